"""The three networks of a text-to-image model as one value, hashable, so that it can be a static argument of `jit`."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sd_jax.models.clip_text import CLIPText
from sd_jax.models.presets import ModelSpec
from sd_jax.models.unet import UNet
from sd_jax.models.vae import VAE
from sd_jax.types import Params


class Networks(NamedTuple):
    """The modules of a model, in the dtypes of a run."""

    spec: ModelSpec
    unet: UNet
    vae: VAE
    text_encoder: CLIPText

    @staticmethod
    def of(spec: ModelSpec, dtype: str = "float32", remat: bool = False) -> "Networks":
        kwargs = {"dtype": jnp.dtype(dtype), "remat": remat}
        return Networks(spec, UNet(spec.unet, **kwargs), VAE(spec.vae, **kwargs), CLIPText(spec.text_encoder, **kwargs))

    def with_scaling_factor(self, factor: float) -> "Networks":
        vae = dataclasses.replace(self.spec.vae, scaling_factor=factor)
        return self._replace(spec=dataclasses.replace(self.spec, vae=vae), vae=self.vae.clone(config=vae))

    def init(self, part: str, key: jax.Array) -> Params:
        """Fresh parameters of one part, float32."""
        spec = self.spec
        side = 2 ** (len(spec.unet.block_out_channels) - 1)
        latent = jnp.zeros((1, side, side, spec.unet.in_channels))
        context = jnp.zeros((1, 1, spec.unet.cross_attention_dim))
        image = jnp.zeros((1, spec.vae.downscale, spec.vae.downscale, spec.vae.in_channels))
        arguments = {
            "unet": (latent, jnp.zeros((1,)), context),
            "vae": (image,),
            "text_encoder": (jnp.zeros((1, 1), jnp.int32),),
        }[part]
        return getattr(self, part).init(key, *arguments)["params"]
