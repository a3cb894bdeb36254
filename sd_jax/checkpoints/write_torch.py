"""Tensors as torch.save writes them (`.pt`, `.bin`), without torch: a zip archive, not compressed.

    NAME/data.pkl    dicts and tuples of tensors, texts and numbers; a persistent id ("storage", type, key, "cpu",
                     elements) stands for the bytes of a storage
    NAME/data/KEY    those bytes, little-endian, beginning at a multiple of 64 bytes of the file
    NAME/byteorder, NAME/version

`torch.load(weights_only=True)` opens it; what is read back by `read_pickle` is equal to the bit.
Formats: torch/serialization.py, torch/_utils.py (https://github.com/pytorch/pytorch)
"""

import itertools
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sd_jax.checkpoints.errors import CheckpointError, listing
from sd_jax.checkpoints.tensors import Tensor, lazy
from sd_jax.checkpoints.torch_pickle import DTYPES, STORAGES

_NAMES = {DTYPES[name]: kind for kind, name in STORAGES.items() if not kind.startswith(("Q", "Untyped"))}
_ATOMS = (str, bool, int, float, type(None))
_TOP = "archive"
_ALIGNMENT = 64


def write(path: str | os.PathLike, tensors: Mapping[str, Any], around: Mapping[str, str] | None = None) -> None:
    """NumPy or JAX arrays or Tensors by name -> one file, one tensor in memory at a time, flushed to the disk.

    With `around`, texts by name, the tensors are its entry "state_dict". The bytes go to `path` itself: see `aside`.
    Raises CheckpointError for a type that torch has no storage of.
    """
    write_object(path, dict(tensors) if around is None else {**around, "state_dict": dict(tensors)})


def write_object(path: str | os.PathLike, value: Mapping[Any, Any]) -> None:
    """The same for a dict of dicts, lists and tuples, in which there may be texts, numbers and None besides. Keys are
    texts or whole numbers."""
    tensors = list(_tensors(value, ""))
    foreign = [f"{name} ({tensor.dtype})" for name, tensor in tensors if tensor.dtype not in _NAMES]
    if foreign:
        raise CheckpointError(f"{path}: torch has no storage of such a type: {listing(foreign)}")
    with Path(path).open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_member("data.pkl"), b"\x80\x02" + _pickled(value, itertools.count()) + b".")
            archive.writestr(_member("byteorder"), "little")
            for key, (_, tensor) in enumerate(tensors):
                # Padding in an extra field, as torch writes it, so that the bytes can be mapped
                member = _member(f"data/{key}")
                begin = file.tell() + zipfile.sizeFileHeader + len(member.filename) + 4
                member.extra = struct.pack("<2sH", b"FB", -begin % _ALIGNMENT) + b"Z" * (-begin % _ALIGNMENT)
                archive.writestr(member, np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).tobytes())
            archive.writestr(_member("version"), "3\n")
        file.flush()
        os.fsync(file.fileno())


def _member(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"{_TOP}/{name}")


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """In the order in which `_pickled` numbers them."""
    if isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(item, f"{name}.{key}" if name else str(key))
    elif type(value) not in _ATOMS:
        yield name, lazy(value)


def _pickled(value: Any, keys: Iterator[int]) -> bytes:
    """Protocol 2, by hand: only the names of torch's functions are in it. keys: of the storages to come."""
    if type(value) in _ATOMS:
        return _atom(value)
    if isinstance(value, Mapping):
        return b"}(" + b"".join(_atom(key) + _pickled(item, keys) for key, item in value.items()) + b"u"
    if isinstance(value, tuple):
        return b"(" + b"".join(_pickled(item, keys) for item in value) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(_pickled(item, keys) for item in value) + b"e"
    return _tensor(next(keys), lazy(value))


def _tensor(key: int, tensor: Tensor) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())"""
    strides = [math.prod(tensor.shape[i + 1 :]) for i in range(tensor.ndim)]
    kind = b"ctorch\n" + _NAMES[tensor.dtype].encode() + b"\n"
    storage = b"(" + _atom("storage") + kind + _atom(str(key)) + _atom("cpu") + _atom(math.prod(tensor.shape)) + b"tQ"
    shape = b"(" + b"".join(map(_atom, tensor.shape)) + b"t(" + b"".join(map(_atom, strides)) + b"t"
    arguments = storage + _atom(0) + shape + b"\x89" + b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def _atom(value: str | int | float | None) -> bytes:
    if isinstance(value, str):
        data = value.encode("utf-8")
        return b"X" + struct.pack("<I", len(data)) + data
    return pickle.dumps(value, protocol=2)[2:-1]  # what is not remembered: its opcode alone, between head and end
