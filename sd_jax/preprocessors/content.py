"""A picture of which something is taken away, for a model to put back: blur, tile, shuffle, inpaint."""

import math

import numpy as np
from jaxtyping import Float32, Float64
from PIL import Image
from scipy import ndimage

from sd_jax.media import Picture
from sd_jax.preprocessors.options import within


def blur(
    pixels: Picture,
    *,
    sigma: float = 9.0,  # pixels
) -> Picture:
    """The picture blurred, by a Gaussian."""
    within(0.0, 1000.0, sigma=sigma)
    blurred = ndimage.gaussian_filter(pixels.astype(np.float32), (sigma, sigma, 0.0), mode="nearest")
    return np.round(np.clip(blurred, 0.0, 255.0)).astype(np.uint8)


def tile(
    pixels: Picture,
    *,
    factor: float = 4.0,  # by which it is made smaller
) -> Picture:
    """The picture made smaller (each pixel the mean of those it covers), and as large as it was again (bicubic)."""
    within(1.0, 1024.0, factor=factor)
    height, width = pixels.shape[:2]
    small = Image.fromarray(pixels).resize(
        (max(1, round(width / factor)), max(1, round(height / factor))), Image.Resampling.BOX
    )
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC), np.uint8)


def shuffle(
    pixels: Picture,
    *,
    seed: int = 0,
    cell: float = 0.5,  # of the shorter side: how far one draws apart what lay together; small = into small bits
) -> Picture:
    """Content shuffle of ControlNet 1.1: the colours stay, the places go.

    Each pixel is fetched from the place that two smooth random fields say, which reach over the whole picture: random
    numbers every `cell`, joined by cubic splines. The default is their 256 pixels of 512. Pictures of one size and
    seed are shuffled alike.
    """
    within(0, 2**63 - 1, seed=seed)
    within(0.02, 4.0, cell=cell)
    height, width = pixels.shape[:2]
    rng = np.random.default_rng(seed)
    step = cell * min(height, width)
    places = [_random_field(height, width, step, rng) * (side - 1) for side in (height, width)]
    channels = [
        ndimage.map_coordinates(pixels[:, :, i].astype(np.float64), places, order=1, mode="nearest") for i in range(3)
    ]
    return np.round(np.stack(channels, axis=2)).astype(np.uint8)


def _random_field(
    height: int, width: int, step: float, rng: np.random.Generator
) -> Float64[np.ndarray, "height width"]:
    """Smooth, its least value 0 and its largest 1."""
    grid = rng.random([math.ceil(side / step) + 3 for side in (height, width)])  # from one cell before the picture on
    places = np.meshgrid(*(np.arange(side) / step + 1 for side in (height, width)), indexing="ij")
    field = ndimage.map_coordinates(grid, places, order=3, mode="mirror")
    field -= field.min()
    return field / max(field.max(), np.finfo(np.float64).tiny)


def inpaint(
    pixels: Picture,
    *,
    mask: np.ndarray,  # [height, width], bool or numbers in [0, 1] or [0, 255]; white is redrawn
) -> Float32[np.ndarray, "height width 3"]:
    """The hint of ControlNet-inpaint (control_v11p_sd15_inpaint): the picture in [0, 1], and -1 where it is redrawn.

    Alone of all hints it is of floats, for no pixel of eight bits is -1. Redrawn is where the mask is above one half.
    Raises ValueError for a mask of another size.
    """
    if mask.shape != pixels.shape[:2]:
        raise ValueError(
            f"mask is {list(mask.shape)}, the picture {list(pixels.shape[:2])} (height, width): make them of one size"
        )
    redrawn = mask > (0.5 if mask.max() <= 1 else 127.5)
    return np.where(redrawn[:, :, None], np.float32(-1), pixels.astype(np.float32) / np.float32(255))
