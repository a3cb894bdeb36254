"""The config.json files of diffusers and transformers <-> our dataclasses, both ways.

Strict: a key that would change the network, at a value that our networks do not have, raises CheckpointError naming
file and key. Where a file is silent, the default is that of the library whose file it is, not ours.
"""

from collections.abc import Mapping
from typing import Any

from sd_jax.checkpoints.config_values import (
    ANY,
    as_list,
    as_tuple,
    blocks,
    divide,
    in_order,
    one,
    per_block,
    read_keys,
    values_of,
)
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.models.presets import CLIPTextConfig, KUNetConfig, TinyVAEConfig, UNetConfig, VAEConfig
from sd_jax.types import PREDICTION_TYPES, NoiseScheduleConfig

DIFFUSERS_VERSION = "0.42.1"  # whose form of the files is written
TRANSFORMERS_VERSION = "5.23.0"


# U-Net

# Key -> the values that our U-Net has; the first is written. ANY: does not change what the network computes.
_UNET_FIXED = {
    "act_fn": ("silu",),
    "addition_embed_type": (None, "text", "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),  # with num_class_embeds: a table
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0, ANY),
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
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "upcast_attention": (False, ANY),
}
DOWN_BLOCK_TYPES = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)  # diffusers' default
_UNET_READ = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": DOWN_BLOCK_TYPES,
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 1280,
    "only_cross_attention": False,
    "use_linear_projection": False,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "time_cond_proj_dim": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}
_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
# The same field of ours, or another for those that are not
_PER_BLOCK = {
    "num_attention_heads": "attention_head_dim",  # so called since diffusers took it for the heads' number
    "transformer_layers_per_block": "transformer_layers_per_block",
    "only_cross_attention": "only_cross_attention",
}
_UNET_PLAIN = ("in_channels", "out_channels", "use_linear_projection", "norm_num_groups", "num_class_embeds")
_UNET_PLAIN += ("time_cond_proj_dim", "addition_embed_type", "addition_embed_type_num_heads")
_UNET_PLAIN += ("addition_time_embed_dim", "projection_class_embeddings_input_dim", "resnet_time_scale_shift")


def unet_from_json(data: Mapping[str, Any], where: str) -> UNetConfig | KUNetConfig:
    """`where` names the file in messages. Raises CheckpointError on a feature that our U-Nets have not."""
    kinds = data.get("down_block_types")
    if isinstance(kinds, list | tuple) and "KDownBlock2D" in kinds:
        return _k_unet_from_json(data, where)
    values = values_of(data, "UNet2DConditionModel", _UNET_READ, _UNET_FIXED, where)
    attention_blocks = blocks(values, "down_block_types", _DOWN, where)
    if blocks(values, "up_block_types", _UP, where) != attention_blocks[::-1]:
        raise CheckpointError(f"{where}: up_block_types must mirror down_block_types")
    if len(values["block_out_channels"]) != len(attention_blocks):
        raise CheckpointError(f"{where}: block_out_channels and down_block_types are of different lengths")
    values["addition_embed_type"] = data.get("addition_embed_type")
    values["resnet_time_scale_shift"] = data.get("resnet_time_scale_shift") or "default"
    if values["only_cross_attention"] is True and data.get("mid_block_only_cross_attention") is None:
        raise CheckpointError(f"{where}: only_cross_attention=True in the middle too is not supported")
    for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        if values["addition_embed_type"] == "text_time" and not values[key]:
            raise CheckpointError(f"{where}: addition_embed_type='text_time' needs {key}, which is missing")
    config = UNetConfig(
        sample_size=one(values, "sample_size", where),
        block_out_channels=tuple(values["block_out_channels"]),
        attention_blocks=attention_blocks,
        layers_per_block=one(values, "layers_per_block", where),
        cross_attention_dim=one(values, "cross_attention_dim", where),
        **{field: per_block(values, key, len(attention_blocks), where) for field, key in _PER_BLOCK.items()},
        **{key: values[key] for key in _UNET_PLAIN},
    )
    for block, width in enumerate(config.block_out_channels):
        divide(width, config.norm_num_groups, "norm_num_groups", where)
        if config.attention_blocks[block] or block == len(attention_blocks) - 1:  # behind the last, the middle attends
            divide(width, config.of_block("num_attention_heads", block), "attention_head_dim", where)
    return config


