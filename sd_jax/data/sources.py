"""Data sets with random access, whatever they are made of: shapes world, folders of pictures, Hugging Face datasets.

Every source has a length, and record i is {"pixels": uint8 [height, width, 3], "fields": its captions, "index": i},
decoded when it is asked for. Of the columns that `config.data.caption_key` names, each has in "fields" a tuple of what
it says of this record, as `captions.choose` reads it. A broken picture raises BadImage at that moment and not before.
Where masks are read there is "mask" as well, uint8 [height, width], 255 where the picture counts; for methods that
steer, "hint", uint8 [height, width, 3].
"""

import hashlib
import itertools
import pathlib
from collections.abc import Iterator
from logging import getLogger
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64
from ml_collections import ConfigDict, FrozenConfigDict

from sd_jax.config import reads_hints
from sd_jax.data import DataError, buckets, fingerprints, folder, hub, tars
from sd_jax.data.shapes import ShapesWorld
from sd_jax.data.shapes_maps import MAPS, draw_map

Config = ConfigDict | FrozenConfigDict

_MOST_CAPTIONS = 100_000  # that a tokenizer is trained from

logger = getLogger(__name__)


@runtime_checkable
class Source(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...  # raises BadImage

    def fields(self, index: int) -> tuple[tuple[str, ...], ...]:
        """A record's "fields", without decoding its picture."""
        ...

    def sizes(self) -> Int64[np.ndarray, "records 2"]:
        """(height, width) of every picture, upright, from headers or columns, without decoding; (0, 0) where that
        fails."""
        ...

    def full_size(self, index: int) -> tuple[int, int] | None:
        """(height, width) of a record's picture in its file, where "pixels" may have been decoded smaller; else None.

        Asked for where a model is told of sizes, of records that could be read.
        """
        ...

    def fingerprint(self) -> str:
        """Changes when the records may have."""
        ...


def open_source(config: Config) -> Source:
    """Opens `config.data.path`.

    "shapes" is shapes world. A folder of pictures has captions in `.txt` or `.caption` files of the same stem, in
    metadata.jsonl, .csv or .parquet files (`file_name`, and a column of captions), or in names (see
    `folder.FolderSource`). A folder, file or pattern of webdataset tars is read where it lies. All else is for Hugging
    Face `datasets`: a folder or file of parquet, arrow or json, what `save_to_disk` wrote, or the name of a set on the
    hub.
    `config.data.caption_key=""` reads no captions; where `config.data.rating_key` is, its column is read in their
    place.
    Raises FileNotFoundError or DataError, each naming the key and the mend.
    """
    data = config.data
    name = str(data.path)
    if not name:
        raise DataError("data.path is empty: give a folder of pictures, a data set's name, or 'shapes'")
    path = pathlib.Path(name).expanduser()
    files = folder.pictures_in(path) if name != "shapes" and path.is_dir() else []
    masked, hinted = "diffusion" in config and config.diffusion.masked_loss, reads_hints(config)
    if masked and not files:
        raise DataError(
            f"config.diffusion.masked_loss: data.path={name!r} is no folder of pictures, and has no masks: set it to "
            "False"
        )
    if name == "shapes":
        return ShapesSource(config)
    keys = (data.image_key, data.get("rating_key") or data.caption_key)
    # A picture of at least these sides covers every size that it is trained at
    at_least = max(2 * data.resolution, *(max(size) for size in buckets.make_sizes(data)))
    if files:
        beside = not data.get("rating_key")
        return folder.FolderSource(path, files, *keys, at_least, beside, data.caption_from_names, masked, hinted)
    if found := tars.tars_of(name):
        if hinted:
            raise DataError(f"data.path={name!r}: tars have no hints: give a folder, or a set with such a column")
        return tars.TarSource(found, name, *keys, at_least)
    return hub.open_dataset(name, *keys, at_least, config.control.hint_key if hinted else "")


def captions(source: Source, most: int = _MOST_CAPTIONS) -> Iterator[str]:
    """The captions of a source, without its pictures; of more than `most` records, that many, evenly spread."""
    for index in np.linspace(0, len(source) - 1, min(len(source), most)).astype(np.int64):
        yield from itertools.chain.from_iterable(source.fields(int(index)))


def repeats_of(source: Source) -> Int64[np.ndarray, " records"]:
    """How often each record counts in an epoch: once, but of folders whose names say another number."""
    if isinstance(source, Subset):
        return repeats_of(source.source)[source.positions]
    return source.repeats if isinstance(source, folder.FolderSource) else np.ones(len(source), np.int64)


def assign_sizes(source: Source, config: Config) -> buckets.Assignment:
    """The size that each record is trained at (`buckets.assign`); asks for the pictures' own sizes where it must."""
    if not config.data.buckets.step and config.data.upscale:
        return buckets.one_size(len(source), config.data)
    logger.info("asking for the sizes of %d pictures", len(source))
    source_sizes = source.sizes()
    assignment = buckets.assign(source_sizes, config)
    logger.info(buckets.describe(assignment, source_sizes))
    return assignment


class ShapesSource:
    """Shapes world at the resolution of the config."""

    def __init__(self, config: Config):
        data = config.data
        if data.num_examples < 1:
            raise DataError(f"data.num_examples={data.num_examples}: shapes world needs at least one")
        self.world = ShapesWorld(
            resolution=data.resolution,
            num_examples=data.num_examples,
            seed=config.seed % 2**32,
            split="train",
            two_objects=float(data.two_objects),
            aspects=tuple(float(aspect) for aspect in data.aspects),
        )
        self._map = config.control.hint_key if reads_hints(config) else ""
        if self._map and self._map not in MAPS:
            raise DataError(
                f"config.control.hint_key={self._map!r}: shapes world has {', '.join(MAPS)}; a folder has hints/"
            )

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, index: int) -> dict:
        record = self.world[index]
        hint = {"hint": draw_map(self._map, self.world.scene(index), self.world.size(index))} if self._map else {}
        return {"pixels": record["pixels"], "fields": ((record["caption"],),), "index": record["index"], **hint}

    def fields(self, index: int) -> tuple[tuple[str, ...], ...]:
        return ((self.world.caption(index),),)

    def sizes(self) -> np.ndarray:
        return np.array([self.world.size(index) for index in range(len(self))], np.int64)

    def full_size(self, index: int) -> None:
        return None

    def fingerprint(self) -> str:
        code = fingerprints.code_of("data/shapes.py", "data/shapes_drawing.py")
        return fingerprints.digest(repr(self.world), code, *[self._map] * bool(self._map))


