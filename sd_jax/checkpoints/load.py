"""A path of any kind -> the spec of its model and its parameters, named and laid out as ours."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util

from sd_jax.checkpoints import (
    detect,
    float8,
    folders,
    hub,
    keys_clip,
    keys_compvis,
    layout,
    native,
    place,
    single_file,
    tokenizer_files,
)
from sd_jax.checkpoints import prediction_type as predictions
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.layout import Config
from sd_jax.checkpoints.tensors import Tensor, dtype_of, lazy
from sd_jax.models.presets import ALL_PARTS, PARTS, CLIPTextConfig, KUNetConfig, ModelSpec, TinyVAEConfig, VAEConfig
from sd_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. The spec of a part that `params` lacks means nothing."""

    spec: ModelSpec
    params: Params  # {part: tree} of NumPy arrays (or Tensors, from `open_checkpoint`), the parts that are there
    tokenizer: str | None  # a folder, or what was given as tokenizer=; None = it carries none
    kind: str  # "native" | "diffusers" | "single_file"
    weights: str  # "ema", "raw" or "ema:0.999": what the U-Net is
    step: int | None = None  # optimiser steps, of a native one
    notes: tuple[str, ...] = ()  # what was decided, and why: a line each


def load_checkpoint(
    path: str | os.PathLike,
    weights: str = "ema",  # averaged ones where there are any; "raw": the last step's; "ema:0.999": another average
    tokenizer: str | os.PathLike | None = None,  # a folder, or a name for `prompts`; None = the checkpoint's own
    vae: str | os.PathLike | None = None,  # another checkpoint, or a VAE alone, to take the autoencoder from
    dtype: Any = None,  # of floats: "float32", "float16", "bfloat16"; None = as they are stored (eight bits: float16)
    config: Any = None,  # of a single file: a diffusers folder, a .yaml, a name of FAMILIES or a ModelSpec
    prediction_type: str | None = None,  # what the U-Net predicts, whatever the checkpoint says; None = what it says
    text_encoder: str | os.PathLike | Sequence[str | os.PathLike] | None = None,  # like vae; SDXL's two
) -> Checkpoint:
    """Opens a workdir of ours, a diffusers folder, a single file or a name on the hub, and reads it.

    Other parts than the U-Net may be missing; of a workdir, any. Memory: one copy of the model, in `dtype`, and one
    tensor more.
    Raises FileNotFoundError, or CheckpointError naming the file and what is wrong with it; a weight that is no finite
    number, too.
    """
    opened = open_checkpoint(path, weights, tokenizer, vae, dtype, config, prediction_type, text_encoder)
    return dataclasses.replace(opened, params=place.gather(opened.params, where=path))


def open_checkpoint(
    path: str | os.PathLike,
    weights: str = "ema",
    tokenizer: str | os.PathLike | None = None,
    vae: str | os.PathLike | None = None,
    dtype: Any = None,
    config: Any = None,
    prediction_type: str | None = None,
    text_encoder: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
) -> Checkpoint:
    """Like `load_checkpoint`, but `params` holds Tensors: each is read when `np.asarray` asks for it.

    (A native checkpoint is read at once, by Orbax.)
    """
    if weights not in ("ema", "raw") and not weights.startswith("ema:"):
        raise ValueError(f"weights={weights!r} is neither 'ema' nor 'raw', nor 'ema:' and a decay")
    dtype, predicts = dtype_of(dtype), predictions.checked(prediction_type)
    path = hub.local(path, weights.partition(":")[0])
    kind = detect.detect(path)
    if kind != "native" and ":" in weights:
        raise ValueError(f"weights={weights!r} is for workdirs of ours, and {path} is none: say 'ema' or 'raw'")
    if config is not None and kind != "single_file":
        raise ValueError(f"config= is for single files, and {path} is a folder, which says its own: leave it out")
    without = ("vae",) * (vae is not None) + ("text_encoder", "text_encoder_2") * (text_encoder is not None)
    opened, own = _OPEN[kind](path, weights, dtype, config, predicts, without)
    if vae is not None:
        given = open_vae(vae, opened.spec.vae.scaling_factor)
        opened = _with_part(opened, "vae", *given)
    if text_encoder is not None:
        opened, own = _with_text_encoders(opened, text_encoder, path), {}
    if tokenizer is not None:
        own = {}
        opened = dataclasses.replace(opened, tokenizer=os.fspath(tokenizer))
    opened = dataclasses.replace(opened, spec=_with_tokenizers(opened, own, path))
    check_together(opened.spec, opened.params, path)
    flat = traverse_util.flatten_dict(opened.params, sep="/")
    cast = {name: float8.widened(tensor, dtype, f"{path}: {name}") for name, tensor in flat.items()}
    return dataclasses.replace(opened, params=traverse_util.unflatten_dict(cast, sep="/"))


def _nested(parts: dict[str, dict[str, Tensor]]) -> Params:
    return {part: traverse_util.unflatten_dict(parts[part], sep="/") for part in ALL_PARTS if part in parts}


