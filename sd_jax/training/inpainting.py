"""`config.method="inpainting"`: a U-Net learns to denoise a picture of which it sees all but a part.

Beside noised latents it reads a mask and the latents of the picture without what is masked, as sampling shows them
(`diffusion/inpainting.py`). Masks are drawn in the step, each from its example's key (`diffusion/random_masks.py`), so
runs repeat and resume to the bit. A model for text to image starts it: its first convolution gets weights of zero for
the new channels, as Stable Diffusion's inpainting models began, and answers as before. All else is `full`.
"""

import dataclasses

import jax
import numpy as np
from ml_collections import ConfigDict

from sd_jax.checkpoints.tensors import lazy
from sd_jax.diffusion.inpainting import beside_latents, without_masked
from sd_jax.diffusion.random_masks import Mix, check, random_masks
from sd_jax.models.presets import ModelSpec
from sd_jax.models.vae import to_image
from sd_jax.training import full
from sd_jax.training.context import MASK, Context, Keys
from sd_jax.training.full import Beside
from sd_jax.training.method import Batch
from sd_jax.types import AnyArray, Params


def masks_of(config: ConfigDict, pixels: AnyArray, keys: Keys) -> jax.Array:
    """[batch, height, width, 1], 1 where the pictures are hidden; the mix is that of `config.inpainting`."""
    return random_masks(keys, MASK, pixels.shape[1:3], Mix(**config.inpainting))


def check_masks(config: ConfigDict) -> None:
    """Raises ValueError, naming the key, for what masks cannot be, and where there are no pixels to be hidden."""
    check(Mix(**config.inpainting), "config.inpainting")
    if config.data.cache_latents:
        raise ValueError("config.data.cache_latents: masks hide pixels, which are not kept: set it to False")


def _show(context: Context, params: Params, batch: Batch, keys: Keys, size: tuple[int, int]) -> Beside:
    networks, masks = context.networks, masks_of(context.config, batch["pixels"], keys)
    kept = without_masked(to_image(batch["pixels"]), masks)
    posterior = networks.vae.apply({"params": params.get("vae", {})}, kept, method="encode")
    return Beside(beside_latents(masks, posterior.mean * networks.spec.vae.scaling_factor))


def _channels(spec: ModelSpec) -> int:
    return 1 + spec.vae.latent_channels


def _begin(spec: ModelSpec, params: Params) -> tuple[ModelSpec, Params]:
    """Of a model that reads latents alone, one that reads mask and masked picture too, and heeds neither yet."""
    if spec.unet.in_channels != spec.vae.latent_channels:
        return spec, params
    extra = _channels(spec)
    spec = dataclasses.replace(spec, unet=dataclasses.replace(spec.unet, in_channels=spec.unet.in_channels + extra))
    if "unet" in params:
        first = params["unet"]["conv_in"]
        kernel = lazy(np.pad(np.asarray(first["kernel"]), ((0, 0), (0, 0), (0, extra), (0, 0))))
        params = {**params, "unet": {**params["unet"], "conv_in": {**first, "kernel": kernel}}}
    return spec, params


def _check(config: ConfigDict, spec: ModelSpec) -> None:
    found, latent = spec.unet.in_channels, spec.vae.latent_channels
    if found != latent + _channels(spec):
        raise ValueError(
            f"config.model.unet.in_channels={found}: config.method='inpainting' needs {latent + _channels(spec)}: the "
            f"latents' {latent}, a mask, and the masked picture's {latent}; a model of {latent} is widened"
        )
    check_masks(config)
    full.check(config, spec)


INPAINTING = full.denoising(_show, check=_check, beside_latents=_channels, begin=_begin)
