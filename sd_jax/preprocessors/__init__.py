"""Picture -> what a control model is shown of it, in numbers on the host: `apply("canny", pixels, sigma=2.0)`.

    canny, soft_edge, scribble, line_art    lines, white on black             `edges`
    segment, recolour, grayscale            colours alone, or none of them    `colours`
    tile, blur, shuffle, inpaint            what a model is to put back       `content`

Maps of depth, normals and poses take networks that are not ours: they are pictures that come ready, and a control takes
them as they are. `python -m sd_jax.preprocessors` does the same with files.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sd_jax.names import hint
from sd_jax.preprocessors import colours, content, edges


class Preprocessor(NamedTuple):
    function: Callable[..., np.ndarray]  # of one picture, and of options by name
    options: Mapping[str, Any]  # name -> default; None = it must be given
    about: str  # a line


def _row(function: Callable[..., np.ndarray]) -> Preprocessor:
    _, *options = inspect.signature(function).parameters.values()
    defaults = {option.name: None if option.default is option.empty else option.default for option in options}
    return Preprocessor(function, defaults, inspect.getdoc(function).splitlines()[0])


PREPROCESSORS: dict[str, Preprocessor] = {
    "canny": _row(edges.canny),
    "soft_edge": _row(edges.soft_edge),
    "scribble": _row(edges.scribble),
    "line_art": _row(edges.line_art),
    "segment": _row(colours.segment),
    "recolour": _row(colours.recolour),
    "grayscale": _row(colours.grayscale),
    "tile": _row(content.tile),
    "blur": _row(content.blur),
    "shuffle": _row(content.shuffle),
    "inpaint": _row(content.inpaint),
}


def apply(
    name: str,  # a key of PREPROCESSORS
    pixels: Any,  # uint8 [height, width, 3] or [batch, height, width, 3]
    **options: Any,  # those of its row, as numbers or as text; `mask` is [height, width], or a batch of such
) -> np.ndarray:
    """What the preprocessor makes of a picture, or of each of a batch as of it alone: of the same shape, uint8.

    Of "inpaint" alone it is float32, in [0, 1] and -1: see `content.inpaint`. Raises ValueError for an unknown name or
    option, a value that an option does not take, an option that must be given, and pixels of another kind.
    """
    row, settings = named(name), read_options(name, options)
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3 or 0 in pixels.shape[-3:]:
        raise ValueError(
            f"{name}: pixels are {pixels.dtype} {list(pixels.shape)}: give uint8 [height, width, 3], or a batch of such"
        )
    if pixels.ndim == 3:
        return row.function(pixels, **settings)
    each = [settings] * len(pixels)
    if np.ndim(settings.get("mask")) == 3:
        if len(settings["mask"]) != len(pixels):
            raise ValueError(f"{name}: {len(settings['mask'])} masks for {len(pixels)} pictures: give one for each")
        each = [{**settings, "mask": mask} for mask in settings["mask"]]
    made = [row.function(picture, **own) for picture, own in zip(pixels, each, strict=True)]
    return np.stack(made) if made else pixels


def named(name: str) -> Preprocessor:
    """Raises ValueError for a name that is not in PREPROCESSORS."""
    if name not in PREPROCESSORS:
        raise ValueError(f"unknown preprocessor {name!r}: {hint(name, PREPROCESSORS)}")
    return PREPROCESSORS[name]


def read_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a preprocessor, of the types that its function takes. Raises ValueError as `apply` does."""
    defaults = named(name).options
    for option in options:
        if option not in defaults:
            mend = hint(option, defaults) if defaults else "it has none"
            raise ValueError(f"{name}: unknown option {option!r}: {mend}")
    missing = [option for option, default in defaults.items() if default is None and options.get(option) is None]
    if missing:
        raise ValueError(f"{name}: {missing[0]} is needed: give {missing[0]}=")
    return {option: _read(name, option, value, defaults[option]) for option, value in options.items()}


_KINDS = {int: "a whole number", float: "a number"}


def _read(name: str, option: str, value: Any, default: Any) -> Any:
    kind = type(default)
    if kind not in _KINDS:
        return np.asarray(value) if default is None else value
    try:
        read = kind(value)
    except (TypeError, ValueError, OverflowError):
        read = None
    if read is None or not isinstance(value, str) and read != value:  # 2.5 is no whole number
        raise ValueError(f"{name}: {option}={value!r}: give {_KINDS[kind]}")
    return read
