"""A path of any kind -> the spec of its model and its parameters, named and laid out as ours."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from sd_jax.checkpoints import config_json, detect, infer, keys_compvis, keys_diffusers, layout, native, tokenizer_files
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.read_safetensors import Contents, open_file, open_sharded
from sd_jax.checkpoints.tensors import Tensor, dtype_of, lazy
from sd_jax.models.presets import ModelSpec, VAEConfig
from sd_jax.types import Params

PARTS = layout.PARTS


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. The spec of a part that `params` lacks means nothing."""

    spec: ModelSpec
    params: Params  # {"unet", "vae", "text_encoder"} of NumPy arrays (or Tensors, from `open_checkpoint`)
    tokenizer: str | None  # a folder, or what was given as tokenizer=; None = it carries none
    kind: str  # "native" | "diffusers" | "single_file"
    weights: str  # "ema" or "raw": what the U-Net is
    step: int | None = None  # optimiser steps, of a native one


def load_checkpoint(
    path: str | os.PathLike,
    weights: str = "ema",  # "ema": averaged weights where there are any; "raw": those of the last step
    tokenizer: str | os.PathLike | None = None,  # a folder, or a name for `prompts`; None = the checkpoint's own
    vae: str | os.PathLike | None = None,  # another checkpoint, or a VAE alone, to take the autoencoder from
    dtype: Any = None,  # of floats: "float32", "float16", "bfloat16"; None = as they are stored
) -> Checkpoint:
    """Opens a workdir of ours, a diffusers folder or a single file, and reads it.

    A workdir whose run trained some parts only gives those; foreign checkpoints must be whole. Memory: one copy of the
    model, in `dtype`, and one tensor more.
    Raises FileNotFoundError, or CheckpointError naming the file and what is wrong with it.
    """
    opened = open_checkpoint(path, weights, tokenizer, vae, dtype)
    params = jax.tree.map(lambda tensor: tensor.read(), opened.params)
    return dataclasses.replace(opened, params=params)


