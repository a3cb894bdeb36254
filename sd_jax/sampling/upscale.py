"""Upscaling: a large picture of a small one, by a U-Net that sees it, noised, and is told how much.

Models of this kind are Stable Diffusion's x4 upscaler, and what config.method='super_resolution' trains.
"""

import functools
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from sd_jax import sharding
from sd_jax.diffusion import low_resolution, noise
from sd_jax.models.vae import to_image
from sd_jax.sampling import canvas
from sd_jax.sampling.denoising import Start, denoise, keys_of
from sd_jax.sampling.text_to_image import size_of

if TYPE_CHECKING:
    from sd_jax.models.presets import ModelSpec
    from sd_jax.sampling.pipeline import Pipeline
    from sd_jax.types import Pixels, Recipe

NOISE_LEVEL = 20


def is_upscaler(spec: "ModelSpec") -> bool:
    return spec.unet.num_class_embeds is not None and spec.unet.in_channels == spec.vae.latent_channels + 3


def upscale(pipe: "Pipeline", prompt, recipe: "Recipe", image, image_noise, given, output: str, callback) -> np.ndarray:
    """The job behind `Pipeline.upscale`, whose docstring says what the arguments are."""
    if not is_upscaler(pipe.spec):
        raise ValueError(
            "this model is no upscaler: load one, such as stabilityai/stable-diffusion-x4-upscaler or a run of "
            "config.method='super_resolution'"
        )
    level = _level(pipe, recipe)
    small, size = _sized(pipe, recipe, canvas.read_pixels(image))
    texts = 1 if isinstance(prompt, str) else len(prompt)
    told = texts * recipe.batch_size if given.conditioning is None else len(given.conditioning.context)
    batch = max(len(small), told)  # each picture has noise of its own
    if not {len(small), told} <= {1, batch}:
        raise ValueError(f"image holds {len(small)} pictures, the prompts ask for {told}")
    shape = small.shape[1:]
    if image_noise is None:
        image_noise = _small_noise(keys_of(recipe, batch), shape)
    elif np.shape(image_noise) not in ((1, *shape), (batch, *shape)):
        raise ValueError(f"image_noise has the shape {np.shape(image_noise)}, small pictures {(batch, *shape)}")
    concat = _beside_latents(small, jnp.asarray(image_noise), np.int32(level), size)
    start = Start(size, concat=concat, class_label=level)
    return pipe.finish(denoise(pipe, prompt, recipe, start, given, callback), output)


def _level(pipe, recipe) -> int:
    level = NOISE_LEVEL if recipe.noise_level is None else recipe.noise_level
    highest = low_resolution.highest_level(pipe.spec.unet.num_class_embeds)
    if not 0 <= level <= highest:
        raise ValueError(f"noise_level={level}: this model knows levels 0 to {highest}")
    return level


def _sized(pipe, recipe, pixels: "Pixels") -> tuple["Pixels", tuple[int, int]]:
    """The small picture as it is shown, and the latents' height and width."""
    factor, (height, width) = pipe.spec.vae.downscale, pixels.shape[1:3]
    if factor == 1:
        for name in ("width", "height"):
            if getattr(recipe, name) is None:
                raise ValueError(f"{name}= is needed: a model that works on pixels does not say how much it enlarges")
        return pixels, size_of(recipe, height, width)
    height, width = canvas.fit_size(*size_of(recipe, height * factor, width * factor), factor)
    size = height // factor, width // factor
    return canvas.resize(pixels, *size), size


@functools.partial(sharding.jit, static_argnums=1)
def _small_noise(keys, shape):
    return noise.normal(keys, noise.SMALL_PICTURE, shape)


@functools.partial(sharding.jit, static_argnums=3)
def _beside_latents(pixels, image_noise, level, size):
    image = to_image(pixels)
    batch = max(len(image), len(image_noise))
    small, n = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in (image, image_noise.astype(jnp.float32)))
    return low_resolution.enlarged(low_resolution.noised(small, n, jnp.broadcast_to(level, batch)), size)
