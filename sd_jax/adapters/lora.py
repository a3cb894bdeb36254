"""The LoRA family before it has learnt anything: which layers it changes, and the arrays that it begins with.

All begin at dW = 0 (`deltas.py` has the equations): one factor is zero, the others are drawn as the reference
implementations draw them (peft for LoRA, LyCORIS for the others).

    LoRA, LoCon   A uniform within 1 / sqrt(fan-in), B zero
    LoHa          B1 normal of deviation 0.1, A1 and A2 normal of deviation 1, B2 zero
    LoKr          W1 uniform within 1 / sqrt(its inputs), W2 zero, or of two factors, the second zero
    DoRA          besides: m = |W|, by rows of outputs
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key

from sd_jax.adapters import deltas
from sd_jax.adapters.deltas import Layers
from sd_jax.types import Params

ALGORITHMS = ("lora", "loha", "lokr")
FIXED = ("alpha", "strength")  # arrays of an entry that no training moves


class Target(NamedTuple):
    """A layer that is changed."""

    shape: tuple[int, ...]  # of its weight, in torch's layout
    rank: int
    alpha: float


Targets = Mapping[str, Mapping[str, Target]]  # by part and path


def targets_of(
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],  # of what may be changed, by part and path; as in torch
    patterns: Sequence[Any],  # of re.search in "part/path", or (pattern, rank[, alpha]); the first match counts
    rank: int,  # where a pattern brings none
    alpha: float,  # likewise; 0 = the rank
    rslora: bool = False,  # alpha / sqrt(rank) is what counts (Kalajdzievski 2023, arXiv 2312.03732)
) -> Targets:
    """The layers that the patterns find.

    Raises ValueError naming a pattern that finds none, or a layer that is narrower than its rank.
    """
    rows = [(row, rank, alpha) if isinstance(row, str) else (*row, *(rank, alpha)[len(row) - 1 :]) for row in patterns]
    found: dict[str, dict[str, Target]] = {}
    used = set()
    for part, layers in shapes.items():
        for path, shape in layers.items():
            row = next((row for row in rows if re.search(row[0], f"{part}/{path}")), None)
            if row is None:
                continue
            pattern, its_rank, its_alpha = row
            used.add(pattern)
            if not 1 <= its_rank <= min(shape[:2]):
                raise ValueError(
                    f"config.adapter.rank={its_rank}: {part}/{path} is {shape[1]} wide and gives {shape[0]} numbers: "
                    f"give 1 to {min(shape[:2])}, or a pattern with a rank of its own in config.adapter.targets"
                )
            its_alpha = float(its_alpha or its_rank) * (its_rank**0.5 if rslora else 1.0)
            found.setdefault(part, {})[path] = Target(tuple(shape), its_rank, its_alpha)
    for pattern, *_ in rows:
        if pattern not in used:
            raise ValueError(
                f"config.adapter.targets: {pattern!r} finds no linear or convolution of {', '.join(shapes)} "
                "that no other pattern found, e.g. 'unet/.*attn2/to_[kv]$'"
            )
    return found


def init(
    key: Key[Array, ""],
    targets: Targets,
    algorithm: str = "lora",
    dora: bool = False,
    factor: int = -1,  # of LoKr: W1 is at most so large; -1 = as near to a square as can be
    params: Mapping[str, Params] | None = None,  # the model's, read for DoRA
) -> dict[str, dict[str, dict[str, Array]]]:
    """Layers as `deltas.py` has them, float32. Raises ValueError for an unknown algorithm."""
    if algorithm not in _INIT:
        raise ValueError(f"config.adapter.algorithm={algorithm!r} is unknown: use {', '.join(ALGORITHMS)}")
    made, number = {}, 0
    for part, entries in targets.items():
        made[part] = {}
        for path, target in entries.items():
            entry = _INIT[algorithm](jax.random.fold_in(key, number), target, factor)
            entry["alpha"] = jnp.float32(target.alpha)
            if dora:
                kernel = flatten_dict(params[part], sep="/")[f"{path}/kernel"]
                weight = jnp.asarray(deltas.to_torch(kernel), jnp.float32)
                norm = jnp.sqrt(jnp.sum(jnp.square(weight), axis=tuple(range(1, weight.ndim)), keepdims=True))
                entry["dora_scale"] = norm
            made[part][path] = entry
            number += 1
    return made


def split(layers: Layers) -> tuple[Params, Layers]:
    """(what training moves, as a nested tree; the rest of each entry)."""
    moves = {part: {p: _without(e, FIXED) for p, e in entries.items()} for part, entries in layers.items()}
    rest = {
        part: {p: {n: a for n, a in e.items() if n in FIXED} for p, e in entries.items()}
        for part, entries in layers.items()
    }
    return {part: unflatten_dict(entries, sep="/") for part, entries in moves.items()}, rest


def join(trained: Params, rest: Layers) -> Layers:
    """The inverse of `split`."""
    joined = {}
    for part, entries in rest.items():
        joined[part] = {path: dict(entry) for path, entry in entries.items()}
        for name, array in flatten_dict(trained[part], sep="/").items():
            path, _, which = name.rpartition("/")
            joined[part][path][which] = array
    return joined


def factors_of(size: int, factor: int) -> tuple[int, int]:
    """size = a * b with a <= b, a the largest divisor that is at most `factor` (-1: the root of size)."""
    most = int(size**0.5) if factor < 0 else factor
    a = max(i for i in range(1, size + 1) if size % i == 0 and i <= most)
    return min(a, size // a), max(a, size // a)


def _without(entry: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: array for name, array in entry.items() if name not in names}


def _uniform(key, shape):
    bound = 1 / np.sqrt(np.prod(shape[1:]))
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _init_lora(key, target: Target, factor: int):
    out, into, *kernel = target.shape
    up = (out, target.rank, *[1] * len(kernel))
    return {"lora_down": _uniform(key, (target.rank, into, *kernel)), "lora_up": jnp.zeros(up, jnp.float32)}


def _init_loha(key, target: Target, factor: int):
    (out, *inside), keys = target.shape, jax.random.split(key, 3)
    down = (target.rank, int(np.prod(inside)))
    return {
        "hada_w1_a": 0.1 * jax.random.normal(keys[0], (out, target.rank), jnp.float32),
        "hada_w1_b": jax.random.normal(keys[1], down, jnp.float32),
        "hada_w2_a": jnp.zeros((out, target.rank), jnp.float32),
        "hada_w2_b": jax.random.normal(keys[2], down, jnp.float32),
    }


def _init_lokr(key, target: Target, factor: int):
    (out, into, *kernel), keys = target.shape, jax.random.split(key, 2)
    (out_1, out_2), (into_1, into_2) = factors_of(out, factor), factors_of(into, factor)
    entry = {"lokr_w1": _uniform(keys[0], (out_1, into_1))}
    if target.rank < max(out_2, into_2) / 2:
        entry["lokr_w2_a"] = _uniform(keys[1], (out_2, target.rank))
        entry["lokr_w2_b"] = jnp.zeros((target.rank, into_2 * int(np.prod(kernel))), jnp.float32)
    else:
        entry["lokr_w2"] = jnp.zeros((out_2, into_2, *kernel), jnp.float32)
    return entry


_INIT = {"lora": _init_lora, "loha": _init_loha, "lokr": _init_lokr}
