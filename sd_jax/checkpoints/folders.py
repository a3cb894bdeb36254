"""Folders of diffusers: which networks they have, and which of the files beside each other are read.

model_index.json                     the pipeline's class and the classes of its parts
unet/ vae/ text_encoder/ text_encoder_2/    config.json; weights, whole or in shards, in one variant or more
tokenizer/ tokenizer_2/ scheduler/
image_encoder/ feature_extractor/           of models that are told pictures in place of text; of others they are left
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sd_jax.checkpoints import clip_config, components, config_json, keys_clip, keys_diffusers, layout, tokenizer_files
from sd_jax.checkpoints.errors import CheckpointError, listing
from sd_jax.checkpoints.files import open_any
from sd_jax.checkpoints.layout import Config
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.models.presets import PARTS, CLIPConfig, KUNetConfig, ModelSpec
from sd_jax.types import NoiseScheduleConfig

# What a pipeline may name besides the parts: it changes nothing of what the networks compute, or it is another's job
_BESIDE = ("tokenizer", "tokenizer_2", "scheduler", "low_res_scheduler", "safety_checker", "feature_extractor")
_BESIDE += ("watermarker", "depth_estimator", "image_encoder")
IMAGE_VARIATION = "StableDiffusionImageVariationPipeline"
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
_TEXT_STEMS = {"safetensors": "model", "bin": "pytorch_model"}
_VARIANTS = {
    "ema": ("ema", "", "fp32", "fp16", "bf16", "non_ema"),
    "raw": ("non_ema", "", "fp32", "fp16", "bf16", "ema"),
}


@dataclasses.dataclass(frozen=True)
class Folder:
    """What is in one. The spec of a part that `parts` lacks means nothing."""

    spec: ModelSpec
    parts: dict[str, dict[str, Tensor]]  # {part: {our name: Tensor}}
    tokenizers: dict[str, Path]  # by the part that they are for
    reason: str  # for the prediction type


def open_folder(path: Path, weights: str, without: Collection[str] = ()) -> Folder:
    """Parts that it has no folder of, or that are in `without`, are left out.

    Raises CheckpointError where it is another pipeline's, or a part is damaged.
    """
    index = path / "model_index.json"
    said = read_json(index) if index.is_file() else {}
    _refuse_other_pipelines(path, said)
    there = [part for part in PARTS if (path / part).is_dir()]
    has_first = "text_encoder" in there or bool((said.get("text_encoder") or [None])[0])
    has_second = "text_encoder_2" in there or bool((said.get("text_encoder_2") or [None])[0])
    configs: dict[str, Any] = {"text_encoder_2": ModelSpec().text_encoder} if has_second else {}
    if has_second and not has_first:
        configs["text_encoder"] = None
    parts = {}
    for part in there:
        if part not in without:
            configs[part], parts[part] = open_component(path / part, part, weights, has_second)
    schedule, reason = NoiseScheduleConfig(), "there is no scheduler_config.json"
    file = path / "scheduler" / "scheduler_config.json"
    if file.is_file():
        schedule, reason = config_json.noise_schedule_from_json(read_json(file), str(file)), f"said by {file}"
    zeros = bool(said.get("force_zeros_for_empty_prompt", False))
    spec = ModelSpec(**configs, noise_schedule=schedule, force_zeros_for_empty_prompt=zeros)
    if isinstance(spec.unet, KUNetConfig) and spec.text_encoder is not None:  # its pipeline says so, and no file
        schedule, reason = dataclasses.replace(schedule, prediction_type="edm"), "the x2 latent upscaler's"
        text_encoder = dataclasses.replace(spec.text_encoder, context_norm=False)
        spec = dataclasses.replace(spec, noise_schedule=schedule, text_encoder=text_encoder)
    if said.get("_class_name") == IMAGE_VARIATION and "image_encoder" not in without:
        config, parts["image_encoder"] = open_image_encoder(path, weights)
        spec = spec.told_pictures(config)
    return Folder(spec, parts, _tokenizers(path, spec), reason)


def open_component(folder: Path, part: str, weights: str, in_sdxl: bool = False) -> tuple[Config, dict[str, Tensor]]:
    """One network's folder -> its config and its tensors by our names."""
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: no {layout.NAMES[part]} here: its config.json is missing")
    config = component_config(file, part, in_sdxl)
    tensors, where = _weights(folder, part, weights)
    wrong = [c for c in components.find(tensors) if c.network != part.removesuffix("_2") and not c.prefix]
    if wrong:
        is_a, wanted = components.TITLES[wrong[0].network], layout.NAMES[part]
        raise CheckpointError(f"{where}: a {is_a}, where the {wanted} belongs: two components are swapped")
    if part not in _STEMS:
        tensors = components.without_images(tensors)
    return config, keys_diffusers.from_diffusers(part, tensors, config, str(where))


def open_image_encoder(path: Path, weights: str) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """Of a pipeline's folder: a CLIPVisionModelWithProjection, and how it reads pixels."""
    folder, pixels = path / "image_encoder", path / "feature_extractor" / "preprocessor_config.json"
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: no image encoder here: its config.json is missing")
    config = clip_config.vision_from_transformers(read_json(file), None, str(folder))
    if pixels.is_file():
        config = clip_config.with_pixels(config, read_json(pixels), str(pixels))
    tensors, where = _weights(folder, "image_encoder", weights)
    return config, keys_clip.from_transformers(tensors, config, str(where), vision_alone=True)


