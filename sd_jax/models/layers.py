"""The small layers that every network here is made of: group norm, convolutions, resampling, time embedding.

Layout is NHWC. Compute happens in `dtype`, parameters are kept in `param_dtype`, statistics of norms are float32.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax import hardware

Dtype = jnp.dtype | type

# The last layer of a residual branch starts at zero: a new network is the identity along its trunk (LDM's zero_module)
ZEROS = nn.initializers.zeros

# Other kernels: variance 1 / fan-in (LeCun et al. 1998), uniform, because hundreds of truncated normals compile slowly
UNIFORM = nn.initializers.lecun_uniform()


def as_many(x: Float[Array, "batch *dims"], like: Float[Array, "rows *others"]) -> Float[Array, "rows *dims"]:
    """All of `x`, then all of it again, until it has the rows of `like`."""
    times = like.shape[0] // x.shape[0]
    return x if times == 1 else jnp.tile(x, (times,) + (1,) * (x.ndim - 1))


class GroupNorm(nn.Module):
    """`group_norm` with a scale and a bias that are learnt."""

    num_groups: int = 32
    epsilon: float = 1e-5
    silu: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch *space channels"]) -> Float[Array, "batch *space channels"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        y = group_norm(x, scale[None], bias[None], self.num_groups, self.epsilon, self.silu)
        return y.astype(self.dtype)


def group_norm(
    x: Float[Array, "batch *space channels"],
    scale: Float[Array, "batch_or_1 channels"],
    bias: Float[Array, "batch_or_1 channels"],
    num_groups: int,
    epsilon: float,
    silu: bool = False,
) -> Float[Array, "batch *space channels"]:
    """Group normalisation (Wu & He 2018) over the last axis' groups, in float32, and a SiLU after it if asked for.

    Mean and variance are taken per channel first and then joined per group, so that the large tensor is only ever
    reduced along its places and then scaled: `y = x * a + b`, `a, b` of shape [batch, channels].
    Raises ValueError where the groups do not divide the channels.
    """
    batch, channels = x.shape[0], x.shape[-1]
    if channels % num_groups:
        raise ValueError(f"{channels} channels do not divide into norm_num_groups={num_groups} groups")

    def per_group(per_channel):  # [batch, channels] -> the same, averaged within each group
        grouped = per_channel.reshape(batch, num_groups, -1).mean(-1, keepdims=True)
        shape = (batch, num_groups, channels // num_groups)
        return jnp.broadcast_to(grouped, shape).reshape(batch, channels)

    row = x.shape[-2] if x.ndim > 2 else 1
    rows = x.reshape(batch, -1, row, channels).astype(jnp.float32)
    moments = moments_by_rows if hardware.backend() == "cpu" else moments_in_one_pass
    channel_mean, channel_variance = moments(rows)
    mean = per_group(channel_mean)
    variance = per_group(channel_variance + jnp.square(channel_mean - mean))
    a = jax.lax.rsqrt(variance + epsilon) * scale.astype(jnp.float32)
    b = bias.astype(jnp.float32) - mean * a
    return _scale(rows, a, b, silu).reshape(x.shape)


@functools.partial(jax.checkpoint, static_argnums=3)
def _scale(x, a, b, silu: bool):
    """`y = x * a + b`, or its SiLU. The backward pass starts from `x` again: `y` is not kept in memory."""
    y = x * a[:, None, None] + b[:, None, None]
    return nn.silu(y) if silu else y


# Mean and variance over the places. E[x^2] - E[x]^2 would lose all digits where the mean is far above the spread; both
# of these keep them.


def moments_by_rows(
    x: Float[Array, "batch rows row channels"],
) -> tuple[Float[Array, "batch channels"], Float[Array, "batch channels"]]:
    """Of each row, while it is in the cache, then over the rows. XLA's CPU compiler writes what it squares for a
    reduction over all places to memory first: twice the time, and three such tensors at once."""
    row_mean = x.mean(2)
    row_variance = jnp.square(x - jax.lax.stop_gradient(row_mean)[:, :, None]).mean(2)  # its gradient there is 0
    mean = row_mean.mean(1)
    return mean, (row_variance + jnp.square(row_mean - mean[:, None])).mean(1)


def moments_in_one_pass(
    x: Float[Array, "batch rows row channels"],
) -> tuple[Float[Array, "batch channels"], Float[Array, "batch channels"]]:
    """Of x minus one of its own values. It is read once, which is what counts on GPUs and TPUs."""
    shift = jax.lax.stop_gradient(x[:, :1, :1])
    shifted = x - shift
    mean = shifted.mean((1, 2))
    variance = jnp.square(shifted).mean((1, 2)) - jnp.square(mean)
    return mean + shift[:, 0, 0], jnp.maximum(variance, 0.0)


def convolve(x, kernel, strides, padding, *, dimension_numbers, **others):
    """`lax.conv_general_dilated`, with gradients that take no longer in a loop than outside of one.

    XLA's CPU compiler has a fast routine for NHWC pictures and HWIO kernels alone. It turns other convolutions round
    for it, but not in the body of a loop (jaxlib 0.10): there the gradient by the kernel takes 60 times as long, and
    that by the picture three times. So a CPU is given them turned round.
    """
    convolution = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=dimension_numbers)
    plain = others.get("feature_group_count", 1) == 1 and not isinstance(padding, str)
    plain &= all(set(others.get(name) or (1,)) == {1} for name in ("lhs_dilation", "rhs_dilation"))
    if hardware.backend() != "cpu" or not plain:
        return convolution(x, kernel, strides, padding, **others)

    @jax.custom_vjp
    def product(x, kernel):
        return convolution(x, kernel, strides, padding)

    def forward(x, kernel):  # keeps what is needed: frozen kernels have no gradient
        kept = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
        return product(x.value, kernel.value), kept

    def backward(kept, g):
        kept_x, kept_kernel = kept
        sizes = zip(x.shape[1:3], kernel.shape[:2], g.shape[1:3], strides, padding, strict=True)
        of_x, of_kernel = [], []  # what each is padded with, so that as many places come out as it has
        for size, width, outputs, stride, (low, _) in sizes:
            reach = (outputs - 1) * stride + 1  # of the outputs, as far apart as what they were made from
            of_kernel.append((low, reach + width - 1 - size - low))
            of_x.append((width - 1 - low, size - reach + low))
        by_x = by_kernel = None
        if kept_kernel is not None:
            turned = kept_kernel[::-1, ::-1].swapaxes(2, 3)
            by_x = convolution(g, turned, (1, 1), of_x, lhs_dilation=strides)
        if kept_x is not None:
            pictures, as_kernel = kept_x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
            by_kernel = convolution(pictures, as_kernel, (1, 1), of_kernel, rhs_dilation=strides).transpose(1, 2, 0, 3)
        return by_x, by_kernel

    product.defvjp(forward, backward, symbolic_zeros=True)
    return product(x, kernel)


def conv(
    features: int, name: str, like: nn.Module, kernel: int = 3, stride: int = 1, padding=None, **kwargs
) -> nn.Conv:
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
        **{"kernel_init": UNIFORM, "conv_general_dilated": convolve, **kwargs},
    )


def dense(features: int, name: str, like: nn.Module, use_bias: bool = True, **kwargs) -> Callable[[Array], Array]:
    """A linear layer in the dtypes of the module `like`.

    The leading axes are joined for it: XLA's CPU compiler sums the gradient of a bias over one axis in a quarter of the
    time that two axes take. The reshapes cost nothing on any device.
    """
    types = {"dtype": like.dtype, "param_dtype": like.param_dtype}
    layer = nn.Dense(features, use_bias=use_bias, name=name, **types, **{"kernel_init": UNIFORM, **kwargs})
    return lambda x: layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], features)


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) over the last axis, in float32."""

    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch *tokens width"]) -> Float[Array, "batch *tokens width"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)  # as in `dense`
        centred = rows - rows.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        y = y * scale.astype(jnp.float32)[None] + bias.astype(jnp.float32)[None]
        return y.astype(self.dtype).reshape(x.shape)


