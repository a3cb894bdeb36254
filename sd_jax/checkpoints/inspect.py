"""What a checkpoint is: python -m sd_jax.checkpoints.inspect PATH

Prints one `key: value` a line and exits 0; or one line on stderr, naming the file and the fault, and exits 1. Every
tensor is read once. PATH is a single file of any kind (LoRAs, embeddings and others that `sd_jax.load` does not open
among them), a diffusers folder or one network's, a workdir of ours, or a name on the hub.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from flax import traverse_util

from sd_jax.checkpoints import (
    components,
    detect,
    files,
    folders,
    hub,
    imports,
    keys_compvis,
    load,
    scan,
    single_file,
)
from sd_jax.checkpoints.errors import CheckpointError, shown
from sd_jax.checkpoints.read_safetensors import Contents
from sd_jax.checkpoints.tensors import Tensor, all_finite, is_float
from sd_jax.models.presets import KUNetConfig, ModelSpec

_LONGEST = 200  # characters of a value of the header
_FORMATS = {
    "safetensors": "safetensors",
    "zip": "pickle of torch in a zip",
    "legacy": "pickle of torch, legacy",
    "diffusers": "diffusers folder",
    "native": "workdir of sd_jax",
}
_NETWORKS = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae", "AutoencoderTiny": "vae"}
_NETWORKS |= {"CLIPTextModel": "text_encoder", "CLIPTextModelWithProjection": "text_encoder"}

Lines = dict[str, str]
Parts = Mapping[str, Mapping[str, Tensor]]


def inspect(path: str | Path) -> Lines:
    """What there is to say, by key. Raises CheckpointError for what is damaged, FileNotFoundError for nothing."""
    given, path = path, hub.local(path)
    lines = {"file": str(given)}
    if path.is_dir() and detect.class_name(path) in _NETWORKS:
        part = _NETWORKS[detect.class_name(path)]
        parts = {part: folders.open_component(path, part, "ema")[1]}
        lines |= {"format": _FORMATS["diffusers"], "family": components.TITLES[part], "components": part}
        return lines | _weights(parts, parts, path)
    kind = detect.detect(path)
    if kind == "single_file":
        return lines | _of_file(path)
    if kind == "diffusers":
        found = folders.open_folder(path, "ema")
        spec, reason, parts, tokenizers = found.spec, found.reason, found.parts, found.tokenizers
    else:
        opened = load.open_checkpoint(path)
        spec, reason = opened.spec, "said by its own spec"
        parts = {part: traverse_util.flatten_dict(tree, sep="/") for part, tree in opened.params.items()}
        tokenizers = {"text_encoder": opened.tokenizer} if opened.tokenizer else {}
    load.check_together(spec, parts, path)
    lines |= {"format": _FORMATS[kind], "family": title(keys_compvis.kind_of(spec), spec)}
    lines |= _of_model(spec, reason, parts, bool(tokenizers))
    return lines | _weights(parts, parts, path)


def title(kind: str, spec: ModelSpec) -> str:
    """The family in words, by what is special of its U-Net."""
    unet, latent = spec.unet, spec.vae.latent_channels
    if unet.num_class_embeds is not None:
        return "Stable Diffusion x4 upscaler"
    if isinstance(unet, KUNetConfig):
        return "Stable Diffusion x2 latent upscaler"
    if spec.sees_pictures:
        return "Stable Diffusion image variations"
    special = {2 * latent + 1: " inpainting", latent + 1: " depth", 2 * latent: " InstructPix2Pix"}
    distilled = " (LCM)" if unet.time_cond_proj_dim is not None else ""
    return detect.FAMILIES[kind][0] + special.get(unet.in_channels, "") + distilled


def _of_file(path: Path) -> Lines:
    contents = single_file.contents_of(path)
    kind, family = files.kind(path), detect.family(contents.tensors)
    lines = {"format": _FORMATS[kind]}
    if kind != "safetensors":
        wanted, _ = scan.scan(path)
        said = [f"{name} ({imports.verdict(name).partition(':')[0]})" for name in wanted]
        lines["imports"] = ", ".join(said) or "none"
    if family in keys_compvis.PREFIXES or family == "averages":
        lines |= _of_model_file(path, contents)
    else:
        there = {f"{c.network}": c.tensors(contents.tensors) for c in components.find(contents.tensors)}
        there = there if family in ("vae", "text_encoder") else {}
        lines["family"] = detect.FAMILIES[family][0] if family in detect.FAMILIES else "unknown"
        if family == "vae" and components.find_one(contents.tensors, "vae").naming == "tiny":
            lines["family"] = "tiny VAE"
        lines |= {"components": ", ".join(there) or "none", "tensors": str(len(contents.tensors))}
        lines |= _weights(there or {"": contents.tensors}, {"": contents.tensors}, path)
    return lines | _metadata(contents.metadata)


def _of_model_file(path: Path, contents: Contents) -> Lines:
    found = single_file.open_model(path, contents, "raw")
    load.check_together(found.spec, found.parts, path, any_channels=True)
    lines = {"family": title(found.kind, found.spec), **_of_model(found.spec, found.reason, found.parts, False)}
    lines["ema"] = "yes" if any(name.startswith("model_ema.") for name in contents.tensors) else "no"
    # A file's other tensors are tables and counters of its training, which may be infinite
    networks = tuple(keys_compvis.PREFIXES[found.kind].values()) + ("model_ema.", "diffusion_model.", "vae.")
    read = {name: tensor for name, tensor in contents.tensors.items() if name.startswith(networks)}
    return lines | _weights(found.parts, {"": read or contents.tensors}, path)


def _of_model(spec: ModelSpec, reason: str, parts: Parts, has_tokenizer: bool) -> Lines:
    schedule = spec.noise_schedule
    missing = [part for part in spec.parts if part not in parts]
    missing += ["tokenizer"] * (not has_tokenizer and not spec.sees_pictures)
    size = spec.unet.sample_size * spec.vae.downscale
    return {
        "prediction_type": schedule.prediction_type,
        "prediction_reason": reason,
        "zero_snr": "yes" if schedule.rescale_betas_zero_snr else "no",
        "components": ", ".join(parts),
        "missing": ", ".join(missing) or "none",
        "resolution": f"{size}x{size}",
        "latent_channels": str(spec.vae.latent_channels),
    }


def _weights(parts: Parts, read: Parts, path: Path) -> Lines:
    """Counts and types of `parts`; every tensor of `read` is looked at."""
    counts = {part: sum(math.prod(t.shape) for t in tensors.values()) for part, tensors in parts.items()}
    kinds = {part: _dtypes(tensors) for part, tensors in parts.items()}
    by_part = ", ".join(f"{part} {count}" for part, count in counts.items() if part)
    for tensors in read.values():
        for name, tensor in tensors.items():
            _check_finite(name, tensor, path)
    same = len(set(kinds.values())) == 1
    return {
        "precision": next(iter(kinds.values()))
        if same
        else ", ".join(f"{part} {kind}" for part, kind in kinds.items()),
        "parameters": f"{sum(counts.values())}" + (f" ({by_part})" if by_part else ""),
        "weights": "all finite",
    }


def _dtypes(tensors: Mapping[str, Tensor]) -> str:
    return "+".join(sorted({str(t.dtype) for t in tensors.values() if math.prod(t.shape)})) or "none"


def _check_finite(name: str, tensor: Tensor, path: Path) -> None:
    array = tensor.read()
    if is_float(array.dtype) and not all_finite(array):
        what = "NaN" if np.isnan(array.astype(np.float32)).any() else "infinite"
        raise CheckpointError(f"{path}: {shown(name)} has values that are {what}: the file is damaged, or overflowed")


def _metadata(metadata: Mapping[str, str]) -> Lines:
    lines = {}
    for key, value in metadata.items():
        value = value if len(value) <= _LONGEST else value[:_LONGEST] + "..."
        lines[f"metadata.{shown(key)}"] = " ".join(value.split()) if value.isprintable() else repr(value)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sd_jax.checkpoints.inspect", description=__doc__.split("\n")[0])
    parser.add_argument("path", metavar="PATH", help="a file, a diffusers folder, a workdir, or a name on the hub")
    try:
        lines = inspect(parser.parse_args(argv).path)
    except (ValueError, OSError) as error:  # CheckpointError and FileNotFoundError among them
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 1
    for key, value in lines.items():
        print(f"{key}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
