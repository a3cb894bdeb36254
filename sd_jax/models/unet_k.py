"""k-diffusion's U-Net, as diffusers' UNet2DConditionModel of K blocks: that of Stability's x2 latent upscaler.

It differs from Stable Diffusion's in nearly all: every norm is scaled and shifted by what the U-Net is told (AdaGN:
Dhariwal & Nichol 2021, arXiv 2105.05233, section 3), sizes are halved and doubled by a fixed filter, one state of each
level is joined on the way up, attention has no feed-forward, there is no middle, and the first and the last convolution
are 1x1. The noise level c (ln(sigma) / 4: Karras et al. 2022, Table 1) is told by Fourier features of learnt
frequencies f, cos(2 pi f c) and sin(2 pi f c).
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sd_jax.models.attention import attention
from sd_jax.models.layers import ZEROS, Dtype, LayerNorm, TimestepEmbedding, conv, dense, group_norm
from sd_jax.models.presets import KUNetConfig
from sd_jax.models.remat import wrapped
from sd_jax.types import Conditioning

GROUP = 32  # channels that a norm joins
_gelu = functools.partial(nn.gelu, approximate=False)


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and shift are linear in what the U-Net is told."""

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], told: Float[Array, "batch told_width"]
    ) -> Float[Array, "batch height width channels"]:
        channels = x.shape[-1]
        scale, shift = jnp.split(dense(2 * channels, "linear", self)(told), 2, axis=-1)
        return group_norm(x, 1 + scale, shift, channels // GROUP, 1e-5).astype(self.dtype)


class ResnetBlock(nn.Module):
    """norm, GELU, conv, norm, GELU, conv, + shortcut (diffusers' ResnetBlockCondNorm2D).

    `inner` channels are between the two convolutions.
    """

    inner: int
    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], told: Float[Array, "batch told_width"]
    ) -> Float[Array, "batch height width features"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = _gelu(AdaptiveGroupNorm(name="norm1", **types)(x, told))
        h = conv(self.inner, "conv1", self)(h)
        h = _gelu(AdaptiveGroupNorm(name="norm2", **types)(h, told))
        h = conv(self.features, "conv2", self, kernel_init=ZEROS)(h)
        if x.shape[-1] != self.features:
            x = conv(self.features, "conv_shortcut", self, kernel=1, use_bias=False)(x)
        return x + h


class Attention(nn.Module):
    """Multi-head attention, its linears with biases, to itself or to a context that is normalised first."""

    head_dim: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        context: Float[Array, "batch words context_width"] | None = None,
    ) -> Float[Array, "batch height width channels"]:
        batch, height, width, channels = x.shape
        places = x.reshape(batch, height * width, channels)
        if context is None:
            context = places
        else:
            context = LayerNorm(name="norm_cross", dtype=self.dtype, param_dtype=self.param_dtype)(context)
        split = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)  # noqa: E731
        q = split(dense(channels, "to_q", self)(places))
        k, v = (split(dense(channels, name, self)(context)) for name in ("to_k", "to_v"))
        return dense(channels, "to_out_0", self, kernel_init=ZEROS)(attention(q, k, v).reshape(x.shape))


class AttentionBlock(nn.Module):
    """Attention to the words, before it to itself if asked for, each after a norm and added (KAttentionBlock)."""

    head_dim: int
    to_itself: bool
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        told: Float[Array, "batch told_width"],
        context: Float[Array, "batch words context_width"],
    ) -> Float[Array, "batch height width channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attend = functools.partial(Attention, self.head_dim, **types)
        if self.to_itself:
            x = x + attend(name="attn1")(AdaptiveGroupNorm(name="norm1", **types)(x, told))
        return x + attend(name="attn2")(AdaptiveGroupNorm(name="norm2", **types)(x, told), context)


def halve(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch half_h half_w channels"]:
    """Half the size, an even one, by the filter (1, 3, 3, 1) / 8 along both axes; borders are mirrored."""
    for axis in (1, 2):
        padded, size = _mirrored(x, axis), x.shape[axis]
        taps = [lax.slice_in_dim(padded, tap, tap + size - 1, 2, axis) for tap in range(4)]
        x = (taps[0] + 3 * (taps[1] + taps[2]) + taps[3]) / 8
    return x


def double(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch twice_h twice_w channels"]:
    """Twice the size by the same filter: 3/4 of a value and 1/4 of its neighbour on either side."""
    for axis in (1, 2):
        padded, size = _mirrored(x, axis), x.shape[axis]
        neighbours = [lax.slice_in_dim(padded, side, side + size, 1, axis) for side in (0, 2)]
        shape = [2 * length if i == axis else length for i, length in enumerate(x.shape)]
        x = jnp.stack([(3 * x + neighbour) / 4 for neighbour in neighbours], axis + 1).reshape(shape)
    return x


def _mirrored(x: Array, axis: int) -> Array:
    """With one value more at both ends of an axis."""
    return jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)], mode="reflect")