class Downsample(nn.Module):
    """Half the size by a strided 3x3 convolution. `asymmetric` pads right and bottom only, as in the VAE's encoder."""

    asymmetric: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch half_h half_w channels"]:
        padding = ((0, 1), (0, 1)) if self.asymmetric else ((1, 1), (1, 1))
        return conv(x.shape[-1], "conv", self, stride=2, padding=padding)(x)


def _conv_of_doubled(doubled, kernel, strides, padding, *, dimension_numbers, **_):
    """What `lax.conv_general_dilated` gives for a 3x3 kernel on a picture doubled by nearest neighbour: as four 2x2
    kernels on the small picture, one for each place within a doubled pixel. 4/9 of the arithmetic, half of the time.

    A row of the doubled picture sees two rows of the small one: the even ones weigh them with k[0] and k[1] + k[2],
    the odd ones with k[0] + k[1] and k[2]; columns likewise.
    """
    batch, height, width, _ = doubled.shape
    x = doubled[:, ::2, ::2]

    def fold(kernel, axis, odd):
        first, middle, last = jnp.split(kernel, 3, axis)
        return jnp.concatenate([first + middle, last] if odd else [first, middle + last], axis)

    def phase(row, column):
        small = fold(fold(kernel, 0, row), 1, column)
        pad = ((1 - row, row), (1 - column, column))
        return convolve(x, small, (1, 1), pad, dimension_numbers=dimension_numbers)

    y = jnp.stack([jnp.stack([phase(row, 0), phase(row, 1)], 3) for row in (0, 1)], 2)
    return y.reshape(batch, height, width, -1)


