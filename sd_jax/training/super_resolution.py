"""`config.method="super_resolution"`: a U-Net learns to denoise a large picture beside a small one of it.

The second stage of a cascade (Ho et al. 2022, arXiv 2106.15282), in latents as Stable Diffusion's x4 upscaler or in
pixels. The small picture is made of the large one in the step, noised at a level that is drawn evenly, and shown in
channels beside the noised latents; the level is the class label (`diffusion/low_resolution.py`). All else is `full`.
"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from sd_jax.diffusion import low_resolution, noise
from sd_jax.models.presets import ModelSpec
from sd_jax.models.vae import to_image
from sd_jax.training import full
from sd_jax.training.context import LEVEL, SMALL_PICTURE, Context, Keys
from sd_jax.training.full import Beside
from sd_jax.training.method import Batch
from sd_jax.types import Params

CHANNELS = 3  # of the small picture


def _show(context: Context, params: Params, batch: Batch, keys: Keys, size: tuple[int, int]) -> Beside:
    """The noised small picture in the latents' size (height, width), and its level."""
    cfg = context.config.super_resolution
    small = low_resolution.make_small(to_image(batch["pixels"]), cfg.factor)
    level = (noise.uniform(keys, LEVEL) * cfg.max_noise_level).astype(jnp.int32)
    noised = low_resolution.noised(small, noise.normal(keys, SMALL_PICTURE, small.shape[1:]), level)
    return Beside(low_resolution.enlarged(noised, size), level)


def _check(config: ConfigDict, spec: ModelSpec) -> None:
    cfg, data, unet, latent = config.super_resolution, config.data, spec.unet, spec.vae.latent_channels
    if unet.in_channels != latent + CHANNELS:
        raise ValueError(
            f"config.model.unet.in_channels={unet.in_channels}: config.method='super_resolution' needs "
            f"{latent + CHANNELS}, the latents' {latent} and the small picture's {CHANNELS}"
        )
    if not 1 <= cfg.max_noise_level <= low_resolution.MAX_NOISE_LEVEL:
        raise ValueError(
            f"config.super_resolution.max_noise_level={cfg.max_noise_level}: give 1 to {low_resolution.MAX_NOISE_LEVEL}"
        )
    if unet.num_class_embeds is None or unet.num_class_embeds < cfg.max_noise_level:
        raise ValueError(
            f"config.model.unet.num_class_embeds={unet.num_class_embeds}: give at least "
            f"config.super_resolution.max_noise_level={cfg.max_noise_level}, an embedding to each level"
        )
    if cfg.factor < 2:
        raise ValueError(f"config.super_resolution.factor={cfg.factor}: give 2 or more")
    if "vae" in spec.parts and cfg.factor != spec.vae.downscale:
        raise ValueError(
            f"config.super_resolution.factor={cfg.factor}: latents of this autoencoder are {spec.vae.downscale} times "
            "smaller than pictures, and the small picture has their size: give the same"
        )
    for key, side in (("resolution", data.resolution), ("buckets.step", data.buckets.step)):
        if side % cfg.factor:
            raise ValueError(
                f"config.data.{key}={side}: give a multiple of config.super_resolution.factor={cfg.factor}"
            )
    if data.cache_latents:
        raise ValueError(
            "config.data.cache_latents: config.method='super_resolution' makes the small picture of the pixels, which "
            "are not kept: set it to False"
        )
    full.check(config, spec)


SUPER_RESOLUTION = full.denoising(_show, check=_check, beside_latents=lambda spec: CHANNELS)
