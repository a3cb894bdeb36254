"""Tensors that are not read yet: renamed, transposed and cast for nothing, read one at a time when asked.

Everything between a file and a parameter tree works on `dict[str, Tensor]`, so loading holds at most one copy of a
model and one tensor more, and converting a file into another one holds one tensor.

What lies in a file as it is (`stored`) is read a few rows at a time, straight into the array that is asked for: a
transposition is a view of that array, a cast happens on the way. So a tensor costs its own memory and a few megabytes,
and what is read is still in the processor's cache when it is laid out.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from sd_jax.checkpoints.errors import CheckpointError

_FLOATS = tuple(
    np.dtype(t)
    for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
)
_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

_ALIGNMENT = 64  # bytes: where an array begins so, JAX on CPU takes its memory over instead of copying it
_ROWS = 64  # that are laid out at once: many more miss the cache (a third of the speed), many fewer take more turns
_CHUNK = 2**20  # bytes that are read at once


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array to come. `np.asarray(tensor)` reads it, each time anew."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    into: Callable[[np.ndarray], None] | None = None  # writes the values into an array; None = all are read at first
    part: Callable[[int, int], "Tensor"] | None = None  # [begin:end] of the first axis; None = all are read for it

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype)

    def fill(self, out: np.ndarray) -> None:
        """Writes the values into `out`, of this shape, whatever its strides; floats become its type."""
        if self.into is None:
            lay_out(self.read(), out)
        else:
            self.into(out)

    def transpose(self, *axes: int) -> "Tensor":
        """Like numpy's, but laid out afresh, so that no larger buffer is kept alive."""
        back = tuple(axes.index(axis) for axis in range(self.ndim))
        shape = tuple(self.shape[axis] for axis in axes)
        return made(shape, self.dtype, lambda out: self.fill(out.transpose(back)))

    def reshape(self, *shape: int) -> "Tensor":
        return made(shape, self.dtype, functools.partial(_reshape_into, self))

    def rows(self, begin: int, end: int) -> "Tensor":
        """[begin:end] of the first axis."""
        if self.part is not None:
            return self.part(begin, end)
        shape = (end - begin, *self.shape[1:])
        return Tensor(shape, self.dtype, lambda: self.read()[begin:end].copy())

    def cast(self, dtype: np.dtype | None, name: str = "a tensor") -> "Tensor":
        """Floats become `dtype` (None = stay); whole numbers stay. Raises CheckpointError, once read, on overflow."""
        if dtype is None or dtype == self.dtype or not is_float(self.dtype):
            return self

        part = None if self.part is None else lambda begin, end: self.part(begin, end).cast(dtype, name)
        return made(self.shape, dtype, functools.partial(_cast_into, self, dtype, name), part)


def lazy(array: Any) -> Tensor:
    """A NumPy or JAX array, or a Tensor, as a Tensor. A JAX array is fetched from its devices when read."""
    if isinstance(array, Tensor):
        return array
    return Tensor(tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array))


