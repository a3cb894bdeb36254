"""Tensors that are not read yet: renamed, transposed and cast for nothing, read one at a time when asked.

Everything between a file and a parameter tree works on `dict[str, Tensor]`, so loading holds at most one copy of a
model and one tensor more, and converting a file into another one holds one tensor.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from sd_jax.checkpoints.errors import CheckpointError

_FLOATS = tuple(
    np.dtype(t)
    for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
)
_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array to come. `np.asarray(tensor)` reads it, each time anew."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype)

    def transpose(self, *axes: int) -> "Tensor":
        """Like numpy's, but laid out afresh, so that no larger buffer is kept alive."""
        shape = tuple(self.shape[axis] for axis in axes)
        return dataclasses.replace(
            self, shape=shape, read=lambda: np.ascontiguousarray(np.transpose(self.read(), axes))
        )

    def reshape(self, *shape: int) -> "Tensor":
        return dataclasses.replace(self, shape=shape, read=lambda: self.read().reshape(shape))

    def cast(self, dtype: np.dtype | None, name: str = "a tensor") -> "Tensor":
        """Floats become `dtype` (None = stay); whole numbers stay. Raises CheckpointError, once read, on overflow."""
        if dtype is None or dtype == self.dtype or self.dtype not in _FLOATS:
            return self
        return dataclasses.replace(self, dtype=dtype, read=lambda: _cast(self.read(), dtype, name))


def _cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if dtype == np.float16 and np.isinf(cast).any() and not np.isinf(array.astype(np.float32)).any():
        raise CheckpointError(f"{name} has values beyond float16's 65504: choose dtype bfloat16 or float32")
    return cast


def lazy(array: Any) -> Tensor:
    """A NumPy or JAX array, or a Tensor, as a Tensor. A JAX array is fetched from its devices when read."""
    if isinstance(array, Tensor):
        return array
    return Tensor(tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array))


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


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())