class Subset:
    """Some records of a source, in a given order. A record's "index" stays its place in the whole."""

    def __init__(self, source: Source, positions: np.ndarray):
        self.source, self.positions = source, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> dict:
        return self.source[int(self.positions[index])]

    def fields(self, index: int) -> tuple[tuple[str, ...], ...]:
        return self.source.fields(int(self.positions[index]))

    def sizes(self) -> np.ndarray:
        return self.source.sizes()[self.positions]

    def full_size(self, index: int) -> tuple[int, int] | None:
        return self.source.full_size(int(self.positions[index]))

    def fingerprint(self) -> str:
        return fingerprints.digest(self.source.fingerprint(), hashlib.sha256(self.positions.tobytes()).hexdigest())


def split_held_out(source: Source, held_out: float | int, seed: int) -> tuple[Subset, Subset]:
    """(records to train on, records to judge by). `held_out` is a share below 1, or a number of records.

    Who is held out hangs on a hash of seed and index alone: with a share, records added later move nobody across.
    Raises DataError where nothing would be left to train on.
    """
    count = len(source)
    if held_out < 0 or (held_out >= 1 and held_out != int(held_out)):
        raise DataError(f"data.held_out={held_out}: give a share from 0 to 1, or a number of records")
    hashes = _hash(np.arange(count, dtype=np.uint64), seed)
    if held_out >= 1:
        chosen = np.zeros(count, bool)
        chosen[np.argsort(hashes, kind="stable")[: int(held_out)]] = True
    else:
        chosen = hashes < np.uint64(held_out * 2.0**64)
        if held_out > 0 and chosen.all() | ~chosen.any():
            chosen = (hashes == hashes.min()) & (count > 1)  # of a small set one at least, of one record none
    if chosen.all():
        raise DataError(f"data.held_out={held_out} leaves none of the {count} records to train on")
    if chosen.any():
        logger.info("%d records to train on, %d held out", count - chosen.sum(), chosen.sum())
    return Subset(source, np.flatnonzero(~chosen)), Subset(source, np.flatnonzero(chosen))


def _hash(values: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64 (Steele et al. 2014), vectorised: uint64 -> uint64, a bijection that looks random."""
    with np.errstate(over="ignore"):
        z = values + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
