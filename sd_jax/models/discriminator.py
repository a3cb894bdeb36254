"""PatchGAN (Isola et al. 2017), which tells patches of pictures from patches of reconstructions, and its losses.

    D: hinge  mean max(0, 1 - D(x)) / 2 + mean max(0, 1 + D(x')) / 2         (Lim & Ye 2017)                  (Eq. 1)
    G:        -mean D(x')                                                                                     (Eq. 2)
    R1:       mean |grad_x D(x)|^2 / 2 over pictures                         (Mescheder et al. 2018)          (Eq. 3)

The network is that of taming-transformers (Esser et al. 2021), its parameters called `main_N` as there; its batch norms
take the statistics of the batch at hand, as they do while it trains, which is all that it is for.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax.models.layers import Dtype, convolve
from sd_jax.models.presets import DiscriminatorConfig
from sd_jax.types import Image

_SMALL = nn.initializers.normal(0.02)


class _BatchNorm(nn.Module):
    """Over all but the last axis, epsilon 1e-5; of the batch at hand alone."""

    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x):
        around_one = lambda *args: 1.0 + _SMALL(*args)  # noqa: E731
        scale = self.param("scale", around_one, (x.shape[-1],), self.param_dtype).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype).astype(jnp.float32)
        x = x.astype(jnp.float32)
        mean, variance = x.mean(axis=(0, 1, 2), keepdims=True), x.var(axis=(0, 1, 2), keepdims=True)
        scale, bias = (values.reshape(1, 1, 1, -1) for values in (scale, bias))
        return ((x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias).astype(self.dtype)


class Discriminator(nn.Module):
    """Image -> how real each patch looks; above 0 is real."""

    config: DiscriminatorConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Image) -> Float[Array, "batch rows columns"]:
        """Image in [-1, 1]; all of a batch are real, or none is: they share the norms' statistics."""
        config, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h, index = image.astype(self.dtype), 0
        for layer in range(config.layers + 1):
            width = config.width * min(2**layer, 8)
            stride = 2 if layer < config.layers else 1
            h = _conv(width, stride, f"main_{index}", use_bias=layer == 0, **types)(h)
            index += 1
            if layer:
                h, index = _BatchNorm(name=f"main_{index}", **types)(h), index + 1
            h, index = nn.leaky_relu(h, 0.2), index + 1
        return _conv(1, 1, f"main_{index}", **types)(h)[..., 0].astype(jnp.float32)


def _conv(width: int, stride: int, name: str, use_bias: bool = True, **types) -> nn.Conv:
    return nn.Conv(
        width,
        (4, 4),
        stride,
        padding=((1, 1), (1, 1)),
        use_bias=use_bias,
        kernel_init=_SMALL,
        conv_general_dilated=convolve,
        name=name,
        **types,
    )


def hinge(real: Float[Array, "batch rows columns"], fake: Float[Array, "batch rows columns"]) -> Float[Array, ""]:
    """(Eq. 1)."""
    return 0.5 * (nn.relu(1.0 - real).mean() + nn.relu(1.0 + fake).mean())


def r1(discriminator: Discriminator, params, image: Image) -> Float[Array, ""]:
    """(Eq. 3) of real pictures, float32."""
    of = lambda x: discriminator.apply({"params": params}, x).mean(axis=(1, 2)).sum()  # noqa: E731
    return 0.5 * jnp.square(jax.grad(of)(image)).sum(axis=(1, 2, 3)).mean()
