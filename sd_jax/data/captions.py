"""Whatever a data set holds as text -> captions, and the one that an example is trained with.

A record's captions are `fields`: for each column of `config.data.caption_key`, in its order, what it says of this
record; () where it says nothing.
"""

import re
from collections.abc import Iterable
from logging import getLogger
from typing import Any

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from sd_jax.data import DataError

# Names that data sets in use give to these two, the likeliest first
IMAGE_KEYS = ("image", "jpg", "jpeg", "png", "webp", "img")
CAPTION_KEYS = ("text", "caption", "txt", "captions", "prompt", "json.caption")

logger = getLogger(__name__)


# -- Columns ---------------------------------------------------------------------------------------------------------


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


def names_in(wanted: str) -> tuple[str, ...]:
    """ "text, blip_caption" -> ("text", "blip_caption"); "" -> ()."""
    return tuple(name for part in wanted.split(",") if (name := part.strip()))


def choose_keys(
    wanted: str, columns: Iterable[str], usual: tuple[str, ...], setting: str, where: str
) -> tuple[str, ...]:
    """The columns that `wanted`, names joined by commas, stands for; () for "".

    One name alone is read as `choose_key` does, of several each is taken at its word. Raises DataError, listing the
    columns, where there is no such one.
    """
    columns, names = list(columns), names_in(wanted)
    return tuple(choose_key(name, columns, usual if len(names) == 1 else (), setting, where) for name in names)


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


# -- The caption of an example ---------------------------------------------------------------------------------------


def check(data: ConfigDict | FrozenConfigDict) -> None:
    """Raises ValueError where `config.data` asks for captions that cannot be chosen."""
    names, weights = names_in(data.caption_key), tuple(data.caption_weights)
    if weights and len(weights) != len(names):
        raise ValueError(
            f"config.data.caption_weights={weights} are {len(weights)} for the {len(names)} columns of "
            f"config.data.caption_key={data.caption_key!r}: give one for each, or none"
        )
    if weights and not (min(weights) >= 0 and 0 < sum(weights) < float("inf")):
        raise ValueError(f"config.data.caption_weights={weights}: give numbers from 0 on, not all of them 0")
    if data.keep_tags < 0:
        raise ValueError(f"config.data.keep_tags={data.keep_tags}: give how many first tags stay, 0 or more")
    if not 0 <= data.tag_dropout < 1:
        raise ValueError(f"config.data.tag_dropout={data.tag_dropout}: give a share from 0 on and below 1")
    for key in ("keep_tags", "shuffle_tags", "tag_dropout"):
        if data[key] and not data.tag_separator:
            raise ValueError(f"config.data.{key}={data[key]} needs config.data.tag_separator, e.g. ','")


def choose(
    fields: tuple[tuple[str, ...], ...],  # of a record; where it has fewer than the config names, the others are empty
    data: ConfigDict | FrozenConfigDict,  # config.data, as `check` passes it
    rng: np.random.Generator | None = None,  # None = the first caption that there is, with all its tags in their order
) -> str:
    """The caption that an example is trained with; `data.prompt` where its record has none.

    A column is drawn by the weights of those that say something of this record, then one of its captions evenly. A
    column of weight 0 is never read.
    """
    weights = tuple(data.caption_weights) or (1.0,) * len(fields)
    spoken = [(texts, weight) for texts, weight in zip(fields, weights, strict=False) if texts and weight > 0]
    if not spoken:
        return data.prompt
    if rng is None:
        return spoken[0][0][0]
    texts = spoken[0][0]
    if len(spoken) > 1:
        shares = np.asarray([weight for _, weight in spoken], np.float64)
        texts = spoken[rng.choice(len(spoken), p=shares / shares.sum())][0]
    text = texts[rng.integers(len(texts))] if len(texts) > 1 else texts[0]
    return _retagged(text, data, rng) if data.shuffle_tags or data.tag_dropout else text


def _retagged(text: str, data: ConfigDict | FrozenConfigDict, rng: np.random.Generator) -> str:
    """`text` with its tags shuffled and some left out, parted as they were.

    As in kohya's sd-scripts, each tag behind the kept ones is left out by itself: where none is kept all may go, and
    the picture is then one of the empty prompt.
    """
    tags = [tag for part in text.split(data.tag_separator) if (tag := part.strip())]
    kept, others = tags[: data.keep_tags], tags[data.keep_tags :]
    if data.shuffle_tags:
        others = [others[i] for i in rng.permutation(len(others))]
    if data.tag_dropout:
        stays = rng.random(len(others)) >= data.tag_dropout
        others = [tag for tag, stay in zip(others, stays, strict=True) if stay]
    parted = re.search(rf"\s*{re.escape(data.tag_separator)}\s*", text)
    return (parted[0] if parted else "").join(kept + others)
