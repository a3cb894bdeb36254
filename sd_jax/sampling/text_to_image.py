"""Text to image: latents from noise alone, decoded. On the way a refiner may take over.

Distilled models are made for few steps, each on a ladder of its own: SDXL Turbo and Lightning for schedule="trailing"
(with euler_ancestral and euler) and guidance_scale=1, models of LCM for sampler="lcm", schedule="lcm".
"""

from typing import TYPE_CHECKING

import numpy as np

from sd_jax.sampling.denoising import Start, denoise

if TYPE_CHECKING:
    from sd_jax.sampling.clip import Clip
    from sd_jax.sampling.pipeline import Pipeline
    from sd_jax.types import Recipe


def text_to_image(
    pipe: "Pipeline",
    prompt,
    recipe: "Recipe",
    given,
    output: str,
    callback,
    refiner: "Pipeline | None" = None,
    clip: "Clip | None" = None,
) -> np.ndarray:
    """The job behind `Pipeline.text_to_image`, whose docstring says what the arguments are."""
    start = Start(latent_size(pipe.spec, recipe))
    return pipe.finish(denoise(pipe, prompt, recipe, start, given, callback, refiner, clip), output, recipe.tile)


def latent_size(spec, recipe: "Recipe") -> tuple[int, int]:
    """(height, width) of a picture's latents. Raises ValueError for a size that the autoencoder cannot make."""
    factor = spec.vae.downscale
    trained = spec.unet.sample_size * factor
    sides = size_of(recipe, trained, trained)
    for name, side in zip(("height", "width"), sides, strict=True):
        if side % factor:
            near = max(1, round(side / factor)) * factor
            raise ValueError(f"{name}={side} is not a multiple of {factor}: use {near}")
    return sides[0] // factor, sides[1] // factor


def size_of(recipe: "Recipe", height: int, width: int) -> tuple[int, int]:
    """(height, width) in pixels: the recipe's, by default the given ones. Raises ValueError for less than one pixel."""
    sides = {"height": height, "width": width}
    sides |= {name: getattr(recipe, name) for name in sides if getattr(recipe, name) is not None}
    for name, side in sides.items():
        if side < 1:
            raise ValueError(f"{name}={side}: at least 1 pixel is needed")
    return sides["height"], sides["width"]
