"""Shards in, of whatever form, as streams of encoded pictures with their columns; and the shards that are written.

    a .tar            webdataset: members of one stem are one record; .txt is its caption, .json its columns
    a .parquet        a column of pictures (bytes, or Hugging Face's {bytes, path}); all others are columns
    a folder of pictures, with .txt and .json beside them; cut into shards of `shard_size`, in the order of names
    what `save_to_disk` of Hugging Face `datasets` wrote; cut likewise

and a folder or pattern of tars or parquet files, but for a parquet file that is called as a tar beside it: that is a
table of what the tar holds, as img2dataset writes one. Nothing is decoded here, and a shard is never held whole.
"""

import dataclasses
import glob
import io
import itertools
import json
import os
import pathlib
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any

from sd_jax import media
from sd_jax.data import DataError, fingerprints, folder
from sd_jax.data.captions import CAPTION_KEYS, IMAGE_KEYS, choose_key, names_in, texts_of

_AT_ONCE = 64  # rows of a table
_PICTURES = tuple(ending.removeprefix(".") for ending in media.PICTURES)
_CAPTION, _COLUMNS = "txt", "json"


@dataclasses.dataclass(frozen=True)
class Record:
    place: int  # in its shard
    name: str  # for messages
    data: bytes  # the picture's file; empty where there is none
    caption: tuple[str, ...]
    columns: dict[str, Any]  # all else that is said of it, as JSON has it; "key" is what it was called


@dataclasses.dataclass(frozen=True)
class InShard:
    """A part of the data, the unit of work. Picklable."""

    name: str
    kind: str  # "tar", "parquet", "folder", "saved"
    path: str
    files: tuple[str, ...] = ()  # of a folder
    texts: frozenset[str] = frozenset()  # of a folder, the .txt and .json among them
    rows: tuple[int, int] = (0, 0)  # of a saved set

    def fingerprint(self) -> str:
        """Changes when its records may have."""
        root = pathlib.Path(self.path)
        if self.kind == "folder":
            paths = [root / file for file in (*self.files, *sorted(self.texts))]
        else:
            paths = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
        return fingerprints.digest(fingerprints.of_files(paths), str(self.rows))


class Damaged(DataError):
    """A shard that cannot be read on; its records up to here are good."""


def find(paths: Iterable[str], shard_size: int) -> list[InShard]:
    """The shards of paths and patterns, of each in the order of their names. Raises FileNotFoundError or DataError."""
    return [shard for path in paths for shard in _find(path, shard_size)]


def _find(path: str, shard_size: int) -> list[InShard]:
    root = pathlib.Path(path).expanduser()
    if root.is_dir():
        if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
            return _cut_saved(root, shard_size)
        if files := folder.pictures_in(root):
            return _cut_folder(root, files, shard_size)
        found = sorted(str(file) for file in root.rglob("*") if file.suffix in (".tar", ".parquet"))
        tars = {file for file in found if file.endswith(".tar")}
        found = [file for file in found if file in tars or file.removesuffix(".parquet") + ".tar" not in tars]
    else:
        found = sorted(glob.glob(str(root), recursive=True))
    if not found:
        raise FileNotFoundError(
            f"--data={path!r}: no tars, parquet files, pictures or saved data set are there: give a folder, or a "
            "pattern such as 'tars/*.tar'"
        )
    wrong = [file for file in found if not file.endswith((".tar", ".parquet"))]
    if wrong:
        raise DataError(f"--data={path!r}: {wrong[0]} is neither a .tar nor a .parquet: give a pattern of these alone")
    return [InShard(pathlib.Path(file).name, pathlib.Path(file).suffix[1:], file) for file in found]


def read(shard: InShard, image_key: str = "image", caption_key: str = "text") -> Iterator[Record]:
    """Its records, one after another. Raises Damaged where it cannot be read on, DataError for a missing column."""
    rows = {"tar": _tar, "parquet": _parquet, "folder": _folder, "saved": _saved}[shard.kind](shard, image_key)
    for place, (own_key, data, columns) in enumerate(rows):
        key = str(columns.setdefault("key", own_key))
        caption = _take_caption(columns, caption_key)
        yield Record(place, f"{shard.name}: {key}", data or b"", caption, columns)


