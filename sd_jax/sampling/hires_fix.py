"""Hires fix: a picture in the size that the model was trained at, enlarged, then denoised a part of the way again."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_jax.sampling.denoising import Given, Start, count_walked, denoise
from sd_jax.sampling.image_to_image import encoded
from sd_jax.sampling.resize import METHODS, resize_latents
from sd_jax.sampling.text_to_image import latent_size
from sd_jax.sampling.upscale import enlarged

if TYPE_CHECKING:
    from sd_jax.sampling.clip import Clip
    from sd_jax.sampling.pipeline import Pipeline
    from sd_jax.types import Recipe

STRENGTH, SCALE = 0.4, 2.0


def hires_fix(
    pipe: "Pipeline",
    prompt,
    recipe: "Recipe",
    given: Given,
    output: str,
    callback,
    clip: "Clip | None" = None,
    enlarger: Any = None,
) -> np.ndarray:
    """The job behind `Pipeline.hires_fix`, whose docstring says what the arguments are."""
    first, second, again = _passes(pipe, recipe)
    recipe = dataclasses.replace(recipe, tile_prompts=None)  # those are for the tiles of the large picture
    small = denoise(pipe, prompt, recipe, first, given, callback, clip=clip)
    if recipe.upscaler == "lanczos" or enlarger is not None:
        factor = pipe.spec.vae.downscale
        sides = (side * factor for side in second.size)
        pixels = pipe.finish(small, "images", recipe.tile)
        clean = encoded(pipe, enlarged(pixels, *sides, enlarger, recipe.tile), recipe.tile)
    else:
        clean = resize_latents(small, *second.size, recipe.upscaler)
    if callback is not None:
        walked, told = count_walked(pipe, recipe, first), callback
        callback = lambda step, x, denoised: told(walked + step, x, denoised)  # noqa: E731
    given = given._replace(latents=None, draws=None)  # which have the first size
    latents = denoise(pipe, prompt, again, second._replace(clean=clean), given, callback, clip=clip)
    return pipe.finish(latents, output, recipe.tile)


def count_both(pipe: "Pipeline", recipe: "Recipe") -> int:
    """How many steps of the sampler both passes take."""
    first, second, again = _passes(pipe, recipe)
    return count_walked(pipe, recipe, first) + count_walked(pipe, again, second._replace(clean=()))


def _passes(pipe, recipe) -> tuple[Start, Start, "Recipe"]:
    """The first start, the second one without its picture, and the recipe of the second pass."""
    scale = SCALE if recipe.scale is None else recipe.scale
    if scale <= 1:
        raise ValueError(f"scale={scale:g}: more than 1 is needed")
    if recipe.upscaler not in (*METHODS, "lanczos"):
        raise ValueError(f"upscaler={recipe.upscaler!r} is unknown: use {', '.join(METHODS)} or lanczos")
    size = latent_size(pipe.spec, recipe)
    strength = STRENGTH if recipe.strength is None else recipe.strength
    second = Start(tuple(round(side * scale) for side in size), None, strength, first_pass_steps=recipe.steps)
    if recipe.second_steps is not None and recipe.second_steps < 1:
        raise ValueError(f"second_steps={recipe.second_steps}: at least 1 is needed")
    return Start(size), second, dataclasses.replace(recipe, steps=recipe.second_steps or recipe.steps)
