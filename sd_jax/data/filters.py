"""Which records of a data set are kept: a table of filters over LAION's columns and our own measures.

    filter       columns                          keeps            default  without a value
    aesthetic    aesthetic, AESTHETIC_SCORE, ..   value > t        5.0      drops    SD 1.2 to 1.5 (2.x: 4.5)
    watermark    pwatermark                       value < t        0.5      keeps    SD 1.2 on (LAION's V1: 0.8)
    unsafe       punsafe                          value < t        0.5      drops    LAION's V1 (SD 2: 0.1)
    nsfw         NSFW                             value is t       UNLIKELY drops    LAION-400M's words
    similarity   similarity, clip_score           value >= t       0.28     keeps    LAION-5B, English, ViT-B/32
    resolution   HEIGHT, WIDTH                    lesser >= t      512      drops    SD 1.2 on
    aspect       HEIGHT, WIDTH                    longer/shorter <= t  3.0  drops    ours
    sharpness    sharpness                        value >= t       100.0    keeps    `quality.sharpness`
    blockiness   blockiness                       value <= t       0.5      keeps    `quality.blockiness`

Where no value is said, safety is not taken for granted and pictures are not taken for beautiful; what merely was not
measured does not throw a picture out. A value that is no number counts as none. Only filters that a config names are
used. Names of columns are matched in any case; the first alias that there is counts.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from ml_collections import ConfigDict, FrozenConfigDict

Columns = Mapping[str, Sequence]  # of a batch: name -> a value or None for each record

_HEIGHT = ("height", "image_height")
_WIDTH = ("width", "image_width")


@dataclasses.dataclass(frozen=True)
class Filter:
    columns: tuple[tuple[str, ...], ...]  # that it reads; of each, the names it may have
    keeps: Callable[..., np.ndarray]  # arrays of the columns, without missing values, and the threshold -> bool
    threshold: float | str  # by default
    keeps_missing: bool
    says: str  # what is kept, for the report


FILTERS: dict[str, Filter] = {
    "aesthetic": Filter(
        (("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2", "aesthetics"),),
        lambda value, t: value > t,
        5.0,
        False,
        "aesthetic score > {}",
    ),
    "watermark": Filter(
        (("pwatermark", "watermark", "watermark_prob"),),
        lambda value, t: value < t,
        0.5,
        True,
        "probability of a watermark < {}",
    ),
    "unsafe": Filter(
        (("punsafe", "unsafe", "unsafe_prob"),),
        lambda value, t: value < t,
        0.5,
        False,
        "probability of being unsafe < {}",
    ),
    "nsfw": Filter(
        (("nsfw",),),
        lambda value, t: np.char.upper(value) == t.upper(),
        "UNLIKELY",
        False,
        "NSFW is {}",
    ),
    "similarity": Filter(
        (("similarity", "clip_score", "clip_similarity"),),
        lambda value, t: value >= t,
        0.28,
        True,
        "similarity of text and picture >= {}",
    ),
    "resolution": Filter(
        (_HEIGHT, _WIDTH),
        lambda height, width, t: np.minimum(height, width) >= t,
        512.0,
        False,
        "shorter side >= {} pixels",
    ),
    "aspect": Filter(
        (_HEIGHT, _WIDTH),
        lambda height, width, t: np.maximum(height, width) <= t * np.minimum(height, width),
        3.0,
        False,
        "longer side / shorter side <= {}",
    ),
    "sharpness": Filter((("sharpness",),), lambda value, t: value >= t, 100.0, True, "sharpness >= {}"),
    "blockiness": Filter((("blockiness",),), lambda value, t: value <= t, 0.5, True, "blockiness <= {}"),
}


def resolve(config: Mapping[str, Any] | ConfigDict | FrozenConfigDict) -> dict[str, float | str]:
    """{filter: threshold} as a ConfigDict or dict says it, None for the default; in the order of FILTERS.

    Raises ValueError for a filter that there is not, or a threshold of another type.
    """
    asked = dict(config.items())
    unknown = set(asked) - set(FILTERS)
    if unknown:
        raise ValueError(f"unknown filter {', '.join(sorted(unknown))}: choose from {', '.join(FILTERS)}")
    return {name: _threshold(name, asked[name]) for name in FILTERS if name in asked}


def parse(text: str) -> dict[str, float | str]:
    """ "aesthetic=5,watermark" -> {"aesthetic": 5.0, "watermark": 0.5}; raises as `resolve` does."""
    parts = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    return resolve({name.strip(): value.strip() if equals else None for name, equals, value in parts})


def find_column(columns: Iterable[str], aliases: Sequence[str]) -> str | None:
    """The column that goes by the first of `aliases` that there is, in any case; None where there is none."""
    lower = {column.lower(): column for column in reversed(list(columns))}
    return next((lower[alias] for alias in aliases if alias in lower), None)


def judge(
    columns: Columns,
    thresholds: Mapping[str, float | str],  # of `resolve`
    count: int,  # of records
) -> dict[str, dict[str, Bool[np.ndarray, " count"]]]:
    """What each filter says of each record: {filter: {"keeps": ..., "missing": ...}}; a pure function of a batch."""
    verdicts = {}
    for name, threshold in thresholds.items():
        row = FILTERS[name]
        read = _words if isinstance(row.threshold, str) else _numbers
        values, missing = [], np.zeros(count, bool)
        for aliases in row.columns:
            column = find_column(columns, aliases)
            value, absent = read(columns[column]) if column else read([None] * count)
            values.append(value)
            missing |= absent
        keeps = np.where(missing, row.keeps_missing, row.keeps(*values, threshold))
        verdicts[name] = {"keeps": keeps, "missing": missing}
    return verdicts


def keep(verdicts: Mapping[str, Mapping[str, np.ndarray]], count: int) -> Bool[np.ndarray, " count"]:
    """The records that every filter keeps."""
    return np.logical_and.reduce([np.ones(count, bool), *(verdict["keeps"] for verdict in verdicts.values())])


def counts(verdicts: Mapping[str, Mapping[str, np.ndarray]], count: int) -> dict[str, dict[str, int]]:
    """For each filter how many records it would keep and drop alone, how many had no value, and how many it is the
    first to drop ("dropped_first"; these add up to all that are dropped)."""
    left, result = np.ones(count, bool), {}
    for name, verdict in verdicts.items():
        keeps = verdict["keeps"]
        result[name] = {
            "kept": int(keeps.sum()),
            "dropped": int((~keeps).sum()),
            "missing": int(verdict["missing"].sum()),
            "dropped_first": int((left & ~keeps).sum()),
        }
        left &= keeps
    return result


def describe(thresholds: Mapping[str, float | str]) -> dict[str, str]:
    """What each filter keeps, in words."""
    names = {True: "kept", False: "dropped"}
    return {
        name: f"{FILTERS[name].says.format(threshold)}; without a value {names[FILTERS[name].keeps_missing]}"
        for name, threshold in thresholds.items()
    }


def _threshold(name: str, value: Any) -> float | str:
    default = FILTERS[name].threshold
    if value is None:
        return default
    try:
        if isinstance(value, bool):
            raise ValueError
        return type(default)(value)
    except (TypeError, ValueError):
        raise ValueError(f"filter {name}={value!r}: give a {type(default).__name__}, or None for {default}") from None


def _numbers(values: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """(float64, 0 where there is none; where that is)."""
    numbers = np.array([_number(value) for value in values], np.float64)
    missing = np.isnan(numbers)
    return np.where(missing, 0.0, numbers), missing


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _words(values: Sequence) -> tuple[np.ndarray, np.ndarray]:
    words = np.array([value.strip() if isinstance(value, str) else "" for value in values], np.str_)
    return words, words == ""
