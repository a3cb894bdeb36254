"""The U-Net of Stable Diffusion (Rombach et al. 2022; XL: Podell et al. 2023), as diffusers' UNet2DConditionModel.

Blocks are plain submodules, never scanned over: adapters find a layer by its path.
"""

import flax.linen as nn
import jax
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
    as_many,
    conv,
    dense,
    guidance_scale_embedding,
    timestep_embedding,
)
from sd_jax.models.presets import UNetConfig
from sd_jax.models.remat import wrapped
from sd_jax.models.resnet import ResnetBlock
from sd_jax.types import Conditioning, Control


class _Block(nn.Module):
    """What down, middle and up blocks share: how their parts are built.

    `level` is the down block whose number of heads and transformer blocks it has; -1: the middle.
    """

    config: UNetConfig
    features: int
    level: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: str = "none"

    @property
    def types(self):
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def resnet(self, index: int):
        block = wrapped(ResnetBlock, "resnet", self.remat)
        scale_shift = self.config.resnet_time_scale_shift == "scale_shift"
        groups = self.config.norm_num_groups
        return block(self.features, groups, scale_shift=scale_shift, name=f"resnets_{index}", **self.types)

    def attention(self, index: int):
        config, level = self.config, self.level
        return SpatialTransformer(
            config.of_block("num_attention_heads", level),
            config.norm_num_groups,
            self.remat,
            num_blocks=config.of_block("transformer_layers_per_block", level),
            linear=config.use_linear_projection,
            only_cross_attention=level >= 0 and config.of_block("only_cross_attention", level),
            name=f"attentions_{index}",
            **self.types,
        )


class DownBlock(_Block):
    """`layers_per_block` times (resnet, attention), then half the size; every state is also returned as a skip.

    `feature`, where there is one, is added where T2I-Adapters were trained to (`Control.features`).
    """

    attend: bool = True
    downsample: bool = True

    @nn.compact
    def __call__(self, h, time, context, feature=None):
        skips = []
        for i in range(self.config.layers_per_block):
            h = self.resnet(i)(h, time)
            if self.attend:
                h = self.attention(i)(h, context)
                if feature is not None and i == self.config.layers_per_block - 1:
                    h = as_many(h, feature) + feature
            skips.append(h)
        if self.downsample:
            h = Downsample(name="downsamplers_0", **self.types)(h)
            skips.append(h)
        if feature is not None and not self.attend:
            h = skips[-1] = as_many(h, feature) + feature
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
            h = self.resnet(i)(jnp.concatenate([h, as_many(skip, h)], axis=-1), time)
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


