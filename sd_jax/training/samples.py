"""The picture that a run draws of its progress: prompts for a diffusion model, reconstructions for an autoencoder."""

import numpy as np
from ml_collections import ConfigDict

from sd_jax import media
from sd_jax.models.vae import to_pixels
from sd_jax.sampling.pipeline import Pipeline
from sd_jax.training.start import Model
from sd_jax.types import Params

SEED = 0  # the same noise at every step of a run: what changes is the model


SHOWN = 12  # pictures that an autoencoder shows again


def draw(config: ConfigDict, model: Model, params: Params, batch: dict[str, np.ndarray]) -> np.ndarray:
    """A sheet, uint8 [height, width, 3]. An autoencoder shows pictures of `batch` and, below, what it makes of them."""
    pipe = Pipeline(model.networks.spec, params, model.tokenizer, config.dtype)
    if config.method == "autoencoder":
        pixels = batch["pixels"][:SHOWN]
        again = np.asarray(to_pixels(pipe.decode_latents(pipe.encode_image(pixels))))
        return media.contact_sheet(np.concatenate([pixels, again]), columns=len(pixels))
    recipe = config.samples
    images = pipe.text_to_image(
        list(recipe.prompts),
        sampler=recipe.sampler,
        schedule=recipe.schedule,
        steps=recipe.steps,
        guidance_scale=recipe.guidance_scale,
        width=config.data.resolution,
        height=config.data.resolution,
        seed=SEED,
    )
    return media.contact_sheet(images, captions=recipe.prompts)