def stored(path: str | os.PathLike, name: str, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> Tensor:
    """An array in C order, from byte `offset` of a file on.

    Raises CheckpointError, once read, where the file ends, or is no longer the one that it was.
    """
    return _stored(path, name, shape, dtype, offset, stamp_of(path))


def stamp_of(path: str | os.PathLike | int) -> tuple[int, int, int]:
    """What changes where a file (or that of a descriptor) is written or replaced."""
    stat = os.stat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def check_unchanged(file: BinaryIO, path: str | os.PathLike, stamp: tuple[int, int, int]) -> None:
    """Raises CheckpointError where an opened file is not the one that it was when its tensors were listed."""
    if stamp_of(file.fileno()) != stamp:
        raise CheckpointError(f"{path}: changed since it was opened: load it again")


def _stored(path, name, shape, dtype, offset, stamp) -> Tensor:
    where = (path, name, shape, dtype, offset, stamp)
    return made(shape, dtype, functools.partial(_read_into, *where), functools.partial(_stored_part, *where))


def _stored_part(path, name, shape, dtype, offset, stamp, begin: int, end: int) -> Tensor:
    rest = shape[1:]
    return _stored(path, name, (end - begin, *rest), dtype, offset + begin * math.prod(rest) * dtype.itemsize, stamp)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one dtype one behind the other, along the first axis."""
    shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])
    return made(shape, tensors[0].dtype, functools.partial(_join_into, tensors))


def made(
    shape: tuple[int, ...],
    dtype: np.dtype,
    into: Callable[[np.ndarray], None],
    part: Callable[[int, int], Tensor] | None = None,
) -> Tensor:
    """A Tensor that writes itself into what it is given: `into` takes any strides, and any type of float for floats."""
    return Tensor(shape, dtype, functools.partial(_filled, shape, dtype, into), into, part)


def lay_out(source: np.ndarray, out: np.ndarray) -> None:
    """out[...] = source, cast to its type, a few rows at a time. What is too large becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        if source.ndim < 2 or out.flags.c_contiguous:
            out[...] = source
            return
        size, rows = math.prod(out.shape[1:]), min(len(out), _ROWS)
        # Rows that lie a power of two apart would push each other out of the cache
        apart = np.empty((rows, size + _ALIGNMENT // out.dtype.itemsize), out.dtype)[:, :size]
        for begin in range(0, len(out), rows or 1):
            block = source[begin : begin + rows]
            between = apart[: len(block)].reshape(block.shape)
            between[...] = block
            out[begin : begin + rows] = between


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array whose memory JAX on CPU takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def read_finite(tensor: Tensor, where: str) -> np.ndarray:
    """The array. Raises CheckpointError where they are no floats, or some are infinite or NaN; `where` names file and
    tensor."""
    array = tensor.read()
    if not is_float(array.dtype):
        raise CheckpointError(f"{where} holds {array.dtype}, and floats are wanted")
    if not all_finite(array):
        raise CheckpointError(f"{where} holds numbers that are not finite: take an earlier one")
    return array


def is_float(dtype: np.dtype) -> bool:
    """Of the types that files hold."""
    return dtype in _FLOATS


def all_finite(array: np.ndarray) -> bool:
    """Whether no number is infinite or NaN. (But for the sign, the bits of a larger number are larger ones.)"""
    if not is_float(array.dtype):
        return True
    unsigned, without_sign, largest = _bits(array.dtype)
    bits = array.reshape(-1).view(unsigned)
    step = _CHUNK // 4 // unsigned.itemsize  # what stays in the processor's cache
    return all((bits[i : i + step] & without_sign).max() <= largest for i in range(0, bits.size, step))


@functools.cache
def _bits(dtype: np.dtype) -> tuple[np.dtype, np.generic, np.generic]:
    """-> the type of a float's bits, all of them but the sign, those of its largest number."""
    unsigned = np.dtype(f"u{dtype.itemsize}")
    without_sign = unsigned.type(2 ** (8 * dtype.itemsize - 1) - 1)
    return unsigned, without_sign, np.asarray(ml_dtypes.finfo(dtype).max, dtype).view(unsigned)[()]


def dtype_of(name: Any) -> np.dtype | None:
    """ "float32" | "float16" | "bfloat16" (or the NumPy or JAX type of one) -> NumPy dtype; None stays None."""
    if name is None:
        return None
    if isinstance(name, str) and name in _DTYPES:
        return _DTYPES[name]
    try:
        dtype = np.dtype(name)
    except TypeError:
        dtype = None
    if dtype not in _DTYPES.values():
        raise ValueError(f"dtype={name!r} is not one of {', '.join(_DTYPES)}")
    return dtype


# How values get to where they are asked for


def _filled(shape: tuple[int, ...], dtype: np.dtype, into: Callable[[np.ndarray], None]) -> np.ndarray:
    out = empty(shape, dtype)
    into(out)
    return out


def _reshape_into(tensor: Tensor, out: np.ndarray) -> None:
    view = out.reshape(tensor.shape)
    if np.may_share_memory(view, out):
        tensor.fill(view)
    else:  # `out` is laid out so that no view has this shape
        lay_out(tensor.read().reshape(out.shape), out)


def _join_into(tensors: Sequence[Tensor], out: np.ndarray) -> None:
    begin = 0
    for tensor in tensors:
        tensor.fill(out[begin : begin + tensor.shape[0]])
        begin += tensor.shape[0]


def _cast_into(tensor: Tensor, dtype: np.dtype, name: str, out: np.ndarray) -> None:
    if out.dtype != dtype:  # cast once more: what is in between has been rounded all the same
        lay_out(_filled(out.shape, dtype, functools.partial(_cast_into, tensor, dtype, name)), out)
        return
    tensor.fill(out)
    if dtype == np.float16 and not all_finite(out):
        with np.errstate(invalid="ignore"):
            too_large = np.isinf(out) & np.isfinite(tensor.read().astype(np.float32))
        if too_large.any():
            raise CheckpointError(f"{name} has values beyond float16's 65504: choose dtype bfloat16 or float32")


def _read_into(path, name, shape, dtype, offset, stamp, out: np.ndarray) -> None:
    """An array in a file -> `out`: at once where it is laid out alike, else a few rows at a time."""
    with open(path, "rb", buffering=0) as file:
        check_unchanged(file, path, stamp)
        file.seek(offset)
        if out.dtype == dtype and out.flags.c_contiguous:
            _read_bytes(file, path, name, out)
            return
        out = np.atleast_1d(out)
        row = max(1, math.prod(out.shape[1:]) * dtype.itemsize)
        rows = max(_ROWS, _CHUNK // row // _ROWS * _ROWS)
        buffer = empty((min(len(out), rows), *out.shape[1:]), dtype)
        for begin in range(0, len(out), rows):
            block = buffer[: len(out) - begin]
            _read_bytes(file, path, name, block)
            lay_out(block, out[begin : begin + len(block)])


def _read_bytes(file: BinaryIO, path: str | os.PathLike, name: str, out: np.ndarray) -> None:
    rest = memoryview(out.reshape(-1).view(np.uint8))
    while rest:
        count = file.readinto(rest)
        if not count:
            raise CheckpointError(f"{path}: cut short while it was read, at {name}")
        rest = rest[count:]
