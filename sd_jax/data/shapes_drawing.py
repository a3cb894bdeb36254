"""How the shapes world is drawn: the coverage of a shape, and the backgrounds. numpy only.

Every shape is a signed distance d(u, v) in units of its radius, with u to the right and v downwards, negative inside. A
pixel whose centre lies at distance d is covered by

    alpha = clip(1/2 - d * radius_in_pixels / softness, 0, 1)                                        (1)

which is the exact box coverage of a straight edge along an axis for softness 1. The bounding box of each shape is
centred on (0, 0), and the extents are chosen so that all shapes of one radius look equally large (a square of the
circle's width would look larger).

Places are fractions of the picture's width and height, lengths are fractions of its shorter side: so any resolution
shows the same scene, and in a wide picture things lie farther apart and stay round.
"""

import functools
import math
from collections.abc import Callable

import numpy as np

REACH = 1.1  # no shape reaches farther than this many radii from its centre, along either axis


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v) - 1.0


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - 0.88


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Corners (0, -0.96), (1.1, 0.9), (-1.1, 0.9)."""
    length = math.hypot(1.1, 1.86)
    return np.maximum((np.abs(u) * 1.86 - (v + 0.96) * 1.1) / length, v - 0.9)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five points, one upwards. The plane is folded into one sector of 36 degrees, in which the outline is one edge."""
    outer, inner, fifth = 1.15, 0.5, 2.0 * math.pi / 5.0
    v = v - 0.11  # a star's box reaches less far below the centre of its circle than above
    angle = np.arctan2(u, -v)
    angle = np.abs(angle - fifth * np.round(angle / fifth))
    rho = np.sqrt(u * u + v * v)
    edge_u, edge_v = inner * math.cos(fifth / 2) - outer, inner * math.sin(fifth / 2)
    length = math.hypot(edge_u, edge_v)
    return ((rho * np.cos(angle) - outer) * edge_v - rho * np.sin(angle) * edge_u) / length


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Two discs, and the convex body that their common tangents and the lower tip enclose."""
    disc, centre_u, centre_v, tip = 0.565, 0.5, -0.415, 0.98
    u = np.abs(u)
    du, dv = u - centre_u, v - centre_v
    lobe = np.sqrt(du * du + dv * dv) - disc
    # The tangent from the tip: its direction makes the angle `spread` with the line from the tip to the disc's centre.
    reach = math.hypot(centre_u, tip - centre_v)
    direction = math.atan2(centre_v - tip, centre_u) + math.asin(disc / reach)
    along_u, along_v = math.cos(direction), math.sin(direction)
    body = np.maximum(-along_v * u + along_u * (v - tip), du * along_u + dv * along_v)
    return np.minimum(lobe, np.maximum(body, -dv))


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(u, v) - 1.0, np.minimum(u, v) - 0.34)


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(u * u + v * v) - 0.77) - 0.26


def _moon(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A crescent open to the right: a disc of 1.06 less a disc of 0.86 that lies 0.52 to its right."""
    u = u - 0.2
    outer = np.sqrt(u * u + v * v) - 1.06
    u = u - 0.52
    return np.maximum(outer, 0.86 - np.sqrt(u * u + v * v))


DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": _ring,
    "moon": _moon,
}


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a picture: of a square, which goes by its side, or as they are."""
    return (size, size) if isinstance(size, int) else size


def coverage(
    shape: str,
    x: float,  # centre, fraction of the width, from the left
    y: float,  # centre, fraction of the height, from the top
    radius: float,  # fraction of the shorter side
    size: int | tuple[int, int],  # pixels of the picture: the side of a square, or height and width
    softness: float = 1.0,  # pixels over which an edge fades (Eq. 1)
) -> tuple[np.ndarray, slice, slice]:
    """The share of each pixel that a shape covers, in the box that holds it: (alpha float32 [h, w], rows, columns)."""
    height, width = sides(size)
    side = min(height, width)
    reach = radius * REACH * side + softness
    columns = slice(max(0, math.floor(x * width - reach)), min(width, math.ceil(x * width + reach)))
    rows = slice(max(0, math.floor(y * height - reach)), min(height, math.ceil(y * height + reach)))
    step = 1.0 / (radius * side)
    u = (np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5) * step - x / radius * (width / side)
    v = (np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5) * step - y / radius * (height / side)
    distance = DISTANCES[shape](u.astype(np.float32)[None, :], v.astype(np.float32)[:, None])
    alpha = np.minimum(np.maximum(0.5 - distance * np.float32(radius * side / softness), 0.0), 1.0)
    return alpha, rows, columns


# -- Backgrounds: achromatic, so that no object colour is ever near one ----------------------------------------------

KINDS = ("plain", "gradient", "striped", "dotted")
TONES = {"white": (236.0, 18.0), "grey": (150.0, 22.0)}  # mean level, and the pattern's amplitude
BACKGROUNDS = tuple(f"{kind} {tone}" for kind in KINDS for tone in TONES)


@functools.lru_cache(maxsize=256)
def background_levels(background: str, size: int | tuple[int, int]) -> np.ndarray:
    """The grey level of each pixel, float32 [height, width], of e.g. "striped grey". Do not write to it.

    Stripes and dots are as large as in a square of the shorter side, and more of them fill the longer one.
    """
    kind, tone = background.split()
    level, amplitude = TONES[tone]
    height, width = sides(size)
    side = min(height, width)
    down, across = ((np.arange(length) + 0.5) / side for length in (height, width))
    if kind == "plain":
        pattern = np.zeros((height, width))
    elif kind == "gradient":  # light above, dark below
        pattern = np.broadcast_to(1.0 - 2.0 * ((np.arange(height) + 0.5) / height)[:, None], (height, width))
    elif kind == "striped":  # upright stripes, four light and four dark
        wave = 8.0 * across % 2.0
        edge = np.minimum(wave, 2.0 - wave) - 0.5  # distance to the nearest edge, in stripes; negative on dark ones
        pattern = np.broadcast_to(np.clip(edge * side / 4.0, -1.0, 1.0)[None, :], (height, width))
    elif kind == "dotted":  # four by four dots, dark on white, light on grey
        cell_down, cell_across = ((4.0 * at) % 1.0 - 0.5 for at in (down, across))
        distance = np.sqrt(cell_down[:, None] ** 2 + cell_across[None, :] ** 2) - 0.3
        dots = np.clip(0.5 - distance * side / 4.0, 0.0, 1.0)
        pattern = (2.0 * dots - 0.7) * (-1.0 if tone == "white" else 1.0)
    else:
        raise ValueError(f"unknown background {background!r}; choose from {', '.join(BACKGROUNDS)}")
    return np.clip(level + amplitude * pattern, 0.0, 255.0).astype(np.float32)
