"""Parameters from where they are onto the devices that compute: each tensor is read, checked and handed over by itself.

Two threads take turns with the tensors, so that one reads while the other lays out. On CPU, JAX takes the memory that
was read into over as it is; elsewhere it goes once the device has its copy. So the host holds at most one copy of the
weights (none, beside another device) and what the two threads have in hand.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.tensors import all_finite, dtype_of, empty, lazy
from sd_jax.types import Params

_THREADS = 2


def place(
    params: Params,  # of Tensors, NumPy or JAX arrays
    dtype: Any,  # of floats: "float32", "float16", "bfloat16"; None = as they are
    shardings: Any = None,  # a tree of jax.sharding.Sharding like `params`; None = all on the default device
    where: str | os.PathLike = "the model",  # for messages: what is being loaded
) -> Params:
    """-> the same tree of JAX arrays, none of which shares memory with `params`.

    With shardings, a process keeps of each tensor what its own devices hold. (`sharding.state_shardings` makes such a
    tree: a Tensor has a shape.)
    Raises CheckpointError naming a tensor that is not finite, or that float16 cannot hold.
    """

    def one(name, leaf, sharding):
        array = _read(name, leaf, dtype_of(dtype), where)
        if sharding is None:
            return jax.block_until_ready(jax.device_put(array))
        shard = lambda index: _shard(array, index)  # noqa: E731
        return jax.block_until_ready(jax.make_array_from_callback(array.shape, sharding, shard))

    return _map(one, params, shardings)


def gather(params: Params, dtype: Any = None, where: str | os.PathLike = "the model") -> Params:
    """Like `place`, but into NumPy arrays."""
    return _map(lambda name, leaf, _: _read(name, leaf, dtype_of(dtype), where), params, None)


def _map(one: Callable, params: Params, shardings: Any) -> Params:
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    names = ["/".join(str(entry.key) for entry in path) for path, _ in leaves]
    asked = [None] * len(leaves) if shardings is None else tree.flatten_up_to(shardings)
    with ThreadPoolExecutor(_THREADS) as pool:  # where one fails, those after it are not begun
        return tree.unflatten(pool.map(one, names, [leaf for _, leaf in leaves], asked))


def _read(name: str, leaf: Any, dtype: np.dtype | None, where: str | os.PathLike) -> np.ndarray:
    """Into memory of its own, laid out for JAX."""
    tensor = lazy(leaf).cast(dtype, f"{where}: {name}")
    array = empty(tensor.shape, tensor.dtype)
    tensor.fill(array)
    if not all_finite(array):
        with np.errstate(invalid="ignore"):
            count = int(np.sum(~np.isfinite(array)))
        raise CheckpointError(f"{where}: {name} has {count} values that are not finite: it is damaged")
    return array


def _shard(array: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    """A part that does not keep the whole alive."""
    part = array[index]
    if part.size == array.size:
        return array
    own = empty(part.shape, part.dtype)
    own[...] = part
    return own
