"""A picture's colours without its detail, and its detail without its colours: grayscale, recolour, segment."""

import numpy as np
from jaxtyping import Float64, Int64, UInt8
from scipy import ndimage

from sd_jax.media import Picture
from sd_jax.preprocessors.options import one_of, within

Grey = UInt8[np.ndarray, "height width"]


def luma(pixels: Picture) -> Grey:
    """Y' of ITU-R BT.601, 0.299 R + 0.587 G + 0.114 B, as Pillow rounds it."""
    weights = np.array([19595, 38470, 7471], np.uint32)  # of 65536
    return ((pixels.astype(np.uint32) @ weights + 32768) >> 16).astype(np.uint8)


def as_picture(grey: Grey) -> Picture:
    return np.repeat(grey[:, :, None], 3, axis=2)


def grayscale(pixels: Picture) -> Picture:
    """The picture in grey: the luma of BT.601."""
    return as_picture(luma(pixels))


def recolour(
    pixels: Picture,
    *,
    kind: str = "luminance",  # or intensity
    gamma: float = 1.0,  # the exponent; above 1 is darker
) -> Picture:
    """What models that colour grey pictures are shown: its luminance (L* of CIELAB) or intensity (V of HSV).

    These are sd-webui-controlnet's recolor_luminance and recolor_intensity, except that those read the channels blue
    first and round down.
    """
    one_of(("luminance", "intensity"), kind=kind)
    within(0.01, 100.0, gamma=gamma)
    grey = _lightness(pixels) / 100.0 if kind == "luminance" else pixels.max(axis=2) / 255.0
    return as_picture(np.round(255.0 * np.clip(grey, 0.0, 1.0) ** gamma).astype(np.uint8))


def _lightness(pixels: Picture) -> Float64[np.ndarray, "height width"]:
    """L* of sRGB pixels under D65, 0 to 100 (IEC 61966-2-1; CIE 15)."""
    values = np.arange(256) / 255.0
    linear = np.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)
    luminance = linear[pixels] @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(luminance > (6 / 29) ** 3, 116.0 * np.cbrt(luminance) - 16.0, (29 / 3) ** 3 * luminance)


# -- Blocks of colour ------------------------------------------------------------------------------------------------

_ROUNDS = 100  # of k-means, at most


def segment(
    pixels: Picture,
    *,
    colours: int = 8,  # at most
    radius: int = 2,  # pixels; what is narrower than this is lost in what lies around it
) -> Picture:
    """The picture in a few flat colours: blocks of colour.

    The colours are clusters of the picture's own (k-means, whose start is no matter of chance), each pixel is given
    what most of its neighbours are, and each cluster is painted in the median of its pixels. It knows colours and not
    things: maps of things, such as ADE20K's, come ready from elsewhere.
    """
    within(1, 64, colours=colours)
    within(0, 64, radius=radius)
    window = 2 * radius + 1
    smooth = ndimage.median_filter(pixels, (window, window, 1), mode="nearest")
    labels = _clusters(smooth, colours)
    winners, most = np.zeros_like(labels), np.zeros(labels.shape, np.float32)
    for k in range(labels.max() + 1):
        votes = ndimage.uniform_filter((labels == k).astype(np.float32), window)
        winners, most = np.where(votes > most, k, winners), np.maximum(votes, most)
    painted = np.empty_like(pixels)
    for k in np.unique(winners):
        painted[winners == k] = np.round(np.median(pixels[winners == k], axis=0)).astype(np.uint8)
    return painted


def _clusters(pixels: Picture, count: int) -> Int64[np.ndarray, "height width"]:
    """The number of each pixel's cluster. k-means on the colours of 5 bits a channel, so any size takes as long."""
    red, green, blue = (pixels[:, :, channel].astype(np.int64) >> 3 for channel in range(3))
    bins = (red << 10) + (green << 5) + blue
    found, places, weights = np.unique(bins, return_inverse=True, return_counts=True)
    flat = pixels.reshape(-1, 3).astype(np.float64)
    places = places.reshape(-1)
    points = np.stack([np.bincount(places, flat[:, channel]) for channel in range(3)], axis=1) / weights[:, None]

    centres = points[[np.argmax(weights)]]
    while len(centres) < min(count, len(found)):  # the next one is where the error is largest
        errors = _squared_distances(points, centres).min(axis=1) * weights
        centres = np.concatenate([centres, points[[np.argmax(errors)]]])
    nearest = _squared_distances(points, centres).argmin(axis=1)
    for _ in range(_ROUNDS):
        totals = np.bincount(nearest, weights, len(centres))
        sums = np.stack([np.bincount(nearest, weights * points[:, i], len(centres)) for i in range(3)], axis=1)
        centres = np.where(totals[:, None] > 0, sums / np.maximum(totals, 1)[:, None], centres)
        before, nearest = nearest, _squared_distances(points, centres).argmin(axis=1)
        if (before == nearest).all():
            break
    return nearest[places].reshape(bins.shape)


def _squared_distances(
    points: Float64[np.ndarray, "points 3"], centres: Float64[np.ndarray, "centres 3"]
) -> Float64[np.ndarray, "points centres"]:
    return sum(np.square(points[:, None, i] - centres[None, :, i]) for i in range(3))