def _with_part(opened: Checkpoint, part: str, config: Config, tensors: dict[str, Tensor]) -> Checkpoint:
    spec = dataclasses.replace(opened.spec, **{part: config})
    return dataclasses.replace(opened, spec=spec, params={**opened.params, **_nested({part: tensors})})


# The three forms: -> what is in it, and the folders of its tokenizers by the text encoder that they are for


def _open_single_file(path, weights, dtype, config, predicts, without) -> tuple[Checkpoint, dict[str, Path]]:
    contents = single_file.contents_of(path)
    found = single_file.open_model(path, contents, weights, single_file.config_of(config), predicts, without)
    notes = (predictions.note(found.spec.noise_schedule, found.reason),)
    return Checkpoint(found.spec, _nested(found.parts), None, "single_file", found.weights, notes=notes), {}


def _open_diffusers(path, weights, dtype, config, predicts, without) -> tuple[Checkpoint, dict[str, Path]]:
    found = folders.open_folder(path, weights, without)
    if "unet" not in found.parts:
        raise CheckpointError(f"{path}: no U-Net here: there is no unet/ in it")
    spec, reason = predictions.overridden(found.spec, predicts, found.reason)
    tokenizer = next((str(folder) for folder in found.tokenizers.values()), None)
    notes = (predictions.note(spec.noise_schedule, reason),)
    return Checkpoint(spec, _nested(found.parts), tokenizer, "diffusers", weights, notes=notes), found.tokenizers


