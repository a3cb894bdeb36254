"""The tiny autoencoder (madebyollin/taesd), equal to diffusers' AutoencoderTiny: distilled from a VAE, which it stands
in for where speed counts more than detail.

    latents = encoder((image + 1) / 2),   image ~ 2 decoder(3 tanh(latents / 3)) - 1        (Eq. 1)

Both are flat lists of layers, numbered as in the original with its activations and resamplings; nothing is normalised.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax.models.layers import ZEROS, Dtype, conv, upsampled_conv
from sd_jax.models.presets import TinyVAEConfig
from sd_jax.models.remat import wrapped
from sd_jax.models.vae import Posterior, check_divisible
from sd_jax.types import Image

LOGVAR = -30.0  # the encoder gives a point: the least that Posterior knows


class _Block(nn.Module):
    """Three convolutions, added to their input."""

    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = nn.relu(conv(self.features, "conv_0", self)(x))
        h = nn.relu(conv(self.features, "conv_2", self)(h))
        return nn.relu(conv(self.features, "conv_4", self, kernel_init=ZEROS)(h) + x)


class _Layers(nn.Module):
    """What encoder and decoder share."""

    config: TinyVAEConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: str = "none"

    def blocks(self, h, features: int, begin: int, count: int):
        block = wrapped(_Block, "resnet", self.remat)
        for i in range(begin, begin + count):
            h = block(features, dtype=self.dtype, param_dtype=self.param_dtype, name=f"layers_{i}")(h)
        return h


class _Encoder(_Layers):
    @nn.compact
    def __call__(self, image):
        cfg, index = self.config, 0
        h = (image.astype(self.dtype) + 1) / 2
        for features, count in zip(cfg.encoder_block_out_channels, cfg.num_encoder_blocks, strict=True):
            halved = {"stride": 2, "use_bias": False} if index else {}
            h = conv(features, f"layers_{index}", self, **halved)(h)
            h = self.blocks(h, features, index + 1, count)
            index += 1 + count
        return conv(cfg.latent_channels, f"layers_{index}", self)(h)


class _Decoder(_Layers):
    @nn.compact
    def __call__(self, z):
        cfg, index = self.config, 2
        h = 3 * jnp.tanh(z / 3)
        h = nn.relu(conv(cfg.decoder_block_out_channels[0], "layers_0", self)(h))
        for level, count in enumerate(cfg.num_decoder_blocks):
            if level > 0:
                h = upsampled_conv(h, f"layers_{index + 1}", self, use_bias=False)
                index += 2
            h = self.blocks(h, cfg.decoder_block_out_channels[level], index, count)
            index += count
        return 2 * conv(cfg.out_channels, f"layers_{index}", self)(h) - 1


class TinyVAE(nn.Module):
    """`encode` and `decode` are methods to `apply`, as those of `VAE`; `__call__` runs both, for initialisation."""

    config: TinyVAEConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: str = "none"

    def setup(self):
        kwargs = {"dtype": self.dtype, "param_dtype": self.param_dtype, "remat": self.remat}
        self.encoder = _Encoder(self.config, **kwargs)
        self.decoder = _Decoder(self.config, **kwargs)

    def encode(self, image: Image) -> Posterior:
        """Image in [-1, 1], sides divisible by `config.downscale` -> a posterior that is a point, float32."""
        check_divisible(image, self.config.downscale)
        mean = self.encoder(image).astype(jnp.float32)
        return Posterior(mean, jnp.full_like(mean, LOGVAR))

    def decode(self, z: Float[Array, "batch latent_height latent_width channels"]) -> Image:
        """Latents -> image, about [-1, 1], not clipped."""
        return self.decoder(z.astype(self.dtype))

    def __call__(self, image: Image) -> Image:
        return self.decode(self.encode(image).mean)
