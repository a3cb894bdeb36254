"""What a picture's file says before it is decoded."""

import io
import os
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from logging import getLogger

import numpy as np
from jaxtyping import Int64
from PIL import Image, UnidentifiedImageError

from sd_jax.media import BadImage

_ORIENTATION = 0x0112  # the EXIF tag; from 5 on height and width change places
_NAMED = 10  # pictures without a size, in the log
_PROBED = 8  # records whose headers are held against what is told of sizes

logger = getLogger(__name__)


def full_size(file: bytes | pathlib.Path) -> tuple[int, int] | None:
    """(height, width) of a JPEG, upright; None for all else, which `media.decode_image` never makes smaller.

    For files that have been decoded: raises whatever PIL does for others.
    """
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        return _upright(image) if image.format in ("JPEG", "MPO") else None


def size(file: bytes | pathlib.Path, name: str) -> tuple[int, int]:
    """(height, width) of any picture, upright, as `media.decode_image` would have it. Raises BadImage, with `name`."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return _upright(image)
    except UnidentifiedImageError as error:
        raise BadImage(name, "not a picture in a known format") from error
    except Exception as error:  # noqa: BLE001  decoders raise OSError, SyntaxError, struct.error, IndexError, ...
        raise BadImage(name, getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def sizes(
    size_of: Callable[[int], tuple[int, int]],  # raises BadImage
    indices: Int64[np.ndarray, " indices"],
) -> Int64[np.ndarray, "indices 2"]:
    """`size_of` each of `indices`, by many threads; (0, 0) where it raises BadImage, which the log tells of."""

    def read(index: np.int64) -> tuple[int, int] | BadImage:
        try:
            return size_of(int(index))
        except BadImage as error:
            return error

    with ThreadPoolExecutor(4 * (os.cpu_count() or 1)) as pool:  # they wait for the disk
        found = list(pool.map(read, indices))
    bad = [error for error in found if isinstance(error, BadImage)]
    for error in bad[:_NAMED]:
        logger.warning("left out %s", error)
    if len(bad) > _NAMED:
        logger.warning("left out %d more that have no size", len(bad) - _NAMED)
    return np.array([(0, 0) if isinstance(size, BadImage) else size for size in found], np.int64).reshape(-1, 2)


def told_sizes(
    told: Int64[np.ndarray, "records 2"],  # (height, width) as columns tell them, 0 where they do not
    size_of: Callable[[int], tuple[int, int]],  # raises BadImage
    what: str,  # tells it, for the log
) -> Int64[np.ndarray, "records 2"]:
    """What is told, where some records' headers agree with it, and else what `sizes` finds."""
    result = told.copy()
    known = np.flatnonzero((result > 0).all(1))
    probed = known[np.linspace(0, len(known) - 1, min(len(known), _PROBED)).astype(np.int64)]
    seen = sizes(size_of, probed)
    if not np.array_equal(result[probed][seen[:, 0] > 0], seen[seen[:, 0] > 0]):
        logger.warning("%s are not the sizes of its pictures", what)
        result[:] = 0
    unknown = np.flatnonzero((result <= 0).any(1))
    result[unknown] = sizes(size_of, unknown) if len(unknown) else 0
    return result


def _upright(image: Image.Image) -> tuple[int, int]:
    try:
        # That of the base: a PNG's own would decode the picture to find metadata at its end
        sideways = Image.Image.getexif(image).get(_ORIENTATION, 1) >= 5
    except Exception:  # noqa: BLE001  the metadata is broken, the picture need not be
        sideways = False
    return image.size if sideways else image.size[::-1]