def _open_native(path, weights, dtype, config, predicts, without) -> tuple[Checkpoint, dict[str, Path]]:
    folder, step = detect.native_location(path)
    params, meta, step, used = native.read_params(folder, step, weights, dtype, without)
    try:
        spec = ModelSpec.from_dict(meta["spec"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / str(step)}: its meta is not that of a model ({error})") from error
    tokenizer = folder.parent / (meta.get("tokenizer") or "tokenizer")
    own = {"text_encoder": tokenizer} if tokenizer_files.is_tokenizer(tokenizer) else {}
    params = jax.tree.map(lazy, {part: tree for part, tree in params.items() if part in ALL_PARTS})
    for part, tree in params.items():  # for its strictness
        flat = traverse_util.flatten_dict(tree, sep="/")
        keys_clip.to_folder(part, flat, getattr(spec, part), str(folder / str(step)))
    spec, reason = predictions.overridden(spec, predicts, "said by its own spec")
    notes = (predictions.note(spec.noise_schedule, reason),)
    return Checkpoint(spec, params, str(tokenizer) if own else None, "native", used, step, notes), own


_OPEN = {"single_file": _open_single_file, "diffusers": _open_diffusers, "native": _open_native}


# Parts from elsewhere


def open_vae(
    path: str | os.PathLike, scaling_factor: float = VAEConfig().scaling_factor
) -> tuple[VAEConfig | TinyVAEConfig, dict[str, Tensor]]:
    """The autoencoder of any checkpoint, or of a file or folder that holds nothing else.

    scaling_factor: that of the model that it is for, where a VAE alone does not say its own.
    """
    path = hub.local(path)
    if path.is_dir() and detect.class_name(path) in ("AutoencoderKL", "AutoencoderTiny"):
        return folders.open_component(path, "vae", "ema")
    if detect.detect(path) == "single_file":
        contents = single_file.contents_of(path)
        if detect.family(contents.tensors) in keys_compvis.PREFIXES:  # which has its family's factor
            found = single_file.open_model(path, contents, "raw", without=[part for part in PARTS if part != "vae"])
            given = (found.spec.vae, found.parts["vae"]) if "vae" in found.parts else None
        else:
            given = single_file.open_vae(path, contents, scaling_factor)
        if given is None:
            what = detect.describe(contents.tensors)
            raise CheckpointError(f"{path} has no VAE, and vae= is to give one: it looks like {what}")
        return given
    without = tuple(part for part in PARTS if part != "vae")
    spec, params = _parts_of(path, without)
    if "vae" not in params:
        raise CheckpointError(f"{path}: vae= is given a checkpoint without a VAE")
    return spec.vae, traverse_util.flatten_dict(params["vae"], sep="/")


def _parts_of(path: Path, without: tuple[str, ...]) -> tuple[ModelSpec, Params]:
    """Of a folder, which need have no U-Net."""
    if detect.detect(path) == "diffusers":
        found = folders.open_folder(path, "ema", without)
        return found.spec, _nested(found.parts)
    opened, _ = _open_native(path, "ema", None, None, None, without)
    return opened.spec, opened.params


def _with_text_encoders(opened: Checkpoint, given: Any, path: Path) -> Checkpoint:
    """text_encoder=: one path for each that the model has, or one checkpoint that has them all."""
    kind, parts = keys_compvis.kind_of(opened.spec), tuple(opened.spec.text_encoders)
    paths = [given] * len(parts) if isinstance(given, str | os.PathLike) else list(given)
    if len(paths) != len(parts):
        raise ValueError(
            f"text_encoder= is {len(paths)} paths, and {path} has {len(parts)} text encoders ({', '.join(parts)})"
        )
    for part, source in zip(parts, paths, strict=True):
        config, tensors = _open_text_encoder(hub.local(source), part, kind)
        if isinstance(opened.spec.unet, KUNetConfig):
            config = dataclasses.replace(config, context_norm=False)
        opened = _with_part(opened, part, config, tensors)
    return opened


def _open_text_encoder(path: Path, part: str, kind: str) -> tuple[CLIPTextConfig, dict[str, Tensor]]:
    if path.is_dir() and detect.class_name(path).lower().startswith("clip"):
        return folders.open_component(path, part, "ema", in_sdxl=kind == "sdxl")
    if detect.detect(path) == "single_file":
        contents = single_file.contents_of(path)
        given = single_file.open_text_encoder(path, contents, part, kind)
        if given is None:
            what = detect.describe(contents.tensors)
            raise CheckpointError(f"{path} has no text encoder, and text_encoder= is to give one: it looks like {what}")
        return given
    spec, params = _parts_of(path, tuple(p for p in PARTS if p != part))
    if part not in params:
        raise CheckpointError(f"{path}: text_encoder= is given a checkpoint without a {layout.NAMES[part]}")
    return getattr(spec, part), traverse_util.flatten_dict(params[part], sep="/")


# What the parts must have in common


def _with_tokenizers(opened: Checkpoint, own: dict[str, Path], path: str | os.PathLike) -> ModelSpec:
    """The text encoders' special ids are their tokenizers' own, where these are at hand.

    A tokenizer that is not an encoder's own leaves it its padding, where that is not the end token: the vocabulary of
    CLIP's and OpenCLIP's tokenizers is one and the same, but they pad with different ids.
    """
    spec = opened.spec
    for part, text in opened.spec.text_encoders.items():
        folder = own.get(part, opened.tokenizer)
        if part not in opened.params or not folder or not tokenizer_files.is_tokenizer(folder):
            continue
        ids = tokenizer_files.special_ids(folder)
        too_large = {kind: i for kind, i in ids.items() if i >= text.vocab_size}
        if too_large:
            kind, i = next(iter(too_large.items()))
            raise CheckpointError(
                f"{path}: the tokenizer {folder} is not this model's: its {kind} is {i}, "
                f"and the text encoder knows {text.vocab_size} tokens"
            )
        eos = ids.get("eos_token", text.eos_token_id)
        pad = ids.get("pad_token", eos)
        if part not in own and text.pad_token_id != text.eos_token_id:
            pad = text.pad_token_id
        text = dataclasses.replace(text, eos_token_id=eos, pad_token_id=pad)
        spec = dataclasses.replace(spec, **{part: text})
    return spec


def check_together(spec: ModelSpec, there: Params, path: str | os.PathLike, any_channels: bool = False) -> None:
    """Raises CheckpointError where parts do not fit each other, or (not with any_channels) no job feeds the U-Net."""
    if "unet" not in there:
        return
    unet, latent = spec.unet, spec.vae.latent_channels
    # Latents alone; with a mask and a masked picture; with a map of depth; with a small picture, and its noise level
    known = (latent, 2 * latent + 1, latent + 1, *((latent + 3,) if unet.num_class_embeds is not None else ()))
    known = (2 * latent,) if isinstance(unet, KUNetConfig) else known  # with small latents
    if "vae" in there and not any_channels and unet.in_channels not in known:
        what = {8: " (an InstructPix2Pix model)"}.get(unet.in_channels, "")
        raise CheckpointError(
            f"{path}: its U-Net takes {unet.in_channels} channels{what} and its VAE has {latent}: only models for text "
            "to image, inpainting, depth and upscaling are opened"
        )
    widths = {part: config.hidden_size for part, config in spec.text_encoders.items()}
    if spec.sees_pictures:
        widths = {"image_encoder": spec.image_encoder.projection_dim}
    if widths and widths.keys() <= set(there):
        writer, written = layout.NAMES[next(iter(widths))], sum(widths.values())
        if unet.cross_attention_dim != written:
            raise CheckpointError(
                f"{path}: its U-Net reads states of width {unet.cross_attention_dim} and its {writer} writes "
                f"{written}: they do not belong together"
            )
    if unet.addition_embed_type == "text_time" and "text_encoder_2" in there:
        pooled, told = spec.text_encoder_2.projection_dim or 0, unet.projection_class_embeddings_input_dim
        if told not in (pooled + 6 * unet.addition_time_embed_dim, pooled + 5 * unet.addition_time_embed_dim):
            raise CheckpointError(
                f"{path}: its U-Net is told {told} numbers, and its second text encoder's pooled state has {pooled}: "
                "they do not belong together (are the two text encoders swapped?)"
            )
