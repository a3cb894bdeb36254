"""Helpers for nested dicts of arrays: names, counting, strict merging."""

import jax
import numpy as np
from flax import traverse_util

from sd_jax.types import Params


def flatten(tree: Params) -> dict[str, jax.Array]:
    """Nested dict -> {"a/b/kernel": leaf}."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: dict[str, jax.Array]) -> Params:
    return traverse_util.unflatten_dict(flat, sep="/")


def count(tree: Params) -> int:
    """Number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Params) -> int:
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def check_same_shapes(got: Params, want: Params, what: str) -> None:
    """Raises ValueError listing the names that are missing, unexpected or of another shape in `got`."""
    got, want = flatten(got), flatten(want)
    faults = [f"missing {name}" for name in want if name not in got]
    faults += [f"unexpected {name}" for name in got if name not in want]
    faults += [
        f"{name} is {tuple(got[name].shape)}, expected {tuple(want[name].shape)}"
        for name in want
        if name in got and tuple(got[name].shape) != tuple(want[name].shape)
    ]
    if faults:
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ValueError(f"{what} does not fit the model of this config: {'; '.join(faults[:10])}{more}")
