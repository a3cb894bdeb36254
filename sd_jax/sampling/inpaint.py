"""Inpainting: what a mask covers is redrawn, everything else comes back as it was, to the bit.

Ordinary checkpoints are kept to the picture outside the mask at every call. U-Nets made for inpainting see the mask and
what surrounds it in channels of their own (9 in place of 4), and are left alone, as in diffusers.
"""

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from sd_jax.diffusion.inpainting import beside_latents, without_masked
from sd_jax.models.vae import to_image
from sd_jax.sampling import canvas
from sd_jax.sampling.denoising import Start, denoise
from sd_jax.sampling.text_to_image import size_of

if TYPE_CHECKING:
    from sd_jax.sampling.clip import Clip
    from sd_jax.sampling.pipeline import Pipeline
    from sd_jax.types import Pixels, Recipe

STRENGTH = 1.0


def inpaint(
    pipe: "Pipeline", prompt, recipe: "Recipe", image, mask, given, output: str, callback, clip: "Clip | None" = None
) -> np.ndarray:
    """The job behind `Pipeline.inpaint`, whose docstring says what the arguments are."""
    pixels, mask = _read(recipe, image, mask)
    box, part, part_mask = _worked_on(pipe, recipe, pixels, mask)
    start = _start(pipe, recipe, part, part_mask)
    hints = tuple(hint.part(box, *pixels.shape[1:3]) for hint in given.control)
    given = given._replace(control=hints)
    latents = denoise(pipe, prompt, recipe, start, given, callback, clip=clip)
    if output == "latents":
        return pipe.finish(latents, output)

    # Put it back
    drawn = canvas.resize(pipe.finish(latents, output, recipe.tile), box.height, box.width)
    whole = np.repeat(pixels, len(drawn) // len(pixels), axis=0)
    mask = np.repeat(mask, len(whole) // len(mask), axis=0)
    box.of(whole)[:] = canvas.composite(drawn, box.of(whole), box.of(mask))
    return whole


def start_of(pipe: "Pipeline", recipe: "Recipe", image, mask) -> Start:
    """Where the walk of this job begins."""
    _, part, part_mask = _worked_on(pipe, recipe, *_read(recipe, image, mask))
    return _start(pipe, recipe, part, part_mask)


def _read(recipe, image, mask) -> tuple["Pixels", canvas.Mask]:
    pixels = canvas.read_pixels(image)
    if mask is None and recipe.extend is None:
        raise ValueError("inpaint has no mask: give mask=, white where the picture is redrawn, or extend=")
    height, width = pixels.shape[1:3]
    mask = np.zeros((1, height, width, 1), np.float32) if mask is None else canvas.read_mask(mask, height, width)
    if recipe.extend is not None:
        return canvas.extend(pixels, mask, *recipe.extend)
    if not mask.any():
        raise ValueError("the mask is black all over: white is what is redrawn")
    return pixels, mask


def _worked_on(pipe, recipe, pixels, mask) -> tuple[canvas.Box, "Pixels", canvas.Mask]:
    """The part of the picture that is worked on, and it and its mask in the size of the work."""
    trained = pipe.spec.unet.sample_size * pipe.spec.vae.downscale
    default = (trained, trained) if recipe.only_masked else pixels.shape[1:3]
    size = canvas.fit_size(*size_of(recipe, *default), pipe.spec.vae.downscale)
    box = canvas.Box(0, 0, *pixels.shape[1:3])
    if recipe.only_masked:
        box = canvas.box_around(mask, recipe.padding, *size)
    return box, canvas.resize(box.of(pixels), *size), canvas.resize_mask(box.of(mask), *size)


def _start(pipe, recipe, pixels, mask) -> Start:
    image = to_image(pixels)
    clean = pipe.encode_image(image, recipe.tile)
    factor = pipe.spec.vae.downscale
    small_mask, concat = jnp.asarray(canvas.latent_mask(mask, factor)), None
    if pipe.spec.unet.in_channels == 2 * pipe.spec.vae.latent_channels + 1:
        redrawn = (mask >= 0.5).astype(np.float32)
        concat = beside_latents(redrawn, pipe.encode_image(without_masked(image, redrawn), recipe.tile))
        small_mask = None
    strength = STRENGTH if recipe.strength is None else recipe.strength
    from_noise = strength >= 1 and recipe.strength_steps == "diffusers"  # the others add noise to the picture
    return Start(clean.shape[1:3], clean, strength, small_mask, concat, from_noise=from_noise)
