"""Random masks, by which a model learns to redraw parts of pictures: what is white (1) is hidden and drawn anew.

Each picture has a mask of one kind, drawn from its own key, as in LaMa (Suvorov et al. 2021, arXiv 2109.07161, section
2.4) and in Stable Diffusion's inpainting models, a quarter of whose masks hide all:

    rectangles  1 to 4, anywhere in the picture, sides even in [0.1, side] of its own
    strokes     1 to 4 of a thick brush, each up to 6 straight pieces, ends round. Of a piece, direction is even, length
                even up to 0.4 and thickness, the whole stroke's, in [0.05, thickness] of the picture's shorter side
    whole       the whole picture, as when nothing is given

A pixel is hidden where its centre lies within.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

MOST = 4  # rectangles or strokes
PIECES = 6  # of a stroke
LENGTH = 0.4  # of a piece, at most
LEAST_SIDE, LEAST_THICKNESS = 0.1, 0.05
_STROKES = (1, 2, PIECES, PIECES)  # numbers of each: thickness, start, directions, lengths
_NUMBERS = MOST * sum(_STROKES)  # that are drawn for a mask


class Mix(NamedTuple):
    rectangles: float  # how often each kind comes, relative to the others
    strokes: float
    whole: float
    side: float  # of rectangles, at most
    thickness: float  # of strokes, at most


def check(mix: Mix, where: str) -> None:
    """Raises ValueError, naming the key after `where`."""
    for key in ("rectangles", "strokes", "whole"):
        if not 0 <= getattr(mix, key) < float("inf"):
            raise ValueError(f"{where}.{key}={getattr(mix, key)}: give a number from 0 (never) on")
    if not mix.rectangles + mix.strokes + mix.whole:
        raise ValueError(f"{where}: rectangles, strokes and whole are all 0, and there is no mask: set one to 1")
    for key, least in (("side", LEAST_SIDE), ("thickness", LEAST_THICKNESS)):
        if not least <= getattr(mix, key) <= 1:
            raise ValueError(f"{where}.{key}={getattr(mix, key)}: give a share of the picture, {least} to 1")


def random_masks(
    keys: Key[Array, " batch"],  # of the pictures
    draw: Int[Array, ""] | int,  # which draw of each this is, as in diffusion/noise.py
    size: tuple[int, int],  # height and width in pixels
    mix: Mix,
) -> Float[Array, "batch height width 1"]:
    """1 where the picture is hidden, else 0."""
    below = jnp.cumsum(jnp.array([mix.rectangles, mix.strokes])) / (mix.rectangles + mix.strokes + mix.whole)

    def one(key):
        u = jax.random.uniform(jax.random.fold_in(key, draw), (2 + _NUMBERS,))
        kind, number, u = u[0], u[1], u[2:]
        there = jnp.arange(MOST) <= jnp.floor(MOST * number).astype(jnp.int32)
        kinds = [
            lambda: _rectangles(u, there, size, mix.side),
            lambda: _strokes(u, there, size, mix.thickness),
            lambda: jnp.ones(size, bool),
        ]
        return jax.lax.switch(jnp.sum(kind >= below), kinds)

    return jax.vmap(one)(keys)[..., None].astype(jnp.float32)


def _rectangles(
    u: Float[Array, " numbers"],  # even in [0, 1)
    there: Bool[Array, " most"],
    size: tuple[int, int],
    side: float,
) -> Bool[Array, "height width"]:
    sides, places = u[: 4 * MOST].reshape(2, MOST, 2)
    sides = LEAST_SIDE + (side - LEAST_SIDE) * sides
    first = places * (1 - sides)
    rows, columns = (_centres(length)[None] / length for length in size)
    inside = lambda at, axis: (at >= first[:, axis, None]) & (at < (first + sides)[:, axis, None])  # noqa: E731
    each = inside(rows, 0)[:, :, None] & inside(columns, 1)[:, None, :]
    return jnp.any(each & there[:, None, None], axis=0)


def _strokes(
    u: Float[Array, " numbers"], there: Bool[Array, " most"], size: tuple[int, int], thickness: float
) -> Bool[Array, "height width"]:
    sides = jnp.array(size, jnp.float32) / min(size)  # in shorter sides, as all that follows
    widths, starts, turns, lengths = jnp.split(u.reshape(MOST, -1), np.cumsum(_STROKES)[:-1], axis=1)
    radii = (LEAST_THICKNESS + (thickness - LEAST_THICKNESS) * widths[:, 0]) / 2
    directions = jnp.stack([jnp.sin(2 * jnp.pi * turns), jnp.cos(2 * jnp.pi * turns)], axis=-1)
    moves = LENGTH * lengths[..., None] * directions
    points = [starts * sides[None]]
    for i in range(PIECES):  # a brush does not leave the picture
        points.append(jnp.clip(points[-1] + moves[:, i], 0, sides[None]))
    points = jnp.stack(points, axis=1)
    rows, columns = (_centres(length) / min(size) for length in size)
    at = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), axis=-1)

    def drawn(mask, piece):
        start, end, radius, counts = piece
        along = (end - start)[None, None]
        nearest = jnp.sum((at - start[None, None]) * along, -1) / jnp.maximum(jnp.sum(along**2, -1), 1e-9)
        away = at - start[None, None] - jnp.clip(nearest, 0, 1)[..., None] * along
        return mask | ((jnp.sum(away**2, -1) < radius**2) & counts), None

    of_each = lambda values: jnp.repeat(values, PIECES)  # noqa: E731
    begins, ends = points[:, :-1].reshape(-1, 2), points[:, 1:].reshape(-1, 2)
    return jax.lax.scan(drawn, jnp.zeros(size, bool), (begins, ends, of_each(radii), of_each(there)))[0]


def _centres(length: int) -> Float[Array, " length"]:
    """Of pixels, in pixels."""
    return jnp.arange(length, dtype=jnp.float32) + 0.5