def unet_to_json(config: UNetConfig | KUNetConfig) -> dict[str, Any]:
    if isinstance(config, KUNetConfig):
        return _k_unet_to_json(config)
    down, up = {v: k for k, v in _DOWN.items()}, {v: k for k, v in _UP.items()}
    return in_order(
        {key: allowed[0] for key, allowed in _UNET_FIXED.items()},
        _class_name="UNet2DConditionModel",
        _diffusers_version=DIFFUSERS_VERSION,
        sample_size=config.sample_size,
        down_block_types=[down[attends] for attends in config.attention_blocks],
        up_block_types=[up[attends] for attends in reversed(config.attention_blocks)],
        block_out_channels=list(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.cross_attention_dim,
        mid_block_only_cross_attention=False if config.only_cross_attention is True else None,
        **{key: as_list(getattr(config, field)) for field, key in _PER_BLOCK.items()},
        **{key: getattr(config, key) for key in _UNET_PLAIN},
    )


# k-diffusion's U-Net

_K_FIXED = {
    "act_fn": ("gelu",),
    "addition_embed_type_num_heads": (64, ANY),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "conv_in_kernel": (1,),
    "conv_out_kernel": (1,),
    "cross_attention_norm": ("layer_norm", ANY),  # its blocks say so themselves, and the other ANY they do not read
    "downsample_padding": (1, ANY),
    "dropout": (0.0, ANY),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0, ANY),
    "mid_block_scale_factor": (1, ANY),
    "mid_block_type": (None,),
    "norm_eps": (1e-5,),
    "norm_num_groups": (None,),
    "only_cross_attention": (False, ANY),
    "resnet_out_scale_factor": (1.0, ANY),
    "resnet_time_scale_shift": ("scale_shift", ANY),
    "time_embedding_type": ("fourier",),
    "timestep_post_act": ("gelu",),
    "transformer_layers_per_block": (1, ANY),
    "upcast_attention": (False, ANY),
    "use_linear_projection": (False, ANY),
}
# What diffusers takes where a file is silent
_K_SILENT = {
    "act_fn": "silu",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_num_groups": 32,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
_K_READ = {key: _UNET_READ[key] for key in ("sample_size", "in_channels", "out_channels", "block_out_channels")}
_K_READ |= {key: _UNET_READ[key] for key in ("down_block_types", "up_block_types", "layers_per_block")}
_K_READ |= {key: _UNET_READ[key] for key in ("attention_head_dim", "cross_attention_dim", "time_cond_proj_dim")}
_K_PLAIN = ("sample_size", "layers_per_block", "attention_head_dim", "cross_attention_dim")


def _k_unet_from_json(data: Mapping[str, Any], where: str) -> KUNetConfig:
    values = values_of({**_K_SILENT, **data}, "UNet2DConditionModel", _K_READ, _K_FIXED, where)
    widths, condition = tuple(values["block_out_channels"]), values["time_cond_proj_dim"]
    for key, wanted in _k_block_types(len(widths)).items():
        if list(values[key]) != wanted:
            raise CheckpointError(f"{where}: {key}={list(values[key])} is not supported: only {wanted} is")
    config = KUNetConfig(
        in_channels=values["in_channels"],
        out_channels=values["out_channels"],
        block_out_channels=widths,
        mapping_cond_dim=condition or 0,
        **{key: one(values, key, where) for key in _K_PLAIN},
    )
    room = config.mapping_cond_dim - config.cross_attention_dim  # for the cosines and sines of the noise level
    if room < 2 or room % 2:
        raise CheckpointError(f"{where}: time_cond_proj_dim={condition!r} leaves no room beside the pooled prompt")
    for width in widths:
        divide(width, 32, "the groups' size", where)
        divide(width, config.attention_head_dim, "attention_head_dim", where)
    return config


def _k_unet_to_json(config: KUNetConfig) -> dict[str, Any]:
    return in_order(
        {key: allowed[0] for key, allowed in _K_FIXED.items()},
        _class_name="UNet2DConditionModel",
        _diffusers_version=DIFFUSERS_VERSION,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=list(config.block_out_channels),
        time_cond_proj_dim=config.mapping_cond_dim,
        **_k_block_types(len(config.block_out_channels)),
        **{key: getattr(config, key) for key in _K_PLAIN},
    )


def _k_block_types(depth: int) -> dict[str, list[str]]:
    """All levels but the first attend."""
    down, up = ["KCrossAttnDownBlock2D"] * (depth - 1), ["KCrossAttnUpBlock2D"] * (depth - 1)
    return {"down_block_types": ["KDownBlock2D", *down], "up_block_types": [*up, "KUpBlock2D"]}


# VAE

_VAE_FIXED = {
    "act_fn": ("silu",),
    "force_upcast": (True, ANY),
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


_TINY_FIXED = {
    "act_fn": ("relu",),
    "force_upcast": (False, ANY),
    "latent_magnitude": (3,),
    "latent_shift": (0.5,),
    "shift_factor": (0.0,),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}
_TINY_READ = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "encoder_block_out_channels": (64, 64, 64, 64),
    "decoder_block_out_channels": (64, 64, 64, 64),
    "num_encoder_blocks": (1, 3, 3, 3),
    "num_decoder_blocks": (3, 3, 3, 1),
    "scaling_factor": 1.0,
}


def vae_from_json(data: Mapping[str, Any], where: str) -> VAEConfig | TinyVAEConfig:
    """AutoencoderKL or AutoencoderTiny, as `_class_name` says."""
    if data.get("_class_name") == "AutoencoderTiny":
        return _tiny_vae_from_json(data, where)
    values = values_of(data, "AutoencoderKL", _VAE_READ, _VAE_FIXED, where)
    levels = len(values["block_out_channels"])
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if len(blocks(values, key, {kind: True}, where)) != levels:
            raise CheckpointError(f"{where}: block_out_channels and {key} are of different lengths")
    for width in values["block_out_channels"]:
        divide(width, values["norm_num_groups"], "norm_num_groups", where)
    plain = ("in_channels", "out_channels", "latent_channels", "norm_num_groups")
    return VAEConfig(
        sample_size=one(values, "sample_size", where),
        layers_per_block=one(values, "layers_per_block", where),
        block_out_channels=tuple(values["block_out_channels"]),
        scaling_factor=float(values["scaling_factor"]),
        **{key: values[key] for key in plain},
    )


def _tiny_vae_from_json(data: Mapping[str, Any], where: str) -> TinyVAEConfig:
    data = {key: value for key, value in data.items() if key != "block_out_channels"}  # the decoder's, once more
    values = values_of(data, "AutoencoderTiny", _TINY_READ, _TINY_FIXED, where)
    for half in ("encoder", "decoder"):
        widths, blocks = values[f"{half}_block_out_channels"], values[f"num_{half}_blocks"]
        if len(widths) != len(blocks):
            raise CheckpointError(f"{where}: {half}_block_out_channels and num_{half}_blocks are of different lengths")
        if len(set(widths)) != 1:
            raise CheckpointError(f"{where}: {half}_block_out_channels={list(widths)} must be equal")
    return TinyVAEConfig(**{key: as_tuple(value) for key, value in values.items()})


def vae_to_json(config: VAEConfig | TinyVAEConfig) -> dict[str, Any]:
    if isinstance(config, TinyVAEConfig):
        return in_order(
            {key: allowed[0] for key, allowed in _TINY_FIXED.items()},
            _class_name="AutoencoderTiny",
            _diffusers_version=DIFFUSERS_VERSION,
            **{key: as_list(getattr(config, key)) for key in _TINY_READ},
        )
    levels = len(config.block_out_channels)
    return in_order(
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


def text_encoder_from_json(
    data: Mapping[str, Any],
    where: str,
    part: str = "text_encoder",
    in_sdxl: bool = False,  # the pipeline has a text_encoder_2, and reads the states of the last layer but one
) -> CLIPTextConfig:
    """Also the `text_config` of a whole CLIPModel. Other keys of transformers say nothing about the network.

    `eos_token_id` 2 and `pad_token_id` 1 are known mistakes of old files. They mean the last token of the vocabulary,
    as in OpenAI's CLIP; OpenCLIP, which is the one with "gelu", pads with 0.
    """
    kind = data.get("model_type", "clip_text_model")
    if kind not in ("clip_text_model", "clip"):
        raise CheckpointError(f"{where}: model_type={kind!r} is not supported as a text encoder: only CLIP's is")
    nested = data.get("text_config") or data
    if not isinstance(nested, Mapping):
        raise CheckpointError(f"{where}: text_config={nested!r} is damaged")
    values = read_keys(nested, _CLIP_READ, where)
    if values["hidden_act"] not in ("quick_gelu", "gelu"):
        raise CheckpointError(f"{where}: hidden_act={values['hidden_act']!r} is not supported")
    divide(values["hidden_size"], values["num_attention_heads"], "num_attention_heads", where)
    last = values["vocab_size"] - 1
    if values["eos_token_id"] in (2, None) or values["eos_token_id"] > last:
        values["eos_token_id"] = last
    if values["pad_token_id"] in (1, None) or values["pad_token_id"] > last:
        values["pad_token_id"] = 0 if values["hidden_act"] == "gelu" else values["eos_token_id"]
    if part == "text_encoder_2" or "CLIPTextModelWithProjection" in str(data.get("architectures")):
        values["projection_dim"] = read_keys(nested, {"projection_dim": 512}, where)["projection_dim"]
    if in_sdxl or part == "text_encoder_2":
        values |= {"clip_skip": 2, "context_norm": False}
    return CLIPTextConfig(**values)


def text_encoder_to_json(config: CLIPTextConfig, bos_token_id: int, dtype: str) -> dict[str, Any]:
    """`clip_skip` and `context_norm` have no place in it: they are the pipeline's (see `save`)."""
    return in_order(
        {key: getattr(config, key) for key in _CLIP_READ},
        architectures=["CLIPTextModel" if config.projection_dim is None else "CLIPTextModelWithProjection"],
        model_type="clip_text_model",
        bos_token_id=bos_token_id,
        attention_dropout=0.0,
        initializer_factor=1.0,
        initializer_range=0.02,
        projection_dim=config.projection_dim or config.hidden_size,
        torch_dtype=dtype,
        transformers_version=TRANSFORMERS_VERSION,
    )


# Noise schedule

_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_SCHEDULE_READ = {
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}


def noise_schedule_from_json(data: Mapping[str, Any], where: str) -> NoiseScheduleConfig:
    """scheduler_config.json: what belongs to the model, not which sampler it names."""
    if str(data.get("_class_name", "")).startswith(("FlowMatch", "EDM")):
        raise CheckpointError(f"{where}: {data['_class_name']} is not a schedule of Stable Diffusion")
    if data.get("trained_betas"):
        raise CheckpointError(f"{where}: trained_betas is not supported")
    values = read_keys(data, _SCHEDULE_READ, where)
    for key, choices in (("beta_schedule", _SCHEDULES), ("prediction_type", PREDICTION_TYPES)):
        if values[key] not in choices:
            raise CheckpointError(f"{where}: {key}={values[key]!r} is not supported: only {', '.join(choices)}")
    return NoiseScheduleConfig(
        **{**values, "beta_start": float(values["beta_start"]), "beta_end": float(values["beta_end"])}
    )


def noise_schedule_to_json(config: NoiseScheduleConfig) -> dict[str, Any]:
    """As diffusers' DDIMScheduler, which knows every schedule and prediction that we share with diffusers, but for EDM:
    there pipelines make x0 of what the U-Net answers, and a scheduler of sigmas, EulerDiscreteScheduler, steps with it.

    A zero terminal signal-to-noise ratio is of use only to steps that begin at the last timestep ("trailing").
    Raises CheckpointError for a schedule of ours that diffusers has not.
    """
    if config.beta_schedule == "rectified_flow":
        raise CheckpointError(
            "diffusers has no scheduler for a U-Net trained with beta_schedule 'rectified_flow': save it as 'native'"
        )
    shared = in_order(
        {},
        _class_name="DDIMScheduler",
        _diffusers_version=DIFFUSERS_VERSION,
        beta_schedule=config.beta_schedule,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        num_train_timesteps=config.num_train_timesteps,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        trained_betas=None,
    )
    if config.prediction_type == "edm":
        return {**shared, "_class_name": "EulerDiscreteScheduler", "prediction_type": "sample"}
    return in_order(
        shared,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing" if config.rescale_betas_zero_snr else "leading",
    )