def component_config(file: Path, part: str, in_sdxl: bool = False) -> Config:
    """Of one network's config.json."""
    data = read_json(file)
    if part == "unet":
        return config_json.unet_from_json(data, str(file))
    if part == "vae":
        return config_json.vae_from_json(data, str(file))
    return config_json.text_encoder_from_json(data, str(file), part, in_sdxl)


def spec_of(path: Path) -> ModelSpec:
    """The configs of a folder whose weights need not be there; for what it lacks, SD 1.5's."""
    index = path / "model_index.json"
    said = read_json(index) if index.is_file() else {}
    there = {part: path / part / "config.json" for part in PARTS if (path / part / "config.json").is_file()}
    if not there:
        raise CheckpointError(f"{path}: no config.json of a network is in it")
    in_sdxl = "text_encoder_2" in there
    configs: dict[str, Any] = {part: component_config(file, part, in_sdxl) for part, file in there.items()}
    if in_sdxl and "text_encoder" not in there:
        configs["text_encoder"] = None
    file = path / "scheduler" / "scheduler_config.json"
    if file.is_file():
        configs["noise_schedule"] = config_json.noise_schedule_from_json(read_json(file), str(file))
    return ModelSpec(**configs, force_zeros_for_empty_prompt=bool(said.get("force_zeros_for_empty_prompt", False)))


def _refuse_other_pipelines(path: Path, said: Mapping[str, Any]) -> None:
    named = {key for key, value in said.items() if isinstance(value, list) and value and value[0]}
    folders = {p.name for p in path.iterdir() if p.is_dir()} & {"transformer", "controlnet", "prior", "text_encoder_3"}
    others = sorted((named | folders) - {*PARTS, *_BESIDE})
    without_text = "text_encoder" not in named and "text_encoder_2" not in named
    if "image_encoder" in named and without_text and said.get("_class_name") != IMAGE_VARIATION:
        others.append("image_encoder")
    if others:
        name = said.get("_class_name", "a pipeline")
        raise CheckpointError(f"{path}: {name} with a {others[0]}/: only Stable Diffusion 1, 2 and XL are opened")


def _tokenizers(path: Path, spec: ModelSpec) -> dict[str, Path]:
    """Raises CheckpointError where the two of SDXL do not know the same words."""
    folders = {"text_encoder": path / "tokenizer", "text_encoder_2": path / "tokenizer_2"}
    found = {p: folder for p, folder in folders.items() if tokenizer_files.is_tokenizer(folder)}
    found = {part: folder for part, folder in found.items() if part in spec.text_encoders}
    if len(found) == 2:
        first, second = (tokenizer_files.vocabulary(folder) for folder in found.values())
        if first != second:
            raise CheckpointError(
                f"{path}: tokenizer/ and tokenizer_2/ are of different vocabularies: one must do for both"
            )
    return found


# Weights


def choose_weights(names: Collection[str], part: str, weights: str) -> str | None:
    """Of the files of a network's folder: the weights, or the index of their shards; None where there are none.

    A variant that is averaged or not, as asked for, comes first; then full precision; then half.
    """
    for variant in _VARIANTS[weights]:
        dotted = f".{variant}" if variant else ""
        for suffix in ("safetensors", "bin"):
            stem = _STEMS.get(part, _TEXT_STEMS[suffix])
            for name in (
                f"{stem}{dotted}.{suffix}",
                f"{stem}.{suffix}.index{dotted}.json",
                f"{stem}{dotted}.{suffix}.index.json",
            ):
                if name in names:
                    return name
    return None


def _weights(folder: Path, part: str, weights: str) -> tuple[dict[str, Tensor], Path]:
    names = [p.name for p in folder.iterdir() if p.is_file()]
    chosen = choose_weights(names, part, weights)
    if chosen is None:
        there = sorted(name for name in names if name.endswith((".safetensors", ".bin", ".msgpack", ".ckpt")))
        stem = _STEMS.get(part, _TEXT_STEMS["safetensors"])
        raise CheckpointError(
            f"{folder}: no {stem}.safetensors in it" + (f", only {', '.join(there)}" if there else "")
        )
    file = folder / chosen
    return (open_shards(file) if chosen.endswith(".json") else open_any(file).tensors), file


def open_shards(index: Path) -> dict[str, Tensor]:
    """Shards as listed by a `*.index.json` beside them. Raises CheckpointError where they do not agree."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index}: not an index of shards: it has no weight_map")
    names = sorted(set(where.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index}: shards must lie beside it: {listing(outside)}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index}: shards are missing beside it: {listing(missing)}")
    shards = {name: open_any(index.parent / name).tensors for name in names}
    lost = [f"{tensor} in {shard}" for tensor, shard in where.items() if tensor not in shards[shard]]
    if lost:
        raise CheckpointError(f"{index}: tensors are not where it says: {listing(lost)}")
    return {tensor: shards[shard][tensor] for tensor, shard in where.items()}


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a table of settings")
    return data
