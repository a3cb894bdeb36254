"""The safetensors format, read and written in NumPy: 8 bytes of header length, a JSON header, the tensors' bytes.

    {"name": {"dtype": "F16", "shape": [...], "data_offsets": [begin, end]}, "__metadata__": {"key": "text"}}

Why not the `safetensors` package: its NumPy side refuses a whole file for one float8 tensor, and it maps the file,
which counts as memory of this process. Here a tensor is read, by offset, when it is asked for.

Format: https://github.com/huggingface/safetensors#format
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sd_jax.checkpoints.errors import CheckpointError, listing, shown
from sd_jax.checkpoints.tensors import Tensor, lazy, stored

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
_HEADER_LIMIT = 1 << 24  # bytes; SDXL has 300 thousand. What the format allows would take gigabytes to parse:
_LIMIT_OF_FORMAT = 100_000_000
_MOST_BRACKETS = 300_000  # three for a tensor; SDXL has eight thousand
_MOST_DIMENSIONS = 32
_LARGEST = 1 << 62


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file holds: tensors by name, and the texts of its header."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


# Reading


def open_file(path: str | os.PathLike) -> Contents:
    """The header of one `.safetensors` file; its tensors are read later, one by one.

    Memory: at most 512 MiB, whatever the header says; its tensors have no more bytes than the file.
    Raises FileNotFoundError, and CheckpointError in one line where the file is cut short, damaged or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(1024)
        if size <= 8:
            raise CheckpointError(f"{path}: not a safetensors file ({size} bytes): download or copy it again")
        if not is_safetensors(start):
            raise CheckpointError(f"{path}: {what_else(start)}")
        (length,) = struct.unpack("<Q", start[:8])
        if length > _HEADER_LIMIT:
            raise CheckpointError(f"{path}: a header of {length} bytes, more than any checkpoint has")
        if 8 + length > size:
            raise CheckpointError(f"{path}: cut short within its header: download or copy it again")
        file.seek(8)
        header = _parse(path, file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    return Contents(_tensors(path, header, 8 + length, size), metadata)


def is_safetensors(start: bytes) -> bool:
    """Of a file that begins so: a length that can be one, and a table in braces (or an end before it)."""
    return int.from_bytes(start[:8], "little") <= _LIMIT_OF_FORMAT and start[8:9] in (b"{", b"")


def what_else(start: bytes) -> str:
    """A file that begins so and is no safetensors, for a message, with its mend."""
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run `git lfs pull`, or download it"
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return "a pickled PyTorch file, not a safetensors file"
    if start[:4] == b"GGUF":
        return "a GGUF file (quantised), which is not read: use the .safetensors file that it was made from"
    if start.lstrip()[:1] == b"<":
        return "a web page, not a checkpoint: download the file itself"
    if b'"weight_map"' in start:
        return "an index of shards, which holds no tensors itself: give the folder it lies in"
    return "not a safetensors file, nor one of torch.save, or its header is damaged: download or copy it again"


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def no_twins(pairs: list) -> dict:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name occurs twice")
        return entries

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        if text.count(b"{") + text.count(b"[") > _MOST_BRACKETS:
            raise ValueError("more entries than any checkpoint has")
        header = json.loads(text.decode("utf-8"), object_pairs_hook=no_twins, parse_constant=no_constant)
        metadata = header.get("__metadata__") or {} if isinstance(header, dict) else None
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("no table of tensors")
        for texts in (header, metadata, metadata.values()):
            "".join(texts).encode("utf-8")  # half a surrogate pair could be neither printed nor written
    except (ValueError, RecursionError) as error:  # UnicodeError and JSONDecodeError are ValueErrors
        what = shown(str(error))
        raise CheckpointError(f"{path}: not a safetensors file, or its header is damaged ({what})") from error
    return header


def _tensors(path: Path, header: dict[str, Any], begin_of_data: int, size: int) -> dict[str, Tensor]:
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = isinstance(dtype, str) and len(shape) <= _MOST_DIMENSIONS
            sound = sound and all(type(n) is int and 0 <= n < _LARGEST for n in (*shape, begin, end))
            sound = sound and 8 * math.prod(max(n, 1) for n in shape) < _LARGEST
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise CheckpointError(f"{path}: the header's entry for {shown(name)} is damaged")
        if dtype not in DTYPES:
            only = f"only {', '.join(DTYPES)} are"
            raise CheckpointError(f"{path}: {shown(name)} is of type {shown(dtype)}, which is not read: {only}")
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise CheckpointError(f"{path}: {shown(name)} is {shape} of {dtype}, but has {end - begin} bytes")
        spans.append((begin, end))
        tensors[name] = stored(path, name, shape, DTYPES[dtype], begin_of_data + begin)

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