def _take_caption(columns: dict[str, Any], wanted: str) -> tuple[str, ...]:
    """Takes out of the columns those that hold the caption, by `captions.choose_keys`' rule; where none does, ()."""
    names = names_in(wanted)
    if len(names) == 1 and names[0] in CAPTION_KEYS:
        names = (names[0], *CAPTION_KEYS)
        names = tuple(itertools.islice((name for name in names if texts_of(columns.get(name))), 1))
    caption = tuple(text for name in names for text in texts_of(columns.get(name)))
    for name in {*names, "caption" if caption else ""}:
        columns.pop(name, None)
    if texts_of(columns.get(_CAPTION)) == caption:
        columns.pop(_CAPTION, None)
    return caption


# -- Webdataset ------------------------------------------------------------------------------------------------------


def _tar(shard: InShard, image_key: str) -> Iterator[tuple[str, bytes | None, dict]]:
    with open(shard.path, "rb") as file:
        for key, places in members(shard.path):
            ending = next((ending for ending in (image_key, *_PICTURES) if ending in places), None)
            contents = {}
            for name in (ending, _CAPTION, _COLUMNS):
                if name in places:
                    file.seek(places[name][0])
                    contents[name] = file.read(places[name][1])
            columns = columns_in(contents.get(_COLUMNS, b""), f"{shard.name}: {key}.json")
            if _CAPTION in contents:
                columns[_CAPTION] = contents[_CAPTION].decode("utf-8", "replace")
            yield key, contents.get(ending), columns