class FourierFeatures(nn.Module):
    """Cosines and sines of a number, of learnt frequencies (Tancik et al. 2020). Float32."""

    features: int
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, " batch"]) -> Float[Array, "batch features"]:
        frequencies = self.param("scale", nn.initializers.normal(1.0), (self.features // 2,), self.param_dtype)
        angles = 2 * jnp.pi * x.astype(jnp.float32)[:, None] * frequencies.astype(jnp.float32)[None]
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Block(nn.Module):
    """Resnets of one size, each with an attention behind it where the level attends.

    On the way up the last one has as many channels as the level above.
    """

    config: KUNetConfig
    level: int
    up: bool
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, h, told, context):
        cfg, level = self.config, self.level
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        resnet, attend = wrapped(ResnetBlock, "resnet", self.remat), wrapped(AttentionBlock, "transformer", self.remat)
        width = cfg.block_out_channels[level]
        to_itself = level == len(cfg.block_out_channels) - 1
        for i in range(cfg.layers_per_block):
            last = self.up and i == cfg.layers_per_block - 1
            features = cfg.block_out_channels[max(level - 1, 0)] if last else width
            h = resnet(width, features, name=f"resnets_{i}", **types)(h, told)
            if cfg.attention_blocks[level]:
                h = attend(cfg.attention_head_dim, to_itself, name=f"attentions_{i}", **types)(h, told, context)
        return h


class KUNet(nn.Module):
    """Answers what the prediction type "edm" asks, from noisy latents beside enlarged small ones, and a prompt.

    dtype: of the computation; param_dtype: of the parameters at initialisation; remat: what the backward pass
    computes again (a name in remat.py).
    """

    config: KUNetConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "batch height width channels"],
        timesteps: Float[Array, " batch"],  # ln(sigma) / 4
        conditioning: Conditioning,  # with its pooled state
        control: None = None,  # none is made for it
    ) -> Float[Array, "batch height width latent_channels"]:
        """Without the last of its `out_channels`. Raises ValueError where latents have another number of channels than
        the config or sides that are no multiples of `config.multiple`, and where there is no pooled state."""
        cfg, depth = self.config, len(self.config.block_out_channels)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        height, width, channels = latents.shape[1:]
        if channels != cfg.in_channels:
            raise ValueError(f"latents have {channels} channels, this U-Net takes {cfg.in_channels} (unet.in_channels)")
        if height % cfg.multiple or width % cfg.multiple:
            raise ValueError(
                f"latents of {width}x{height}: this U-Net takes sides that are multiples of {cfg.multiple}"
            )
        told, context = self._told(timesteps, conditioning), conditioning.context.astype(self.dtype)

        h = conv(cfg.block_out_channels[0], "conv_in", self, kernel=1)(latents.astype(self.dtype))
        block = functools.partial(Block, cfg, remat=self.remat, **types)
        skips = []
        for level in range(depth):
            h = block(level, up=False, name=f"down_blocks_{level}")(h, told, context)
            if level < depth - 1:
                skips.append(h)
                h = halve(h)
        for i, level in enumerate(reversed(range(depth))):
            if i:
                h = jnp.concatenate([double(h), skips.pop()], axis=-1)
            h = block(level, up=True, name=f"up_blocks_{i}")(h, told, context)
        return conv(cfg.out_channels, "conv_out", self, kernel=1, kernel_init=ZEROS)(h)[..., :-1]

    def _told(self, timesteps, conditioning) -> Float[Array, "batch told_width"]:
        """The noise level of the latents, that of the small picture, which is always 0, and the prompt as a whole."""
        cfg, pooled = self.config, conditioning.pooled
        if pooled is None:
            raise ValueError("this U-Net needs pooled in its conditioning (unet.mapping_cond_dim)")
        width, half = 2 * cfg.block_out_channels[0], (cfg.mapping_cond_dim - pooled.shape[-1]) // 2
        cosines, sines = jnp.ones((len(pooled), half)), jnp.zeros((len(pooled), half))
        condition = jnp.concatenate([cosines, sines, pooled.astype(jnp.float32)], axis=-1).astype(self.dtype)
        noise = FourierFeatures(width, self.param_dtype, name="time_proj")(timesteps).astype(self.dtype)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return _gelu(TimestepEmbedding(width, _gelu, name="time_embedding", **types)(noise, condition))
