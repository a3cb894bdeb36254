"""What the names in torch's pickles stand for: storages, and tensors as views of them. Nothing is judged or read yet.

A persistent id ("storage", type, key, device, elements) names a storage; torch._utils._rebuild_tensor_v2 and its like
make of one, and of offset, shape and strides in elements, a tensor. Calls of other names stay `Call`s.

Formats: torch/_utils.py, torch/serialization.py (https://github.com/pytorch/pytorch)
"""

import dataclasses
import functools
from typing import Any

import ml_dtypes
import numpy as np

from sd_jax.checkpoints import pickle_machine
from sd_jax.checkpoints.errors import shown
from sd_jax.checkpoints.pickle_machine import Global, Stream

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a legacy file
# By torch's names, without "torch."
DTYPES = {
    **{
        name: np.dtype(name)
        for name in ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
    },
    **{name: np.dtype(name) for name in ("float16", "float32", "float64", "complex64", "complex128")},
    **{
        name: np.dtype(getattr(ml_dtypes, name))
        for name in ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
    },
}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "UntypedStorage": "uint8",
    "QInt8Storage": "int8",
    "QUInt8Storage": "uint8",
    "QInt32Storage": "int32",
    "QUInt4x2Storage": "uint8",
    "QUInt2x4Storage": "uint8",
}
STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")
_MOST_DIMENSIONS = 32


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A persistent id: bytes [begin, end) of the storage `key`."""

    key: str
    dtype: np.dtype
    begin: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tensor as the pickle describes it, not yet judged: offset, shape and strides may be anything."""

    storage: Storage
    dtype: np.dtype
    offset: Any
    shape: Any
    strides: Any


def load(stream: Stream, storages: dict[str, Storage]) -> Any:
    """The next pickle, with Views for tensors; adds to `storages`, by key, each whole storage that it names."""
    return pickle_machine.load(stream, KNOWN, functools.partial(_persistent, storages))


def _persistent(storages, machine, identity):
    if type(identity) is tuple and identity[:1] == ("module",) and len(identity) > 1:
        return identity[1]  # a class, and its source in the legacy format
    if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
        machine.stream.fail("a damaged torch pickle: it refers to something that is no storage")
    kind, key, _, numel = identity[1:5]
    name = STORAGES.get(kind.name) if type(kind) is Global and kind.module in STORAGE_MODULES else None
    if name is None:
        machine.stream.fail(f"a storage of type {kind if type(kind) is Global else 'unknown'}, which is not read")
    if type(key) not in (str, int) or not counts([numel]):
        machine.stream.fail("a damaged torch pickle: a storage's key or length is none")
    dtype = DTYPES[name]
    whole = storages.setdefault(str(key), Storage(str(key), dtype, 0, numel * dtype.itemsize))
    if whole.end != numel * dtype.itemsize:
        machine.stream.fail(f"a damaged torch pickle: storage {shown(str(key))} has two lengths")
    view = identity[5] if len(identity) == 6 else None
    if view is None:
        return Storage(whole.key, dtype, 0, whole.end)
    if type(view) is not tuple or len(view) != 3 or not counts(view[1:]) or view[1] + view[2] > numel:
        machine.stream.fail(f"a damaged torch pickle: a view reaches out of storage {shown(str(key))}")
    return Storage(whole.key, dtype, view[1] * dtype.itemsize, (view[1] + view[2]) * dtype.itemsize)


def counts(numbers: Any) -> bool:
    """Are they a few whole numbers from 0 to 2^62?"""
    few = type(numbers) in (tuple, list) and len(numbers) <= _MOST_DIMENSIONS
    return few and all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)


def _ordered_dict(machine, arguments):
    """OrderedDict(), or as Python 2 wrote it: OrderedDict([[key, value], ...])."""
    pairs = arguments[0] if arguments else []
    if type(pairs) is not list:
        return None
    machine.stream.spend(len(pairs))  # or one list, named again and again, is work without end
    if not all(type(pair) in (tuple, list) and len(pair) == 2 for pair in pairs):
        return None
    entries = {}
    machine.fill(entries, [part for pair in pairs for part in pair])
    return entries


def _size(machine, arguments):
    if len(arguments) != 1 or type(arguments[0]) not in (tuple, list):
        return None
    machine.stream.spend(len(arguments[0]))
    return tuple(arguments[0])


def _tensor(machine, arguments):
    if len(arguments) < 4 or type(arguments[0]) is not Storage:
        return None
    return View(arguments[0], arguments[0].dtype, *arguments[1:4])


def _tensor_of_dtype(machine, arguments):
    if len(arguments) < 7 or type(arguments[0]) is not Storage or type(arguments[6]) is not Global:
        return None
    module, dtype = arguments[6].module, arguments[6].name
    if module != "torch" or dtype not in DTYPES:
        return None
    return View(arguments[0], DTYPES[dtype], *arguments[1:4])


def _parameter(machine, arguments):
    return arguments[0] if arguments else None


def _with_attributes(machine, arguments):
    """(function, type, its arguments, state): a tensor that something was attached to, or of a subclass."""
    if len(arguments) != 4 or type(arguments[0]) is not Global or type(arguments[2]) is not tuple:
        return None
    function = _TENSORS.get((arguments[0].module, arguments[0].name))
    return None if function is None else function(machine, arguments[2])


_TENSORS = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}
# (module, name) -> what stands for a call of it; None = a Call, as of any other name
KNOWN = {
    **_TENSORS,
    ("torch._tensor", "_rebuild_from_type_v2"): _with_attributes,
    ("torch", "Size"): _size,
    ("collections", "OrderedDict"): _ordered_dict,
}
