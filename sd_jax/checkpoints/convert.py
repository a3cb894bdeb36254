"""Changes the form of a checkpoint: python -m sd_jax.checkpoints.convert IN OUT [--format=...] [--dtype=...] ...

IN is a workdir of ours, a diffusers folder or a single .safetensors file; what it is, is detected. OUT is written
whole or not at all. Tensors pass one at a time, so a model of any size converts in little memory.
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


def convert(
    source: str | Path,
    target: str | Path,
    format: str | None = None,  # None = "single_file" where the target is called *.safetensors, else "diffusers"
    dtype: str | None = None,
    weights: str = "ema",
    tokenizer: str | None = None,
    vae: str | None = None,
    overwrite: bool = False,
) -> Checkpoint:
    """Returns what was opened. Raises as `load_checkpoint` and `save_checkpoint` do."""
    format = format or ("single_file" if Path(target).suffix == ".safetensors" else "diffusers")
    opened = open_checkpoint(source, weights=weights, tokenizer=tokenizer, vae=vae)
    found = _tokenizer(opened.tokenizer) if format == "diffusers" else _local(opened.tokenizer)
    spec = opened.spec
    if found is not None and hasattr(found, "eos_token_id"):
        text = dataclasses.replace(spec.text_encoder, eos_token_id=found.eos_token_id, pad_token_id=found.pad_token_id)
        found.check(text)
        spec = dataclasses.replace(spec, text_encoder=text)
    save_checkpoint(target, spec, opened.params, found, format, dtype, overwrite)
    return opened


def _tokenizer(found: str | None) -> Any:
    """A folder as it is; else what `prompts` finds: in the hub's cache or on the hub."""
    if _local(found) is not None:
        return found
    from sd_jax.prompts.tokenize import load_tokenizer

    return load_tokenizer(found)


def _local(found: str | None) -> str | None:
    return found if found is not None and Path(found).is_dir() else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sd_jax.checkpoints.convert", description=__doc__.split("\n")[0])
    parser.add_argument("source", metavar="IN", help="a workdir, a diffusers folder or a .safetensors file")
    parser.add_argument("target", metavar="OUT", help="what to write: *.safetensors, or a folder")
    parser.add_argument("--format", choices=["diffusers", "single_file", "native"], help="default: told by OUT's name")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: as it is stored")
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema", help="averaged weights, or the last step's")
    parser.add_argument("--tokenizer", help="a folder, or a name on the hub, where IN carries none")
    parser.add_argument("--vae", help="another checkpoint to take the autoencoder from")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUT, once the new is whole")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        opened = convert(**vars(options))
    except (ValueError, OSError) as error:  # CheckpointError and FileNotFoundError among them
        print(f"error: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - started
    print(f"{options.source} ({opened.kind}, {opened.weights} weights) -> {options.target} in {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
