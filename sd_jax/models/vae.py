"""The KL autoencoder of Stable Diffusion (Rombach et al. 2022, section 3.1), equal to diffusers' AutoencoderKL.

q(z | image) = N(mean, exp(logvar)),   mean, logvar = encode(image)                              (Eq. 1)
latents = scaling_factor * z,          image ~ decode(latents / scaling_factor)                  (Eq. 2)
KL(q || N(0, 1)) = sum (mean^2 + exp(logvar) - 1 - logvar) / 2                                   (Eq. 3)
"""

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax.models.attention import attention
from sd_jax.models.layers import Downsample, Dtype, GroupNorm, Upsample, conv, dense
from sd_jax.models.presets import IdentityConfig, VAEConfig
from sd_jax.models.remat import wrapped
from sd_jax.models.resnet import ResnetBlock
from sd_jax.types import Image, Pixels


@flax.struct.dataclass
class Posterior:
    """(Eq. 1): a diagonal Gaussian over unscaled latents."""

    mean: Float[Array, "batch height width channels"]
    logvar: Float[Array, "batch height width channels"]

    @staticmethod
    def from_moments(moments: Float[Array, "batch height width twice_channels"]) -> "Posterior":
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def sample(self, noise: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        """`noise` is of unit variance."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def kl(self) -> Float[Array, " batch"]:
        """(Eq. 3), summed over a picture's latents, in nats."""
        terms = 0.5 * (jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar)
        return terms.sum(axis=(1, 2, 3))


class VAEAttention(nn.Module):
    """Single-head self-attention over places, with its own group norm and shortcut."""

    norm_num_groups: int = 32
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = GroupNorm(self.norm_num_groups, 1e-6, name="group_norm", **types)(x)
        h = h.reshape(x.shape[0], -1, x.shape[-1])
        q, k, v = (dense(x.shape[-1], name, self)(h)[:, :, None] for name in ("to_q", "to_k", "to_v"))
        h = dense(x.shape[-1], "to_out_0", self)(attention(q, k, v)[:, :, 0])
        return x + h.reshape(x.shape)


class _Stack(nn.Module):
    """What encoder, decoder and their middle share."""

    config: VAEConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: str = "none"

    @property
    def types(self):
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def out(self, h, features: int):
        h = GroupNorm(self.config.norm_num_groups, 1e-6, silu=True, name="conv_norm_out", **self.types)(h)
        return conv(features, "conv_out", self)(h)


class _Level(nn.Module):
    """A run of resnets at one size, then a change of size (`resample`: None, "down" or "up")."""

    config: VAEConfig
    features: int
    num_resnets: int
    resample: str | None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, h):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        block = wrapped(ResnetBlock, "resnet", self.remat)
        for i in range(self.num_resnets):
            h = block(self.features, self.config.norm_num_groups, 1e-6, name=f"resnets_{i}", **types)(h)
        if self.resample == "down":
            h = Downsample(asymmetric=True, name="downsamplers_0", **types)(h)
        elif self.resample == "up":
            h = Upsample(name="upsamplers_0", **types)(h)
        return h


class _Middle(_Stack):
    @nn.compact
    def __call__(self, h):
        groups, features = self.config.norm_num_groups, self.config.block_out_channels[-1]
        resnet = wrapped(ResnetBlock, "resnet", self.remat)
        h = resnet(features, groups, 1e-6, name="resnets_0", **self.types)(h)
        h = wrapped(VAEAttention, "transformer", self.remat)(groups, name="attentions_0", **self.types)(h)
        return resnet(features, groups, 1e-6, name="resnets_1", **self.types)(h)


class Encoder(_Stack):
    """Image to the input of `quant_conv`."""

    @nn.compact
    def __call__(self, image):
        cfg = self.config
        h = conv(cfg.block_out_channels[0], "conv_in", self)(image.astype(self.dtype))
        for i, features in enumerate(cfg.block_out_channels):
            resample = "down" if i < len(cfg.block_out_channels) - 1 else None
            level = _Level(
                cfg, features, cfg.layers_per_block, resample, remat=self.remat, name=f"down_blocks_{i}", **self.types
            )
            h = level(h)
        h = _Middle(cfg, remat=self.remat, name="mid_block", **self.types)(h)
        return self.out(h, 2 * cfg.latent_channels)


class Decoder(_Stack):
    """Output of `post_quant_conv` to image."""

    @nn.compact
    def __call__(self, z):
        cfg = self.config
        h = conv(cfg.block_out_channels[-1], "conv_in", self)(z)
        h = _Middle(cfg, remat=self.remat, name="mid_block", **self.types)(h)
        for i, features in enumerate(reversed(cfg.block_out_channels)):
            resample = "up" if i < len(cfg.block_out_channels) - 1 else None
            level = _Level(
                cfg, features, cfg.layers_per_block + 1, resample, remat=self.remat, name=f"up_blocks_{i}", **self.types
            )
            h = level(h)
        return self.out(h, cfg.out_channels)


class VAE(nn.Module):
    """`encode` and `decode` are methods to `apply`; `__call__` runs both, for initialisation."""

    config: VAEConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: str = "none"

    def setup(self):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.encoder = Encoder(self.config, remat=self.remat, **types)
        self.decoder = Decoder(self.config, remat=self.remat, **types)
        self.quant_conv = nn.Conv(2 * self.config.latent_channels, (1, 1), **types)
        self.post_quant_conv = nn.Conv(self.config.latent_channels, (1, 1), **types)

    def encode(self, image: Image) -> Posterior:
        """Image in [-1, 1], sides divisible by `config.downscale` -> posterior of unscaled latents, float32."""
        check_divisible(image, self.config.downscale)
        return Posterior.from_moments(self.quant_conv(self.encoder(image)))

    def decode(self, z: Float[Array, "batch latent_height latent_width channels"]) -> Image:
        """Unscaled latents -> image, about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(z.astype(self.dtype)))

    def __call__(self, image: Image) -> Image:
        return self.decode(self.encode(image).mean)


class Identity(nn.Module):
    """In place of a VAE: pixels are their own latents. It has no parameters."""

    config: IdentityConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: str = "none"

    def encode(self, image: Image) -> Posterior:
        """Image in [-1, 1] -> itself, as a posterior as narrow as can be (deviation 3e-7)."""
        return Posterior(image.astype(jnp.float32), jnp.full(image.shape, -30.0, jnp.float32))

    def decode(self, z: Float[Array, "batch height width channels"]) -> Image:
        return z.astype(self.dtype)


def check_divisible(image: Image, factor: int) -> None:
    """Raises ValueError for a picture with a side that is no multiple of `factor`."""
    if image.shape[1] % factor or image.shape[2] % factor:
        raise ValueError(f"a picture of {image.shape[2]}x{image.shape[1]} has a side not divisible by {factor}")


def to_image(pixels: Pixels) -> Image:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def to_pixels(image: Image) -> Pixels:
    """Float [-1, 1] -> uint8 [0, 255], rounded and clipped."""
    return jnp.round(jnp.clip(image.astype(jnp.float32) * 127.5 + 127.5, 0.0, 255.0)).astype(jnp.uint8)
