"""The networks of ESRGAN and Real-ESRGAN: a picture -> a larger one, in one step, without noise and without words.

    RRDBNet   dense block   h_k = lrelu(conv_k([x, h_1, ..., h_k-1])), k = 1..4;   D(x) = x + 0.2 conv_5([x, h_1..h_4])
              RRDB          R(x) = x + 0.2 D_3(D_2(D_1(x)))                                                      (Eq. 1)
              f = conv_first(x),   f + conv_body(R_n(...R_1(f)))   is doubled in size by nearest neighbour and a
              convolution, as often as the scale asks for, and two convolutions make the picture of it.
    compact   convolutions with PReLUs at the small size; the last one's channels become pixels, added to the small
              picture enlarged by nearest neighbour.

For scales below 4 Real-ESRGAN's RRDBNet turns squares of pixels into channels first, and so always doubles twice.
Parameter names are those of BasicSR. Papers: Wang et al. 2018 (arXiv 1809.00219), Wang et al. 2021 (arXiv 2107.10833).
Sources: xinntao/ESRGAN, xinntao/Real-ESRGAN (srvgg_arch.py).
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax.models.layers import Dtype, conv, upsampled_conv
from sd_jax.models.presets import RRDBConfig, SRVGGConfig, UpscalerConfig
from sd_jax.types import Image

Larger = Float[Array, "batch new_height new_width 3"]

DENSE_BLOCKS, DENSE_CONVOLUTIONS = 3, 5  # of an RRDB, of each of them
_RESIDUAL = 0.2

# A tenth of He's deviation: what a new dense block adds is small (Wang et al. 2018, section 3.1)
_SMALL = nn.initializers.variance_scaling(0.02, "fan_in", "uniform")


class _DenseBlock(nn.Module):
    """D of (Eq. 1)."""

    growth: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x):
        seen = x
        for k in range(1, DENSE_CONVOLUTIONS):
            h = nn.leaky_relu(conv(self.growth, f"conv{k}", self, kernel_init=_SMALL)(seen), 0.2)
            seen = jnp.concatenate([seen, h], axis=-1)
        return x + _RESIDUAL * conv(x.shape[-1], f"conv{DENSE_CONVOLUTIONS}", self, kernel_init=_SMALL)(seen)


class _RRDB(nn.Module):
    """R of (Eq. 1)."""

    growth: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x):
        h = x
        for i in range(1, DENSE_BLOCKS + 1):
            h = _DenseBlock(self.growth, self.dtype, self.param_dtype, name=f"rdb{i}")(h)
        return x + _RESIDUAL * h


class RRDBNet(nn.Module):
    """Image -> image, `config.scale` times as high and as wide."""

    config: RRDBConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    last = "conv_last"  # the layer that makes the picture

    @nn.compact
    def __call__(self, image: Image) -> Larger:
        """Image in [-1, 1] -> about [-1, 1], not clipped, float32. Raises ValueError for a side that
        `config.unshuffle` does not divide."""
        cfg = self.config
        h = pixels_to_channels((image.astype(self.dtype) + 1) / 2, cfg.unshuffle)
        first = h = conv(cfg.features, "conv_first", self)(h)
        for i in range(cfg.blocks):
            h = _RRDB(cfg.growth, self.dtype, self.param_dtype, name=f"body_{i}")(h)
        h = first + conv(cfg.features, "conv_body", self)(h)
        for stage in range(1, cfg.stages + 1):
            h = nn.leaky_relu(upsampled_conv(h, f"conv_up{stage}", self), 0.2)
        h = nn.leaky_relu(conv(cfg.features, "conv_hr", self)(h), 0.2)
        return 2 * conv(3, self.last, self)(h).astype(jnp.float32) - 1


class _PReLU(nn.Module):
    """x where it is positive, else a slope of the channel's own times x (He et al. 2015)."""

    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x):
        slope = self.param("slope", nn.initializers.constant(0.25), (x.shape[-1],), self.param_dtype)
        return jnp.where(x > 0, x, x * slope.astype(self.dtype).reshape(1, 1, 1, -1))


class SRVGGNet(nn.Module):
    """Image -> image, `config.scale` times as high and as wide. Layers are numbered, PReLUs too."""

    config: SRVGGConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @property
    def last(self) -> str:
        """The layer that makes the picture."""
        return f"body_{2 * self.config.convolutions + 2}"

    @nn.compact
    def __call__(self, image: Image) -> Larger:
        """Image in [-1, 1] -> about [-1, 1], not clipped, float32."""
        cfg = self.config
        x = (image.astype(jnp.float32) + 1) / 2
        h = x.astype(self.dtype)
        for i in range(0, 2 * cfg.convolutions + 2, 2):
            h = conv(cfg.features, f"body_{i}", self)(h)
            h = _PReLU(self.dtype, self.param_dtype, name=f"body_{i + 1}")(h)
        h = conv(3 * cfg.scale**2, self.last, self)(h)
        base = x.repeat(cfg.scale, axis=1).repeat(cfg.scale, axis=2)
        return 2 * (channels_to_pixels(h, cfg.scale).astype(jnp.float32) + base) - 1


def upscaler(config: UpscalerConfig, dtype: Dtype = jnp.float32) -> RRDBNet | SRVGGNet:
    """The network of a config."""
    return (RRDBNet if isinstance(config, RRDBConfig) else SRVGGNet)(config, dtype=dtype)


def pixels_to_channels(x: Float[Array, "batch height width channels"], side: int) -> Float[Array, "batch h w more"]:
    """Squares of `side` pixels become channels, in the order of torch's pixel_unshuffle: channel, row, column."""
    batch, height, width, channels = x.shape
    if height % side or width % side:
        raise ValueError(f"a picture of {width}x{height}: this upscaler takes multiples of {side} pixels: pad it")
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // side, width // side, channels * side**2)


def channels_to_pixels(x: Float[Array, "batch h w more"], side: int) -> Float[Array, "batch height width channels"]:
    """The inverse of `pixels_to_channels`."""
    batch, height, width, more = x.shape
    x = x.reshape(batch, height, width, more // side**2, side, side)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, height * side, width * side, more // side**2)
