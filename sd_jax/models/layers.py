"""The small layers that every network here is made of: group norm, convolutions, resampling, time embedding.

Layout is NHWC. Compute happens in `dtype`, parameters are kept in `param_dtype`, statistics of norms are float32.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Dtype = jnp.dtype | type


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) over the last axis' groups, in float32, with optional SiLU after it.

    The statistics are taken per channel first and then joined per group, so the tensor is read once for them and once
    to be scaled: `y = x * a + b` with `a, b` of shape [batch, channels].
    """

    num_groups: int = 32
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch *space channels"]) -> Float[Array, "batch *space channels"]:
        batch, channels = x.shape[0], x.shape[-1]
        if channels % self.num_groups:
            raise ValueError(f"{channels} channels do not divide into norm_num_groups={self.num_groups} groups")
        scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)

        flat = x.reshape(batch, -1, channels).astype(jnp.float32)

        def per_group(per_channel):  # [batch, channels] -> the same, averaged within each group
            grouped = per_channel.reshape(batch, self.num_groups, -1).mean(-1, keepdims=True)
            return jnp.broadcast_to(grouped, (batch, self.num_groups, channels // self.num_groups)).reshape(
                batch, channels
            )

        mean = per_group(flat.mean(1))
        variance = per_group(jnp.square(flat).mean(1)) - jnp.square(mean)
        a = jax.lax.rsqrt(jnp.maximum(variance, 0.0) + self.epsilon) * scale.astype(jnp.float32)[None]
        b = bias.astype(jnp.float32)[None] - mean * a
        return (flat * a[:, None] + b[:, None]).astype(self.dtype).reshape(x.shape)


def conv(features: int, name: str, like: nn.Module, kernel: int = 3, stride: int = 1, padding=None, **kwargs) -> nn.Conv:
    """A square convolution with `kernel // 2` zero padding, in the dtypes of the module `like`."""
    pad = kernel // 2
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=((pad, pad), (pad, pad)) if padding is None else padding,
        dtype=like.dtype,
        param_dtype=like.param_dtype,
        name=name,
        **kwargs,
    )


def dense(features: int, name: str, like: nn.Module, use_bias: bool = True) -> nn.Dense:
    """A linear layer in the dtypes of the module `like`."""
    return nn.Dense(features, use_bias=use_bias, dtype=like.dtype, param_dtype=like.param_dtype, name=name)


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) over the last axis, in float32."""

    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        centred = x.astype(jnp.float32)
        centred = centred - centred.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        scale, bias = scale.astype(jnp.float32), bias.astype(jnp.float32)
        return (y * scale[None, None] + bias[None, None]).astype(self.dtype)


class Downsample(nn.Module):
    """Half the size by a strided 3x3 convolution. `asymmetric` pads right and bottom only, as the VAE's encoder does."""

    asymmetric: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch half_h half_w channels"]:
        padding = ((0, 1), (0, 1)) if self.asymmetric else ((1, 1), (1, 1))
        return conv(x.shape[-1], "conv", self, stride=2, padding=padding)(x)


class Upsample(nn.Module):
    """Twice the size by nearest neighbour, then a 3x3 convolution."""

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch twice_h twice_w channels"]:
        batch, height, width, channels = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
        return conv(channels, "conv", self)(x.reshape(batch, 2 * height, 2 * width, channels))


def timestep_embedding(timesteps: Float[Array, " batch"], width: int) -> Float[Array, "batch width"]:
    """Sinusoids of possibly fractional timesteps, cosines first: diffusers' `get_timestep_embedding` with
    flip_sin_to_cos=True, downscale_freq_shift=0 (Ho et al. 2020, after Vaswani et al. 2017). Float32."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedding(nn.Module):
    """The two-layer perceptron that follows the sinusoids."""

    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch features"]:
        x = nn.silu(dense(self.features, "linear_1", self)(x))
        return dense(self.features, "linear_2", self)(x)
