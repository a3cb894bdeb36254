"""What Hugging Face `datasets` opens, with random access: parquet, arrow, json, webdataset tars, sets on the hub."""

import contextlib
import glob
import pathlib
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from logging import getLogger
from typing import Any

from sd_jax import media
from sd_jax.data import DataError, fingerprints, headers
from sd_jax.data.captions import CAPTION_KEYS, IMAGE_KEYS, choose_key, texts_of

# How `datasets` calls its readers
READERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
}
_COUNTED = 1_000_000  # records whose captions are looked at when a set is opened
_MEND = "give a folder of pictures, a parquet, arrow or tar file, or the name of a data set on the hub"

logger = getLogger(__name__)


def open_dataset(name: str, image_key: str, caption_key: str, at_least: int | None = None) -> "DatasetSource":
    """Opens the split "train" of `name`, or its only one: a path here, a pattern such as `tars/*.tar`, or a hub name.

    Files are converted once to arrow in the Hugging Face cache and read from there.
    Raises FileNotFoundError where there is nothing of this name, DataError where it cannot be read or lacks a column.
    """
    dataset, base = _load(name)
    return DatasetSource(dataset, name, base, image_key, caption_key, at_least)


class DatasetSource:
    """A `datasets.Dataset` whose pictures we decode ourselves, so that a broken one is found when it is read."""

    def __init__(
        self,
        dataset,  # datasets.Dataset
        name: str,  # what errors call it
        base: pathlib.Path,  # what file names in it are relative to
        image_key: str,
        caption_key: str,  # may be nested, "json.caption"; "" = no captions
        at_least: int | None = None,  # as `media.decode_image` takes it
    ):
        import datasets

        where = f"data.path={name!r}"
        if not len(dataset):
            raise DataError(f"{where} holds no records")
        columns = dataset.column_names
        self._image_key = choose_key(image_key, columns, IMAGE_KEYS, "data.image_key", where)
        if isinstance(dataset.features[self._image_key], datasets.Image):
            dataset = dataset.cast_column(self._image_key, datasets.Image(decode=False))
        self._caption_path: list[str] = []
        if caption_key:
            every = [*columns, *_nested(dataset.features)]
            caption_key = choose_key(caption_key, every, CAPTION_KEYS, "data.caption_key", where)
            self._caption_path = [caption_key] if caption_key in columns else caption_key.split(".")
        named = ["__key__"] if "__key__" in columns else []
        self._texts = dataset.select_columns(self._caption_path[:1])
        kept = dict.fromkeys([self._image_key, *self._caption_path[:1], *named])
        self._records = dataset.select_columns(list(kept))
        self._name, self._base, self._at_least = name, base, at_least
        self._tell_of_empty_captions()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        row = self._records[int(index)]
        pixels = self._decode(row, index)
        texts = self._read_texts(row)
        record = {"pixels": pixels, "caption": texts[0] if texts else "", "index": index}
        return {**record, "captions": texts} if len(texts) > 1 else record

    def texts(self, index: int) -> tuple[str, ...]:
        return self._read_texts(self._texts[int(index)]) if self._caption_path else ()

    def full_size(self, index: int) -> tuple[int, int] | None:
        path, data = self._file(self._records[int(index)])
        return headers.full_size(self._base / path if data is None else data)

    def fingerprint(self) -> str:
        """Of the arrow files that are read, and which columns."""
        files = [pathlib.Path(file["filename"]) for file in self._records.cache_files]
        return fingerprints.digest(fingerprints.of_files(files), self._name, self._image_key, str(len(self)))

    def _decode(self, row: dict, index: int) -> media.Picture:
        path, data = self._file(row)
        name = f"{self._name}, record {index}"
        if path or row.get("__key__"):
            name += f" ({path or row['__key__']})"
        if data is None and path is None:
            value = row[self._image_key]
            what = "is empty" if value is None else f"holds {type(value).__name__}, not a picture"
            raise media.BadImage(name, f"column {self._image_key} {what}")
        return media.decode_image(self._base / path if data is None else data, name, self._at_least)

    def _file(self, row: dict) -> tuple[str | None, bytes | None]:
        """(path, content) of a record's picture; where there is content, the path only names it."""
        value = row[self._image_key]
        if isinstance(value, dict):
            return value.get("path"), value.get("bytes")
        return value if isinstance(value, str) else None, value if isinstance(value, bytes) else None

    def _tell_of_empty_captions(self) -> None:
        import pyarrow
        import pyarrow.compute

        if len(self._caption_path) != 1 or self._texts.features[self._caption_path[0]].pa_type != pyarrow.string():
            return
        texts = self._texts.data.column(self._caption_path[0]).slice(0, _COUNTED)
        spoken = pyarrow.compute.utf8_length(pyarrow.compute.utf8_trim_whitespace(texts))
        silent = len(texts) - (pyarrow.compute.sum(pyarrow.compute.greater(spoken, 0)).as_py() or 0)
        if silent:
            logger.warning("%d of %d records of %s have no caption: theirs is empty", silent, len(texts), self._name)

    def _read_texts(self, row: dict) -> tuple[str, ...]:
        value: Any = row
        for key in self._caption_path:
            value = value.get(key) if isinstance(value, dict) else None
        return () if value is row else texts_of(value)


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
            raise DataError(f"data.path={name!r} holds neither pictures nor parquet, arrow, json or tar files")
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
