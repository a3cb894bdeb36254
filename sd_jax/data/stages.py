"""What is done to a batch of records on their way from shard to shard: pure functions, whoever calls them.

look    files -> pixels, once: what `quality` measures, the size to train at, the scorer's input (in any process)
score   the model stage (where the accelerator is)
judge   `filters` over all columns
"""

import dataclasses
import functools
import hashlib
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from sd_jax import media
from sd_jax.data import DataError, buckets, headers, quality
from sd_jax.data.shards import Record
from sd_jax.media import BadImage, Picture

_JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Scorer:
    """The model stage.

    `preprocess` (picklable) runs where a picture is decoded; what it makes of each is stacked. `score` has them as
    "inputs" [batch, ...], with "caption" (list of texts) and all columns of the batch (lists, None where a record has
    none), and returns columns: a number or text for each record. It is called with `batch_size` records, or fewer.
    """

    name: str  # says which weights: shards of another scorer are not gone on with
    score: Callable[[dict[str, Any]], dict[str, Sequence]]
    preprocess: Callable[[Picture], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that pictures are sorted into, as `buckets` has them."""

    resolution: int = 0  # 0 = none
    step: int = 64  # of the sides; 0 = squares only
    shrink: bool = False  # a picture that more than covers its size is resampled to just cover it


@dataclasses.dataclass(frozen=True)
class Look:
    """What `look` made of one record."""

    columns: dict[str, Any]
    data: bytes | None = None  # the picture's file, where it is another one than it was
    inputs: np.ndarray | None = None  # of the scorer
    bad: str | None = None  # why there is nothing of all this


def look(
    records: Sequence[Record],
    preprocess: Callable[[Picture], np.ndarray] | None,
    sizes: Sizes,
) -> list[Look]:
    """Decodes each picture once. A bad one does no harm to the others."""
    return [_look(record, preprocess, sizes) for record in records]


def _look(record: Record, preprocess: Callable | None, sizes: Sizes) -> Look:
    if not record.data:
        return Look({}, bad="there is no picture, or an empty file")
    try:
        pixels = media.decode_image(record.data, record.name)
    except BadImage as error:
        return Look({}, bad=error.reason)
    columns = quality.measures(pixels)
    columns["digest"] = hashlib.blake2b(record.data, digest_size=8).hexdigest()
    data = None
    if sizes.resolution:
        size = size_of(*pixels.shape[:2], sizes)
        columns["bucket_height"], columns["bucket_width"] = size
        data = _shrunk(pixels, size) if sizes.shrink else None
    return Look(columns, data, None if preprocess is None else np.asarray(preprocess(pixels)))


@functools.lru_cache(4096)
def size_of(height: int, width: int, sizes: Sizes) -> tuple[int, int]:
    """The size that a picture goes to. Raises ValueError where `resolution` and `step` contradict each other."""
    config = ConfigDict({"data": {"path": "", "resolution": sizes.resolution, "upscale": True}, "batch_size": 1})
    config.data.buckets = ConfigDict({"step": sizes.step, "min_side": 0, "max_side": 0, "max_area": 0})
    return buckets.assign(np.array([[height, width]]), config).sizes[0]


def _shrunk(pixels: Picture, size: tuple[int, int]) -> bytes | None:
    """A JPEG whose sides just cover `size`; None where the picture need not be made smaller."""
    height, width = pixels.shape[:2]
    scale = max(size[0] / height, size[1] / width)
    if scale >= 1:
        return None
    to = max(math.ceil(width * scale - 1e-6), size[1]), max(math.ceil(height * scale - 1e-6), size[0])
    out = io.BytesIO()
    Image.fromarray(pixels).resize(to, Image.Resampling.LANCZOS).save(out, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return out.getvalue()


def table(records: Sequence[Record], looks: Sequence[Look]) -> dict[str, list]:
    """Columns of a batch: what is measured takes the place of a column of the same name, in any case; "caption"."""
    rows = [merged(record.columns, seen.columns) for record, seen in zip(records, looks, strict=True)]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return columns | {"caption": [record.caption[0] if record.caption else "" for record in records]}


def merged(columns: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    lower = {name.lower() for name in measured}
    return {name: value for name, value in columns.items() if name.lower() not in lower} | measured


def written(columns: dict[str, Any], data: bytes | None) -> dict[str, Any]:
    """The columns of a record whose file is `data` in place of what was looked at; None = it is that."""
    if data is None:
        return columns
    height, width = headers.size(data, "a picture made smaller")
    original = {"original_height": columns["height"], "original_width": columns["width"]}
    return merged(columns, {"height": height, "width": width, **original})


def score(scorer: Scorer | None, columns: dict[str, list], looks: Sequence[Look]) -> dict[str, list]:
    """The columns that the model adds, as Python's numbers and texts. Raises DataError where it gives too few."""
    if scorer is None or not looks:
        return {}
    inputs = {} if scorer.preprocess is None else {"inputs": np.stack([seen.inputs for seen in looks])}
    scored = {name: np.asarray(values).tolist() for name, values in scorer.score(columns | inputs).items()}
    for name, values in scored.items():
        if not isinstance(values, list) or len(values) != len(looks):
            raise DataError(f"the scorer {scorer.name} gave no {len(looks)} values of {name!r}")
    return scored
