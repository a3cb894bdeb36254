"""Webdataset tars with random access, and without a copy of them: where each member lies is listed once.

A tar is read through, headers and .json, when it is seen for the first time; the list (16 bytes a member) is kept in
the user's cache folder and mapped into memory. Then a record costs one read of its own bytes.
"""

import glob
import os
import pathlib
import tarfile
from logging import getLogger
from typing import Any

import numpy as np
from jaxtyping import Int64

from sd_jax import media
from sd_jax.checkpoints.aside import aside
from sd_jax.data import DataError, fingerprints, headers, shards
from sd_jax.data.captions import CAPTION_KEYS, IMAGE_KEYS, choose_key, choose_keys, names_in, texts_of

_JSON = "json"
_INSIDE = "json."
_LOOKED_AT = 100  # records whose .json is looked at for the names of columns
_PICTURES = tuple(ending.removeprefix(".") for ending in media.PICTURES)

logger = getLogger(__name__)


def tars_of(name: str) -> list[pathlib.Path]:
    """The tars of a folder, file or pattern, in the order of their names; [] where it is something else."""
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        saved = any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))
        return [] if saved else sorted(path.rglob("*.tar"))
    found = [path] if path.is_file() else [pathlib.Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
    return found if found and all(file.suffix == ".tar" for file in found) else []


class TarSource:
    """The records of tars, in their order. A column is a member's ending, or one of .json, "json.caption"."""

    def __init__(
        self,
        tars: list[pathlib.Path],
        name: str,  # what errors call them
        image_key: str,
        caption_key: str,  # names joined by commas; "" = no captions
        at_least: int | None = None,  # as `media.decode_image` takes it
    ):
        self._tars, self._name, self._at_least = tars, name, at_least
        where = f"data.path={name!r}"
        self._files = fingerprints.of_files(tars)
        self._index = _index(tars, self._files)
        if not len(self._index):
            raise DataError(f"{where} holds no records")
        endings = [ending for ending in self._index.dtype.names if ending not in _OURS]
        pictures = [ending for ending in _PICTURES if ending in endings]
        usual = pictures if image_key in IMAGE_KEYS and image_key not in endings else [image_key]
        # What is a jpg in one record may be a png in the next
        self._endings = [choose_key(key, endings, (), "data.image_key", where) for key in usual or [image_key]]
        inside = self._names_inside()
        columns = [*endings, *(_INSIDE + column for column in inside)]
        # A column of its own in .json may go without the prefix: those that `prepare` writes
        alone = set(inside) - {*endings, *CAPTION_KEYS}
        asked = ",".join(_INSIDE + key if key in alone else key for key in names_in(caption_key))
        self._captions = choose_keys(asked, columns, CAPTION_KEYS, "data.caption_key", where)
        if len(self._captions) == 1 and (ending := self._captions[0]) in endings:
            silent = int((self._index[ending][:, 1] <= 0).sum())
            if silent:
                logger.warning("%d of %d records of %s have no caption: theirs is empty", silent, len(self), name)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> dict:
        pixels = media.decode_image(*self._picture(index), self._at_least)
        return {"pixels": pixels, "fields": self.fields(index), "index": index}

    def fields(self, index: int) -> tuple[tuple[str, ...], ...]:
        inside = any(name.startswith(_INSIDE) for name in self._captions)
        columns = self._columns(index) if inside else {}
        return tuple(
            texts_of(
                columns.get(name.removeprefix(_INSIDE)) if name.startswith(_INSIDE) else self._read(index, name)[0]
            )
            for name in self._captions
        )

    def sizes(self) -> Int64[np.ndarray, "records 2"]:
        """Of "height" and "width" in .json, where some records' headers agree with them; else of all headers."""
        told = np.stack([self._index["height"], self._index["width"]], 1).astype(np.int64)
        size_of = lambda index: headers.size(*self._picture(index))  # noqa: E731
        return headers.told_sizes(told, size_of, f"{self._name}: json.height and json.width")

    def full_size(self, index: int) -> tuple[int, int] | None:
        return headers.full_size(self._picture(index)[0])

    def fingerprint(self) -> str:
        return fingerprints.digest(self._files, self._name, *self._endings)

    def _picture(self, index: int) -> tuple[bytes, str]:
        """A record's picture, and what it is called. Raises BadImage where there is none."""
        for ending in self._endings:
            content, name = self._read(index, ending)
            if content is not None:
                return content, name
        raise media.BadImage(name, f"there is no picture ({', '.join(self._endings)}) in this record")

    def _read(self, index: int, ending: str) -> tuple[bytes | None, str]:
        """(a member, None where the record has none; what it is called). Raises BadImage for a tar that has changed."""
        row = self._index[int(index)]
        path, name = self._tars[row["tar"]], f"{self._name}, record {index}"
        begin, size = row[ending].tolist()
        if begin < 0:
            return None, name
        try:
            with open(path, "rb", buffering=0) as file:
                content = os.pread(file.fileno(), tarfile.BLOCKSIZE + size, begin - tarfile.BLOCKSIZE)
        except OSError as error:
            raise media.BadImage(name, f"{path} cannot be read ({error.strerror})") from error
        if len(content) < tarfile.BLOCKSIZE + size:
            raise media.BadImage(name, f"{path} ends before it")
        # Before its content a member has its name, in 100 bytes
        own = content[:100].partition(b"\0")[0].decode("utf-8", "replace")
        return content[tarfile.BLOCKSIZE :], f"{name} ({path.name}: {own})"

    def _columns(self, index: int) -> dict[str, Any]:
        content, name = self._read(index, _JSON)
        return shards.columns_in(content or b"", name)

    def _names_inside(self) -> list[str]:
        if _JSON not in self._index.dtype.names:
            return []
        looked_at = range(min(len(self), _LOOKED_AT))
        return list(dict.fromkeys(name for index in looked_at for name in self._columns(index)))


# -- Where the members lie -------------------------------------------------------------------------------------------

_OURS = {"tar": "i4", "height": "i4", "width": "i4"}  # beside (offset, size) for each ending; -1 = none


def _index(tars: list[pathlib.Path], files: str) -> np.ndarray:
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    path = pathlib.Path(cache) / "sd_jax" / "tars" / f"{files}.npy"
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError):  # it is not there, or damaged
        pass
    logger.info("listing %d tars", len(tars))
    index = _listed(tars)
    try:
        with aside(path, overwrite=True) as work, work.open("wb") as file:
            np.save(file, index)
    except OSError as error:
        logger.warning("the list of tars is not kept: %s", error)
    return index


