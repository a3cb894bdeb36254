"""Latents in another size, for the second pass of a hires fix. On the host, along the width first, then the height.

nearest, bilinear and bicubic are those of torch's `interpolate` (align_corners=False, not antialiased), bicubic being
Keys 1981 with a = -3/4. bislerp is ComfyUI's: as bilinear, but between two neighbours a latent turns from the direction
of one to that of the other, and its length goes straight, so that noise keeps the variance that blending would lose.
"""

import numpy as np
from jaxtyping import Float

from sd_jax.names import hint
from sd_jax.types import Latents


def resize_latents(
    latents: Latents,
    height: int,  # in latents
    width: int,
    method: str = "bislerp",  # a key of METHODS
) -> Float[np.ndarray, "batch new_height new_width channels"]:
    """Float32. Raises ValueError for an unknown method."""
    if method not in METHODS:
        raise ValueError(f"unknown latent upscaler {method!r}: {hint(method, METHODS)}")
    resized = np.asarray(latents, np.float32)
    for axis, new in ((2, width), (1, height)):
        resized = METHODS[method](resized, axis, new)
    return resized


def _nearest(x: np.ndarray, axis: int, new: int) -> np.ndarray:
    count = x.shape[axis]
    at = np.arange(new, dtype=np.float32) * np.float32(count / new)  # torch rounds here, and so takes another at times
    return x.take(np.minimum(at.astype(int), count - 1), axis)


def _bilinear(x: np.ndarray, axis: int, new: int) -> np.ndarray:
    return _lerp(*_neighbours(x, axis, new))


def _bicubic(x: np.ndarray, axis: int, new: int, a: float = -0.75) -> np.ndarray:
    places = _places(x.shape[axis], new)
    total = np.float32(0)
    for tap in range(-1, 3):
        at = np.floor(places) + tap
        distance = np.abs(places - at)
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1  # within 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a  # within 2
        weight = _along(np.where(distance <= 1, near, far), axis)
        total = total + weight * x.take(np.clip(at.astype(int), 0, x.shape[axis] - 1), axis)
    return total


def _bislerp(x: np.ndarray, axis: int, new: int) -> np.ndarray:
    """Neighbours of one direction, or of opposite ones, have no arc between them: the first, or a blend."""
    left, right, share = _neighbours(x, axis, new)
    lengths = [np.linalg.norm(side, axis=-1, keepdims=True) for side in (left, right)]
    units = [side / np.where(length > 0, length, 1) for side, length in zip((left, right), lengths, strict=True)]
    cosine = np.sum(units[0] * units[1], axis=-1, keepdims=True)
    angle = np.arccos(np.clip(cosine, -1, 1))
    sine = np.where(np.abs(cosine) < 1, np.sin(angle), 1)
    turned = (np.sin((1 - share) * angle) * units[0] + np.sin(share * angle) * units[1]) / sine
    turned = turned * _lerp(*lengths, share)
    turned = np.where(cosine > 1 - 1e-5, left, turned)
    return np.where(cosine < 1e-5 - 1, _lerp(left, right, share), turned)


METHODS = {"nearest": _nearest, "bilinear": _bilinear, "bicubic": _bicubic, "bislerp": _bislerp}


def _places(count: int, new: int) -> Float[np.ndarray, " new"]:
    """Where the middle of each new cell lies among the middles of the old ones; float32, as in torch."""
    return np.float32(count / new) * (np.arange(new, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)


def _neighbours(x: np.ndarray, axis: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two old neighbours of each new place, and how far it lies from the left to the right one, 0 to 1."""
    last = x.shape[axis] - 1
    places = np.clip(_places(last + 1, new), 0, last)
    left = places.astype(int)
    share = _along((places - left).astype(np.float32), axis)
    return x.take(left, axis), x.take(np.minimum(left + 1, last), axis), share


def _along(values: np.ndarray, axis: int) -> np.ndarray:
    return np.expand_dims(values, [i for i in range(4) if i != axis])


def _lerp(left: np.ndarray, right: np.ndarray, share: np.ndarray) -> np.ndarray:
    return (1 - share) * left + share * right