class Encoder(nn.Module):
    """The half of a U-Net that a ControlNet is a copy of.

    dtype: of the computation; param_dtype: of the parameters at initialisation; remat: what the backward pass
    computes again (a name in remat.py).
    """

    config: UNetConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: str = "none"

    @property
    def types(self):
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def encode(
        self,
        latents: Float[Array, "batch height width channels"],
        time: Float[Array, "batch time_width"],  # of `embed_time`
        context: Float[Array, "rows tokens wide"],  # the batch's, or several for each, one after the other
        hint: Float[Array, "batch height width first"] | None = None,  # added to the first state
        features: tuple[Array, ...] = (),  # `Control.features`
    ) -> tuple[Array, list[Array]]:
        """(what the middle block says, the state of every place that an up block reads): the batch's where no context
        has been read yet, else of as many rows as the context."""
        cfg = self.config
        depth = len(cfg.block_out_channels)
        # Constant channels from the start: the zero padding of later convolutions shows them where the border is
        h = conv(cfg.block_out_channels[0], "conv_in", self, bias_init=nn.initializers.normal(1.0))(latents)
        h = h if hint is None else h + hint
        skips = [h]
        for i, width in enumerate(cfg.block_out_channels):
            attend, last = cfg.attention_blocks[i], i == depth - 1
            block = DownBlock(
                cfg,
                width,
                i,
                remat=self.remat,
                attend=attend,
                downsample=not last,
                name=f"down_blocks_{i}",
                **self.types,
            )
            h, new_skips = block(h, time, context, features[i] if features else None)
            skips += new_skips
        width = cfg.block_out_channels[-1]
        h = MidBlock(cfg, width, -1, remat=self.remat, name="mid_block", **self.types)(h, time, context)
        return (h + features[depth] if len(features) > depth else h), skips

    def embed_time(
        self, timesteps: Float[Array, " batch"], conditioning: Conditioning
    ) -> Float[Array, "batch time_width"]:
        """What every resnet is told: the timestep, and what else the family tells in a vector of that width."""
        cfg = self.config
        width = cfg.block_out_channels[0]
        types = self.types

        def told(field: str, why: str):
            value = getattr(conditioning, field)
            if value is None:
                raise ValueError(f"this U-Net needs {field} in its conditioning (unet.{why})")
            return value

        scale = None
        if cfg.time_cond_proj_dim is not None:
            scale = told("guidance_scale", "time_cond_proj_dim")
            scale = guidance_scale_embedding(scale, cfg.time_cond_proj_dim).astype(self.dtype)
        time = timestep_embedding(timesteps, width).astype(self.dtype)
        time = TimestepEmbedding(4 * width, name="time_embedding", **types)(time, scale)
        if cfg.num_class_embeds is not None:
            labels = told("class_labels", "num_class_embeds")
            time = time + nn.Embed(cfg.num_class_embeds, 4 * width, name="class_embedding", **types)(labels)
        if cfg.addition_embed_type == "text":
            time = time + TextEmbedding(cfg, name="add_embedding", **types)(conditioning.context.astype(self.dtype))
        if cfg.addition_embed_type == "text_time":
            pooled, time_ids = (told(field, "addition_embed_type=text_time") for field in ("pooled", "time_ids"))
            sinusoids = timestep_embedding(time_ids.reshape(-1), cfg.addition_time_embed_dim)
            sinusoids = sinusoids.reshape(time_ids.shape[0], -1)
            facts = jnp.concatenate([pooled.astype(self.dtype), sinusoids.astype(self.dtype)], axis=-1)
            time = time + TimestepEmbedding(4 * width, name="add_embedding", **types)(facts)
        return time


class UNet(Encoder):
    """Predicts noise (or what prediction_type of the schedule says) from noisy latents, a timestep, a conditioning."""

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "batch height width channels"],
        timesteps: Float[Array, " batch"],
        conditioning: Conditioning,
        control: Control | None = None,  # added from outside
    ) -> Float[Array, "rows height width out_channels"]:
        """Of any height and width. Where `told_by_context_alone`, the conditioning may have several rows for each of
        the batch, all first ones, then all second ones: what comes before the first cross-attention is then done once.
        Raises ValueError where latents have another number of channels than the config, or the conditioning lacks what
        this family reads."""
        cfg = self.config
        control = jax.tree.map(lambda added: added.astype(self.dtype), control or Control())
        depth, types = len(cfg.block_out_channels), self.types
        if latents.shape[-1] != cfg.in_channels:
            found = latents.shape[-1]
            raise ValueError(f"latents have {found} channels, this U-Net takes {cfg.in_channels} (unet.in_channels)")
        context = conditioning.context.astype(self.dtype)
        time = self.embed_time(timesteps, conditioning)

        # Down and middle
        h, skips = self.encode(latents.astype(self.dtype), time, context, features=control.features)
        h = h if control.middle is None else h + control.middle
        if control.skips:
            skips = [as_many(skip, residual) + residual for skip, residual in zip(skips, control.skips, strict=True)]

        # Up, mirrored
        for i, features in enumerate(reversed(cfg.block_out_channels)):
            level, last = depth - 1 - i, i == depth - 1
            attend = cfg.attention_blocks[level]
            block = UpBlock(
                cfg, features, level, remat=self.remat, attend=attend, upsample=not last, name=f"up_blocks_{i}", **types
            )
            taken = [skips.pop() for _ in range(cfg.layers_per_block + 1)]
            h = block(h, taken, time, context, skips[-1].shape[1:3] if skips else None)

        # Out
        h = GroupNorm(cfg.norm_num_groups, 1e-5, silu=True, name="conv_norm_out", **types)(h)
        return conv(cfg.out_channels, "conv_out", self, kernel_init=ZEROS)(h)
