"""One file -> the networks in it: a whole model in any family's layout, or one network alone in any naming."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sd_jax.checkpoints import (
    components,
    detect,
    float8,
    folders,
    infer,
    keys_compvis,
    keys_diffusers,
    keys_taesd,
    layout,
    ldm_yaml,
    prediction_type,
)
from sd_jax.checkpoints.components import Component
from sd_jax.checkpoints.errors import CheckpointError, listing
from sd_jax.checkpoints.files import open_any
from sd_jax.checkpoints.layout import Config
from sd_jax.checkpoints.read_safetensors import Contents
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.models.families import FAMILIES
from sd_jax.models.presets import ModelSpec

_EMA = "model_ema."
_V_SIZE = 96  # latents of SD 2 with v-prediction

Parts = dict[str, dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class SingleFile:
    """A whole model's."""

    kind: str  # a key of `keys_compvis.PREFIXES`
    spec: ModelSpec
    parts: Parts  # {part: {our name: Tensor}}, those that are there
    weights: str  # "ema" or "raw": what the U-Net is
    reason: str  # for the prediction type


def contents_of(path: Path) -> Contents:
    """A file's tensors, eight-bit factors multiplied in. Raises CheckpointError where two networks are swapped."""
    contents = open_any(path)
    tensors = float8.unscaled(contents.tensors, str(path))
    wrong = components.misplaced(tensors)
    if wrong:
        raise CheckpointError(f"{path}: {wrong}")
    return Contents(tensors, contents.metadata)


def open_model(
    path: Path,
    contents: Contents,
    weights: str,
    config: ModelSpec | ldm_yaml.Said | None = None,  # None = a .yaml beside the file, if there is one
    predicts: str | None = None,
    without: Collection[str] = (),
) -> SingleFile:
    """A file with a U-Net. Raises CheckpointError where it has none, or is no such model, or does not fit `config`."""
    where = str(path)
    given = config if isinstance(config, ModelSpec) else None
    tensors = _with_unet(components.unified(contents.tensors), given, where)
    kind = detect.family(tensors)
    if kind not in keys_compvis.PREFIXES:
        raise CheckpointError(
            f"{path} looks like {_a(detect.describe(tensors))}: only models of Stable Diffusion 1, 2 and XL are opened"
        )
    parts = _split(tensors, kind, where, weights)
    parts = {part: found for part, found in parts.items() if part not in without}

    # What it is a model of
    said, beside = config if isinstance(config, ldm_yaml.Said) else None, None
    if config is None and (beside := ldm_yaml.beside(path)) is not None:
        said = ldm_yaml.read(beside)
    written = infer.written(parts, kind, contents.metadata) if config is None else None
    if given is not None and keys_compvis.kind_of(given) != kind:
        titles = [keys_compvis.TITLES[k] for k in (keys_compvis.kind_of(given), kind)]
        raise CheckpointError(f"{path}: config= is of {titles[0]}, and the file of {titles[1]}")
    spec = given or written or _beside_its_config(path, tensors, kind)
    is_whole = spec is not None
    spec = spec or infer.infer(parts, kind, contents.metadata, where, said)

    # What it predicts
    reason = "said by config=" if given else "said by the header that we wrote"
    if given is None and (written is None or said is not None):
        schedule, reason = prediction_type.decide(spec, tensors, parts.get("unet"), kind, contents.metadata, said)
        spec = dataclasses.replace(spec, noise_schedule=schedule)
    spec, reason = prediction_type.overridden(spec, predicts, reason)
    if not is_whole and _is_sd2_v(spec, kind) and "modelspec.resolution" not in contents.metadata:
        spec = infer.resized(spec, _V_SIZE)

    ours = {part: converted(part, found, getattr(spec, part), kind, where) for part, found in parts.items()}
    has_averages = any(name.startswith(_EMA) for name in contents.tensors)
    return SingleFile(kind, spec, ours, weights if has_averages else "raw", reason)


def _is_sd2_v(spec: ModelSpec, kind: str) -> bool:
    is_v = spec.noise_schedule.prediction_type == "v_prediction"
    return is_v and kind == "sd2" and spec.unet.num_class_embeds is None


def _beside_its_config(path: Path, tensors: Mapping[str, Tensor], kind: str) -> ModelSpec | None:
    """Of a U-Net out of a diffusers folder, where its config.json lies beside it still."""
    unet = components.find_one(tensors, "unet")
    config = config_beside(path, unet, "UNet2DConditionModel")
    return (
        None
        if config is None
        else dataclasses.replace(infer.BASES[kind], unet=folders.component_config(config, "unet"))
    )


def config_beside(path: Path, component: Component, *class_names: str) -> Path | None:
    """The config.json of a network that is by diffusers' or transformers' names, as in its folder; None: not there."""
    file = path.parent / "config.json"
    if component.naming in ("compvis", "open_clip") or detect.class_name(path.parent) not in class_names:
        return None
    return file


def _a(title: str) -> str:
    """With its article, but for names of models."""
    return title if title.startswith(("Stable", "Flux", "nothing")) else f"a {title}"


