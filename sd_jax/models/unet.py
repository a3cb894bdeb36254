"""The U-Net of Stable Diffusion 1.x (Rombach et al. 2022), equal to diffusers' UNet2DConditionModel.

Blocks are plain submodules, never scanned over: adapters find a layer by its path.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax.models.attention import SpatialTransformer, attention
from sd_jax.models.layers import (
    ZEROS,
    Downsample,
    Dtype,
    GroupNorm,
    LayerNorm,
    TimestepEmbedding,
    Upsample,
    conv,
    dense,
    timestep_embedding,
)
from sd_jax.models.presets import UNetConfig
from sd_jax.models.resnet import ResnetBlock


class _Block(nn.Module):
    """What down, middle and up blocks share: how their parts are built."""

    config: UNetConfig
    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: bool = False

    @property
    def types(self):
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def resnet(self, index: int):
        block = nn.remat(ResnetBlock) if self.remat else ResnetBlock
        scale_shift = self.config.resnet_time_scale_shift == "scale_shift"
        groups = self.config.norm_num_groups
        return block(self.features, groups, scale_shift=scale_shift, name=f"resnets_{index}", **self.types)

    def attention(self, index: int):
        return SpatialTransformer(
            self.config.num_attention_heads,
            self.config.norm_num_groups,
            self.remat,
            name=f"attentions_{index}",
            **self.types,
        )


class DownBlock(_Block):
    """`layers_per_block` times (resnet, attention), then half the size; every state is also returned as a skip."""

    attend: bool = True
    downsample: bool = True

    @nn.compact
    def __call__(self, h, time, context):
        skips = []
        for i in range(self.config.layers_per_block):
            h = self.resnet(i)(h, time)
            if self.attend:
                h = self.attention(i)(h, context)
            skips.append(h)
        if self.downsample:
            h = Downsample(name="downsamplers_0", **self.types)(h)
            skips.append(h)
        return h, skips


class MidBlock(_Block):
    """resnet, attention, resnet at the smallest size."""

    @nn.compact
    def __call__(self, h, time, context):
        h = self.resnet(0)(h, time)
        h = self.attention(0)(h, context)
        return self.resnet(1)(h, time)


class UpBlock(_Block):
    """`layers_per_block + 1` times (join a skip, resnet, attention), then the size of the next skip, about twice."""

    attend: bool = True
    upsample: bool = True

    @nn.compact
    def __call__(self, h, skips, time, context, size):
        for i, skip in enumerate(skips):
            h = self.resnet(i)(jnp.concatenate([h, skip], axis=-1), time)
            if self.attend:
                h = self.attention(i)(h, context)
        return Upsample(name="upsamplers_0", **self.types)(h, size) if self.upsample else h


class TextEmbedding(nn.Module):
    """The whole prompt as one vector of the timestep embedding's width (diffusers' addition_embed_type="text").

    Deep Floyd IF's way: norm, attention pooling (Radford et al. 2021, section 2.4), linear, norm.
    """

    config: UNetConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, context: Float[Array, "batch words width"]) -> Float[Array, "batch time_width"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = LayerNorm(1e-5, name="norm1", **types)(context)
        h = AttentionPooling(self.config.addition_embed_type_num_heads, name="pool", **types)(h)
        h = dense(4 * self.config.block_out_channels[0], "proj", self)(h)
        return LayerNorm(1e-5, name="norm2", **types)(h)


class AttentionPooling(nn.Module):
    """The mean of a sequence asks the sequence, itself included."""

    heads: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch words width"]) -> Float[Array, "batch width"]:
        batch, _, width = x.shape
        place = self.param("positional_embedding", nn.initializers.normal(width**-0.5), (1, width), self.param_dtype)
        mean = x.mean(axis=1, keepdims=True) + place[None].astype(self.dtype)
        x = jnp.concatenate([mean, x], axis=1)
        split = lambda y: y.reshape(*y.shape[:2], self.heads, width // self.heads)  # noqa: E731
        q = split(dense(width, "q_proj", self)(mean))
        k, v = (split(dense(width, name, self)(x)) for name in ("k_proj", "v_proj"))
        return attention(q, k, v).reshape(batch, width)


class UNet(nn.Module):
    """Predicts noise (or what the schedule's prediction_type says) from noisy latents, a timestep and a context.

    dtype: of the computation; param_dtype: of the parameters at initialisation; remat: recompute resnets and
    transformer blocks in the backward pass instead of keeping their insides.
    """

    config: UNetConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "batch height width channels"],
        timesteps: Float[Array, " batch"],
        context: Float[Array, "batch words context_width"],
    ) -> Float[Array, "batch height width out_channels"]:
        """Of any height and width. Raises ValueError where latents have another number of channels than the config."""
        cfg = self.config
        depth = len(cfg.block_out_channels)
        if latents.shape[-1] != cfg.in_channels:
            found = latents.shape[-1]
            raise ValueError(f"latents have {found} channels, this U-Net takes {cfg.in_channels} (unet.in_channels)")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h, context = latents.astype(self.dtype), context.astype(self.dtype)

        # Time
        time = timestep_embedding(timesteps, cfg.block_out_channels[0]).astype(self.dtype)
        time = TimestepEmbedding(4 * cfg.block_out_channels[0], name="time_embedding", **types)(time)
        if cfg.addition_embed_type is not None:
            time = time + TextEmbedding(cfg, name="add_embedding", **types)(context)

        # Down
        # Constant channels from the start: the zero padding of later convolutions shows them where the border is
        h = conv(cfg.block_out_channels[0], "conv_in", self, bias_init=nn.initializers.normal(1.0))(h)
        skips = [h]
        for i, features in enumerate(cfg.block_out_channels):
            attend, last = cfg.attention_blocks[i], i == depth - 1
            block = DownBlock(
                cfg, features, remat=self.remat, attend=attend, downsample=not last, name=f"down_blocks_{i}", **types
            )
            h, new_skips = block(h, time, context)
            skips += new_skips

        # Middle
        h = MidBlock(cfg, cfg.block_out_channels[-1], remat=self.remat, name="mid_block", **types)(h, time, context)

        # Up, mirrored
        for i, features in enumerate(reversed(cfg.block_out_channels)):
            attend, last = cfg.attention_blocks[depth - 1 - i], i == depth - 1
            block = UpBlock(
                cfg, features, remat=self.remat, attend=attend, upsample=not last, name=f"up_blocks_{i}", **types
            )
            taken = [skips.pop() for _ in range(cfg.layers_per_block + 1)]
            h = block(h, taken, time, context, skips[-1].shape[1:3] if skips else None)

        # Out
        h = GroupNorm(cfg.norm_num_groups, 1e-5, silu=True, name="conv_norm_out", **types)(h)
        return conv(cfg.out_channels, "conv_out", self, kernel_init=ZEROS)(h)
