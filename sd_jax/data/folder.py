"""A folder of pictures with captions beside them."""

import csv
import json
import os
import pathlib
from collections.abc import Iterator
from logging import getLogger

import numpy as np
from jaxtyping import Int64

from sd_jax import media
from sd_jax.data import DataError, fingerprints, headers
from sd_jax.data.captions import CAPTION_KEYS, IMAGE_KEYS, choose_key, choose_keys, texts_of

PICTURES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TABLES = (".parquet", ".arrow", ".tar")  # a folder that holds these is a data set; pictures in it are decoration

logger = getLogger(__name__)


def pictures_in(root: pathlib.Path) -> list[str]:
    """All files below `root`, sorted, if it is a folder of pictures; [] if it is something else.

    Of a folder with splits in subfolders, those in train/.
    """
    files = list(_walk(root))
    if any(f.endswith(TABLES) and os.path.basename(f) not in METADATA for f in files):
        return []
    if not any(_is_picture(f) or os.path.basename(f) in METADATA for f in files):
        return []
    train = [f for f in files if f.startswith("train/")]
    others = {f.split("/")[0] for f in files} & {"test", "val", "valid", "validation"}
    if others and any(map(_is_picture, train)):
        logger.info("data.path=%r: reading train/, not %s", str(root), ", ".join(sorted(others)))
        return train
    return files


class FolderSource:
    """Pictures below `root` in the order of their names; where a metadata file speaks for a folder, those it lists."""

    def __init__(
        self,
        root: pathlib.Path,
        files: list[str],  # of `pictures_in`
        image_key: str,  # the column of metadata with the file's name, where it is not `file_name`
        caption_key: str,  # the columns of metadata with captions, joined by commas; "" = no captions at all
        at_least: int | None = None,  # as `media.decode_image` takes it
    ):
        self._root, self._at_least = root, at_least
        self._captioned = bool(caption_key)
        listed, spoken_for = _read_metadata(root, files, image_key, caption_key)
        loose = [f for f in files if _is_picture(f) and f not in listed]
        unlisted = [f for f in loose if spoken_for and any(f.startswith(folder) for folder in spoken_for)]
        if unlisted:
            logger.warning("%d pictures in %s are not in its metadata and are left out", len(unlisted), root)
        self._files: list[str] = sorted({*listed, *loose} - set(unlisted))
        if not self._files:
            raise DataError(f"data.path={str(root)!r} holds no pictures ({', '.join(PICTURES)})")
        texts = {f for f in files if f.endswith(".txt")}
        # Where captions are: in the metadata, or in a .txt file
        self._listed = listed
        self._texts = {f: text for f in self._files if f not in listed and (text := _beside(f)) in texts}
        if self._captioned:
            silent = sum(not (any(listed[f]) if f in listed else f in self._texts) for f in self._files)
            if silent:
                logger.warning(
                    "%d of %d pictures in %s have no caption: theirs is empty", silent, len(self._files), root
                )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict:
        pixels = media.decode_image(self._root / self._files[index], at_least=self._at_least)
        return {"pixels": pixels, "fields": self.fields(index), "index": index}

    def fields(self, index: int) -> tuple[tuple[str, ...], ...]:
        """Of a .txt file one field alone."""
        file = self._files[index]
        if not self._captioned:
            return ()
        if file in self._listed:
            return self._listed[file]
        if file not in self._texts:
            return ((),)
        try:
            return (texts_of((self._root / self._texts[file]).read_bytes()),)
        except OSError:  # it was there when the folder was read
            return ((),)

    def sizes(self) -> Int64[np.ndarray, "records 2"]:
        paths = [self._root / file for file in self._files]
        return headers.sizes(lambda index: headers.size(paths[index], str(paths[index])), np.arange(len(paths)))

    def full_size(self, index: int) -> tuple[int, int] | None:
        return headers.full_size(self._root / self._files[index])

    def fingerprint(self) -> str:
        """Of the pictures alone: captions are read afresh every time."""
        return fingerprints.of_files(self._root / file for file in self._files)


def _walk(root: pathlib.Path) -> Iterator[str]:
    """Paths below `root`, relative, with slashes; without hidden files. Links are followed, but not in circles."""
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield pathlib.Path(folder, name).relative_to(root).as_posix()


def _is_picture(file: str) -> bool:
    return file.lower().endswith(PICTURES)


def _beside(file: str) -> str:
    return os.path.splitext(file)[0] + ".txt"


# -- Metadata --------------------------------------------------------------------------------------------------------


def _read_metadata(
    root: pathlib.Path, files: list[str], image_key: str, caption_key: str
) -> tuple[dict[str, tuple[tuple[str, ...], ...]], tuple[str, ...]]:
    """(file -> captions for all that is listed, the folders that metadata files lie in, as prefixes of paths)."""
    listed: dict[str, tuple[tuple[str, ...], ...]] = {}
    folders = []
    for file in files:
        if os.path.basename(file) not in METADATA:
            continue
        where = str(root / file)
        rows = list(_rows(root / file))
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if not rows:
            continue
        names = (
            "file_name"
            if "file_name" in columns
            else choose_key(image_key, columns, ("file_name", *IMAGE_KEYS), "data.image_key", where)
        )
        texts = choose_keys(caption_key, columns, CAPTION_KEYS, "data.caption_key", where)
        folder = file[: -len(os.path.basename(file))]
        folders.append(folder)
        for number, row in enumerate(rows, start=1):
            if not row.get(names):
                raise DataError(f"{where}: record {number} has no {names}")
            picture = os.path.normpath(folder + str(row[names])).replace(os.sep, "/")
            listed[picture] = tuple(texts_of(row.get(column)) for column in texts)
    return listed, tuple(folders)


def _rows(path: pathlib.Path) -> Iterator[dict]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as lines:
            yield from csv.DictReader(lines)
    else:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}: not a line of JSON ({error.msg}); mend or remove it") from error
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number}: not a JSON object; mend or remove it")
                yield row
