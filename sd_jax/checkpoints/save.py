"""A model -> a diffusers folder, a single file in the CompVis layout, or a workdir of ours; whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from sd_jax.checkpoints import (
    detect,
    keys_clip,
    keys_compvis,
    layout,
    native,
    save_diffusers,
    save_single_file,
    tokenizer_files,
)
from sd_jax.checkpoints.aside import aside
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.tensors import Tensor, dtype_of, lazy
from sd_jax.models.presets import ALL_PARTS, KUNetConfig, ModelSpec
from sd_jax.types import Params

Flat = dict[str, dict[str, Tensor]]  # {part: {our name: Tensor}}


def save_checkpoint(
    path: str | os.PathLike,
    spec: ModelSpec,
    params: Params,  # {part: tree} of NumPy or JAX arrays, or of Tensors
    tokenizer: Any = None,  # a folder, or a Tokenizer with `save(folder)`; a single file carries none
    format: str = "diffusers",  # "diffusers" | "single_file" | "native"
    dtype: Any = None,  # of floats: "float32", "float16", "bfloat16"; None = as they are
    overwrite: bool = False,  # True: replace a checkpoint at `path`, once the new one is complete
) -> None:
    """Writes a model. Memory: one tensor at a time besides `params` (native: one copy in `dtype`).

    A single file needs a U-Net and takes what else there is; a diffusers folder must be whole, but that SDXL's may lack
    text encoders.
    Raises FileExistsError where something is at `path`, CheckpointError where parts are missing or do not fit the spec,
    OSError naming `path` where it cannot be written; in each case nothing is left and nothing that was there is lost.
    """
    if format not in _SAVE:
        raise ValueError(f"format={format!r} is not one of {', '.join(_SAVE)}")
    path, dtype = Path(path), dtype_of(dtype)
    if format == "single_file" and path.suffix != ".safetensors":
        raise ValueError(f"{path}: a single file is called *.safetensors")
    where = f"cannot write {path}"
    if format != "native" and "vae" not in spec.parts:
        raise CheckpointError(f"{where}: the model works on pixels, for which only format='native' has a place")
    if format == "single_file" and isinstance(spec.unet, KUNetConfig):
        raise CheckpointError(f"{where}: single files have no place for the x2 latent upscaler: use 'diffusers'")
    if format == "single_file" and spec.sees_pictures:
        raise CheckpointError(f"{where}: a single file has no place for the image encoder: use format='diffusers'")
    missing = [part for part in _needed(spec, format) if part not in params]
    if missing:
        raise CheckpointError(f"{where}: the model has no {layout.NAMES[missing[0]]}")
    if tokenizer is None and format == "diffusers" and set(spec.text_encoders) & set(params):
        raise CheckpointError(f"{where}: a diffusers folder needs a tokenizer: give one (tokenizer=)")
    if overwrite and path.is_dir():
        detect.detect(path)  # only a checkpoint is replaced, never some other folder

    flat = {part: traverse_util.flatten_dict(params[part], sep="/") for part in ALL_PARTS if part in params}
    without = [part for part in flat if getattr(spec, part) is None]
    if without:
        raise CheckpointError(f"{where}: its spec knows of no {layout.NAMES[without[0]]}")
    cast = {
        part: {name: lazy(leaf).cast(dtype, f"{part}/{name}") for name, leaf in leaves.items()}
        for part, leaves in flat.items()
    }
    theirs = {p: keys_clip.to_folder(p, t, getattr(spec, p), where) for p, t in cast.items()}
    with aside(path, overwrite) as work:
        _SAVE[format](work, path, spec, cast if format == "native" else theirs, tokenizer)


def _needed(spec: ModelSpec, format: str) -> tuple[str, ...]:
    if format == "native":
        return ()
    if format == "single_file":
        return ("unet",)
    return spec.parts if keys_compvis.kind_of(spec) in ("sd1", "sd2") else ("unet", "vae")


def _save_native(work: Path, path: Path, spec: ModelSpec, ours: Flat, tokenizer: Any) -> None:
    work.mkdir()
    if tokenizer is not None:
        first = next(iter(spec.text_encoders.values()))
        tokenizer_files.save_tokenizer(tokenizer, work / "tokenizer", first)
    params = {
        part: traverse_util.unflatten_dict({name: np.asarray(t) for name, t in tensors.items()}, sep="/")
        for part, tensors in ours.items()
    }
    meta = {"spec": spec.to_dict(), "tokenizer": None if tokenizer is None else "tokenizer"}
    checkpoints = native.Checkpoints(work / "checkpoints")
    try:
        checkpoints.save(0, {"params": params}, meta=meta)
    finally:
        checkpoints.close()


# (where to write, what it will be called, spec, {part: {name: Tensor}}, tokenizer)
_SAVE: dict[str, Callable[[Path, Path, ModelSpec, Flat, Any], None]] = {
    "diffusers": save_diffusers.save,
    "single_file": save_single_file.save,
    "native": _save_native,
}
