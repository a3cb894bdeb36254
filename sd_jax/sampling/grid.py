"""X/Y/Z grids: a picture for every combination of values of up to three fields of a recipe, in a labelled table.

    sampler=euler,dpmpp_2m;steps=10,20,30        X is the sampler, Y the steps; a third would be Z, a table each
    seed=1-5;guidance_scale=2-8 (+1.5)           whole numbers and others also as ranges: both ends count
    strength=0.2-0.8 [4]                         four values from 0.2 to 0.8
    prompt_sr=cat,dog,"a cat, asleep"            the first is looked for in the prompts, and replaced by each in turn
    extend="64,0,0,0","0,0,64,0"                 a value with a comma is quoted

The notation of values is that of the X/Y/Z plot of A1111 (stable-diffusion-webui, scripts/xyz_grid.py).
"""

import csv
import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sd_jax import media
from sd_jax.names import hint
from sd_jax.sampling.recipe import FIELDS, kind_of, read_value
from sd_jax.types import Recipe

SEARCH_AND_REPLACE = "prompt_sr"
MOST_AXES = 3

# Another value of these compiles anew; and of those that follow, None in place of a number
_COMPILED = (
    "width",
    "height",
    "scale",
    "extend",
    "only_masked",
    "tile",
    "sampler",
    "steps",
    "second_steps",
    "clip_skip",
)
_OPTIONS = ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "guidance_rescale", "apg_eta", "apg_norm_threshold")

_NUMBER = r"[+-]?\d+(?:\.\d*)?"
_RANGE = re.compile(rf"({_NUMBER})\s*-\s*({_NUMBER})(?:\s*\(\s*({_NUMBER})\s*\)|\s*\[\s*(\d+)\s*\])?")


@dataclasses.dataclass(frozen=True)
class Axis:
    field: str  # of a Recipe, or SEARCH_AND_REPLACE
    values: tuple[Any, ...]

    def labels(self) -> list[str]:
        """What stands beside the pictures; names and prompts speak for themselves."""
        if self.field == SEARCH_AND_REPLACE or kind_of(self.field)[0] is str:
            return [str(value) or f"{self.field}: none" for value in self.values]
        return [f"{self.field}: {_shown(value)}" for value in self.values]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else f"{value:.8g}" if isinstance(value, float) else str(value)


# -- Reading ---------------------------------------------------------------------------------------------------------


def parse(text: str) -> list[Axis]:
    """The axes X, Y and Z, as many as there are. Raises ValueError, naming what is wrong."""
    parts = [part for part in re.split(r';(?=(?:[^"]*"[^"]*")*[^"]*$)', text) if part.strip()]  # not within quotes
    if not 1 <= len(parts) <= MOST_AXES:
        raise ValueError(f"grid: {len(parts)} axes: give 1 to {MOST_AXES}, as in sampler=euler,heun;steps=10,20")
    axes = [_axis(part) for part in parts]
    for i, axis in enumerate(axes):
        if axis.field != SEARCH_AND_REPLACE and axis.field in [other.field for other in axes[:i]]:
            raise ValueError(f"grid: {axis.field} is there twice")
    return axes


def _axis(text: str) -> Axis:
    name, equals, listed = text.partition("=")
    field = name.strip()
    fields = [field for field in FIELDS if field != "batch_size"] + [SEARCH_AND_REPLACE]
    if field == "batch_size":
        raise ValueError("grid: batch_size is no axis: a cell of a grid is one picture")
    if field not in fields:
        raise ValueError(f"grid: {field!r} is no field of a recipe: {hint(field, fields)}")
    values = [value.strip() for value in next(csv.reader([listed], skipinitialspace=True), [])]
    if not equals or not any(values):
        raise ValueError(f"grid: {field} has no values: write them as {field}=first,second")
    if field == SEARCH_AND_REPLACE:
        if not values[0]:
            raise ValueError(f"grid: {field} has nothing to look for: its first value is empty")
        return Axis(field, tuple(values))
    return Axis(field, tuple(value for text in values for value in _values(field, text)))


