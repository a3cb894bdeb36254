"""The safetensors format, read and written in NumPy: 8 bytes of header length, a JSON header, the tensors' bytes.

    {"name": {"dtype": "F16", "shape": [...], "data_offsets": [begin, end]}, "__metadata__": {"key": "text"}}

Why not the `safetensors` package: its NumPy side refuses a whole file for one float8 tensor, and it maps the file,
which counts as memory of this process. Here a tensor is read, by offset, when it is asked for.

Format: https://github.com/huggingface/safetensors#format
"""

import dataclasses
import functools
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sd_jax.checkpoints.errors import CheckpointError, listing
from sd_jax.checkpoints.tensors import Tensor, lazy

DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # the format's own


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file, or a set of shards, holds: tensors by name, and the texts of its header."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


# Reading


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All of one `.safetensors` file: {name: array}. Raises CheckpointError on a damaged or foreign file."""
    return {name: tensor.read() for name, tensor in open_file(path).tensors.items()}


def open_file(path: str | os.PathLike) -> Contents:
    """The header of one `.safetensors` file; its tensors are read later, one by one.

    Raises FileNotFoundError, and CheckpointError in one line where the file is cut short, damaged or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(1024)
        if size < 8:
            raise CheckpointError(f"{path}: not a safetensors file ({size} bytes): download or copy it again")
        (length,) = struct.unpack("<Q", start[:8])
        if length > _HEADER_LIMIT:
            raise CheckpointError(f"{path}: {_what_else(start)}")
        if 8 + length > size:
            raise CheckpointError(f"{path}: cut short within its header: download or copy it again")
        file.seek(8)
        header = _parse(path, file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    return Contents(_tensors(path, header, 8 + length, size), {str(k): str(v) for k, v in metadata.items()})


def open_sharded(index: str | os.PathLike) -> Contents:
    """Shards as listed by a `*.safetensors.index.json` beside them. Raises CheckpointError where they do not agree."""
    index = Path(index)
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(where.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors shards ({error})") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index}: shards are missing beside it: {listing(missing)}")
    shards = {name: open_file(index.parent / name).tensors for name in names}
    lost = [f"{tensor} in {shard}" for tensor, shard in where.items() if tensor not in shards[shard]]
    if lost:
        raise CheckpointError(f"{index}: tensors are not where it says: {listing(lost)}")
    return Contents({tensor: shards[shard][tensor] for tensor, shard in where.items()}, {})


def _what_else(start: bytes) -> str:
    """Of a file whose first 8 bytes are no length of a header."""
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run `git lfs pull`, or download it"
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return "a pickled PyTorch file, which is not read yet: convert it to .safetensors first"
    if start.lstrip()[:1] == b"<":
        return "a web page, not a checkpoint: download the file itself"
    return "not a safetensors file, or its header is damaged: download or copy it again"


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def no_twins(pairs: list) -> dict:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name occurs twice")
        return entries

    try:
        header = json.loads(text, object_pairs_hook=no_twins)
        if not isinstance(header, dict) or not isinstance(header.get("__metadata__") or {}, dict):
            raise ValueError("no table of tensors")
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{path}: not a safetensors file, or its header is damaged ({error})") from error
    return header


def _tensors(path: Path, header: dict[str, Any], begin_of_data: int, size: int) -> dict[str, Tensor]:
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise CheckpointError(f"{path}: the header's entry for {name} is damaged")
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name} is of type {dtype}, which is not read: only {', '.join(DTYPES)} are")
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise CheckpointError(f"{path}: {name} is {shape} of {dtype}, but has {end - begin} bytes")
        spans.append((begin, end))
        place = functools.partial(_read_at, path, name, shape, DTYPES[dtype], begin_of_data + begin)
        tensors[name] = Tensor(shape, DTYPES[dtype], place)

    # Every byte belongs to one tensor
    covered = 0
    for begin, end in sorted(spans):
        if begin != covered:
            raise CheckpointError(f"{path}: the header is damaged: tensors overlap or leave holes at byte {begin}")
        covered = end
    if begin_of_data + covered > size:
        raise CheckpointError(
            f"{path}: cut short: {size} of {begin_of_data + covered} bytes are there: download or copy it again"
        )
    if begin_of_data + covered < size:
        raise CheckpointError(f"{path}: {size - begin_of_data - covered} bytes too long: download or copy it again")
    return tensors


def _read_at(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> np.ndarray:
    length = math.prod(shape) * dtype.itemsize
    raw = np.fromfile(path, np.uint8, count=length, offset=offset)
    if raw.size != length:
        raise CheckpointError(f"{path}: cut short while it was read, at {name}")
    return raw.view(dtype).reshape(shape)


# Writing


def write(path: str | os.PathLike, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """NumPy arrays, JAX arrays or Tensors by name -> one file, one tensor in memory at a time, flushed to the disk.

    The bytes go to `path` itself: writing aside and renaming is the caller's (see `aside`).
    """
    lazies = {name: lazy(array) for name, array in tensors.items()}
    foreign = [f"{name} ({tensor.dtype})" for name, tensor in lazies.items() if tensor.dtype not in _NAMES]
    if foreign:
        raise CheckpointError(f"{path}: safetensors has no such type: {listing(foreign)}")

    # Wide types first, so that each tensor is aligned to its own width
    order = sorted(lazies, key=lambda name: (-lazies[name].dtype.itemsize, name))
    header, offset = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name in order:
        length = math.prod(lazies[name].shape) * lazies[name].dtype.itemsize
        header[name] = {
            "dtype": _NAMES[lazies[name].dtype],
            "shape": list(lazies[name].shape),
            "data_offsets": [offset, offset + length],
        }
        offset += length
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    with Path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            array = np.ascontiguousarray(lazies[name].read())
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
