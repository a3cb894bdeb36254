"""Work on pictures larger than memory or training allows: in overlapping tiles of one size, with feathered seams.

All tiles have the same size, so that one compilation serves them. The weight w of a tile rises from its edge over the
overlap; the result is the weighted mean of what the tiles k say of a place p,

    y(p) = sum_k w_k(p) y_k(p) / sum_k w_k(p).                                                              (1)

The autoencoder is tiled on the host, one picture and one tile after the other. It is not quite local: group norms and
attention see a tile alone, so that a tiled decode is near a whole one, but not equal to it. Denoising is tiled inside
the compiled loop, at every call: MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113, Eq. 5).

Tiles and overlaps are measured in latents throughout.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sd_jax.diffusion.denoiser import ConditionedDenoise
from sd_jax.models.presets import AutoencoderConfig, TinyVAEConfig
from sd_jax.types import Image, Latents, Pixels


class Tiling(NamedTuple):
    sides: tuple[int, int]  # height and width of every tile
    corners: list[tuple[int, int]]  # top and left of each
    shares: Float[np.ndarray, "tiles height width 1"]  # w_k / sum w of Eq. 1


def lay_tiles(
    height: int,
    width: int,
    tile: int,  # the side; a shorter side of the picture is taken whole
    overlap: int | None = None,  # at least this much; None = a quarter of the tile
    scale: int = 1,  # shares are wanted for places so many times as fine as latents
) -> Tiling:
    """Tiles, evenly spread over the picture. Raises ValueError for a tile that is no larger than its overlap."""
    overlap = tile // 4 if overlap is None else overlap
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} latents cannot overlap by {overlap}: make the tile larger")
    sides = min(tile, height), min(tile, width)
    corners = [(top, left) for top in _starts(height, tile, overlap) for left in _starts(width, tile, overlap)]
    rows, columns = (_ramp(side * scale, overlap * scale) for side in sides)
    weights = (rows[:, None] * columns[None])[..., None]
    total = np.zeros((height * scale, width * scale, 1), np.float32)
    for corner in corners:
        total[window(corner, sides, scale)] += weights
    return Tiling(sides, corners, np.stack([weights / total[window(corner, sides, scale)] for corner in corners]))


def window(corner: tuple[int, int], sides: tuple[int, int], scale: int = 1) -> tuple[slice, slice]:
    """Rows and columns of a tile, in an array of places `scale` times as fine as latents."""
    top, left = (slice(start * scale, (start + side) * scale) for start, side in zip(corner, sides, strict=True))
    return top, left


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [i * (length - tile) // (count - 1) for i in range(count)]


def _ramp(length: int, overlap: int) -> Float[np.ndarray, " length"]:
    """Up over the overlap and down again, in (0, 1]."""
    rise = (np.arange(length, dtype=np.float32) + np.float32(0.5)) / np.float32(max(overlap, 1))
    return np.minimum(np.float32(1), np.minimum(rise, rise[::-1]))


# -- The autoencoder ---------------------------------------------------------------------------------------------------


def decode_tiled(
    decode: Callable[[Latents], Image],  # such as Pipeline.decode_latents
    latents: Latents,
    factor: int,  # pixels per latent along a side
    tile: int,
    overlap: int | None = None,  # None = a quarter of the tile
) -> Float[np.ndarray, "batch height width 3"]:
    """The picture, tile by tile (Eq. 1); float32, on the host."""
    return _map_tiles(decode, np.asarray(latents), 1, factor, tile, overlap)


def encode_tiled(
    encode: Callable[[Image | Pixels], Latents],  # such as Pipeline.encode_image
    image: Image | Pixels,  # sides divisible by the factor
    factor: int,
    tile: int,
    overlap: int | None = None,
) -> Float[np.ndarray, "batch h w channels"]:
    """The latents, tile by tile (Eq. 1); float32, on the host. Tiles begin where a latent does."""
    return _map_tiles(encode, np.asarray(image), factor, 1, tile, overlap)


def _map_tiles(function: Callable, array: np.ndarray, scale: int, new_scale: int, tile: int, overlap: int | None):
    """`function` takes [1, rows, columns, c], places `scale` times as fine as latents, to `new_scale` times as fine."""
    height, width = array.shape[1] // scale, array.shape[2] // scale
    sides, corners, shares = lay_tiles(height, width, tile, overlap, new_scale)
    results = []
    for picture in array:
        sums = None
        for corner, share in zip(corners, shares, strict=True):
            part = np.asarray(function(picture[window(corner, sides, scale)][None]), np.float32)[0]
            if sums is None:
                sums = np.zeros((height * new_scale, width * new_scale, part.shape[-1]), np.float32)
            sums[window(corner, sides, new_scale)] += share * part
        results.append(sums)
    return np.stack(results)


# -- Whether the autoencoder needs tiles -------------------------------------------------------------------------------

TILES = (256, 192, 128, 96, 64, 32)  # latents; the larger, the nearer to the whole


def choose_tile(
    vae: AutoencoderConfig,
    height: int,  # of the picture, in pixels
    width: int,
    batch: int,
    free: int | None,  # bytes, of `free_memory`; None = unknown
) -> int | None:
    """The tile for `decode_tiled` and `encode_tiled`; None where the whole batch fits into memory, or that is unknown.

    A tile as large as the picture goes first: the pictures of the batch one by one. Where not even the smallest fits,
    it is tried all the same.
    """
    if free is None or batch * peak_bytes(vae, height, width) <= free:
        return None
    factor = vae.downscale
    for tile in (-(-max(height, width) // factor), *TILES):
        if peak_bytes(vae, min(height, tile * factor), min(width, tile * factor)) <= free:
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


def free_memory() -> int | None:
    """Bytes that the first device has left, or the machine where that is a CPU; None = unknown."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        known = "bytes_limit" in stats and "bytes_in_use" in stats
        return stats["bytes_limit"] - stats["bytes_in_use"] if known else None
    try:
        lines = pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


# -- Denoising ---------------------------------------------------------------------------------------------------------


def tiled_denoiser(
    denoise: ConditionedDenoise,
    tile: int,
    overlap: int | None = None,  # None = a quarter of the tile
    cut: Callable[[Any, Callable], Any] | None = None,  # None = every tile is told the same
) -> ConditionedDenoise:
    """The same denoiser on a large canvas, tile after tile, joined at every call (Eq. 1).

    `cut(conditioning, of_tile)` is for conditioning that belongs to places: what a tile is told, where
    `of_tile(maps [batch, height, width, c])` cuts arrays of the latents' size as the latents are cut.
    """

    def tiled(x: Float[Array, "batch height width channels"], sigma: Float[Array, "..."], conditioning=None) -> Array:
        sides, corners, shares = lay_tiles(*x.shape[1:3], tile, overlap)
        if len(corners) == 1:
            return denoise(x, sigma, conditioning)

        def add(total, at):
            (top, left), share = at

            def of_tile(maps):
                return jax.lax.dynamic_slice(maps, (0, top, left, 0), (maps.shape[0], *sides, maps.shape[3]))

            told = conditioning if cut is None else cut(conditioning, of_tile)
            part = denoise(of_tile(x), sigma, told).astype(x.dtype) * share[None]
            return jax.lax.dynamic_update_slice(total, of_tile(total) + part, (0, top, left, 0)), None

        tops, lefts = (jnp.asarray(starts, jnp.int32) for starts in zip(*corners, strict=True))
        total, _ = jax.lax.scan(add, jnp.zeros_like(x), ((tops, lefts), jnp.asarray(shares, x.dtype)))
        return total

    return tiled
