"""A folder of pictures with captions beside them."""

import csv
import json
import os
import pathlib
import re
from collections.abc import Iterator
from logging import getLogger
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image, ImageOps

from sd_jax import media
from sd_jax.data import DataError, fingerprints, headers
from sd_jax.data.captions import CAPTION_KEYS, IMAGE_KEYS, choose_key, choose_keys, texts_of
from sd_jax.media import BadImage

PICTURES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
CAPTIONS = (".txt", ".caption")  # of a picture's name beside it; the second is kohya's
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
    """Pictures below `root` in the order of their names; where a metadata file speaks for a folder, those it lists.

    A picture's caption is in the metadata or in one file of its name, .txt or .caption: two are an error. Where all
    pictures lie in folders named "10_name class" (`repeats_of`), `repeats` says how often each counts, and those
    without a caption have "name class". Pictures in a folder masks/ or hints/, of the same names as others beside that
    folder, are masks and hints.
    """

    def __init__(
        self,
        root: pathlib.Path,
        files: list[str],  # of `pictures_in`
        image_key: str,  # the column of metadata with the file's name, where it is not `file_name`
        caption_key: str,  # the columns of metadata with captions, joined by commas; "" = no captions at all
        at_least: int | None = None,  # as `media.decode_image` takes it
        beside: bool = True,  # whether files and folders beside the metadata have captions; not of what is no caption
        from_names: bool = False,  # whether a picture without a caption is called by its own name, `words_of`
        masked: bool = False,  # whether records have a "mask", uint8 [height, width]
        hinted: bool = False,  # whether records have a "hint", uint8 [height, width, 3]
    ):
        self._root, self._at_least, self._masked, self._hinted = root, at_least, masked, hinted
        self._captioned = bool(caption_key)
        listed, spoken_for = _read_metadata(root, files, image_key, caption_key)
        pictures = {f for f in files if _is_picture(f)}
        self._masks, self._hints = (
            {f: beside for f, beside in _beside_pictures(pictures | set(listed), kind).items() if beside not in listed}
            for kind in ("masks", "hints")
        )
        masks, hints = set(self._masks.values()), set(self._hints.values())
        loose = pictures - set(listed) - masks - hints
        unlisted = {f for f in loose if spoken_for and any(f.startswith(folder) for folder in spoken_for)}
        if unlisted:
            logger.warning("%d pictures in %s are not in its metadata and are left out", len(unlisted), root)
        if masks and not masked:
            logger.info("%d masks in %s are not read: see config.diffusion.masked_loss", len(masks), root)
        self._files: list[str] = sorted((loose - unlisted).union(listed))
        if not self._files:
            raise DataError(f"data.path={str(root)!r} holds no pictures ({', '.join(PICTURES)})")
        named = repeats_of(root, self._files) if beside else {}
        if hints and not hinted:
            logger.info("%d hints in %s are not read: they are for config.method='controlnet'", len(hints), root)
        lacking = [f for f in self._files if f not in self._hints] if hinted else []
        if lacking:
            raise DataError(
                f"{root / lacking[0]}: has no hint, one of {len(lacking)} such pictures of {len(self._files)}: put a "
                "picture of its name into a folder hints/ beside it"
            )
        # How often each picture counts in an epoch
        self.repeats = np.array([named[_folder_of(f)].times if named else 1 for f in self._files], np.int64)
        # Where captions are: in a file beside; else in `_told`, by metadata or names
        self._texts: dict[str, str] = {}
        self._told = dict(listed)
        if self._captioned:
            self._find_captions(files if beside else [], named, from_names and beside)

    def _find_captions(self, files: list[str], named: dict[str, "Repeats"], from_names: bool) -> None:
        texts = {f for f in files if f.endswith(CAPTIONS)}
        for f in self._files:
            told = any(self._told.get(f, ()))
            beside = [text for text in _beside(f) if text in texts]
            if len(beside) + told > 1:
                places = " and ".join([*["the metadata"] * told, *map(os.path.basename, beside)])
                raise DataError(f"{self._root / f}: has two captions, in {places}: remove one")
            if beside:
                self._texts[f] = beside[0]
            words = named[_folder_of(f)].words if named else words_of(f) if from_names else ""
            if words and not told:
                self._told[f] = ((words,),)
        silent = sum(f not in self._texts and not any(self._told.get(f, ())) for f in self._files)
        if silent:
            logger.warning(
                "%d of %d pictures in %s have no caption: theirs is empty", silent, len(self._files), self._root
            )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict:
        path = self._root / self._files[index]
        pixels = media.decode_image(path, at_least=self._at_least)
        beside = {"mask": self._mask(index, pixels.shape[:2])} if self._masked else {}
        if self._hinted:
            beside["hint"] = hint_of(self._root / self._hints[self._files[index]], pixels.shape[:2])
        return {"pixels": pixels, "fields": self.fields(index), "index": index, **beside}

    def fields(self, index: int) -> tuple[tuple[str, ...], ...]:
        """Of a file beside, and of a name, one field alone."""
        file = self._files[index]
        if not self._captioned:
            return ()
        if file not in self._texts:
            return self._told.get(file, ((),))
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
        """Of the pictures alone, their masks and hints: captions are read afresh every time."""
        beside = [self._masks[file] for file in self._files if file in self._masks] if self._masked else []
        beside += [self._hints[file] for file in self._files] if self._hinted else []
        return fingerprints.of_files(self._root / file for file in (*self._files, *beside))

    def _mask(self, index: int, size: tuple[int, int]) -> UInt8[np.ndarray, "height width"]:
        """Of a picture that was decoded in this size: its own file, else its alpha channel, else white."""
        file = self._files[index]
        if file not in self._masks:
            return _alpha(self._root / file, size)
        path = self._root / self._masks[file]
        pixels = media.decode_image(path)
        _check_shape(path, "mask", pixels.shape[:2], size)
        return np.asarray(Image.fromarray(pixels).convert("L").resize(size[::-1], Image.Resampling.BILINEAR))


