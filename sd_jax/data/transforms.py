"""Pictures of any size -> pictures of one size, and the numbers that say how one was cut out."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from sd_jax.media import Picture

AESTHETIC_SCORE = 6.0  # of every picture: what SDXL's refiner is asked for when it samples, and data seldom say another


class Fitted(NamedTuple):
    """A picture of the size that was asked for, and where it lies in the whole one."""

    pixels: UInt8[np.ndarray, "height width 3"]
    crop: tuple[int, int]  # pixels above it and left of it, in the whole picture as it was resized and mirrored
    mask: UInt8[np.ndarray, "height width"] | None = None  # cut as the picture is
    hint: UInt8[np.ndarray, "height width 3"] | None = None  # likewise


def draws(seed: int, index: int, position: int) -> np.random.Generator:
    """The random numbers of one example: the `position`-th of the run (over all epochs), record `index` of the data."""
    return np.random.default_rng((seed % 2**32, index, position))


def fit(
    pixels: Picture,
    size: tuple[int, int],  # height and width
    rng: np.random.Generator | None = None,  # cut at a random place; None = in the middle
    flip: bool = False,  # mirror it left to right
    mask: UInt8[np.ndarray, "height width"] | None = None,  # to be cut as the picture is
    hint: UInt8[np.ndarray, "height width 3"] | None = None,  # likewise
) -> Fitted:
    """A picture resampled (Lanczos) to the least that covers `size` with its aspect kept, and cut to `size`."""
    whole = pixels.shape[:2]
    # Its scale is a fraction, so that what is left over comes out in whole pixels
    up, down = max(zip(size, whole, strict=True), key=lambda sides: sides[0] / sides[1])
    part = [min(wanted * down / up, side) for wanted, side in zip(size, whole, strict=True)]  # of the picture as it is
    room = [(side * up - wanted * down) // up for wanted, side in zip(size, whole, strict=True)]
    top, left = (int(rng.integers(most + 1)) for most in room) if rng is not None else (most // 2 for most in room)

    def cut(pixels):
        if up == down:
            pixels = pixels[top : top + size[0], left : left + size[1]]
        else:
            # That part alone: a long thin picture resampled whole could take any amount of memory
            box = (left, top, min(left + part[1], whole[1]), min(top + part[0], whole[0]))
            pixels = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.LANCZOS, box))
        return np.ascontiguousarray(pixels[:, ::-1] if flip else pixels)

    begin = whole[1] - (left + part[1]) if flip else left  # in the picture as it is mirrored
    crop = (round(top * up / down), round(begin * up / down))
    return Fitted(cut(pixels), crop, *(None if beside is None else cut(beside) for beside in (mask, hint)))


def time_ids(
    size: tuple[int, int],  # height and width of the picture in its file
    crop: tuple[int, int],  # of `Fitted`
    target: tuple[int, int],  # height and width of what was cut out
    count: int,  # of numbers that the model reads: 6, or 5
) -> Float32[np.ndarray, " count"]:
    """SDXL's micro-conditioning (Podell et al. 2023, arXiv 2307.01952, section 2.2), as in `Conditioning.time_ids`.

    size, crop and target; the refiner, which reads five numbers, has AESTHETIC_SCORE in place of the target. Raises
    ValueError for any other count.
    """
    last = {6: target, 5: (AESTHETIC_SCORE,)}
    if count not in last:
        raise ValueError(f"the model reads {count} time_ids: SDXL's kinds read 6, or 5 (its refiner)")
    return np.asarray((*size, *crop, *last[count]), np.float32)
