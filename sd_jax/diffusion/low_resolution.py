"""The small picture of a super-resolution stage: made, noised, and brought beside the latents.

A U-Net that enlarges sees a small picture y in channels beside the latents. So that it serves pictures that another
model made, y is noised, and the U-Net told the level l (conditioning augmentation: Ho et al. 2022, arXiv 2106.15282,
section 4.2), with abar of a schedule of its own:

    y_l = sqrt(abar_l) y + sqrt(1 - abar_l) n                                                               (1)

Latents of the x4 upscaler (Rombach et al. 2022) have the size of y. To larger ones, pixels among them, y_l is enlarged
by bicubic interpolation, as in SR3 (Saharia et al. 2021, arXiv 2104.07636).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sd_jax.diffusion.predictions import along_batch
from sd_jax.diffusion.schedules import alphas_cumprod
from sd_jax.types import Image, NoiseScheduleConfig

# stabilityai/stable-diffusion-x4-upscaler: its low_res_scheduler, and the max_noise_level of its model_index.json
SCHEDULE = NoiseScheduleConfig(beta_start=0.0001, beta_end=0.02)
MAX_NOISE_LEVEL = 350


def highest_level(num_class_embeds: int) -> int:
    """That a U-Net with so many embeddings of levels is told."""
    return min(MAX_NOISE_LEVEL, num_class_embeds - 1)


def make_small(image: Image, factor: int) -> Float[Array, "batch h w 3"]:
    """Means over squares of `factor` pixels a side, which divides the sides: nothing is aliased, nothing rings."""
    batch, height, width, channels = image.shape
    squares = jnp.asarray(image).reshape(batch, height // factor, factor, width // factor, factor, channels)
    return squares.mean((2, 4))


def noised(
    small: Float[Array, "batch h w 3"],  # in [-1, 1]
    noise: Float[Array, "batch h w 3"],  # unit variance
    level: Int[Array, " batch"],  # a timestep of SCHEDULE
) -> Float[Array, "batch h w 3"]:
    """y_l of Eq. 1, float32."""
    abar = along_batch(jnp.asarray(alphas_cumprod(SCHEDULE), jnp.float32)[level], small)
    return jnp.sqrt(abar) * small.astype(jnp.float32) + jnp.sqrt(1 - abar) * noise.astype(jnp.float32)


def enlarged(small: Float[Array, "batch h w 3"], size: tuple[int, int]) -> Float[Array, "batch height width 3"]:
    """In the latents' size (height, width); of that size already, as it is."""
    if small.shape[1:3] == size:
        return small
    return jax.image.resize(small, (len(small), *size, small.shape[-1]), "cubic")
