"""Work on pictures larger than memory or training allows: in overlapping tiles of one size, with feathered seams.

All tiles have the same size, so that one compilation serves them. The weight w of a tile rises from its edge over the
overlap; the result is the weighted mean of what the tiles k say of a place p,

    y(p) = sum_k w_k(p) y_k(p) / sum_k w_k(p).                                                              (1)

Within a margin of its edges, where a convolution has met the zeros around the tile, w is next to nothing: another
tile's answer is taken wherever there is one.

Where several pixels belong together (those of a latent, those that become channels), tiles begin where they do: sides
are counted in such cells.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

_NEXT_TO_NOTHING = 1e-5  # not nothing: at the edges of the picture there is no other tile


class Tiling(NamedTuple):
    sides: tuple[int, int]  # height and width of every tile
    corners: list[tuple[int, int]]  # top and left of each
    shares: Float[np.ndarray, "tiles height width 1"]  # w_k / sum w of Eq. 1


def lay_tiles(
    height: int,
    width: int,
    tile: int,  # the side; a shorter side of the picture is taken whole
    overlap: int | None = None,  # at least this much; None = a quarter of the tile
    scale: int = 1,  # shares are wanted for places so many times as fine as cells
    margin: int = 0,  # less than half of the overlap, of which it is a part
) -> Tiling:
    """Tiles, evenly spread over the picture. Raises ValueError for a tile that is no larger than its overlap."""
    overlap = tile // 4 if overlap is None else overlap
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles of side {tile} cannot overlap by {overlap}: make the tile larger")
    sides = min(tile, height), min(tile, width)
    corners = [(top, left) for top in _starts(height, tile, overlap) for left in _starts(width, tile, overlap)]
    rows, columns = (_ramp(side * scale, overlap * scale, margin * scale) for side in sides)
    weights = (rows[:, None] * columns[None])[..., None]
    total = np.zeros((height * scale, width * scale, 1), np.float32)
    for corner in corners:
        total[window(corner, sides, scale)] += weights
    return Tiling(sides, corners, np.stack([weights / total[window(corner, sides, scale)] for corner in corners]))


def window(corner: tuple[int, int], sides: tuple[int, int], scale: int = 1) -> tuple[slice, slice]:
    """Rows and columns of a tile, in an array of places `scale` times as fine as cells."""
    top, left = (slice(start * scale, (start + side) * scale) for start, side in zip(corner, sides, strict=True))
    return top, left


def map_tiles(
    function: Callable,  # of [1, rows, columns, c], `scale` times as fine as cells, to `new_scale` times as fine
    picture: np.ndarray,  # [height, width, c]
    scale: int,
    new_scale: int,
    tile: int,  # cells, as is the overlap
    overlap: int | None = None,  # None = a quarter of the tile
    margin: int = 0,  # of the tiles' edges, that counts only where no other tile is
) -> Float[np.ndarray, "new_height new_width channels"]:
    """What `function` makes of a picture, one tile after the other (Eq. 1); float32, on the host."""
    height, width = picture.shape[0] // scale, picture.shape[1] // scale
    sides, corners, shares = lay_tiles(height, width, tile, overlap, new_scale, margin)
    sums = None
    for corner, share in zip(corners, shares, strict=True):
        part = np.asarray(function(picture[window(corner, sides, scale)][None]), np.float32)[0]
        if sums is None:
            sums = np.zeros((height * new_scale, width * new_scale, part.shape[-1]), np.float32)
        sums[window(corner, sides, new_scale)] += share * part
    return sums


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [i * (length - tile) // (count - 1) for i in range(count)]


def _ramp(length: int, overlap: int, margin: int) -> Float[np.ndarray, " length"]:
    """Up over the overlap and down again, in (0, 1]; first the margin, in which it is next to nothing."""
    from_edge = np.arange(length, dtype=np.float32) + np.float32(0.5 - margin)
    rise = np.maximum(from_edge / np.float32(max(overlap - 2 * margin, 1)), np.float32(_NEXT_TO_NOTHING))
    return np.minimum(np.float32(1), np.minimum(rise, rise[::-1]))