class Upsample(nn.Module):
    """`upsampled_conv` with a convolution named `conv`."""

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        size: tuple[int, int] | None = None,
    ) -> Float[Array, "batch new_height new_width channels"]:
        return upsampled_conv(x, "conv", self, size)


def upsampled_conv(
    x: Float[Array, "batch height width channels"],
    name: str,
    like: nn.Module,
    size: tuple[int, int] | None = None,  # of the result: twice that of x, or one less; None = twice
    **kwargs,
) -> Float[Array, "batch new_height new_width channels"]:
    """Twice the size by nearest neighbour, then a 3x3 convolution (`kwargs` as of `conv`).

    The last row or column may be left out, for what had an odd number of them before it was halved.
    """
    batch, height, width, channels = x.shape
    doubled = (2 * height, 2 * width)
    size = doubled if size is None else size
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    x = x.reshape(batch, *doubled, channels)[:, : size[0], : size[1]]
    # On GPUs and TPUs four small convolutions would each fill the device less well than one.
    if hardware.backend() == "cpu" and size == doubled:
        kwargs = {"conv_general_dilated": _conv_of_doubled, **kwargs}
    return conv(channels, name, like, **kwargs)(x)


def timestep_embedding(timesteps: Float[Array, " batch"], width: int) -> Float[Array, "batch width"]:
    """Sinusoids of possibly fractional timesteps, cosines first: diffusers' `get_timestep_embedding` with
    flip_sin_to_cos=True, downscale_freq_shift=0 (Ho et al. 2020, after Vaswani et al. 2017). Float32."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def guidance_scale_embedding(scale: Float[Array, " batch"], width: int) -> Float[Array, "batch width"]:
    """Sinusoids of 1000 (w - 1), sines first: what models distilled by LCM are told of the guidance scale w.

    diffusers' `get_guidance_scale_embedding(w - 1)` (Luo et al. 2023, after Kingma et al. 2021); their pipelines count
    the scale from 1 = no guidance, the paper from 0. Float32.
    """
    half = width // 2
    frequencies = jnp.exp(jnp.arange(half, dtype=jnp.float32) * -(jnp.log(10000.0) / (half - 1)))
    angles = 1000.0 * (scale.astype(jnp.float32)[:, None] - 1.0) * frequencies[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class TimestepEmbedding(nn.Module):
    """The two-layer perceptron that follows the sinusoids; `condition` is projected and added to them."""

    features: int
    activation: Callable[[Array], Array] = nn.silu
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch width"],
        condition: Float[Array, "batch condition_width"] | None = None,
    ) -> Float[Array, "batch features"]:
        if condition is not None:
            x = x + dense(x.shape[-1], "cond_proj", self, False)(condition)
        x = self.activation(dense(self.features, "linear_1", self)(x))
        return dense(self.features, "linear_2", self)(x)
