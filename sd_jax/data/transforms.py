"""Pictures of any size -> squares of one size."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sd_jax.media import Picture


def draws(seed: int, index: int, position: int) -> np.random.Generator:
    """The random numbers of one example: the `position`-th of the run (over all epochs), record `index` of the data."""
    return np.random.default_rng((seed % 2**32, index, position))


def fit(
    pixels: Picture,
    resolution: int,
    rng: np.random.Generator | None = None,  # None = the middle of the picture
    flip: bool = False,  # mirror it left to right half of the time; needs an rng
) -> UInt8[np.ndarray, "side side 3"]:
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
    return np.ascontiguousarray(square)
