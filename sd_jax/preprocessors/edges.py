"""A picture's lines, white on black: canny, soft edge, scribble, line art.

Canny (1986, A computational approach to edge detection) as scikit-image's `feature.canny` has it, to the pixel:

    I = G_sigma * grey                                   smoothed; beyond the picture there is nothing, not black    (1)
    g = (Sobel_y * I, Sobel_x * I)                       gradient, eight times that of one pixel                     (2)
    |g| >= |g| at both places one step along +-g         kept: steps end between two neighbours, which are blended   (3)
    |g| >= low, and linked to a place with |g| >= high   hysteresis: linked by kept neighbours in eight directions   (4)

Thresholds are of grey in [0, 1], in which a sharp step of height h has |g| = 2.5 h for sigma = 1, and about
3.2 h / sigma from 2 on. Those of OpenCV and of ControlNet's examples (100 and 200) are of [0, 255], without (1) and
with the sum of the parts of g for its length.
"""

import math

import numpy as np
from jaxtyping import Bool, Float64
from scipy import ndimage

from sd_jax.media import Picture
from sd_jax.preprocessors.colours import Grey, as_picture, luma
from sd_jax.preprocessors.options import one_of, within

Plane = Float64[np.ndarray, "height width"]
Marks = Bool[np.ndarray, "height width"]

_MOST_SIGMA = 100.0


def canny(
    pixels: Picture,
    *,
    sigma: float = 1.0,  # pixels
    low_threshold: float = 0.1,  # edges go on while they are this steep,
    high_threshold: float = 0.2,  # and are edges at all where they are this steep somewhere
    channels: str = "grey",  # or colour: the steepest of red, green and blue at each pixel, as OpenCV takes it
) -> Picture:
    """Edges, one pixel wide. On grey it equals scikit-image; colour also finds edges between colours of one grey."""
    one_of(("grey", "colour"), channels=channels)
    planes = [luma(pixels)] if channels == "grey" else [pixels[:, :, i] for i in range(3)]
    return _white(edges_of(planes, sigma, low_threshold, high_threshold))


def scribble(
    pixels: Picture,
    *,
    sigma: float = 2.0,  # pixels; the larger, the fewer details are drawn
    low_threshold: float = 0.1,  # as for canny
    high_threshold: float = 0.3,
    radius: int = 3,  # pixels; strokes are twice as wide, and one pixel
) -> Picture:
    """Thick strokes, black and white, along the edges of colours."""
    within(0, 64, radius=radius)
    edges = edges_of([pixels[:, :, i] for i in range(3)], sigma, low_threshold, high_threshold)
    across = np.arange(-radius, radius + 1)
    disc = np.hypot(across[:, None], across[None]) <= radius + 0.5
    return _white(ndimage.binary_dilation(edges, disc))


def soft_edge(
    pixels: Picture,
    *,
    sigma: float = 1.0,  # pixels, of the finest scale
    scales: int = 3,  # each twice as coarse as the one before
) -> Picture:
    """How much of an edge each pixel is, in grey: a stand-in for HED and PiDiNet, which are trained networks.

    It is not what they give: they leave out texture and draw the outlines of things, this draws whatever differs from
    its neighbours. At each scale s it is sqrt(2 pi) s |gradient of G_s * I|, which is h on a step of height h, of the
    channel where that is largest; then the mean over scales, divided by what a hundredth of the pixels exceed (but by
    0.1 at least: a picture that is almost flat stays dark).
    """
    within(0.3, _MOST_SIGMA, sigma=sigma)
    within(1, 8, scales=scales)
    planes = [pixels[:, :, i] / 255.0 for i in range(3)]
    total = np.zeros(pixels.shape[:2])
    for s in (sigma * 2**i for i in range(scales)):
        steepness = [ndimage.gaussian_gradient_magnitude(plane, s, mode="nearest") for plane in planes]
        total += math.sqrt(2.0 * math.pi) * s * np.max(steepness, axis=0) / scales
    white = max(0.1, float(np.percentile(total, 99)))
    return as_picture(np.round(255.0 * np.minimum(total / white, 1.0)).astype(np.uint8))


