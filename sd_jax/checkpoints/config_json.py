"""The config.json files of diffusers and transformers <-> our dataclasses, both ways.

Strict: a key that would change the network, at a value that our networks do not have, raises CheckpointError naming
file and key. Where a file is silent, the default is that of the library whose file it is, not ours.
"""

from collections.abc import Mapping
from typing import Any

from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.models.presets import CLIPTextConfig, UNetConfig, VAEConfig
from sd_jax.types import PREDICTION_TYPES, NoiseScheduleConfig

DIFFUSERS_VERSION = "0.42.1"  # whose form of the files is written
TRANSFORMERS_VERSION = "5.23.0"
_ANY = object()


# U-Net

# Key -> the values that our U-Net has; the first is written. _ANY: does not change what the network computes.
_UNET_FIXED = {
    "act_fn": ("silu",),
    "addition_time_embed_dim": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0, _ANY),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "projection_class_embeddings_input_dim": (None,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
    "upcast_attention": (False, _ANY),
    "use_linear_projection": (False,),
}
_UNET_READ = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 1280,
    "norm_num_groups": 32,
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "resnet_time_scale_shift": "default",
}
_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}


def unet_from_json(data: Mapping[str, Any], where: str) -> UNetConfig:
    """`where` names the file in messages. Raises CheckpointError on a feature that our U-Net has not."""
    values = _values(data, "UNet2DConditionModel", _UNET_READ, _UNET_FIXED, where)
    attention_blocks = _blocks(values, "down_block_types", _DOWN, where)
    if _blocks(values, "up_block_types", _UP, where) != attention_blocks[::-1]:
        raise CheckpointError(f"{where}: up_block_types must mirror down_block_types")
    if len(values["block_out_channels"]) != len(attention_blocks):
        raise CheckpointError(f"{where}: block_out_channels and down_block_types are of different lengths")
    if values["addition_embed_type"] not in (None, "text"):
        raise CheckpointError(f"{where}: addition_embed_type={values['addition_embed_type']!r} is not supported")
    if values["resnet_time_scale_shift"] not in ("default", "scale_shift"):
        raise CheckpointError(
            f"{where}: resnet_time_scale_shift={values['resnet_time_scale_shift']!r} is not supported"
        )
    return UNetConfig(
        sample_size=_one(values, "sample_size", where),
        in_channels=values["in_channels"],
        out_channels=values["out_channels"],
        block_out_channels=tuple(values["block_out_channels"]),
        attention_blocks=attention_blocks,
        layers_per_block=_one(values, "layers_per_block", where),
        num_attention_heads=_one(values, "attention_head_dim", where),
        cross_attention_dim=_one(values, "cross_attention_dim", where),
        norm_num_groups=values["norm_num_groups"],
        addition_embed_type=values["addition_embed_type"],
        addition_embed_type_num_heads=values["addition_embed_type_num_heads"],
        resnet_time_scale_shift=values["resnet_time_scale_shift"],
    )


def unet_to_json(config: UNetConfig) -> dict[str, Any]:
    down, up = {v: k for k, v in _DOWN.items()}, {v: k for k, v in _UP.items()}
    return _sorted(
        {key: allowed[0] for key, allowed in _UNET_FIXED.items()},
        _class_name="UNet2DConditionModel",
        _diffusers_version=DIFFUSERS_VERSION,
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        down_block_types=[down[attends] for attends in config.attention_blocks],
        up_block_types=[up[attends] for attends in reversed(config.attention_blocks)],
        block_out_channels=list(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.num_attention_heads,  # so called since diffusers took it for the heads' number
        cross_attention_dim=config.cross_attention_dim,
        norm_num_groups=config.norm_num_groups,
        addition_embed_type=config.addition_embed_type,
        addition_embed_type_num_heads=config.addition_embed_type_num_heads,
        resnet_time_scale_shift=config.resnet_time_scale_shift,
    )


# VAE

_VAE_FIXED = {
    "act_fn": ("silu",),
    "force_upcast": (True, _ANY),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None, 0, 0.0),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
_VAE_READ = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "latent_channels": 4,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}


def vae_from_json(data: Mapping[str, Any], where: str) -> VAEConfig:
    values = _values(data, "AutoencoderKL", _VAE_READ, _VAE_FIXED, where)
    levels = len(values["block_out_channels"])
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if len(_blocks(values, key, {kind: True}, where)) != levels:
            raise CheckpointError(f"{where}: block_out_channels and {key} are of different lengths")
    plain = ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups")
    return VAEConfig(
        sample_size=_one(values, "sample_size", where),
        block_out_channels=tuple(values["block_out_channels"]),
        scaling_factor=float(values["scaling_factor"]),
        **{key: values[key] for key in plain},
    )


def vae_to_json(config: VAEConfig) -> dict[str, Any]:
    levels = len(config.block_out_channels)
    return _sorted(
        {key: allowed[0] for key, allowed in _VAE_FIXED.items()},
        _class_name="AutoencoderKL",
        _diffusers_version=DIFFUSERS_VERSION,
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        latent_channels=config.latent_channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=list(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        scaling_factor=config.scaling_factor,
    )


# Text encoder

_CLIP_READ = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}


