"""A line through points, as a picture: the FID-CLIP curve (Saharia et al. 2022, figure 4) needs no plotting library."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

_SIZE = (720, 480)  # width, height
_BOX = (84, 52, 690, 414)  # left, top, right, bottom of the axes
_TIMES = 2  # drawn so many times larger, then made smaller: smooth lines
_INK, _GREY, _GRID, _LINE = (30, 30, 30), (90, 90, 90), (226, 226, 226), (31, 99, 173)


def curve(
    points: Sequence[tuple[float, float]],  # in the order in which they are joined
    labels: Sequence[str],  # one beside each
    x_name: str,
    y_name: str,
    title: str = "",
) -> UInt8[np.ndarray, "480 720 3"]:
    """Raises ValueError where a number is not finite, or there is no point."""
    if not len(points) or not np.isfinite(points).all():
        raise ValueError(f"a curve of the points {list(points)}: at least one, and finite numbers are needed")
    sheet = Image.new("RGB", tuple(_TIMES * side for side in _SIZE), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    left, top, right, bottom = (_TIMES * edge for edge in _BOX)
    font, small = (ImageFont.load_default(_TIMES * size) for size in (15, 13))
    (x_ticks, x_low, x_high), (y_ticks, y_low, y_high) = (_axis(values) for values in zip(*points, strict=True))

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return left + across * (right - left), bottom - up * (bottom - top)

    for tick in x_ticks:
        x, _ = place(tick, y_low)
        draw.line([(x, top), (x, bottom)], _GRID, _TIMES)
        draw.text((x, bottom + 6 * _TIMES), _text(tick, x_ticks), _GREY, small, anchor="ma")
    for tick in y_ticks:
        _, y = place(x_low, tick)
        draw.line([(left, y), (right, y)], _GRID, _TIMES)
        draw.text((left - 8 * _TIMES, y), _text(tick, y_ticks), _GREY, small, anchor="rm")
    draw.line([(left, top), (left, bottom), (right, bottom)], _GREY, _TIMES)
    draw.text(((left + right) / 2, bottom + 32 * _TIMES), x_name, _INK, font, anchor="ma")
    draw.text((left - 8 * _TIMES, top - 10 * _TIMES), y_name, _INK, font, anchor="ls")
    draw.text((right, top - 10 * _TIMES), title, _GREY, font, anchor="rs")

    places = [place(x, y) for x, y in points]
    draw.line(places, _LINE, 2 * _TIMES, joint="curve")
    for (x, y), label, aside in zip(places, labels, _sides(places), strict=True):
        draw.circle((x, y), 4 * _TIMES, _LINE)
        draw.text((x + aside[0] * 16 * _TIMES, y + aside[1] * 16 * _TIMES), label, _INK, small, anchor="mm")
    return np.array(sheet.resize(_SIZE, Image.Resampling.LANCZOS), np.uint8)


def _axis(values: Sequence[float]) -> tuple[list[float], float, float]:
    """(round numbers that cover the values and a little more, the least, the greatest)."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - room, high + room
    rough = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (magnitude, 2 * magnitude, 5 * magnitude, 10 * magnitude) if step >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [n * step for n in range(first, last + 1)], low, high


def _text(tick: float, ticks: Sequence[float]) -> str:
    """With as many digits as tell the ticks apart."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(tick) or 1.0
    return f"{tick + 0.0:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _sides(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """For each point a direction, of length 1, away from its neighbours: there its label crosses no line."""
    found = []
    for i, here in enumerate(places):
        pull = np.zeros(2)
        for other in (places[i - 1] if i else None, places[i + 1] if i + 1 < len(places) else None):
            apart = np.subtract(here, here if other is None else other)
            pull += apart / (np.linalg.norm(apart) or 1.0)
        length = np.linalg.norm(pull)
        if length < 0.2 and i and i + 1 < len(places):  # on a straight line: across it
            along = np.subtract(places[i + 1], places[i - 1])
            pull, length = np.array([along[1], -along[0]]), np.linalg.norm(along)
        found.append(tuple(pull / length) if length else (0.0, -1.0))
    return found
