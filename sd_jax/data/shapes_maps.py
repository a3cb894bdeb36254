"""Maps of shapes world's scenes, which a control may be trained to follow; that the truth is known makes them exact.

outline   white lines, about a pixel wide, on black
segment   each thing in its shape's colour of SEGMENTS, on black; what colour it has in the picture, it does not say
depth     each thing a dome: the deeper inside, the brighter, by the distance to its border; black is far
"""

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from sd_jax.data.shapes import SHAPES, Scene
from sd_jax.data.shapes_drawing import coverage, sides

MAPS = ("outline", "segment", "depth")
# Far from each other, and from black
_LEVELS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255), (255, 255, 255))
SEGMENTS = dict(zip(SHAPES, (*_LEVELS, (128, 128, 128)), strict=True))


def draw_map(
    kind: str,  # one of MAPS
    scene: Scene,
    size: int | tuple[int, int],  # pixels: the side of a square, or height and width
) -> UInt8[np.ndarray, "height width 3"]:
    """Raises ValueError for a kind that there is not."""
    if kind not in MAPS:
        raise ValueError(f"shapes world has no map {kind!r}: there are {', '.join(MAPS)}")
    height, width = sides(size)
    pixels = np.zeros((height, width, 3), np.uint8)
    for thing, mask in zip(scene.things, masks_of(scene, size), strict=True):
        if kind == "segment":
            pixels[mask] = SEGMENTS[thing.shape]
            continue
        pixels[mask] = 0  # it hides what is behind it
        if kind == "outline":
            pixels[mask & ~_inner(mask)] = 255
            continue
        # A wide soft edge is the distance to the border
        radius = scene.radius(thing)
        soft = np.zeros((height, width), np.float32)
        alpha, rows, columns = coverage(thing.shape, thing.x, thing.y, radius, size, 2 * radius * min(height, width))
        soft[rows, columns] = alpha
        dome = 96.0 + 318.0 * np.clip(soft - 0.5, 0.0, 0.5)
        pixels[mask] = dome[mask][:, None].astype(np.uint8)
    return pixels


def masks_of(scene: Scene, size: int | tuple[int, int]) -> list[Bool[np.ndarray, "height width"]]:
    """Where each thing is drawn, more than half of a pixel, whatever is in front of it."""
    masks = []
    for thing in scene.things:
        mask: Float32[np.ndarray, "height width"] = np.zeros(sides(size), np.float32)
        alpha, rows, columns = coverage(thing.shape, thing.x, thing.y, scene.radius(thing), size)
        mask[rows, columns] = alpha
        masks.append(mask > 0.5)
    return masks


def _inner(mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """What has neighbours of the mask on all four sides."""
    padded = np.pad(mask, 1)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
