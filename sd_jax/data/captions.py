"""Whatever a data set holds as text -> captions."""

from collections.abc import Iterable
from logging import getLogger
from typing import Any

from sd_jax.data import DataError

# Names that data sets in use give to these two, the likeliest first
IMAGE_KEYS = ("image", "jpg", "jpeg", "png", "webp", "img")
CAPTION_KEYS = ("text", "caption", "txt", "captions", "prompt", "json.caption")

logger = getLogger(__name__)


def texts_of(value: Any) -> tuple[str, ...]:
    """A caption, a list of captions, bytes or nothing -> captions, each on one line; () where there is no word."""
    if value is None:
        return ()
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, list | tuple):
        return tuple(text for part in value for text in texts_of(part))
    text = " ".join(str(value).lstrip("\ufeff").split())
    return (text,) if text else ()


def choose_key(wanted: str, columns: Iterable[str], usual: tuple[str, ...], setting: str, where: str) -> str:
    """The column that `wanted`, the value of the config key `setting`, stands for.

    A usual name that is not there stands for the first usual name that is ("text" finds the `txt` of a webdataset); any
    other name is taken at its word. Raises DataError, listing the columns, where there is none.
    """
    columns = list(columns)
    if wanted in columns:
        return wanted
    for name in usual if wanted in usual else ():
        if name in columns:
            logger.info("%s=%r: %s has no such column, reading %r", setting, wanted, where, name)
            return name
    raise DataError(f"{setting}={wanted!r}: {where} has no such column; it has {', '.join(columns) or 'none'}")
