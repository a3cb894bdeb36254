"""Models of each family at a small width that keeps its rules, so that shapes say all: heads, groups, positions."""

import dataclasses

from sd_jax.checkpoints import keys_compvis, layout
from sd_jax.models.presets import CLIPTextConfig, ModelSpec, UNetConfig, VAEConfig
from sd_jax.types import NoiseScheduleConfig
from tests.checkpoints.tiny import shapes_only

_LAST = 599
_CLIP = CLIPTextConfig(
    vocab_size=_LAST + 1,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    max_position_embeddings=32,
    eos_token_id=_LAST,
    pad_token_id=_LAST,
)
_OPEN_CLIP = dataclasses.replace(
    _CLIP, hidden_size=64, num_attention_heads=1, hidden_act="gelu", pad_token_id=0, num_hidden_layers=4
)
_VAE = VAEConfig(sample_size=256, block_out_channels=(32, 32, 64), layers_per_block=1)
_SD1 = ModelSpec(
    unet=UNetConfig(
        block_out_channels=(32, 64), attention_blocks=(True, False), layers_per_block=1, cross_attention_dim=48
    ),
    vae=_VAE,
    text_encoder=_CLIP,
)
_SD2 = ModelSpec(
    unet=UNetConfig(
        block_out_channels=(64, 128),
        attention_blocks=(True, False),
        layers_per_block=1,
        num_attention_heads=(1, 2),
        cross_attention_dim=64,
        use_linear_projection=True,
    ),
    vae=_VAE,
    text_encoder=_OPEN_CLIP,
)
_SDXL = ModelSpec(
    unet=dataclasses.replace(
        _SD2.unet,
        sample_size=128,
        attention_blocks=(False, True),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=48 + 64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=40 + 6 * 8,
    ),
    vae=dataclasses.replace(_VAE, sample_size=512, scaling_factor=0.13025),
    text_encoder=dataclasses.replace(_CLIP, clip_skip=2, context_norm=False),
    text_encoder_2=dataclasses.replace(_OPEN_CLIP, projection_dim=40, clip_skip=2, context_norm=False),
    force_zeros_for_empty_prompt=True,
)


def _unet(spec: ModelSpec, **fields) -> ModelSpec:
    return dataclasses.replace(spec, unet=dataclasses.replace(spec.unet, **fields))


REDUCED: dict[str, ModelSpec] = {
    "sd1": _SD1,
    "sd1_inpainting": _unet(_SD1, in_channels=9),
    "sd1_lcm": _unet(_SD1, time_cond_proj_dim=16),
    "sd2": _SD2,
    "sd2_depth": _unet(_SD2, in_channels=5),
    "sd2_whole": dataclasses.replace(
        _SD2, text_encoder=dataclasses.replace(_OPEN_CLIP, num_hidden_layers=24, clip_skip=2)
    ),
    "upscaler": dataclasses.replace(
        _unet(
            _SD2,
            sample_size=128,
            in_channels=7,
            num_attention_heads=8,
            only_cross_attention=(True, False),
            num_class_embeds=50,
        ),
        vae=dataclasses.replace(_VAE, scaling_factor=0.08333),
        noise_schedule=NoiseScheduleConfig(beta_start=0.0001, beta_end=0.02, prediction_type="v_prediction"),
    ),
    "sdxl": _SDXL,
    "sdxl_inpainting": _unet(_SDXL, in_channels=9),
    "sdxl_refiner": dataclasses.replace(
        _unet(
            _SDXL,
            block_out_channels=(64, 128, 128),
            attention_blocks=(False, True, False),
            transformer_layers_per_block=2,
            num_attention_heads=(1, 2, 2),
            cross_attention_dim=64,
            projection_class_embeddings_input_dim=40 + 5 * 8,
        ),
        text_encoder=None,
        force_zeros_for_empty_prompt=False,
    ),
}


def file_of(spec: ModelSpec, parts=None) -> dict:
    """A single file's tensors, by name, that cannot be read."""
    kind, file = keys_compvis.kind_of(spec), {}
    for part in parts or spec.parts:
        tensors = shapes_only(layout.LAYOUTS[part](getattr(spec, part)))
        file |= keys_compvis.from_diffusers(part, tensors, getattr(spec, part), kind)
    return file


def parts_of(spec: ModelSpec, parts=None) -> dict:
    """The same by part, without prefixes."""
    return keys_compvis.split(file_of(spec, parts), keys_compvis.kind_of(spec), "test", "ema")
