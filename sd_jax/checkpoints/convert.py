"""Changes the form of a checkpoint: python -m sd_jax.checkpoints.convert IN OUT [--format=...] [--dtype=...] ...

IN is whatever `sd_jax.load` opens: a workdir of ours, a diffusers folder or a single file, pickled ones too, of any
family; what it is, is detected. What IN lacks may be lacking in OUT where its form allows: a single file needs a U-Net
alone. OUT is written whole or not at all. Tensors pass one at a time, so a model of any size converts in little memory.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd_jax.checkpoints.load import Checkpoint, open_checkpoint
from sd_jax.checkpoints.save import save_checkpoint
from sd_jax.models.presets import ModelSpec


def convert(
    source: str | Path,
    target: str | Path,
    format: str | None = None,  # None = "single_file" where the target is called *.safetensors, else "diffusers"
    dtype: str | None = None,
    weights: str = "ema",
    tokenizer: str | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | Sequence[str | Path] | None = None,
    config: Any = None,
    prediction_type: str | None = None,
    overwrite: bool = False,
) -> Checkpoint:
    """Returns what was opened. Raises as `load_checkpoint` and `save_checkpoint` do."""
    opened = open_checkpoint(
        source,
        weights=weights,
        tokenizer=tokenizer,
        vae=vae,
        config=config,
        prediction_type=prediction_type,
        text_encoder=text_encoder,
    )
    write_opened(opened, target, format, dtype, overwrite)
    return opened


def write_opened(
    opened: Checkpoint, target: str | Path, format: str | None = None, dtype: str | None = None, overwrite: bool = False
) -> None:
    """Saves what was opened, with a tokenizer where the form has one and there are words to read."""
    format = format or ("single_file" if Path(target).suffix == ".safetensors" else "diffusers")
    encoders = [part for part in opened.spec.text_encoders if part in opened.params]
    needed = format == "diffusers" and encoders
    found = _tokenizer(opened.tokenizer) if needed else _local(opened.tokenizer)
    spec = _with_ids(opened.spec, encoders, found) if hasattr(found, "eos_token_id") else opened.spec
    save_checkpoint(target, spec, opened.params, found, format, dtype, overwrite)


def _tokenizer(found: str | None) -> Any:
    """A folder as it is; else what `prompts` finds: in the hub's cache or on the hub."""
    if _local(found) is not None:
        return found
    from sd_jax.prompts.tokenize import load_tokenizer

    return load_tokenizer(found)


def _local(found: str | None) -> str | None:
    return found if found is not None and Path(found).is_dir() else None


def _with_ids(spec: ModelSpec, encoders: Sequence[str], tokenizer: Any) -> ModelSpec:
    """Special ids as this tokenizer has them; an encoder that pads with another id than the end goes on doing so."""
    for part in encoders:
        text = getattr(spec, part)
        tokenizer.check(text)
        pad = tokenizer.pad_token_id if text.pad_token_id == text.eos_token_id else text.pad_token_id
        text = dataclasses.replace(text, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad)
        spec = dataclasses.replace(spec, **{part: text})
    return spec


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every command that writes a checkpoint asks."""
    parser.add_argument("--format", choices=["diffusers", "single_file", "native"], help="default: told by OUT's name")
    parser.add_argument("--weights", default="ema", help="averages, raw: the last step's, or ema:0.999 of a workdir")
    parser.add_argument("--tokenizer", help="a folder, or a name on the hub, where there is none")
    parser.add_argument("--vae", help="another checkpoint, or a VAE alone, to take the autoencoder from")
    parser.add_argument("--prediction_type", help="epsilon, v_prediction or sample, whatever the files say")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUT, once the new is whole")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sd_jax.checkpoints.convert", description=__doc__.split("\n")[0])
    parser.add_argument("source", metavar="IN", help="a workdir, a diffusers folder or a single file")
    parser.add_argument("target", metavar="OUT", help="what to write: *.safetensors, or a folder")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: as it is stored")
    add_options(parser)
    parser.add_argument("--text_encoder", action="append", help="like --vae; once for each, where the model has two")
    parser.add_argument("--config", help="of a single file: a diffusers folder, a .yaml or a family, for its sizes")
    options = parser.parse_args(argv)
    if options.text_encoder is not None and len(options.text_encoder) == 1:
        options.text_encoder = options.text_encoder[0]
    started = time.perf_counter()
    try:
        opened = convert(**vars(options))
    except (ValueError, OSError) as error:  # CheckpointError and FileNotFoundError among them
        print(f"error: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - started
    for note in opened.notes:
        print(note)
    print(f"{options.source} ({opened.kind}, {opened.weights} weights) -> {options.target} in {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
