"""SDXL and its refiner, reduced: two text encoders, pooled state and time_ids; pictures of 32x32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sd_jax.models.networks import Networks
from sd_jax.models.presets import TINY_SHAPES

_TEXT = dataclasses.replace(
    TINY_SHAPES.text_encoder, eos_token_id=767, pad_token_id=767, clip_skip=2, context_norm=False
)
_SECOND = dataclasses.replace(
    _TEXT,
    hidden_size=16,
    intermediate_size=32,
    num_attention_heads=2,
    hidden_act="gelu",
    pad_token_id=0,
    projection_dim=24,
)


def _unet(context: int, numbers: int):
    return dataclasses.replace(
        TINY_SHAPES.unet,
        block_out_channels=(16,),
        attention_blocks=(True,),
        cross_attention_dim=context,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 8 * numbers,
    )


BASE = dataclasses.replace(
    TINY_SHAPES,
    unet=_unet(32 + 16, 6),
    text_encoder=_TEXT,
    text_encoder_2=_SECOND,
    force_zeros_for_empty_prompt=True,
)
REFINER = dataclasses.replace(BASE, unet=_unet(16, 5), text_encoder=None, force_zeros_for_empty_prompt=False)
SD1 = dataclasses.replace(TINY_SHAPES, text_encoder=dataclasses.replace(_TEXT, clip_skip=1, context_norm=True))


def random_params(spec):
    """Every parameter random: fresh networks end in zeros, through which no gradient passes."""
    networks, rng = Networks.of(spec), np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
    shapes = {part: jax.eval_shape(functools.partial(networks.init, part), jax.random.key(0)) for part in spec.parts}
    return jax.tree.map(draw, shapes)
