"""A folder as diffusers' `DiffusionPipeline.from_pretrained` opens it: a folder per network, and model_index.json.

Which pipeline it names follows from the model. Depth's needs a depth estimator, which is no part of our models: its
place is empty, and diffusers asks for one (`from_pretrained(folder, depth_estimator=..., feature_extractor=...)`).
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_jax.checkpoints import clip_config, config_json, tokenizer_files
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.folders import IMAGE_VARIATION
from sd_jax.checkpoints.read_safetensors import write
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.diffusion import low_resolution
from sd_jax.models.presets import CLIPTextConfig, KUNetConfig, ModelSpec

_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
_ABSENT = [None, None]


def save(work: Path, path: Path, spec: ModelSpec, theirs: Mapping[str, Mapping[str, Tensor]], tokenizer: Any) -> None:
    """Writes at `work` what will be called `path`: {part: {diffusers' name: Tensor}}."""
    theirs = dict(theirs)
    for part, config in spec.text_encoders.items():
        if part in theirs:
            config, theirs[part] = _as_pipelines_read(config, theirs[part], part, spec, f"cannot write {path}")
            spec = dataclasses.replace(spec, **{part: config})
    work.mkdir()
    index = index_of(spec)
    configs = {"unet": config_json.unet_to_json(spec.unet), "vae": config_json.vae_to_json(spec.vae)}
    for part, config in spec.text_encoders.items():
        if part not in theirs:
            continue
        folder = work / _TOKENIZERS[part]
        tokenizer_files.save_tokenizer(tokenizer, folder, config)
        bos = tokenizer_files.special_ids(folder).get("bos_token", config.eos_token_id - 1)
        dtype = str(next(iter(theirs[part].values())).dtype)
        configs[part] = config_json.text_encoder_to_json(config, bos, dtype)
        index[part] = ["transformers", configs[part]["architectures"][0]]
        index[_TOKENIZERS[part]] = ["transformers", "CLIPTokenizer"]
    if "image_encoder" in theirs:
        dtype = str(theirs["image_encoder"]["visual_projection.weight"].dtype)
        configs["image_encoder"], pixels = clip_config.vision_to_transformers(spec.image_encoder, dtype)
        (work / "feature_extractor").mkdir()
        _write_json(work / "feature_extractor" / "preprocessor_config.json", pixels)
        index["image_encoder"] = ["transformers", configs["image_encoder"]["architectures"][0]]
        index["feature_extractor"] = ["transformers", pixels["image_processor_type"]]
    for part, config in configs.items():
        (work / part).mkdir()
        _write_json(work / part / "config.json", config)
        stem = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
        write(work / part / f"{stem}.safetensors", theirs[part], {"format": "pt"})
        if "_class_name" in config:
            index[part] = ["diffusers", config["_class_name"]]
    for name, schedule in _schedulers(spec).items():
        (work / name).mkdir()
        _write_json(work / name / "scheduler_config.json", schedule)
        index[name] = ["diffusers", schedule["_class_name"]]
    _write_json(work / "model_index.json", dict(sorted(index.items())))


def _as_pipelines_read(
    config: CLIPTextConfig, tensors: Mapping[str, Tensor], part: str, spec: ModelSpec, where: str
) -> tuple[CLIPTextConfig, Mapping[str, Tensor]]:
    """SDXL's pipelines read the last layer but one, without the final norm; the x2 latent upscaler's the last, without
    it too; the others the last layer and its norm.

    So the folders of a model that reads an earlier layer (SD 2's single files hold a last one that nothing reads, and a
    projection) are written without what lies behind it. Raises CheckpointError where no folder says the same.
    """
    how = (config.clip_skip, config.context_norm)
    if spec.text_encoder_2 is not None:
        if how != (2, False):
            raise CheckpointError(
                f"{where}: {part} with clip_skip, context_norm {how}: SDXL's pipelines have (2, False)"
            )
        return config, tensors
    if isinstance(spec.unet, KUNetConfig):
        if how != (1, False):
            raise CheckpointError(
                f"{where}: {part} with clip_skip, context_norm {how}: the x2 latent upscaler's pipeline has (1, False)"
            )
        return config, tensors
    if not config.context_norm:
        raise CheckpointError(f"{where}: {part} with context_norm=False: diffusers' pipelines have the final norm")
    if config.clip_skip == 1:
        return config, tensors
    read = config.num_hidden_layers - config.clip_skip + 1
    behind = tuple(f"text_model.encoder.layers.{i}." for i in range(read, config.num_hidden_layers))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith((*behind, "text_projection."))}
    return dataclasses.replace(config, num_hidden_layers=read, clip_skip=1, projection_dim=None), kept


def index_of(spec: ModelSpec) -> dict[str, Any]:
    """model_index.json but for the parts that are there."""
    unet, latent = spec.unet, spec.vae.latent_channels
    inpaints, sees_depth = unet.in_channels == 2 * latent + 1, unet.in_channels == latent + 1
    index = {"_diffusers_version": config_json.DIFFUSERS_VERSION, "feature_extractor": _ABSENT}
    if spec.text_encoder_2 is not None:
        absent = ("image_encoder", *_TOKENIZERS, *_TOKENIZERS.values())
        index |= dict.fromkeys(absent, _ABSENT) | {"force_zeros_for_empty_prompt": spec.force_zeros_for_empty_prompt}
        if spec.text_encoder is None:
            return index | {
                "_class_name": "StableDiffusionXLImg2ImgPipeline",
                "requires_aesthetics_score": spec.num_time_ids == 5,
            }
        return index | {"_class_name": f"StableDiffusionXL{'Inpaint' if inpaints else ''}Pipeline"}
    if unet.num_class_embeds is not None:
        return index | {
            "_class_name": "StableDiffusionUpscalePipeline",
            "max_noise_level": low_resolution.highest_level(unet.num_class_embeds),
            "safety_checker": _ABSENT,
            "watermarker": _ABSENT,
        }
    if isinstance(unet, KUNetConfig):
        del index["feature_extractor"]  # for which this pipeline has no place
        return index | {"_class_name": "StableDiffusionLatentUpscalePipeline"}
    if sees_depth:
        return index | {"_class_name": "StableDiffusionDepth2ImgPipeline", "depth_estimator": _ABSENT}
    from_text = f"StableDiffusion{'Inpaint' if inpaints else ''}Pipeline"
    return index | {
        "_class_name": IMAGE_VARIATION if spec.sees_pictures else from_text,
        "image_encoder": _ABSENT,
        "requires_safety_checker": False,
        "safety_checker": _ABSENT,
    }


def _schedulers(spec: ModelSpec) -> dict[str, dict[str, Any]]:
    schedulers = {"scheduler": config_json.noise_schedule_to_json(spec.noise_schedule)}
    if spec.unet.num_class_embeds is not None:  # the noise that the x4 upscaler's small picture gets
        noise = config_json.noise_schedule_to_json(low_resolution.SCHEDULE)
        schedulers["low_res_scheduler"] = {**noise, "_class_name": "DDPMScheduler", "clip_sample": True}
    return schedulers


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
