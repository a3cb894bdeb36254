"""Tensors as torch.save writes them (`.pt`, `.bin`), without torch: a zip archive, not compressed.

    NAME/data.pkl    a dict of tensors, or of such a dict and texts; a persistent id ("storage", type, key, "cpu",
                     elements) stands for the bytes of a storage
    NAME/data/KEY    those bytes, little-endian, beginning at a multiple of 64 bytes of the file
    NAME/byteorder, NAME/version

`torch.load(weights_only=True)` opens it; what is read back by `read_pickle` is equal to the bit.
Formats: torch/serialization.py, torch/_utils.py (https://github.com/pytorch/pytorch)
"""

import math
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sd_jax.checkpoints.errors import CheckpointError, listing
from sd_jax.checkpoints.tensors import Tensor, lazy
from sd_jax.checkpoints.torch_pickle import DTYPES, STORAGES

_NAMES = {DTYPES[name]: kind for kind, name in STORAGES.items() if not kind.startswith(("Q", "Untyped"))}
_TOP = "archive"
_ALIGNMENT = 64


def write(path: str | os.PathLike, tensors: Mapping[str, Any], around: Mapping[str, str] | None = None) -> None:
    """NumPy or JAX arrays or Tensors by name -> one file, one tensor in memory at a time, flushed to the disk.

    With `around`, texts by name, the tensors are its entry "state_dict". The bytes go to `path` itself: see `aside`.
    Raises CheckpointError for a type that torch has no storage of.
    """
    lazies = {name: lazy(array) for name, array in tensors.items()}
    foreign = [f"{name} ({tensor.dtype})" for name, tensor in lazies.items() if tensor.dtype not in _NAMES]
    if foreign:
        raise CheckpointError(f"{path}: torch has no storage of such a type: {listing(foreign)}")
    with Path(path).open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_member("data.pkl"), _pickled(lazies, around))
            archive.writestr(_member("byteorder"), "little")
            for key, tensor in enumerate(lazies.values()):
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


def _pickled(tensors: Mapping[str, Tensor], around: Mapping[str, str] | None) -> bytes:
    """Protocol 2, by hand: only the names of torch's functions are in it."""
    entries = b"".join(_atom(name) + _tensor(key, tensor) for key, (name, tensor) in enumerate(tensors.items()))
    state = b"}(" + entries + b"u"
    if around is not None:
        texts = b"".join(_atom(name) + _atom(text) for name, text in around.items())
        state = b"}(" + texts + _atom("state_dict") + state + b"u"
    return b"\x80\x02" + state + b"."


def _tensor(key: int, tensor: Tensor) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())"""
    strides = [math.prod(tensor.shape[i + 1 :]) for i in range(tensor.ndim)]
    kind = b"ctorch\n" + _NAMES[tensor.dtype].encode() + b"\n"
    storage = b"(" + _atom("storage") + kind + _atom(str(key)) + _atom("cpu") + _atom(math.prod(tensor.shape)) + b"tQ"
    shape = b"(" + b"".join(map(_atom, tensor.shape)) + b"t(" + b"".join(map(_atom, strides)) + b"t"
    arguments = storage + _atom(0) + shape + b"\x89" + b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def _atom(value: str | int) -> bytes:
    if isinstance(value, str):
        data = value.encode("utf-8")
        return b"X" + struct.pack("<I", len(data)) + data
    return pickle.dumps(value, protocol=2)[2:-1]  # a number is not remembered: its opcode alone, between head and end
