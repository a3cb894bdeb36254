"""What pixels alone say of a picture: its sharpness, the ruin that JPEG leaves, and hashes that find its doubles.

All work on the luma of ITU-R 601, Y = 0.299 R + 0.587 G + 0.114 B, in 0..255, as Pillow's mode "L".

sharpness    the variance of the Laplacian (Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy"):
             pixels with their four neighbours, no border. It grows with contrast and falls with enlargement.
blockiness   how much higher the steps are at the borders of JPEG's blocks of 8 pixels than elsewhere, in grey levels. A
             step's height is what its two neighbours do not lead to expect (after Wang, Sheikh & Bovik 2002,
             "No-reference perceptual quality assessment of JPEG compressed images"):

                 s[c] = min(8, | |y[c+1] - y[c]| - (|y[c] - y[c-1]| + |y[c+2] - y[c+1]|) / 2 |)            (1)

             (higher ones are edges of things) averaged over the picture for each of the 8 places c mod 8: that of the
             borders less the median of all; the lower one of across and down, as bars of 8 pixels run one way only. The
             grid is looked for where an encoder lays it: a picture that was cut or scaled afterwards hides its blocks,
             and a pattern drawn every 8 pixels, both ways, passes for them.
dhash        64 bits: in a picture of 9x8 pixels, which pixels are darker than their right neighbours (Krawetz 2013).
phash        64 bits: in a picture of 32x32 pixels, which of the 8x8 lowest cosine coefficients are above their median
             (Krawetz 2011, "Looks like it"; as the Python package imagehash has it).
"""

import functools
import math

import numpy as np
from jaxtyping import UInt8, UInt64
from PIL import Image

from sd_jax.media import Picture

BLOCK = 8
_HIGHEST = 8

Grey = UInt8[np.ndarray, "height width"]


def measures(pixels: Picture) -> dict[str, float | int | str]:
    """All of this file for one picture, with its height and width; hashes as 16 hexadecimal digits."""
    grey = luma(pixels)
    return {
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        "sharpness": sharpness(grey),
        "blockiness": blockiness(grey),
        "dhash": f"{dhash(grey):016x}",
        "phash": f"{phash(grey):016x}",
    }


def luma(pixels: Picture) -> Grey:
    return np.asarray(Image.fromarray(pixels).convert("L"))


def sharpness(grey: Grey) -> float:
    """0 for a picture of fewer than 3 pixels a side."""
    if min(grey.shape) < 3:
        return 0.0
    y = grey.astype(np.int16)
    laplacian = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1]
    # Sums of whole numbers: the same on every machine
    total = int(laplacian.sum(dtype=np.int64))
    squares = int(np.square(laplacian, dtype=np.int32).sum(dtype=np.int64))
    return (squares * laplacian.size - total * total) / laplacian.size**2


def blockiness(grey: Grey) -> float:
    """In grey levels, about 0 where there are no blocks; of a picture smaller than two blocks 0."""
    if min(grey.shape) < 2 * BLOCK:
        return 0.0
    y = grey.astype(np.int16)
    return min(_steps(np.abs(np.diff(y, axis=1)), 1), _steps(np.abs(np.diff(y, axis=0)), 0))


def _steps(step: np.ndarray, axis: int) -> float:
    """Of the heights of all steps along an axis."""
    before, at, after = (step[:, c : step.shape[1] - 2 + c] if axis else step[c : len(step) - 2 + c] for c in range(3))
    unexpected = np.minimum(np.abs(2 * at - before - after), 2 * _HIGHEST)  # twice (Eq. 1), c >= 1
    totals = unexpected.sum(1 - axis, dtype=np.int32) / (2 * step.shape[1 - axis])
    places = np.arange(1, len(totals) + 1) % BLOCK
    means = np.bincount(places, totals, BLOCK) / np.bincount(places, minlength=BLOCK)
    return float(means[BLOCK - 1] - np.sort(means)[BLOCK // 2 - 1 : BLOCK // 2 + 1].mean())  # the median


# -- Hashes ----------------------------------------------------------------------------------------------------------


def dhash(grey: Grey) -> int:
    """Bits row by row, the first one highest."""
    small = _resized(grey, 9, 8)
    return _number(small[:, 1:] > small[:, :-1])


def phash(grey: Grey) -> int:
    """Bits row by row, the first one highest."""
    transform = _cosines(32)[:8]
    low = transform @ _resized(grey, 32, 32) @ transform.T
    return _number(low > np.median(low))


def distances(
    a: UInt64[np.ndarray, " n"],
    b: UInt64[np.ndarray, " n"],
) -> np.ndarray:
    """How many bits of each pair of hashes differ."""
    return np.bitwise_count(a ^ b)


def _resized(grey: np.ndarray, width: int, height: int) -> np.ndarray:
    small = Image.fromarray(grey).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(small, np.float64)


def _number(bits: np.ndarray) -> int:
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@functools.cache
def _cosines(size: int) -> np.ndarray:
    """The cosine transform (DCT-II), unnormalised: float64 [frequencies, places]."""
    k, n = np.arange(size)[:, None], np.arange(size)[None]
    return 2.0 * np.cos(math.pi * k * (2 * n + 1) / (2 * size))
