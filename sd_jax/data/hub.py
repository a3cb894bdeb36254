"""What Hugging Face `datasets` opens, with random access: parquet, arrow, json, sets on the hub."""

import contextlib
import glob
import pathlib
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from logging import getLogger
from typing import Any

import numpy as np
from jaxtyping import Int64

from sd_jax import media
from sd_jax.data import DataError, fingerprints, folder, headers
from sd_jax.data.captions import CAPTION_KEYS, IMAGE_KEYS, choose_key, choose_keys, texts_of

# How `datasets` calls its readers
READERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
}
SIZE_KEYS = ("height", "image_height", "json.height"), ("width", "image_width", "json.width")  # in any case
_COUNTED = 1_000_000  # records whose captions are looked at when a set is opened
_MEND = "give a folder of pictures, a parquet, arrow or tar file, or the name of a data set on the hub"

logger = getLogger(__name__)


def open_dataset(
    name: str, image_key: str, caption_key: str, at_least: int | None = None, hint_key: str = ""
) -> "DatasetSource":
    """Opens the split "train" of `name`, or its only one: a path here, a pattern such as `a/*.parquet`, or a hub name.

    Files are converted once to arrow in the Hugging Face cache and read from there.
    Raises FileNotFoundError where there is nothing of this name, DataError where it cannot be read or lacks a column.
    """
    dataset, base = _load(name)
    return DatasetSource(dataset, name, base, image_key, caption_key, at_least, hint_key)


class DatasetSource:
    """A `datasets.Dataset` whose pictures we decode ourselves, so that a broken one is found when it is read."""

    def __init__(
        self,
        dataset,  # datasets.Dataset
        name: str,  # what errors call it
        base: pathlib.Path,  # what file names in it are relative to
        image_key: str,
        caption_key: str,  # names joined by commas; each may be nested, "json.caption"; "" = no captions
        at_least: int | None = None,  # as `media.decode_image` takes it
        hint_key: str = "",  # the column of hints; "" = none are read
    ):
        import datasets

        where = f"data.path={name!r}"
        if not len(dataset):
            raise DataError(f"{where} holds no records")
        columns = dataset.column_names
        self._image_key = choose_key(image_key, columns, IMAGE_KEYS, "data.image_key", where)
        if isinstance(dataset.features[self._image_key], datasets.Image):
            dataset = dataset.cast_column(self._image_key, datasets.Image(decode=False))
        if hint_key and hint_key not in columns:
            raise DataError(f"{where}: no column {hint_key!r} of hints: config.control.hint_key names one of {columns}")
        if hint_key and isinstance(dataset.features[hint_key], datasets.Image):
            dataset = dataset.cast_column(hint_key, datasets.Image(decode=False))
        self._hint_key = hint_key
        every = [*columns, *_nested(dataset.features)]
        keys = choose_keys(caption_key, every, CAPTION_KEYS, "data.caption_key", where)
        self._caption_paths = [_path(key, columns) for key in keys]
        self._size_paths = [_path(key, columns) for names in SIZE_KEYS if (key := _alias(names, every))]
        named = ["__key__"] if "__key__" in columns else []
        first = [path[0] for path in self._caption_paths]
        self._texts = dataset.select_columns(list(dict.fromkeys(first)))
        read = [self._image_key, *[hint_key] * bool(hint_key), *first, *named]
        self._records = dataset.select_columns(list(dict.fromkeys(read)))
        self._sizes = dataset.select_columns(list(dict.fromkeys(path[0] for path in self._size_paths)))
        self._name, self._base, self._at_least = name, base, at_least
        self._tell_of_empty_captions()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        row = self._records[int(index)]
        pixels = media.decode_image(*self._picture(row, index), self._at_least)
        record = {"pixels": pixels, "fields": self._read_fields(row), "index": index}
        if not self._hint_key:
            return record
        hint, name = self._picture(row, index, self._hint_key)
        return {**record, "hint": folder.hint_of(hint, pixels.shape[:2], f"{name}, {self._hint_key}")}

    def fields(self, index: int) -> tuple[tuple[str, ...], ...]:
        return self._read_fields(self._texts[int(index)]) if self._caption_paths else ()

    def sizes(self) -> Int64[np.ndarray, "records 2"]:
        """Of columns of heights and widths, where some records' headers agree with them; else of all headers."""
        size_of = lambda index: headers.size(*self._picture(self._records[index], index))  # noqa: E731
        told = np.zeros((len(self), 2), np.int64)
        if len(self._size_paths) == 2:
            for axis, path in enumerate(self._size_paths):
                told[:, axis] = _whole_numbers(self._sizes, path)
        names = " and ".join(".".join(path) for path in self._size_paths)
        return headers.told_sizes(told, size_of, f"{self._name}: the columns {names}")

    def full_size(self, index: int) -> tuple[int, int] | None:
        path, data = self._file(self._records[int(index)], self._image_key)
        return headers.full_size(self._base / path if data is None else data)

    def fingerprint(self) -> str:
        """Of the arrow files that are read, and which columns."""
        files = [pathlib.Path(file["filename"]) for file in self._records.cache_files]
        return fingerprints.digest(fingerprints.of_files(files), self._name, self._image_key, str(len(self)))

    def _picture(self, row: dict, index: int, key: str = "") -> tuple[bytes | pathlib.Path, str]:
        """A record's picture, or that of another column, in memory or as a file, and what it is called. Raises BadImage
        where there is none."""
        key = key or self._image_key
        path, data = self._file(row, key)
        name = f"{self._name}, record {index}"
        if path or row.get("__key__"):
            name += f" ({path or row['__key__']})"
        if data is None and path is None:
            value = row[key]
            what = "is empty" if value is None else f"holds {type(value).__name__}, not a picture"
            raise media.BadImage(name, f"column {key} {what}")
        return self._base / path if data is None else data, name

    def _file(self, row: dict, key: str) -> tuple[str | None, bytes | None]:
        """(path, content) of a record's picture; where there is content, the path only names it."""
        value = row[key]
        if isinstance(value, dict):
            return value.get("path"), value.get("bytes")
        return value if isinstance(value, str) else None, value if isinstance(value, bytes) else None

    def _tell_of_empty_captions(self) -> None:
        import pyarrow
        import pyarrow.compute

        columns = self._texts.column_names
        if [list(columns)] != self._caption_paths or self._texts.features[columns[0]].pa_type != pyarrow.string():
            return  # several, or in another: then this costs too much
        texts = self._texts.data.column(columns[0]).slice(0, _COUNTED)
        spoken = pyarrow.compute.utf8_length(pyarrow.compute.utf8_trim_whitespace(texts))
        silent = len(texts) - (pyarrow.compute.sum(pyarrow.compute.greater(spoken, 0)).as_py() or 0)
        if silent:
            logger.warning("%d of %d records of %s have no caption: theirs is empty", silent, len(texts), self._name)

    def _read_fields(self, row: dict) -> tuple[tuple[str, ...], ...]:
        return tuple(texts_of(_value(row, path)) for path in self._caption_paths)