def _listed(tars: list[pathlib.Path]) -> np.ndarray:
    of_tars = [_members(number, path) for number, path in enumerate(tars)]
    endings = list(dict.fromkeys(ending for columns in of_tars for ending in columns if ending not in _OURS))
    dtype = [*_OURS.items(), *((ending, "i8", (2,)) for ending in endings)]
    parts = [np.zeros(len(columns["tar"]), dtype) for columns in of_tars]
    for columns, part in zip(of_tars, parts, strict=True):
        for name in part.dtype.names:
            part[name] = columns.get(name, -1)
    return np.concatenate([*parts, np.zeros(0, dtype)])


def _members(number: int, path: pathlib.Path) -> dict[str, np.ndarray]:
    """The columns of one tar; what lies behind a damage is left out, and the log says so."""
    rows: list[dict[str, tuple[int, int]]] = []
    sizes: list[tuple[int, int]] = []
    try:
        with path.open("rb") as file:
            for _, members in shards.members(str(path)):
                rows.append(members)
                sizes.append(_told(file, members))
    except shards.Damaged as error:
        logger.warning("damaged shard %s", error)
    endings = {ending for members in rows for ending in members} - {"", *_OURS}
    nowhere = (-1, 0)
    return {
        "tar": np.full(len(rows), number),
        "height": np.array([height for height, _ in sizes], np.int32),
        "width": np.array([width for _, width in sizes], np.int32),
        **{
            ending: np.array([members.get(ending, nowhere) for members in rows], np.int64).reshape(-1, 2)
            for ending in sorted(endings)
        },
    }


def _told(file, members: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """(height, width) as a record's .json tells them; (0, 0) where it does not."""
    begin, size = members.get(_JSON, (0, 0))
    columns = shards.columns_in(os.pread(file.fileno(), size, begin), "") if size else {}
    lower = {name.lower(): value for name, value in columns.items()}
    told = [next((lower[name] for name in names if name in lower), None) for names in _SIZES]
    return tuple(told) if all(isinstance(value, int) and 0 < value < 2**31 for value in told) else (0, 0)


_SIZES = ("height", "image_height"), ("width", "image_width")
