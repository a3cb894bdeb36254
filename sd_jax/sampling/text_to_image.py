"""Text to image: latents from noise alone, decoded."""

from typing import TYPE_CHECKING

import numpy as np

from sd_jax.sampling.denoising import Start, denoise

if TYPE_CHECKING:
    from sd_jax.sampling.pipeline import Pipeline
    from sd_jax.types import Recipe


def text_to_image(pipe: "Pipeline", prompt, recipe: "Recipe", given, output: str, callback) -> np.ndarray:
    """The job behind `Pipeline.text_to_image`, whose docstring says what the arguments are."""
    start = Start(latent_size(pipe.spec, recipe))
    return pipe.finish(denoise(pipe, prompt, recipe, start, given, callback), output)


def latent_size(spec, recipe: "Recipe") -> tuple[int, int]:
    """(height, width) of a picture's latents. Raises ValueError for a size that the autoencoder cannot make."""
    factor = spec.vae.downscale
    trained = spec.unet.sample_size * factor
    sides = {"height": recipe.height or trained, "width": recipe.width or trained}
    for name, side in sides.items():
        if side < 1 or side % factor:
            near = max(1, round(side / factor)) * factor
            raise ValueError(f"{name}={side} is not a multiple of {factor}: use {near}")
    return sides["height"] // factor, sides["width"] // factor