def members(path: str) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(stem, {ending: (offset, size)}) of neighbours in a webdataset tar. Raises Damaged where it cannot be read on."""
    key, found = None, {}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            size = os.fstat(file.fileno()).st_size
            for member in tar:
                tar.members = []  # else it keeps all that it has seen
                base = os.path.basename(member.name)
                if not member.isfile() or base.startswith("."):
                    continue
                stem, _, ending = base.partition(".")
                stem = os.path.join(os.path.dirname(member.name), stem)
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                if stem != key and found:
                    yield key, found
                    found = {}
                key = stem
                found[ending.lower()] = member.offset_data, member.size
            file.seek(tar.offset)  # tarfile takes a broken header in the middle for the end
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it does not end as a tar does, cut short or overwritten")
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Damaged(f"{path}: {reason}: what was read of it before is used; fetch it again for the rest") from error
    if found:
        yield key, found


def columns_in(text: bytes, where: str) -> dict[str, Any]:
    """Of a .json; what is no JSON object counts as nothing: the picture may be good all the same."""
    try:
        columns = json.loads(text) if text.strip() else {}
    except ValueError:
        return {"json_error": f"{where} is no JSON"}
    return columns if isinstance(columns, dict) else {"json_error": f"{where} is no object"}


# -- Tables ----------------------------------------------------------------------------------------------------------


def _parquet(shard: InShard, image_key: str) -> Iterator[tuple[str, bytes | None, dict]]:
    import pyarrow
    import pyarrow.parquet

    base = pathlib.Path(shard.path).parent
    try:
        with pyarrow.parquet.ParquetFile(shard.path) as file:
            image = choose_key(image_key, file.schema_arrow.names, IMAGE_KEYS, "--image_key", shard.path)
            number = 0
            for batch in file.iter_batches(_AT_ONCE):
                for row in batch.to_pylist():
                    yield _row(row, image, base, number)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise Damaged(f"{shard.path}: {reason}: what was read of it before is used; fetch it again for the rest") from (
            error
        )


def _saved(shard: InShard, image_key: str) -> Iterator[tuple[str, bytes | None, dict]]:
    import datasets

    data = _open_saved(shard.path)
    image = choose_key(image_key, data.column_names, IMAGE_KEYS, "--image_key", shard.path)
    if isinstance(data.features[image], datasets.Image):
        data = data.cast_column(image, datasets.Image(decode=False))
    for number in range(*shard.rows):
        yield _row(data[number], image, pathlib.Path(shard.path), number)


def _open_saved(path: str):
    import datasets

    data = datasets.load_from_disk(path)
    if not isinstance(data, datasets.DatasetDict):
        return data
    if "train" not in data and len(data) > 1:
        raise DataError(f"--data={path!r} has no split 'train', only {', '.join(data)}: give the folder of one")
    return data["train"] if "train" in data else next(iter(data.values()))


def _cut_saved(root: pathlib.Path, size: int) -> list[InShard]:
    count = len(_open_saved(str(root)))
    bounds = [(begin, min(begin + size, count)) for begin in range(0, count, size)]
    return [InShard(f"{root.name}[{a}:{b}]", "saved", str(root), rows=(a, b)) for a, b in bounds]


def _row(row: dict, image: str, base: pathlib.Path, number: int) -> tuple[str, bytes | None, dict]:
    value = row.pop(image)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        value = _content(base / value)
    columns = {name: plain for name, content in row.items() if (plain := _plain(content)) is not None}
    if isinstance(columns.get(_COLUMNS), dict):  # of what was a webdataset
        columns |= columns.pop(_COLUMNS)
    key = columns.get("__key__", f"{number:09d}")
    return str(key), value, columns


def _plain(value: Any) -> Any:
    """As JSON has it; bytes, what is empty and what is no number are left out."""
    if value is None or isinstance(value, bytes | bytearray) or value != value:
        return None
    if isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, dict):
        return {str(name): plain for name, inner in value.items() if (plain := _plain(inner)) is not None}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value)


# -- Folders ---------------------------------------------------------------------------------------------------------


def _cut_folder(root: pathlib.Path, files: list[str], size: int) -> list[InShard]:
    listed = [file for file in files if os.path.basename(file) in folder.METADATA]
    if listed:
        raise DataError(
            f"--data={str(root)!r}: {listed[0]} is not read here, only .txt and .json beside pictures: save it as a "
            "data set first (datasets.load_dataset('imagefolder', ...).save_to_disk)"
        )
    beside = {file for file in files if file.lower().endswith((".txt", ".json"))}
    pictures = sorted(file for file in files if file.lower().endswith(media.PICTURES))
    shards = []
    for begin in range(0, len(pictures), size):
        part = tuple(pictures[begin : begin + size])
        texts = (os.path.splitext(file)[0] + ending for file in part for ending in (".txt", ".json"))
        name = f"{root.name}[{begin}:{begin + len(part)}]"
        shards.append(InShard(name, "folder", str(root), part, frozenset(beside.intersection(texts))))
    return shards


def _folder(shard: InShard, image_key: str) -> Iterator[tuple[str, bytes | None, dict]]:
    root = pathlib.Path(shard.path)
    for file in shard.files:
        stem = os.path.splitext(file)[0]
        columns = {}
        if f"{stem}.json" in shard.texts:
            columns = columns_in(_content(root / f"{stem}.json") or b"", f"{shard.name}: {stem}.json")
        if f"{stem}.txt" in shard.texts:
            columns[_CAPTION] = (_content(root / f"{stem}.txt") or b"").decode("utf-8", "replace")
        yield stem, _content(root / file), columns


def _content(path: pathlib.Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


# -- Out -------------------------------------------------------------------------------------------------------------


class TarWriter:
    """A webdataset tar whose bytes hang on its records alone: no times, no owners.

    Every picture is called .jpg, whatever its format: who reads webdatasets wants one name for a column (Hugging Face
    `datasets` refuses another), and decoders look at the content. A .txt is always there.
    """

    def __init__(self, path: pathlib.Path):
        self._tar = tarfile.open(path, "w", format=tarfile.GNU_FORMAT)

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(self, *error) -> None:
        self._tar.close()

    def add(self, key: str, data: bytes, caption: tuple[str, ...], columns: dict[str, Any]) -> None:
        columns = {**columns, "caption": caption[0] if len(caption) == 1 else list(caption)} if caption else columns
        self.add_member(f"{key}.jpg", data)
        self.add_member(f"{key}.txt", (caption[0] if caption else "").encode())
        self.add_member(f"{key}.json", json.dumps(columns, ensure_ascii=False, sort_keys=True).encode())

    def add_member(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))


def rewrite(path: pathlib.Path, target: pathlib.Path, dropped: Iterable[str]) -> int:
    """A tar of TarWriter's without some of its keys -> another one; how many keys it holds."""
    dropped, kept = set(dropped), set()
    with tarfile.open(path, "r:") as tar, TarWriter(target) as writer:
        for member in tar:
            tar.members = []
            key = member.name.partition(".")[0]
            if key not in dropped:
                kept.add(key)
                writer.add_member(member.name, tar.extractfile(member).read())
    return len(kept)