def hint_of(
    source: pathlib.Path | bytes,
    size: tuple[int, int],  # height and width of its picture
    name: str | None = None,  # for messages, of bytes
) -> UInt8[np.ndarray, "height width 3"]:
    """In the size of its picture. Raises BadImage where it is none, or of another shape."""
    pixels = media.decode_image(source) if name is None else media.decode_image(source, name)
    _check_shape(name or source, "hint", pixels.shape[:2], size)
    return np.array(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.LANCZOS))


def _check_shape(path: pathlib.Path | str, kind: str, found: tuple[int, int], size: tuple[int, int]) -> None:
    (height, width), (wanted_height, wanted_width) = found, size
    if abs(height * wanted_width - width * wanted_height) > 0.02 * height * wanted_width:
        shape = f"{wanted_width}x{wanted_height}"
        raise BadImage(str(path), f"a {kind} of {width}x{height} for a picture of another shape, {shape}")


# -- What names say --------------------------------------------------------------------------------------------------

MOST_REPEATS = 1000  # a greater number before a folder's name is a year, or no number of repeats


class Repeats(NamedTuple):
    times: int  # that each picture of a folder counts in an epoch
    words: str  # the caption of those that have none


def repeats_of(root: pathlib.Path, files: list[str]) -> dict[str, Repeats]:
    """The folders of pictures, as kohya's scripts name them: "10_name class" = 10 times "name class".

    {} unless every picture's own folder is named so, with a number from 1 to MOST_REPEATS that begins with no 0: of
    folders named "2023_summer", or "01_red" beside "02_blue", the numbers are no repeats. The log tells what was
    decided. A picture deeper in such a folder lies in another one.
    """
    folders = sorted({_folder_of(file) for file in files})
    found = {folder: re.fullmatch(r"([1-9]\d*)_(.+)", folder.split("/")[-1]) for folder in folders}
    others = [folder for folder, match in found.items() if not match or int(match[1]) > MOST_REPEATS]
    if others:
        if len(others) < len(folders):
            said = (root, next(f for f in folders if f not in others), others[0] or ".")
            logger.info("%s: no number in a folder's name is one of repeats: %s is named so, %s is not", *said)
        return {}
    named = {folder: Repeats(int(match[1]), " ".join(match[2].split())) for folder, match in found.items()}
    said = ", ".join(f"those in {folder!r} {repeats.times}" for folder, repeats in named.items())
    logger.info("%s: times that pictures count, by the names of their folders: %s", root, said)
    return named


def words_of(file: str) -> str:
    """The name of a file as a caption: "a/blue_star-012.png" -> "blue star"."""
    stem = os.path.splitext(os.path.basename(file))[0]
    return re.sub(r"\s*\(?\d+\)?$", "", " ".join(re.split(r"[\s_-]+", stem)).strip())


def _beside_pictures(files: set[str], folder: str) -> dict[str, str]:
    """Picture -> the one of its name in a folder beside it, "masks" or "hints", of those that have one."""
    stems = {os.path.splitext(file)[0]: file for file in sorted(files)}
    at = lambda file: os.path.normpath(f"{file}/../{folder}/{os.path.splitext(os.path.basename(file))[0]}")  # noqa: E731
    return {file: found for file in files if (found := stems.get(at(file)))}


def _alpha(path: pathlib.Path, size: tuple[int, int]) -> UInt8[np.ndarray, "height width"]:
    """The alpha channel of a picture that has been decoded in this size; white where it has none."""
    with Image.open(path) as image:
        if not image.has_transparency_data:
            return np.full(size, 255, np.uint8)
        return np.asarray(ImageOps.exif_transpose(image).convert("RGBA").getchannel("A"))


def _folder_of(file: str) -> str:
    return file.rpartition("/")[0]


# -- Files -----------------------------------------------------------------------------------------------------------


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


def _beside(file: str) -> list[str]:
    return [os.path.splitext(file)[0] + ending for ending in CAPTIONS]


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
            if texts and picture in listed:
                raise DataError(
                    f"{root / picture}: has two captions, one in record {number} of {where} and one before it: keep one"
                )
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
