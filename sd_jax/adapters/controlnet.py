"""ControlNet (Zhang et al. 2023, arXiv 2302.05543): a copy of a U-Net's first half reads a picture, the hint, and adds
to the states of the U-Net itself, which stays as it is.

    h_0  = conv_in(x) + E(hint)                                                                              (Eq. 1)
    r_i  = Z_i(h_i)                   of every state h_i that the copy keeps, and of its middle block        (Eq. 2)
    h_i' = h_i + strength w_i r_i     in the U-Net (`types.Control`)                                         (Eq. 3)

E makes the hint as small as latents are; it does not hang on the step, and is made once. Its last convolution and all
Z_i begin as zeros, so that a new ControlNet changes nothing. Parameters are called as in diffusers' ControlNetModel.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sd_jax.models.layers import ZEROS, Dtype, conv
from sd_jax.models.presets import UNetConfig
from sd_jax.models.unet import Encoder
from sd_jax.types import Conditioning, Control, Params

EMBEDDING = "controlnet_cond_embedding"  # E, beside the copy


@dataclasses.dataclass(frozen=True)
class ControlNetConfig:
    """Of diffusers' ControlNetModel."""

    unet: UNetConfig = UNetConfig()  # that it is a copy of; what up blocks alone would read does not matter
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)  # each but the first halves the size
    conditioning_channels: int = 3
    conditioning_channel_order: str = "rgb"  # or "bgr"
    global_pool_conditions: bool = False  # residuals are means over the picture, in the shuffle model

    @property
    def downscale(self) -> int:
        """Pixels of the hint per latent, along a side."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    @property
    def num_residuals(self) -> int:
        """Of Eq. 2, the middle's included: 13 in SD 1.5, 10 in SDXL."""
        depth = len(self.unet.block_out_channels)
        return 1 + depth * self.unet.layers_per_block + (depth - 1) + 1


class HintEmbedding(nn.Module):
    """E of Eq. 1."""

    config: ControlNetConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, hint: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch h w features"]:  # [0, 1]; -1 where a picture is to be redrawn
        cfg = self.config
        widths = cfg.conditioning_embedding_out_channels
        hint = hint[..., ::-1] if cfg.conditioning_channel_order == "bgr" else hint
        h = nn.silu(conv(widths[0], "conv_in", self)(hint.astype(self.dtype)))
        for i, (width, wider) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            h = nn.silu(conv(width, f"blocks_{2 * i}", self)(h))
            h = nn.silu(conv(wider, f"blocks_{2 * i + 1}", self, stride=2)(h))
        return conv(cfg.unet.block_out_channels[0], "conv_out", self, kernel_init=ZEROS)(h)


class ControlNet(Encoder):
    """The copy and its Z_i. `config` is the U-Net's."""

    global_pool_conditions: bool = False

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "batch h w channels"],  # as the U-Net sees them; what it sees beside is not looked at
        timesteps: Float[Array, " batch"],
        conditioning: Conditioning,  # may have several rows for each of the batch, as for the U-Net
        embedded: Float[Array, "batch h w features"],  # of `HintEmbedding`
    ) -> Control:
        """The residuals of Eq. 2."""
        latents = latents[..., : self.config.in_channels].astype(self.dtype)
        time, context = self.embed_time(timesteps, conditioning), conditioning.context.astype(self.dtype)
        h, skips = self.encode(latents, time, context, embedded.astype(self.dtype))

        def zero(state, name):
            residual = conv(state.shape[-1], name, self, kernel=1, kernel_init=ZEROS)(state)
            return residual.mean((1, 2), keepdims=True) if self.global_pool_conditions else residual

        residuals = tuple(zero(skip, f"controlnet_down_blocks_{i}") for i, skip in enumerate(skips))
        return Control(residuals, zero(h, "controlnet_mid_block"))


def shapes_of(config: ControlNetConfig) -> Params:
    """All parameters, as jax.ShapeDtypeStruct."""
    unet = config.unet
    side = 2 ** (len(unet.block_out_channels) - 1)
    told = Conditioning(jnp.zeros((1, 1, unet.cross_attention_dim)))
    if unet.num_class_embeds is not None:
        told = told.replace(class_labels=jnp.zeros(1, jnp.int32))
    if unet.addition_embed_type == "text_time":
        pooled = unet.projection_class_embeddings_input_dim - unet.addition_time_embed_dim
        told = told.replace(pooled=jnp.zeros((1, pooled)), time_ids=jnp.zeros((1, 1)))
    latents, embedded = (jnp.zeros((1, side, side, c)) for c in (unet.in_channels, unet.block_out_channels[0]))
    pixels = jnp.zeros((1, config.downscale, config.downscale, config.conditioning_channels))
    key = jax.random.key(0)
    made = jax.eval_shape(lambda: ControlNet(unet).init(key, latents, jnp.zeros(1), told, embedded)["params"])
    return {**made, EMBEDDING: jax.eval_shape(lambda: HintEmbedding(config).init(key, pixels)["params"])}


def init(key: Key[Array, ""], config: ControlNetConfig, unet: Params) -> Params:
    """A new one, float32, that changes no picture: copies of the U-Net's parameters, zeros, and a random E."""
    shapes = shapes_of(config)
    pixels = jnp.zeros((1, config.downscale, config.downscale, config.conditioning_channels))
    made = {EMBEDDING: HintEmbedding(config).init(key, pixels)["params"]}
    for name in shapes.keys() - made.keys():
        if name in unet:
            made[name] = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), unet[name])
        else:
            made[name] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes[name])
    return made
