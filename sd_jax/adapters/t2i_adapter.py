"""T2I-Adapter (Mou et al. 2023, arXiv 2302.08453): a small network makes features of a picture, the hint, that are
added to the states of a U-Net's down blocks. They hang neither on the step nor on the text, and are made once.

Parameters are called as in diffusers' T2IAdapter. Where the features go, `types.Control` says.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sd_jax.models.layers import Dtype, conv
from sd_jax.types import Control, Params

KINDS = ("full_adapter", "full_adapter_xl", "light_adapter")


@dataclasses.dataclass(frozen=True)
class T2IAdapterConfig:
    """Of diffusers' T2IAdapter. A light one has a level more than it has `channels`."""

    adapter_type: str = "full_adapter"  # one of KINDS
    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8  # pixels per feature of the first level; 16 in SDXL's

    @property
    def levels(self) -> tuple[tuple[int, bool], ...]:
        """(width, whether it halves the size) of each."""
        halves = [i > 0 for i in range(len(self.channels))]
        if self.adapter_type == "full_adapter_xl":
            halves = [i == 2 for i in range(len(self.channels))]
        levels = tuple(zip(self.channels, halves, strict=True))
        return (*levels, (self.channels[-1], True)) if self.adapter_type == "light_adapter" else levels


class _Resnet(nn.Module):
    """x + block2(relu(block1(x))); block2 is 3x3 in light ones, else 1x1."""

    width: int
    kernel: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x):
        return x + conv(self.width, "block2", self, self.kernel)(nn.relu(conv(self.width, "block1", self)(x)))


class _Level(nn.Module):
    """A level: resnets; a light one's work at a quarter of its width."""

    config: T2IAdapterConfig
    width: int
    halve: bool
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x):
        light = self.config.adapter_type == "light_adapter"
        if self.halve:
            sides = x.shape[1:3]
            x = nn.avg_pool(x, (2, 2), (2, 2), [(0, side % 2) for side in sides], count_include_pad=False)
        inner = self.width // 4 if light else self.width
        if light or x.shape[-1] != inner:
            x = conv(inner, "in_conv", self, kernel=1)(x)
        for i in range(self.config.num_res_blocks):
            x = _Resnet(inner, 3 if light else 1, self.dtype, self.param_dtype, name=f"resnets_{i}")(x)
        return conv(self.width, "out_conv", self, kernel=1)(x) if light else x


class T2IAdapter(nn.Module):
    config: T2IAdapterConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, hint: Float[Array, "batch height width channels"]) -> Control:  # [0, 1]
        """The features of every level. Height and width are divisible by `downscale_factor`."""
        cfg, factor = self.config, self.config.downscale_factor
        batch, height, width, channels = hint.shape
        h = hint.astype(self.dtype).reshape(batch, height // factor, factor, width // factor, factor, channels)
        h = h.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // factor, width // factor, -1)  # torch's order
        if cfg.adapter_type != "light_adapter":
            h = conv(cfg.channels[0], "conv_in", self)(h)
        features = []
        for i, (wide, halve) in enumerate(cfg.levels):
            h = _Level(cfg, wide, halve, self.dtype, self.param_dtype, name=f"body_{i}")(h)
            features.append(h)
        return Control(features=tuple(features))


def init(key: Key[Array, ""], config: T2IAdapterConfig) -> Params:
    """New parameters, random, float32."""
    side = config.downscale_factor * 2 ** len(config.levels)
    return T2IAdapter(config).init(key, jnp.zeros((1, side, side, config.in_channels)))["params"]


def shapes_of(config: T2IAdapterConfig) -> Params:
    """All parameters, as jax.ShapeDtypeStruct."""
    return jax.eval_shape(lambda: init(jax.random.key(0), config))
