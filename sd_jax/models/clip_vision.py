"""CLIP's vision transformer (Radford et al. 2021, after Dosovitskiy et al. 2020), equal to transformers'
CLIPVisionModel(WithProjection).

A picture is cut into patches, each projected without bias; a class embedding stands before them, and its last state is
what the picture means. A norm stands before the layers too; its parameters are called `pre_layrnorm`, as in every file.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax.models.clip_transformer import Encoder, layer_norm
from sd_jax.models.layers import UNIFORM, Dtype, dense
from sd_jax.models.presets import CLIPVisionConfig


class ImageStates(NamedTuple):
    """tokens: the last layer's states of the class and the patches, row by row, before `post_layernorm`.
    pooled: of the class after it, or [batch, projection_dim] of that.
    before_last: as `tokens`, of the layer before the last."""

    tokens: Float[Array, "batch tokens width"]
    pooled: Float[Array, "batch pooled_width"]
    before_last: Float[Array, "batch tokens width"]


class _Embeddings(nn.Module):
    config: CLIPVisionConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, images):
        config, batch = self.config, images.shape[0]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        small = nn.initializers.normal(config.hidden_size**-0.5)
        patches = nn.Conv(
            config.hidden_size,
            (config.patch_size, config.patch_size),
            strides=config.patch_size,
            padding="VALID",
            use_bias=False,
            kernel_init=UNIFORM,
            name="patch_embedding",
            **types,
        )(images).reshape(batch, -1, config.hidden_size)
        of_class = self.param("class_embedding", small, (config.hidden_size,), self.param_dtype).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(of_class, (batch, 1, config.hidden_size)), patches], axis=1)
        places = nn.Embed(x.shape[1], config.hidden_size, embedding_init=small, name="position_embedding", **types)
        return x + places(jnp.arange(x.shape[1], dtype=jnp.int32))[None]


class _VisionModel(nn.Module):
    config: CLIPVisionConfig
    dtype: Dtype
    param_dtype: Dtype
    remat: str

    @nn.compact
    def __call__(self, images):
        types = (self.dtype, self.param_dtype)
        x = _Embeddings(self.config, *types, name="embeddings")(images)
        x = layer_norm(self.config, "pre_layrnorm", self)(x)
        states = Encoder(self.config, False, *types, self.remat, name="encoder")(x)
        pooled = layer_norm(self.config, "post_layernorm", self)(states[-1][:, 0])
        return ImageStates(states[-1], pooled, states[-2:][0])


class CLIPVision(nn.Module):
    """Pictures -> ImageStates."""

    config: CLIPVisionConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width 3"]) -> ImageStates:
        """`images`: normalised as the model wants them (`data/clip_pixels.py`), square.

        Raises ValueError where they are not of the config's image_size.
        """
        size = self.config.image_size
        if images.shape[1:3] != (size, size):
            raise ValueError(f"pictures of {images.shape[1]}x{images.shape[2]}, but image_size is {size}")
        types = (self.dtype, self.param_dtype)
        states = _VisionModel(self.config, *types, self.remat, name="vision_model")(images)
        if self.config.projection_dim is None:
            return states
        return states._replace(
            pooled=dense(self.config.projection_dim, "visual_projection", self, False)(states.pooled)
        )
