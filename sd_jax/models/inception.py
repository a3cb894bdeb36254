"""FID's InceptionV3 (Szegedy et al. 2015, as in Heusel et al. 2017): pictures -> the 2048 features of its last pool.

The network of TensorFlow's inception-2015-12-05 graph, as pytorch-fid, torch-fidelity and clean-fid run it. It differs
from torchvision's inception_v3: averages over 3x3 do not count the padding, the last block takes a maximum in place of
the average, levels are scaled by (x - 128) / 128. Batch normalisation (epsilon 1e-3) uses its running statistics.

Parameter names are those of the published pt_inception-2015-12-05 file; its classifier `fc` is left out. Convolutions
are as exact as the device can be: figures are compared between papers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax.models.layers import Dtype

SIDE = 299  # pixels, at which published figures are taken
SMALLEST = 75  # pixels of a side, below which no place would be left

# A convolution is (name, features, height, width). A branch is a chain of them; a list within it is a fork, joined
Step = tuple[str, int, int, int] | tuple[tuple[str, int, int, int], ...]
Branches = tuple[tuple[Step, ...], ...]

_5X5 = (("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 5))
_3X3_TWICE = (("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3))
_A: Branches = ((("branch1x1", 64, 1, 1),), _5X5, _3X3_TWICE)
_B: Branches = ((("branch3x3", 384, 3, 3),), _3X3_TWICE)
_D: Branches = (
    (("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 3)),
    (
        ("branch7x7x3_1", 192, 1, 1),
        ("branch7x7x3_2", 192, 1, 7),
        ("branch7x7x3_3", 192, 7, 1),
        ("branch7x7x3_4", 192, 3, 3),
    ),
)
_E: Branches = (
    (("branch1x1", 320, 1, 1),),
    (("branch3x3_1", 384, 1, 1), (("branch3x3_2a", 384, 1, 3), ("branch3x3_2b", 384, 3, 1))),
    (
        ("branch3x3dbl_1", 448, 1, 1),
        ("branch3x3dbl_2", 384, 3, 3),
        (("branch3x3dbl_3a", 384, 1, 3), ("branch3x3dbl_3b", 384, 3, 1)),
    ),
)


def _c(width: int) -> Branches:
    return (
        (("branch1x1", 192, 1, 1),),
        (("branch7x7_1", width, 1, 1), ("branch7x7_2", width, 1, 7), ("branch7x7_3", 192, 7, 1)),
        (
            ("branch7x7dbl_1", width, 1, 1),
            ("branch7x7dbl_2", width, 7, 1),
            ("branch7x7dbl_3", width, 1, 7),
            ("branch7x7dbl_4", width, 7, 1),
            ("branch7x7dbl_5", 192, 1, 7),
        ),
    )


# (name, branches, pool, features of the branch behind the pool; None = the block halves the size)
_MIXED: tuple[tuple[str, Branches, str, int | None], ...] = (
    ("Mixed_5b", _A, "average", 32),
    ("Mixed_5c", _A, "average", 64),
    ("Mixed_5d", _A, "average", 64),
    ("Mixed_6a", _B, "max", None),
    ("Mixed_6b", _c(128), "average", 192),
    ("Mixed_6c", _c(160), "average", 192),
    ("Mixed_6d", _c(160), "average", 192),
    ("Mixed_6e", _c(192), "average", 192),
    ("Mixed_7a", _D, "max", None),
    ("Mixed_7b", _E, "average", 192),
    ("Mixed_7c", _E, "max", 192),
)


class _FrozenBatchNorm(nn.Module):
    """With running statistics, which are parameters here like any other."""

    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x):
        def vector(name, init):
            return self.param(name, init, (x.shape[-1],), self.param_dtype).astype(jnp.float32)

        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale, bias = vector("scale", ones), vector("bias", zeros)
        mean, variance = vector("running_mean", zeros), vector("running_var", ones)
        gain = scale * jax.lax.rsqrt(variance + 1e-3)
        shape = (1, 1, 1, -1)
        y = x.astype(jnp.float32) * gain.reshape(shape) + (bias - mean * gain).reshape(shape)
        return y.astype(self.dtype)


class _Conv(nn.Module):
    """Convolution without a bias, normalisation, ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        layer = nn.Conv(
            self.features,
            self.kernel,
            strides=self.stride,
            padding=self.padding,
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,
            kernel_init=nn.initializers.he_normal(),
            name="conv",
            **types,
        )
        return nn.relu(_FrozenBatchNorm(name="bn", **types)(layer(x)))


class _Mixed(nn.Module):
    """Branches side by side and a pool, joined along the channels."""

    branches: Branches
    pool: str
    pool_features: int | None
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x):
        halves = self.pool_features is None
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def conv(h, step, last):
            name, features, height, width = step
            stride, padding = (2, "VALID") if halves and last else (1, "SAME")
            return _Conv(features, (height, width), stride, padding, name=name, **types)(h)

        joined = []
        for branch in self.branches:
            h = x
            for i, step in enumerate(branch):
                steps = (step,) if isinstance(step[0], str) else step
                parts = [conv(h, one, i == len(branch) - 1) for one in steps]
                h = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
            joined.append(h)
        if halves:
            pooled = nn.max_pool(x, (3, 3), (2, 2))
        elif self.pool == "max":
            pooled = nn.max_pool(x, (3, 3), padding=((1, 1), (1, 1)))
        else:
            pooled = nn.avg_pool(x, (3, 3), padding=((1, 1), (1, 1)), count_include_pad=False)
        if self.pool_features is not None:
            pooled = _Conv(self.pool_features, (1, 1), name="branch_pool", **types)(pooled)
        return jnp.concatenate([*joined, pooled], axis=-1)


class InceptionV3(nn.Module):
    """Levels of pictures -> features."""

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, levels: Float[Array, "batch height width 3"]) -> Float[Array, "batch 2048"]:
        """Levels in [0, 255], 299 x 299 for published figures (see evals/features.py) -> features, float32.

        Raises ValueError for a side of less than 75 pixels.
        """
        if min(levels.shape[1:3]) < SMALLEST:
            raise ValueError(
                f"a picture of {levels.shape[2]}x{levels.shape[1]} is too small for Inception: "
                f"its sides need {SMALLEST} pixels, and are {SIDE} where figures are published"
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = ((levels.astype(jnp.float32) - 128.0) / 128.0).astype(self.dtype)
        h = _Conv(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3", **types)(h)
        h = _Conv(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3", **types)(h)
        h = _Conv(64, (3, 3), name="Conv2d_2b_3x3", **types)(h)
        h = nn.max_pool(h, (3, 3), (2, 2))
        h = _Conv(80, (1, 1), name="Conv2d_3b_1x1", **types)(h)
        h = _Conv(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3", **types)(h)
        h = nn.max_pool(h, (3, 3), (2, 2))
        for name, *block in _MIXED:
            h = _Mixed(*block, name=name, **types)(h)
        return h.astype(jnp.float32).mean(axis=(1, 2))
