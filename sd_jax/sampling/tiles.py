"""Sampling in tiles (`sd_jax/tiles.py`, Eq. 1 there): pictures larger than memory or training allows.

The autoencoder is tiled on the host, one picture and one tile after the other. It is not quite local: group norms and
attention see a tile alone, so that a tiled decode is near a whole one, but not equal to it. Denoising is tiled inside
the compiled loop, at every call: MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113, Eq. 5).

Tiles and overlaps are measured in latents throughout.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sd_jax.diffusion.denoiser import ConditionedDenoise
from sd_jax.models.presets import AutoencoderConfig, TinyVAEConfig
from sd_jax.tiles import lay_tiles, map_tiles
from sd_jax.types import Image, Latents, Pixels

# -- The autoencoder ---------------------------------------------------------------------------------------------------


def decode_tiled(
    decode: Callable[[Latents], Image],  # such as Pipeline.decode_latents
    latents: Latents,
    factor: int,  # pixels per latent along a side
    tile: int,
    overlap: int | None = None,  # None = a quarter of the tile
) -> Float[np.ndarray, "batch height width 3"]:
    """The picture, tile by tile (Eq. 1); float32, on the host."""
    return np.stack([map_tiles(decode, each, 1, factor, tile, overlap) for each in np.asarray(latents)])


def encode_tiled(
    encode: Callable[[Image | Pixels], Latents],  # such as Pipeline.encode_image
    image: Image | Pixels,  # sides divisible by the factor
    factor: int,
    tile: int,
    overlap: int | None = None,
) -> Float[np.ndarray, "batch h w channels"]:
    """The latents, tile by tile (Eq. 1); float32, on the host. Tiles begin where a latent does."""
    return np.stack([map_tiles(encode, each, factor, 1, tile, overlap) for each in np.asarray(image)])


# -- Whether the autoencoder needs tiles -------------------------------------------------------------------------------

FLAT = 1024  # pixels: in a job with tiles the autoencoder's have this side, or that of the job's where it is more
TILES = (256, 192, 128, 96, 64, 32)  # latents; the larger, the nearer to the whole


def choose_tile(
    vae: AutoencoderConfig,
    height: int,  # of the picture, in pixels
    width: int,
    batch: int,
    free: int | None,  # bytes, of `hardware.free_memory`; None = unknown
    most: int | None = None,  # pixels of a tile's side, whatever memory there is; None = no limit
) -> int | None:
    """The tile for `decode_tiled` and `encode_tiled`; None where the whole batch fits into memory, or that is unknown.

    A tile as large as the picture goes first: the pictures of the batch one by one. Where not even the smallest fits,
    it is tried all the same.
    """
    factor, side = vae.downscale, max(height, width)
    is_small = most is None or side <= most
    if is_small and (free is None or batch * peak_bytes(vae, height, width) <= free):
        return None
    for tile in (-(-side // factor), *TILES) if is_small else (most // factor, *TILES):
        if free is None or peak_bytes(vae, min(height, tile * factor), min(width, tile * factor)) <= free:
            return tile
    return TILES[-1]


def peak_bytes(vae: AutoencoderConfig, height: int, width: int) -> int:
    """About what decoding or encoding a picture takes besides parameters, picture and latents.

    The widest array is what the decoder enlarges last: all the pixels, in the channels of the second level. Of it there
    are up to 4 float32 copies at once. XLA's own account for SD 1.5 on a CPU (256x256, 512x512, 1024x1024): 2.5 copies
    for decoding in float32, 3.0 to 3.3 in bfloat16, 1.5 and 2.3 for encoding; 3.0 for the model of shapes world. A tiny
    decoder's widest are those that it works on last.
    """
    tiny = isinstance(vae, TinyVAEConfig)
    channels = vae.decoder_block_out_channels[-1] if tiny else vae.block_out_channels[:2][-1]
    return 4 * 4 * channels * height * width


# -- Denoising ---------------------------------------------------------------------------------------------------------


def tiled_denoiser(
    denoise: ConditionedDenoise,
    tile: int,
    overlap: int | None = None,  # None = a quarter of the tile
    cut: Callable[[Any, Callable, Any], Any] | None = None,  # None = every tile is told the same
) -> ConditionedDenoise:
    """The same denoiser on a large canvas, tile after tile, joined at every call (Eq. 1).

    `cut(conditioning, of_tile, number)` is for conditioning that belongs to places: what a tile is told, where
    `of_tile(maps [batch, height, width, c])` cuts arrays of the latents' size as the latents are cut, and `number`
    counts tiles from 0, row by row.
    """

    def tiled(x: Float[Array, "batch height width channels"], sigma: Float[Array, "..."], conditioning=None) -> Array:
        sides, corners, shares = lay_tiles(*x.shape[1:3], tile, overlap)
        if len(corners) == 1:
            return denoise(x, sigma, conditioning if cut is None else cut(conditioning, lambda maps: maps, 0))

        def add(total, at):
            (top, left), share, number = at

            def of_tile(maps):
                return jax.lax.dynamic_slice(maps, (0, top, left, 0), (maps.shape[0], *sides, maps.shape[3]))

            told = conditioning if cut is None else cut(conditioning, of_tile, number)
            part = denoise(of_tile(x), sigma, told).astype(x.dtype) * share[None]
            return jax.lax.dynamic_update_slice(total, of_tile(total) + part, (0, top, left, 0)), None

        tops, lefts = (jnp.asarray(starts, jnp.int32) for starts in zip(*corners, strict=True))
        each = (tops, lefts), jnp.asarray(shares, x.dtype), jnp.arange(len(corners))
        total, _ = jax.lax.scan(add, jnp.zeros_like(x), each)
        return total

    return tiled
