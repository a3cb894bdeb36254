"""LPIPS, the learned perceptual distance (Zhang et al. 2018), version 0.1 on VGG16, equal to the `lpips` package's.

    y_l(x) = h_l / |h_l|,   h_l = the ReLU at the end of VGG's stage l, of (x - shift) / scale                   (Eq. 1)
    d(a, b) = sum_l mean_places sum_channels w_l (y_l(a) - y_l(b))^2                                             (Eq. 2)

Parameter names are those of torchvision's vgg16 (`features_N`) and of the lpips package (`lin0/model_1`, ...). The
weights w_l start at ones, the package's unweighted `baseline`: then any trunk of this shape makes a distance.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax.models.layers import Dtype, conv
from sd_jax.types import Image

# ImageNet's mean and deviation, for levels in [-1, 1]
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)

_ONES = nn.initializers.ones


class _Weights(nn.Module):
    """[batch, h, w, channels] -> [batch, h, w]: w_l of (Eq. 2), a 1x1 convolution to the package."""

    param_dtype: Dtype

    @nn.compact
    def __call__(self, x):
        types = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        return nn.Conv(1, (1, 1), use_bias=False, kernel_init=_ONES, name="model_1", **types)(x)[..., 0]


class VGGFeatures(nn.Module):
    """Image -> the ReLU at the end of each stage; between stages the size is halved by maxima.

    Names count convolutions, ReLUs and pools, as torchvision's list `features` does.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)  # of the stages; VGG16's
    depths: tuple[int, ...] = (2, 2, 3, 3, 3)  # convolutions in each
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Image) -> list[Array]:
        """Image in [-1, 1] -> per stage [batch, h, w, width]. Raises ValueError where a side vanishes in the pools."""
        smallest = 2 ** (len(self.widths) - 1)
        if min(image.shape[1:3]) < smallest:
            size = f"{image.shape[2]}x{image.shape[1]}"
            raise ValueError(f"a picture of {size} is too small for LPIPS: its sides need {smallest} pixels")
        shift, scale = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 3) for values in (_SHIFT, _SCALE))
        h = ((image.astype(jnp.float32) - shift) / scale).astype(self.dtype)
        stages, index = [], 0
        for width, depth in zip(self.widths, self.depths, strict=True):
            if stages:
                h, index = nn.max_pool(h, (2, 2), (2, 2)), index + 1
            for _ in range(depth):
                h, index = nn.relu(conv(width, f"features_{index}", self)(h)), index + 2
            stages.append(h)
        return stages


class LPIPS(nn.Module):
    """Two images -> their distance; a loss too: its gradient is finite everywhere."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    depths: tuple[int, ...] = (2, 2, 3, 3, 3)
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, a: Image, b: Image) -> Float[Array, " batch"]:
        """Images in [-1, 1] of one shape, sides of at least 16 pixels -> (Eq. 2) of each pair, float32.

        Each image goes through the trunk by itself, so that a gradient of one does not pay for the other.
        """
        trunk = VGGFeatures(self.widths, self.depths, dtype=self.dtype, param_dtype=self.param_dtype)
        nn.share_scope(self, trunk)
        distance = jnp.zeros((a.shape[0],), jnp.float32)
        for i, (of_a, of_b) in enumerate(zip(trunk(a), trunk(b), strict=True)):
            difference = jnp.square(_unit(of_a) - _unit(of_b))
            distance = distance + _Weights(self.param_dtype, name=f"lin{i}")(difference).mean(axis=(1, 2))
        return distance


def _unit(h: Float[Array, "batch h w channels"]) -> Float[Array, "batch h w channels"]:
    """h / (|h| + 1e-10) over the channels. Where all are zero the root has no gradient: there it is none."""
    h = h.astype(jnp.float32)
    squared = jnp.square(h).sum(-1, keepdims=True)
    some = squared > 0
    norm = jnp.sqrt(jnp.where(some, squared, 1.0))
    return jnp.where(some, h / (norm + 1e-10), 0.0)