def _split(tensors: Mapping[str, Tensor], kind: str, where: str, weights: str) -> Parts:
    unet = components.find_one(tensors, "unet")
    if unet.naming == "compvis":
        return keys_compvis.split(tensors, kind, where, weights)
    left = [name for name in tensors if not name.startswith(unet.prefix)]
    if left:
        raise CheckpointError(f"{where}: unexpected beside a U-Net by diffusers' names: {listing(left)}")
    return {"unet": unet.tensors(tensors)}


def converted(part: str, tensors: Mapping[str, Tensor], config: Config, kind: str, where: str) -> dict[str, Tensor]:
    """One network without its prefix, in any naming -> by our names."""
    (found, *_) = components.find(tensors) or [Component(part, "", "")]
    if found.naming in ("compvis", "open_clip", ""):
        if config is None:
            raise CheckpointError(f"{where}: it has a {layout.NAMES[part]}, of which its config knows nothing")
        tensors = keys_compvis.to_diffusers(part, tensors, config, kind, where)
    return keys_diffusers.from_diffusers(part, tensors, config, where)


# Averages alone


def _with_unet(tensors: dict[str, Tensor], given: ModelSpec | None, where: str) -> dict[str, Tensor]:
    """A file whose only U-Net is `model_ema.*`, with it by its own names.

    The dots that EMA's names lack are those of a published model, or of `given`, that has just these tensors.
    """
    if not any(name.startswith(f"{_EMA}diffusion_model") for name in tensors) or components.find_one(tensors, "unet"):
        return tensors
    stem = f"{_EMA}diffusion_model"
    ema = {name.removeprefix(stem): tensor for name, tensor in tensors.items() if name.startswith(stem)}
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(_EMA)}
    for spec in ([given] if given else []) + list(FAMILIES.values()):
        kind = keys_compvis.kind_of(spec)
        names = keys_compvis.names("unet", spec.unet, kind).values()
        if {name.replace(".", "") for name in names} == ema.keys():
            prefix = keys_compvis.PREFIXES[kind]["unet"]
            return {**rest, **{prefix + name: ema[name.replace(".", "")] for name in names}}
    raise CheckpointError(f"{where}: only averages of a U-Net ({stem}*), not a published model's: {infer.MEND}")


# One network


def open_vae(path: Path, contents: Contents, scaling_factor: float) -> tuple[Config, dict[str, Tensor]] | None:
    """The VAE of any file, whatever is beside it; None where there is none.

    scaling_factor: where neither a config.json beside it nor the header that we wrote says it.
    """
    file = keys_taesd.whole(path, contents.tensors, lambda other: contents_of(other).tensors)
    found = components.find_one(file, "vae")
    if found is None:
        return None
    where, tensors = str(path), found.tensors(file)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("loss.", "model_ema."))}
    if (beside := config_beside(path, found, "AutoencoderKL", "AutoencoderTiny")) is not None:
        config = folders.component_config(beside, "vae")
    elif (written := infer.written({"vae": tensors}, "sd1", contents.metadata)) is not None:
        config = written.vae
    else:
        config = infer.vae(tensors, where, scaling_factor)
    return config, converted("vae", tensors, config, "sd1", where)


def open_text_encoder(path: Path, contents: Contents, part: str, kind: str) -> tuple[Config, dict[str, Tensor]] | None:
    """The text encoder for `part` of a model of `kind`, of any file; None where there is none.

    Of two, as SDXL's files have them, the one of its prefix.
    """
    texts = [c for c in components.find(contents.tensors) if c.network == "text_encoder"]
    if len(texts) > 1:
        second = "conditioner.embedders.1."
        texts = [c for c in texts if c.prefix.startswith(second) == (part == "text_encoder_2")]
    if not texts:
        return None
    where, tensors = str(path), texts[0].tensors(contents.tensors)
    if texts[0].naming == "open_clip" and part == "text_encoder" and kind in ("sd1", "sdxl"):
        raise CheckpointError(f"{path}: an OpenCLIP text encoder, where {keys_compvis.TITLES[kind]} has CLIP-L first")
    classes = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel", "clip_text_model", "clip")
    if (beside := config_beside(path, texts[0], *classes)) is not None:
        config = folders.component_config(beside, part, in_sdxl=kind == "sdxl")
    elif (written := infer.written({part: tensors}, kind, contents.metadata)) is not None:
        config = getattr(written, part)
    else:
        config = infer.text_encoder(tensors, part, kind, where)
    return config, converted(part, tensors, config, kind, where)


# What `config=` may be


def config_of(given: Any) -> ModelSpec | ldm_yaml.Said | None:
    """config= -> a spec, or what a .yaml says.

    Raises ValueError for anything else, CheckpointError where it is damaged.
    """
    if given is None or isinstance(given, ModelSpec):
        return given
    place = Path(given)
    if place.is_dir():
        return folders.spec_of(place)
    if place.suffix.lower() in (".yaml", ".yml"):
        if not place.is_file():
            raise FileNotFoundError(f"no such config: {place}")
        return ldm_yaml.read(place)
    if str(given) in FAMILIES:
        return FAMILIES[str(given)]
    raise ValueError(
        f"config={str(given)!r} is neither a diffusers folder, nor a .yaml, nor one of {', '.join(FAMILIES)}"
    )