def line_art(
    pixels: Picture,
    *,
    sigma: float = 6.0,  # pixels, of the background; lines are narrower
    threshold: float = 8.0,  # levels of 255 by which a line is darker than its background
) -> Picture:
    """Dark lines on a light ground, turned about: white on black, by how much darker they are than what is around them.

    The darkness is that of the channel that is darkened least, and that of the middle one of all pixels in lines comes
    out as 127, as in ControlNet 1.1's "lineart standard".
    """
    within(0.3, _MOST_SIGMA, sigma=sigma)
    within(0.0, 255.0, threshold=threshold)
    picture = pixels.astype(np.float64)
    around = ndimage.gaussian_filter(picture, (sigma, sigma, 0.0), mode="mirror")
    darkness = np.maximum((around - picture).min(axis=2), 0.0)
    lines = darkness[darkness > threshold]
    middle = max(16.0, float(np.median(lines))) if lines.size else 16.0  # noise is no line
    return as_picture(np.round(np.minimum(darkness / middle * 127.0, 255.0)).astype(np.uint8))


# -- Canny -----------------------------------------------------------------------------------------------------------


def edges_of(planes: list[Grey], sigma: float, low: float, high: float) -> Marks:
    """Where the edges are, on planes of one size, of which each pixel goes by the steepest (Eqs. 1 to 4)."""
    within(0.0, _MOST_SIGMA, sigma=sigma)
    within(0.0, 100.0, low_threshold=low, high_threshold=high)
    if high < low:
        raise ValueError(f"high_threshold={high} is below low_threshold={low}: give one that is as high or higher")
    steepness, down, across = _gradient(planes[0], sigma)
    for plane in planes[1:]:
        other = _gradient(plane, sigma)
        steeper = other[0] > steepness
        steepness, down, across = (
            np.where(steeper, new, old) for new, old in zip(other, (steepness, down, across), strict=True)
        )
    kept = _thin(steepness, down, across, low)
    labels, count = ndimage.label(kept, np.ones((3, 3)))
    strong = np.zeros(count + 1, bool)
    strong[labels[kept & (steepness >= high)]] = True
    return strong[labels]


def _gradient(plane: Grey, sigma: float) -> tuple[Plane, Plane, Plane]:
    """(|g|, its part downwards, its part to the right): Eqs. 1 and 2."""
    grey = plane * (1.0 / 255.0)  # not plane / 255, which now and then differs in the last bit
    inside = ndimage.gaussian_filter(np.ones_like(grey), sigma, mode="constant")
    smooth = ndimage.gaussian_filter(grey, sigma, mode="constant") / (inside + np.finfo(np.float64).eps)
    down, across = ndimage.sobel(smooth, axis=0), ndimage.sobel(smooth, axis=1)
    return np.sqrt(down * down + across * across), down, across


def _thin(steepness: Plane, down: Plane, across: Plane, low: float) -> Marks:
    """Where |g| is at least `low` and largest along +-g (Eqs. 3 and 4); nowhere on the picture's border."""
    low = max(float(np.float32(low)), 1e-14)  # scikit-image's is a C float; and of 0 only what is more than round-off
    kept = np.zeros(steepness.shape, bool)
    y, x = np.nonzero(steepness[1:-1, 1:-1] >= low)
    y, x = y + 1, x + 1
    here, down, across = steepness[y, x], down[y, x], across[y, x]
    step_y, step_x = np.where(down > 0, 1, -1), np.where(across > 0, 1, -1)
    upright = np.abs(down) > np.abs(across)
    smaller, larger = np.sort([np.abs(down), np.abs(across)], axis=0)
    share = smaller / larger
    largest = np.ones(here.shape, bool)
    for way in (1, -1):
        diagonal = steepness[y + way * step_y, x + way * step_x]
        straight = steepness[y + way * step_y * upright, x + way * step_x * ~upright]
        largest &= diagonal * share + straight * (1.0 - share) <= here
    kept[y[largest], x[largest]] = True
    return kept


def _white(marks: Marks) -> Picture:
    return as_picture(np.where(marks, np.uint8(255), np.uint8(0)))
