"""Pictures of any size -> squares of one size, and the numbers that say how a square was cut out."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from sd_jax.media import Picture

AESTHETIC_SCORE = 6.0  # of every picture: what SDXL's refiner is asked for when it samples, and data seldom say another


class Fitted(NamedTuple):
    """A square picture, and where it lies in the whole one."""

    pixels: UInt8[np.ndarray, "side side 3"]
    crop: tuple[int, int]  # pixels above it and left of it, in the whole picture as it was resized and mirrored


def draws(seed: int, index: int, position: int) -> np.random.Generator:
    """The random numbers of one example: the `position`-th of the run (over all epochs), record `index` of the data."""
    return np.random.default_rng((seed % 2**32, index, position))


def fit(
    pixels: Picture,
    resolution: int,
    rng: np.random.Generator | None = None,  # None = the middle of the picture
    flip: bool = False,  # mirror it left to right half of the time; needs an rng
) -> Fitted:
    """The largest square of a picture, in its middle or at a random place, resampled (Lanczos) to `resolution`."""
    height, width, _ = pixels.shape
    side = min(height, width)
    if rng is None:
        top, left = (height - side) // 2, (width - side) // 2
    else:
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    square = pixels[top : top + side, left : left + side]
    if side != resolution:
        # The square alone: a long thin picture resampled whole could take any amount of memory
        size = (resolution, resolution)
        square = np.asarray(Image.fromarray(square).resize(size, Image.Resampling.LANCZOS))
    if flip and rng is not None and rng.random() < 0.5:
        square = square[:, ::-1]
        left = width - (left + side)  # in the mirrored picture
    return Fitted(np.ascontiguousarray(square), (round(top * resolution / side), round(left * resolution / side)))


def time_ids(
    size: tuple[int, int],  # height and width of the picture in its file
    crop: tuple[int, int],  # of `Fitted`
    resolution: int,
    count: int,  # of numbers that the model reads: 6, or 5
) -> Float32[np.ndarray, " count"]:
    """SDXL's micro-conditioning (Podell et al. 2023, arXiv 2307.01952, section 2.2), as in `Conditioning.time_ids`.

    size and crop, and then the side of the square twice (its height and width); the refiner, which reads five numbers,
    has AESTHETIC_SCORE in their place. Raises ValueError for any other count.
    """
    last = {6: (resolution, resolution), 5: (AESTHETIC_SCORE,)}
    if count not in last:
        raise ValueError(f"the model reads {count} time_ids: SDXL's kinds read 6, or 5 (its refiner)")
    return np.asarray((*size, *crop, *last[count]), np.float32)
