"""Hints from pictures: python -m sd_jax.preprocessors NAME IN OUT [--low_threshold=0.1 ...]

IN is a picture, or a folder whose pictures all are done; OUT a file (png, jpg or webp), or a folder, where hints have
the names of the pictures and end in .png. What is at OUT already is left as it is, unless --overwrite is given. A
picture that cannot be read is told of, and the others are done.

The hint of `inpaint` has numbers below 0, as no picture has, so it is written as .npy (float32 [height, width, 3]). Its
mask is --mask=FILE, or a folder of files that have the names of the pictures; white is redrawn.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from sd_jax import media
from sd_jax.checkpoints.aside import aside
from sd_jax.preprocessors import PREPROCESSORS, apply, colours, read_options


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sd_jax.preprocessors",
        description=__doc__.split("\n\n", 1)[1],
        epilog=_listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="of a preprocessor: see below")
    parser.add_argument("source", metavar="IN", type=pathlib.Path, help="a picture, or a folder of pictures")
    parser.add_argument("target", metavar="OUT", type=pathlib.Path, help="a file, or a folder")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at OUT already")
    arguments, rest = parser.parse_known_args(argv)
    try:
        failed = _preprocess(arguments.name, arguments.source, arguments.target, _options(rest), arguments.overwrite)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0


def _listing() -> str:
    lines = ["preprocessors and their options:"]
    for name, row in PREPROCESSORS.items():
        flags = [f"--{option}={'FILE' if default is None else default}" for option, default in row.options.items()]
        lines += [f"  {' '.join([name, *flags])}", f"      {row.about}"]
    return "\n".join(lines)


def _options(rest: Sequence[str]) -> dict[str, str]:
    """["--sigma=2"] -> {"sigma": "2"}."""
    options = {}
    for text in rest:
        option, equals, value = text.removeprefix("--").partition("=")
        if not text.startswith("--") or not equals:
            raise ValueError(f"unexpected argument {text!r}: options are given as --name=value")
        options[option] = value
    return options


def _preprocess(name: str, source: pathlib.Path, target: pathlib.Path, options: dict[str, str], overwrite: bool) -> int:
    """How many pictures could not be read."""
    read_options(name, options)  # before anything else is looked at
    pairs = _pairs(source, target, ".npy" if name == "inpaint" else ".png")
    there = [path for _, path in pairs if path.exists()]
    if there and not overwrite:
        raise FileExistsError(f"{there[0]} already exists and is left as it is: give another OUT, or --overwrite")
    if name == "inpaint" and pairs[0][1].suffix != ".npy":
        raise ValueError(f"{target}: the hint has numbers below 0, as no picture has: give an OUT that ends in .npy")
    failed = 0
    for picture, path in pairs:
        try:
            pixels, settings = media.decode_image(picture), _with_mask(options, picture)
        except media.BadImage as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        _write(path, apply(name, pixels, **settings))
        print(path)
    return failed


def _pairs(source: pathlib.Path, target: pathlib.Path, ending: str) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """What is read, and where what comes of it is written."""
    if not source.is_dir():
        return [(source, target / f"{source.stem}{ending}" if target.is_dir() else target)]
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file, and {source} a folder: give a folder as OUT")
    pictures = sorted(path for path in source.iterdir() if path.name.lower().endswith(media.PICTURES))
    if not pictures:
        raise ValueError(f"{source} holds no pictures ({', '.join(media.PICTURES)})")
    found: dict[pathlib.Path, pathlib.Path] = {}
    for picture in pictures:
        path = target / f"{picture.stem}{ending}"
        if path in found:
            raise ValueError(f"{found[path]} and {picture} would both become {path}: rename one of them")
        found[path] = picture
    return [(picture, path) for path, picture in found.items()]


def _with_mask(options: dict[str, str], picture: pathlib.Path) -> dict[str, Any]:
    """The options, the mask's file read."""
    if "mask" not in options:
        return options
    path = pathlib.Path(options["mask"])
    return {**options, "mask": colours.luma(media.decode_image(path / picture.name if path.is_dir() else path))}


def _write(path: pathlib.Path, hint: np.ndarray) -> None:
    if hint.dtype == np.uint8:
        media.write_picture(path, hint, {})
    else:
        with aside(path, overwrite=True) as work, work.open("wb") as file:
            np.save(file, hint)


if __name__ == "__main__":
    sys.exit(main())
