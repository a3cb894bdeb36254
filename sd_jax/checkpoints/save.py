"""A model -> a diffusers folder, a single file in the CompVis layout, or a workdir of ours; whole or not at all."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from sd_jax.checkpoints import config_json, detect, infer, keys_compvis, keys_diffusers, layout, native, tokenizer_files
from sd_jax.checkpoints.aside import aside
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.read_safetensors import write
from sd_jax.checkpoints.tensors import Tensor, dtype_of, lazy
from sd_jax.models.presets import ModelSpec
from sd_jax.types import Params

Flat = dict[str, dict[str, Tensor]]  # {part: {our name: Tensor}}


def save_checkpoint(
    path: str | os.PathLike,
    spec: ModelSpec,
    params: Params,  # {"unet", "vae", "text_encoder"} of NumPy or JAX arrays, or of Tensors
    tokenizer: Any = None,  # a folder, or a Tokenizer with `save(folder)`; a single file carries none
    format: str = "diffusers",  # "diffusers" | "single_file" | "native"
    dtype: Any = None,  # of floats: "float32", "float16", "bfloat16"; None = as they are
    overwrite: bool = False,  # True: replace a checkpoint at `path`, once the new one is complete
) -> None:
    """Writes a whole model. Memory: one tensor at a time besides `params` (native: one copy in `dtype`).

    Raises FileExistsError where something is at `path`, CheckpointError where parts are missing or do not fit the spec,
    OSError naming `path` where it cannot be written; in each case nothing is left and nothing that was there is lost.
    """
    if format not in _SAVE:
        raise ValueError(f"format={format!r} is not one of {', '.join(_SAVE)}")
    path, dtype = Path(path), dtype_of(dtype)
    if format == "single_file" and path.suffix != ".safetensors":
        raise ValueError(f"{path}: a single file is called *.safetensors")
    missing = [part for part in layout.PARTS if part not in params]
    if missing and format != "native":
        raise CheckpointError(f"cannot write {path}: the model has no {layout.NAMES[missing[0]]}")
    if tokenizer is None and format == "diffusers":
        raise CheckpointError(f"cannot write {path}: a diffusers folder needs a tokenizer: give one (tokenizer=)")
    if overwrite and path.is_dir():
        detect.detect(path)  # only a checkpoint is replaced, never some other folder

    flat = {part: traverse_util.flatten_dict(params[part], sep="/") for part in layout.PARTS if part in params}
    cast = {
        part: {name: lazy(leaf).cast(dtype, f"{part}/{name}") for name, leaf in leaves.items()}
        for part, leaves in flat.items()
    }
    theirs = {p: keys_diffusers.to_diffusers(p, t, getattr(spec, p), f"cannot write {path}") for p, t in cast.items()}
    with aside(path, overwrite) as work:
        _SAVE[format](work, spec, cast if format == "native" else theirs, tokenizer)


def _save_single_file(work: Path, spec: ModelSpec, theirs: Flat, tokenizer: Any) -> None:
    tensors = {}
    for part in layout.PARTS:
        tensors |= keys_compvis.from_diffusers(part, theirs[part], getattr(spec, part))
    prediction = spec.noise_schedule.prediction_type
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "sd_jax",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
        infer.SPEC_KEY: json.dumps(spec.to_dict()),
    }
    write(work, tensors, metadata)


def _save_diffusers(work: Path, spec: ModelSpec, theirs: Flat, tokenizer: Any) -> None:
    work.mkdir()
    tokenizer_files.save_tokenizer(tokenizer, work / "tokenizer", spec.text_encoder.max_position_embeddings)
    ids = tokenizer_files.special_ids(work / "tokenizer")
    text = spec.text_encoder
    configs = {
        "unet": config_json.unet_to_json(spec.unet),
        "vae": config_json.vae_to_json(spec.vae),
        "text_encoder": config_json.text_encoder_to_json(
            text, ids.get("bos_token", text.eos_token_id - 1), _dtype_name(theirs["text_encoder"])
        ),
    }
    for part, config in configs.items():
        (work / part).mkdir()
        _write_json(work / part / "config.json", config)
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        write(work / part / f"{stem}.safetensors", theirs[part], {"format": "pt"})
    (work / "scheduler").mkdir()
    schedule = config_json.noise_schedule_to_json(spec.noise_schedule)
    _write_json(work / "scheduler" / "scheduler_config.json", schedule)
    _write_json(
        work / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": config_json.DIFFUSERS_VERSION,
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", schedule["_class_name"]],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def _save_native(work: Path, spec: ModelSpec, ours: Flat, tokenizer: Any) -> None:
    work.mkdir()
    if tokenizer is not None:
        tokenizer_files.save_tokenizer(tokenizer, work / "tokenizer", spec.text_encoder.max_position_embeddings)
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


_SAVE: dict[str, Callable[[Path, ModelSpec, Flat, Any], None]] = {
    "diffusers": _save_diffusers,
    "single_file": _save_single_file,
    "native": _save_native,
}


def _dtype_name(tensors: Mapping[str, Tensor]) -> str:
    return str(next(iter(tensors.values())).dtype)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