def _value(row: Any, path: list[str]) -> Any:
    for key in path:
        row = row.get(key) if isinstance(row, dict) else None
    return row


def _path(key: str, columns: Iterable[str]) -> list[str]:
    """Where a column is, which may be inside of another."""
    return [key] if key in columns else key.split(".")


def _alias(names: Iterable[str], columns: list[str]) -> str | None:
    """The column that is called by the first of `names`, or in another case by it; None where none is."""
    lower = {column.lower(): column for column in reversed(columns)}
    return next((name if name in columns else lower[name] for name in names if name in lower), None)


def _whole_numbers(dataset, path: list[str]) -> Int64[np.ndarray, " records"]:
    """A column of numbers; 0 where it has none."""
    import pyarrow
    import pyarrow.compute

    column = dataset.with_format("arrow")[:].column(path[0])
    for key in path[1:]:
        column = pyarrow.compute.struct_field(column, key)
    try:
        column = pyarrow.compute.cast(column, pyarrow.int64(), safe=False)
    except pyarrow.ArrowException:
        return np.zeros(len(column), np.int64)
    return pyarrow.compute.fill_null(column, 0).to_numpy()


def _nested(features: dict) -> Iterable[str]:
    """Columns inside of columns, "json.caption"."""
    return [f"{name}.{inner}" for name, kind in features.items() if isinstance(kind, dict) for inner in kind]


def _load(name: str):
    """(datasets.Dataset, the folder that its file names are relative to)."""
    import datasets

    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _only_split(_try(name, datasets.load_from_disk, str(path)), name), path
        if not any(file.suffix in READERS for file in path.rglob("*")):
            raise DataError(
                f"data.path={name!r} holds neither pictures nor parquet, arrow, json or tar files: name one that does"
            )
        return _load_split(name, str(path)), path
    found = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    if found:
        reader = READERS.get(pathlib.Path(found[0]).suffix)
        if reader is None:
            raise DataError(f"data.path={name!r} is no data set: {_MEND}")
        return _load_split(name, reader, data_files=found), pathlib.Path(found[0]).parent
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or path.suffix in READERS or glob.has_magic(name):
        raise FileNotFoundError(f"data.path={name!r} does not exist: {_MEND}")
    with _offline_without_network():
        return _load_split(name, name), pathlib.Path()


@contextlib.contextmanager
def _offline_without_network() -> Iterator[None]:
    """Lets a machine without network look into its cache at once, where the hub's client would retry for minutes."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    try:
        if not before and not urllib.request.getproxies():
            socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _load_split(name: str, *args, **kwargs):
    import datasets

    try:
        return _try(name, datasets.load_dataset, *args, split="train", **kwargs)
    except DataError as error:
        if "Unknown split" not in str(error):
            raise
    return _only_split(_try(name, datasets.load_dataset, *args, **kwargs), name)


def _only_split(dataset, name: str):
    if not isinstance(dataset, dict):
        return dataset
    if "train" not in dataset and len(dataset) > 1:
        raise DataError(f"data.path={name!r} has no split 'train', only {', '.join(dataset)}: give the files of one")
    return dataset["train"] if "train" in dataset else next(iter(dataset.values()))


def _try(name: str, function, *args, **kwargs):
    """Calls into `datasets`; its many kinds of errors become one sentence."""
    from datasets.exceptions import DatasetNotFoundError

    try:
        return function(*args, **kwargs)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"data.path={name!r} is neither here nor to be had from the hub ({_first_line(error)}): {_MEND}"
        ) from error
    except Exception as error:  # noqa: BLE001  each reader has its own
        raise DataError(f"data.path={name!r} cannot be read as a data set ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    cause = error.__cause__ if str(error).startswith("An error occurred while generating") else None
    return (str(cause or error).strip() or type(error).__name__).splitlines()[0]