def _values(field: str, text: str) -> list[Any]:
    kind = kind_of(field)[0]
    span = _RANGE.fullmatch(text) if kind in (int, float) else None
    if span is None:
        try:
            return [read_value(field, text)]
        except ValueError as error:
            raise ValueError(f"grid: {error}") from None
    try:
        first, last = kind(span[1]), kind(span[2])
        step = kind(span[3] or (1 if last >= first else -1))
    except ValueError:
        raise ValueError(f"grid: {field}={text!r}: whole numbers are needed") from None
    if span[4] is not None:
        count = int(span[4])
        spread = np.linspace(first, last, count).tolist()
        values = [kind(value) if kind is int else round(value, 10) for value in spread]
    else:
        count = 1 + math.floor((last - first) / step + 1e-9) if step else 0
        values = [first + i * step if kind is int else round(first + i * step, 10) for i in range(count)]
    if not values:
        raise ValueError(f"grid: {field}={text!r} holds no value")
    return values


def to_json(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    return [{"field": axis.field, "values": list(axis.values)} for axis in axes]


def from_json(axes: Sequence[Mapping[str, Any]]) -> list[Axis]:
    as_tuple = lambda value: tuple(value) if isinstance(value, list) else value  # noqa: E731
    return [Axis(axis["field"], tuple(map(as_tuple, axis["values"]))) for axis in axes]


# -- The pictures ----------------------------------------------------------------------------------------------------


def cells(recipe: Recipe, axes: Sequence[Axis]) -> list[tuple[int, Recipe]]:
    """(number, recipe) of every picture, in the order in which they are best made: what compiles anew comes together.

    Pictures are numbered along X first, then Y, then Z. Raises ValueError for a recipe of more than one picture, and
    for a prompt without the text that is to be replaced.
    """
    if recipe.batch_size != 1:
        raise ValueError(f"batch_size={recipe.batch_size}: a cell of a grid is one picture: leave it out")
    made = []
    for number, places in enumerate(itertools.product(*(range(len(axis.values)) for axis in reversed(axes)))):
        made.append((number, _applied(recipe, axes, places[::-1])))
    order: dict[tuple, int] = {}
    for _, cell in made:
        order.setdefault(_compiled(cell), len(order))
    return sorted(made, key=lambda each: (order[_compiled(each[1])], each[0]))


def _applied(recipe: Recipe, axes: Sequence[Axis], places: Sequence[int]) -> Recipe:
    chosen = [(axis, axis.values[place]) for axis, place in zip(axes, places, strict=True)]
    recipe = dataclasses.replace(recipe, **{a.field: value for a, value in chosen if a.field != SEARCH_AND_REPLACE})
    for axis, value in chosen:
        if axis.field == SEARCH_AND_REPLACE:
            search = axis.values[0]
            if search not in recipe.prompt and search not in recipe.negative_prompt:
                raise ValueError(f"grid: {SEARCH_AND_REPLACE} looks for {search!r}, which is in neither of the prompts")
            prompts = {name: getattr(recipe, name).replace(search, value) for name in ("prompt", "negative_prompt")}
            recipe = dataclasses.replace(recipe, **prompts)
    return recipe


def _compiled(recipe: Recipe) -> tuple:
    options = tuple(getattr(recipe, name) is None for name in _OPTIONS)
    return tuple(getattr(recipe, name) for name in _COMPILED), recipe.guidance_scale == 1, options


def picture(
    axes: Sequence[Axis],
    pixels: Sequence[np.ndarray],  # uint8 [height, width, 3], by number; smaller ones get a white margin
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """The table, or a table for each value of Z."""
    columns, rows, blocks = [axis.labels() for axis in axes] + [[""]] * (MOST_AXES - len(axes))
    height, width = (max(each.shape[side] for each in pixels) for side in (0, 1))
    table = np.full((len(pixels), height, width, 3), 255, np.uint8)
    for place, each in zip(table, pixels, strict=True):
        place[: each.shape[0], : each.shape[1]] = each
    shape = (len(blocks), len(rows), len(columns), height, width, 3)
    return media.labelled_grid(table.reshape(shape), blocks, rows, columns)
