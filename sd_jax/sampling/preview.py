"""A cheap look at latents while they are sampled: the colour of a latent is a linear function of it and its neighbours,

    rgb = sum_ij W_ij latent_ij + b,    i, j in -1, 0, 1                                                    (1)

with W and b by least squares over a few synthetic pictures and what the autoencoder makes of them. So it serves every
autoencoder, without a table of published factors. It shows layout and colours in the size of the latents.
"""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from sd_jax.types import Latents

if TYPE_CHECKING:
    from sd_jax.sampling.pipeline import Pipeline

_PICTURES, _SIDE = 12, 8  # of each kind, and their side in latents


class LatentPreview:
    """`preview(latents)` -> pixels.

    Made once for a pipeline, from small pictures: colours in patches, in noise and in waves; and what the decoder makes
    of patches of random latents, since an autoencoder of a small world knows no other pictures than its own.
    """

    def __init__(self, pipe: "Pipeline"):
        self.factor = pipe.spec.vae.downscale
        rng = np.random.default_rng(0)
        latents = np.stack([_patches(rng, i, _SIDE, pipe.spec.vae.latent_channels) for i in range(_PICTURES)])
        decoded = np.asarray(pipe.decode_latents(latents.astype(np.float32)), np.float64)
        drawn = np.stack([_drawn(rng, i, _SIDE * self.factor) for i in range(_PICTURES)])
        image = np.clip(np.concatenate([decoded, drawn]), -1, 1)
        latents = np.asarray(pipe.encode_image(image.astype(np.float32)))
        colours = image.reshape(-1, _SIDE, self.factor, _SIDE, self.factor, 3).mean((2, 4)).reshape(-1, 3)
        self.weights = np.linalg.lstsq(_neighbourhoods(latents), colours, rcond=None)[0]  # W and b of Eq. 1

    def __call__(self, latents: Latents) -> UInt8[np.ndarray, "batch height width 3"]:
        """Scaled latents, such as a sampler's guess of the clean ones -> uint8, in the picture's full size."""
        colours = _neighbourhoods(np.asarray(latents)) @ self.weights
        pixels = np.round(np.clip(np.nan_to_num(colours) * 127.5 + 127.5, 0, 255)).astype(np.uint8)
        pixels = pixels.reshape(*latents.shape[:3], 3)
        return pixels.repeat(self.factor, axis=1).repeat(self.factor, axis=2)


def _neighbourhoods(latents: np.ndarray) -> Float[np.ndarray, "places nine_times_channels_and_one"]:
    """What Eq. 1 is linear in, a row for each latent; beyond the border, the last ones again."""
    padded = np.pad(latents.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows, columns = latents.shape[1:3]
    shifted = [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    stacked = np.concatenate([*shifted, np.ones((*latents.shape[:3], 1))], axis=-1)
    return stacked.reshape(-1, stacked.shape[-1])


def _patches(rng: np.random.Generator, index: int, side: int, channels: int) -> Float[np.ndarray, "side side channels"]:
    """Unit variance, in 1, 4, 16 or 64 patches by turns."""
    cells = 2 ** (index % 4)
    return rng.standard_normal((cells, cells, channels)).repeat(side // cells, axis=0).repeat(side // cells, axis=1)


def _drawn(rng: np.random.Generator, index: int, side: int) -> Float[np.ndarray, "side side 3"]:
    """By turns patches of colour, the same under noise, and two colours that pass into each other in waves."""
    if index % 3 == 2:
        y, x = np.mgrid[:side, :side] / side
        colours, angle, waves = rng.uniform(-1, 1, (2, 3)), rng.uniform(0, np.pi), rng.uniform(0.3, 3)
        share = 0.5 + 0.5 * np.cos(2 * np.pi * waves * (x * np.cos(angle) + y * np.sin(angle)))
        return colours[0] + share[..., None] * (colours[1] - colours[0])
    patches = np.tanh(_patches(rng, index // 3, side, 3))
    return patches + (index % 3) * 0.3 * rng.standard_normal((side, side, 3))