def text_encoder_from_json(data: Mapping[str, Any], where: str) -> CLIPTextConfig:
    """Also the `text_config` of a whole CLIPModel. Other keys of transformers say nothing about the network.

    `eos_token_id` 2 and `pad_token_id` 1 are known mistakes of old files and mean the last token of the vocabulary.
    """
    kind = data.get("model_type", "clip_text_model")
    if kind not in ("clip_text_model", "clip"):
        raise CheckpointError(f"{where}: model_type={kind!r} is not supported as a text encoder: only CLIP's is")
    nested = data.get("text_config")
    values = _CLIP_READ | {k: v for k, v in (nested or data).items() if k in _CLIP_READ}
    if values["hidden_act"] not in ("quick_gelu", "gelu"):
        raise CheckpointError(f"{where}: hidden_act={values['hidden_act']!r} is not supported")
    last = values["vocab_size"] - 1
    if values["eos_token_id"] in (2, None) or values["eos_token_id"] > last:
        values["eos_token_id"] = last
    if values["pad_token_id"] in (1, None) or values["pad_token_id"] > last:
        values["pad_token_id"] = values["eos_token_id"]
    return CLIPTextConfig(**values)


def text_encoder_to_json(config: CLIPTextConfig, bos_token_id: int, dtype: str) -> dict[str, Any]:
    return _sorted(
        {key: getattr(config, key) for key in _CLIP_READ},
        architectures=["CLIPTextModel"],
        model_type="clip_text_model",
        bos_token_id=bos_token_id,
        attention_dropout=0.0,
        initializer_factor=1.0,
        initializer_range=0.02,
        projection_dim=config.hidden_size,
        torch_dtype=dtype,
        transformers_version=TRANSFORMERS_VERSION,
    )


# Noise schedule

_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def noise_schedule_from_json(data: Mapping[str, Any], where: str) -> NoiseScheduleConfig:
    """scheduler_config.json: what belongs to the model, not which sampler it names."""
    if str(data.get("_class_name", "")).startswith("FlowMatch"):
        raise CheckpointError(f"{where}: {data['_class_name']} is not a schedule of SD 1.x")
    if data.get("trained_betas"):
        raise CheckpointError(f"{where}: trained_betas is not supported")
    schedule, prediction = data.get("beta_schedule", "linear"), data.get("prediction_type", "epsilon")
    if schedule not in _SCHEDULES:
        raise CheckpointError(f"{where}: beta_schedule={schedule!r} is not supported: only {', '.join(_SCHEDULES)}")
    if prediction not in PREDICTION_TYPES:
        raise CheckpointError(
            f"{where}: prediction_type={prediction!r} is not supported: only {', '.join(PREDICTION_TYPES)}"
        )
    return NoiseScheduleConfig(
        beta_schedule=schedule,
        beta_start=float(data.get("beta_start", 0.0001)),
        beta_end=float(data.get("beta_end", 0.02)),
        num_train_timesteps=data.get("num_train_timesteps", 1000),
        prediction_type=prediction,
        rescale_betas_zero_snr=bool(data.get("rescale_betas_zero_snr", False)),
    )


def noise_schedule_to_json(config: NoiseScheduleConfig) -> dict[str, Any]:
    """As diffusers' DDIMScheduler, which knows every schedule and prediction that we share with diffusers."""
    return _sorted(
        {},
        _class_name="DDIMScheduler",
        _diffusers_version=DIFFUSERS_VERSION,
        beta_schedule=config.beta_schedule,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        num_train_timesteps=config.num_train_timesteps,
        prediction_type=config.prediction_type,
        clip_sample=False,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        trained_betas=None,
    )


# Reading strictly


def _values(data: Mapping, class_name: str, read: Mapping, fixed: Mapping, where: str) -> dict[str, Any]:
    """The keys of `read`, with its defaults. Refuses values that are not in `fixed`, and unknown keys in use."""
    said = data.get("_class_name", class_name)
    if said != class_name:
        raise CheckpointError(f"{where}: _class_name={said!r} is not supported: only {class_name} is")
    for key, value in data.items():
        if key.startswith("_") or key in read:
            continue
        allowed = fixed.get(key, (None, False))
        if _ANY not in allowed and value not in allowed and not _all_of(value, allowed):
            raise CheckpointError(f"{where}: {key}={value!r} is not supported: no model of SD 1.x has it")
    return {key: default if data.get(key) is None else data[key] for key, default in read.items()}


def _all_of(value: Any, allowed: tuple) -> bool:
    """A list with one entry per block, each of which is allowed."""
    return isinstance(value, list | tuple) and bool(value) and all(entry in allowed for entry in value)


def _blocks(values: Mapping[str, Any], key: str, kinds: Mapping[str, bool], where: str) -> tuple[bool, ...]:
    for kind in values[key]:
        if kind not in kinds:
            raise CheckpointError(f"{where}: {key} has {kind}, which is not supported: only {', '.join(kinds)}")
    return tuple(kinds[kind] for kind in values[key])


def _one(values: Mapping[str, Any], key: str, where: str) -> int:
    """A number, also where it is written as a list of equal ones."""
    value = values[key]
    if not isinstance(value, list | tuple):
        return value
    if len(set(value)) != 1:
        raise CheckpointError(f"{where}: {key}={list(value)} is not supported: it must be one number for all blocks")
    return value[0]


def _sorted(first: Mapping[str, Any], **rest: Any) -> dict[str, Any]:
    return dict(sorted({**first, **rest}.items()))