def open_checkpoint(
    path: str | os.PathLike,
    weights: str = "ema",
    tokenizer: str | os.PathLike | None = None,
    vae: str | os.PathLike | None = None,
    dtype: Any = None,
) -> Checkpoint:
    """Like `load_checkpoint`, but `params` holds Tensors: each is read when `np.asarray` asks for it.

    (A native checkpoint is read at once, by Orbax.)
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r} is neither 'ema' nor 'raw'")
    dtype = dtype_of(dtype)
    kind = detect.detect(path)
    opened = _OPEN[kind](Path(path), weights, dtype, () if vae is None else ("vae",))
    if vae is not None:
        config, tensors = open_vae(vae)
        opened = dataclasses.replace(
            opened,
            spec=dataclasses.replace(opened.spec, vae=config),
            params={**opened.params, "vae": traverse_util.unflatten_dict(tensors, sep="/")},
        )
    if tokenizer is not None:
        opened = dataclasses.replace(opened, tokenizer=os.fspath(tokenizer))
    opened = dataclasses.replace(opened, spec=_with_tokenizer(opened, path))
    _check_together(opened, path)
    flat = traverse_util.flatten_dict(opened.params, sep="/")
    cast = {name: tensor.cast(dtype, f"{path}: {name}") for name, tensor in flat.items()}
    return dataclasses.replace(opened, params=traverse_util.unflatten_dict(cast, sep="/"))


def open_vae(path: str | os.PathLike) -> tuple[VAEConfig, dict[str, Tensor]]:
    """The autoencoder of any checkpoint, or of a file or folder that holds nothing else."""
    path = Path(path)
    if path.is_dir() and detect.class_name(path) == "AutoencoderKL":
        return _component(path, "vae", "ema")
    if path.is_file() and detect.detect(path) == "single_file":
        contents = open_file(path)
        if "encoder.down_blocks.0.resnets.0.conv1.weight" in contents.tensors:  # diffusers' names need its config
            if not (path.parent / "config.json").is_file():
                raise CheckpointError(f"{path}: a VAE of a diffusers folder, without the config.json beside it")
            return _component(path.parent, "vae", "ema")
        if "encoder.conv_in.weight" in contents.tensors:
            prefix = keys_compvis.PREFIXES["vae"]
            contents = Contents({prefix + name: t for name, t in contents.tensors.items()}, contents.metadata)
        spec, found = _from_compvis(contents, path, "raw", only="vae")
        return spec.vae, found["vae"]
    opened = _OPEN[detect.detect(path)](path, "ema", None, tuple(part for part in PARTS if part != "vae"))
    if "vae" not in opened.params:
        raise CheckpointError(f"{path}: vae= is given a checkpoint without a VAE")
    return opened.spec.vae, traverse_util.flatten_dict(opened.params["vae"], sep="/")


# Single files


def _open_single_file(path: Path, weights: str, dtype: np.dtype | None, without: tuple[str, ...]) -> Checkpoint:
    contents = open_file(path)
    if detect.family(contents.tensors) != "sd1":
        raise CheckpointError(
            f"{path} looks like {detect.describe(contents.tensors)}: only Stable Diffusion 1.x is opened"
        )
    spec, found = _from_compvis(contents, path, weights, without=without)
    for part in PARTS:
        if part not in found and part not in without:
            mend = ": give another checkpoint's as vae=" if part == "vae" else ": only whole checkpoints are opened"
            raise CheckpointError(f"{path} has no {layout.NAMES[part]} ({keys_compvis.PREFIXES[part]}*){mend}")
    used = weights if any(name.startswith("model_ema.") for name in contents.tensors) else "raw"
    params = {part: traverse_util.unflatten_dict(found[part], sep="/") for part in PARTS if part in found}
    return Checkpoint(spec, params, None, "single_file", used)


def _from_compvis(
    contents: Contents, path: Path, weights: str, only: str | None = None, without: tuple[str, ...] = ()
) -> tuple[ModelSpec, dict[str, dict[str, Tensor]]]:
    """-> spec, {part: {our name: Tensor}}, of the parts asked for that are there."""
    where = str(path)
    parts = keys_compvis.split(contents.tensors, where, weights)
    parts = {part: t for part, t in parts.items() if part not in without and only in (None, part)}
    if only is not None and only not in parts:
        raise CheckpointError(f"{path} has no {layout.NAMES[only]}: it looks like {detect.describe(contents.tensors)}")
    spec = infer.infer(parts, contents.metadata, where)
    marks = {"v_pred": {"prediction_type": "v_prediction"}, "ztsnr": {"rescale_betas_zero_snr": True}}
    for mark, meaning in marks.items():  # empty tensors, of which only the name says something
        if mark in contents.tensors:
            spec = dataclasses.replace(spec, noise_schedule=dataclasses.replace(spec.noise_schedule, **meaning))
    found = {}
    for part, tensors in parts.items():
        config = getattr(spec, part)
        theirs = keys_compvis.to_diffusers(part, tensors, config, where)
        found[part] = keys_diffusers.from_diffusers(part, theirs, config, where)
    return spec, found


# Diffusers folders

_FROM_JSON = {
    "unet": config_json.unet_from_json,
    "vae": config_json.vae_from_json,
    "text_encoder": config_json.text_encoder_from_json,
}
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def _open_diffusers(path: Path, weights: str, dtype: np.dtype | None, without: tuple[str, ...]) -> Checkpoint:
    _refuse_other_pipelines(path)
    configs, params = {}, {}
    for part in PARTS:
        if part not in without:
            configs[part], flat = _component(path / part, part, weights)
            params[part] = traverse_util.unflatten_dict(flat, sep="/")
    schedule = path / "scheduler" / "scheduler_config.json"
    if schedule.is_file():
        configs["noise_schedule"] = config_json.noise_schedule_from_json(_json(schedule), str(schedule))
    tokenizer = path / "tokenizer"
    found = str(tokenizer) if tokenizer_files.is_tokenizer(tokenizer) else None
    return Checkpoint(ModelSpec(**configs), params, found, "diffusers", weights)


def _refuse_other_pipelines(path: Path) -> None:
    index = path / "model_index.json"
    said = _json(index) if index.is_file() else {}
    for extra in ("text_encoder_2", "transformer", "controlnet", "prior"):
        if (said.get(extra) or [None])[0] or (path / extra).is_dir():
            name = said.get("_class_name", "a pipeline")
            raise CheckpointError(f"{path}: {name} with a {extra}/: only Stable Diffusion 1.x is opened")


def _component(folder: Path, part: str, weights: str) -> tuple[Any, dict[str, Tensor]]:
    """One network's folder -> its config and its tensors by our names."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{folder}: no {layout.NAMES[part]} here: its config.json is missing")
    config = _FROM_JSON[part](_json(config_file), str(config_file))
    file = _weights_file(folder, _STEMS[part], weights)
    contents = open_sharded(file) if file.suffix == ".json" else open_file(file)
    return config, keys_diffusers.from_diffusers(part, contents.tensors, config, str(file))


