"""Image to image: a picture is encoded, noised to a part of the way, and denoised with a prompt (Meng et al. 2022).

U-Nets made for depth see a map of it in a fifth channel: how near each place is, in the latents' size, from -1 to 1.
"""

from typing import TYPE_CHECKING

import numpy as np

from sd_jax.models.vae import to_image
from sd_jax.sampling import canvas
from sd_jax.sampling.denoising import Start, denoise
from sd_jax.sampling.text_to_image import size_of
from sd_jax.types import Latents

if TYPE_CHECKING:
    from sd_jax.sampling.clip import Clip
    from sd_jax.sampling.pipeline import Pipeline
    from sd_jax.types import Recipe

STRENGTH = 0.75


def image_to_image(
    pipe: "Pipeline", prompt, recipe: "Recipe", image, depth, given, output: str, callback, clip: "Clip | None" = None
) -> np.ndarray:
    """The job behind `Pipeline.image_to_image`, whose docstring says what the arguments are."""
    start = start_of(pipe, recipe, image)
    if depth is not None:
        if pipe.spec.unet.in_channels != pipe.spec.vae.latent_channels + 1:
            raise ValueError("depth= is for models that see depth, which this one does not: leave it out")
        start = start._replace(concat=canvas.latent_depth(canvas.read_depth(depth), *start.size))
    return pipe.finish(denoise(pipe, prompt, recipe, start, given, callback, clip=clip), output, recipe.tile)


def start_of(pipe: "Pipeline", recipe: "Recipe", image) -> Start:
    """The picture in the recipe's size, by default its own, as latents."""
    pixels = canvas.read_pixels(image)
    size = canvas.fit_size(*size_of(recipe, *pixels.shape[1:3]), pipe.spec.vae.downscale)
    pixels = canvas.resize(pixels, *size)
    clean = encoded(pipe, pixels, recipe.tile)
    return Start(clean.shape[1:3], clean, STRENGTH if recipe.strength is None else recipe.strength)


def encoded(pipe: "Pipeline", pixels, tile: int | None) -> Latents:
    return pipe.encode_image(to_image(pixels), tile)