def _weights_file(folder: Path, stem: str, weights: str) -> Path:
    """The file or index of shards to read: the plain one, else a variant; `raw` prefers `non_ema`."""
    variants = ["", "fp32", "fp16", "bf16", "ema"]
    variants = ["non_ema", *variants] if weights == "raw" else [*variants, "non_ema"]
    for variant in variants:
        dotted = f".{variant}" if variant else ""
        for name in (
            f"{stem}{dotted}.safetensors",
            f"{stem}.safetensors.index{dotted}.json",
            f"{stem}{dotted}.safetensors.index.json",
        ):
            if (folder / name).is_file():
                return folder / name
    there = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".msgpack"))
    if any(name.endswith(".bin") for name in there):
        raise CheckpointError(
            f"{folder}: only pickled weights ({there[0]}), which are not read: save as safetensors first"
        )
    raise CheckpointError(f"{folder}: no {stem}.safetensors in it" + (f", only {', '.join(there)}" if there else ""))


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a table of settings")
    return data


# Ours


def _open_native(path: Path, weights: str, dtype: np.dtype | None, without: tuple[str, ...]) -> Checkpoint:
    folder, step = detect.native_location(path)
    params, meta, step, used = native.read_params(folder, step, weights, dtype, without)
    try:
        spec = ModelSpec.from_dict(meta["spec"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / str(step)}: its meta is not that of a model ({error})") from error
    tokenizer = folder.parent / (meta.get("tokenizer") or "tokenizer")
    found = str(tokenizer) if tokenizer_files.is_tokenizer(tokenizer) else None
    params = jax.tree.map(lazy, {part: tree for part, tree in params.items() if part in PARTS})
    for part, tree in params.items():  # for its strictness
        flat = traverse_util.flatten_dict(tree, sep="/")
        keys_diffusers.to_diffusers(part, flat, getattr(spec, part), str(folder / str(step)))
    return Checkpoint(spec, params, found, "native", used, step)


_OPEN = {"single_file": _open_single_file, "diffusers": _open_diffusers, "native": _open_native}


# What the parts must have in common


def _with_tokenizer(opened: Checkpoint, path: str | os.PathLike) -> ModelSpec:
    """The text encoder's special ids are the tokenizer's own, where it is at hand."""
    spec, text = opened.spec, opened.spec.text_encoder
    if (
        "text_encoder" not in opened.params
        or not opened.tokenizer
        or not tokenizer_files.is_tokenizer(opened.tokenizer)
    ):
        return spec
    ids = tokenizer_files.special_ids(opened.tokenizer)
    too_large = {kind: i for kind, i in ids.items() if i >= text.vocab_size}
    if too_large:
        kind, i = next(iter(too_large.items()))
        raise CheckpointError(
            f"{path}: the tokenizer {opened.tokenizer} is not this model's: its {kind} is {i}, "
            f"and the text encoder knows {text.vocab_size} tokens"
        )
    eos = ids.get("eos_token", text.eos_token_id)
    own = {"eos_token_id": eos, "pad_token_id": ids.get("pad_token", eos)}
    return dataclasses.replace(spec, text_encoder=dataclasses.replace(text, **own))


def _check_together(opened: Checkpoint, path: str | os.PathLike) -> None:
    spec, there = opened.spec, opened.params
    latent = spec.vae.latent_channels
    known = (latent, 2 * latent + 1)  # text to image; inpainting, which also sees a mask and a masked picture
    if {"unet", "vae"} <= set(there) and spec.unet.in_channels not in known:
        what = {8: " (an InstructPix2Pix model)"}.get(spec.unet.in_channels, "")
        raise CheckpointError(
            f"{path}: its U-Net takes {spec.unet.in_channels} channels{what} and its VAE has {latent}: only models for "
            "text to image and for inpainting are opened"
        )
    if {"unet", "text_encoder"} <= set(there) and spec.unet.cross_attention_dim != spec.text_encoder.hidden_size:
        raise CheckpointError(
            f"{path}: its U-Net reads states of width {spec.unet.cross_attention_dim} and its text encoder writes "
            f"{spec.text_encoder.hidden_size}: they do not belong together"
        )
