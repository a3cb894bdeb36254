"""LoRAs made from weights and from one another: extraction, another rank, sums. NumPy, on the host.

The best approximation of a matrix by one of rank r keeps its r largest singular values (Eckart & Young 1936):

    dW ~ B A,   B = U sqrt(S),   A = sqrt(S) V^T,   alpha = r                                               (1)

A convolution's weight (out, in, h, w) counts as the matrix (out, in h w).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from sd_jax.adapters import deltas
from sd_jax.adapters.deltas import Entry, Layers

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # of linears' and convolutions' weights, by part and path

_UNCHANGED = 1e-6  # of the weight's largest number: below this a difference is what rounding left
_ADDED = ("diff_b", "w_norm", "b_norm")


def extract(
    base: Mapping[str, Mapping[str, np.ndarray]],  # {part: {path: weight in torch's layout}}
    tuned: Mapping[str, Mapping[str, np.ndarray]],  # the same layers of the other model
    rank: int,  # of linears and 1x1 convolutions
    conv_rank: int | None = None,  # of larger convolutions; None = they are left out, as kohya's tool does
) -> Layers:
    """The LoRA that makes, as nearly as its ranks allow, `tuned` of `base` (Eq. 1). Layers that are alike are left out.

    Raises ValueError where nothing differs, and for a rank below 1.
    """
    _check_rank(rank if conv_rank is None else min(rank, conv_rank))
    layers: dict[str, dict[str, Entry]] = {}
    for part, weights in tuned.items():
        for path, weight in weights.items():
            before = np.asarray(base[part][path], np.float32)
            change = np.asarray(weight, np.float32) - before
            largest = conv_rank if change.ndim == 4 and change.shape[2:] != (1, 1) else rank
            if largest is not None and np.abs(change).max() > _UNCHANGED * max(np.abs(before).max(), 1e-30):
                layers.setdefault(part, {})[path] = _factored(change, largest, None)
    if not layers:
        raise ValueError("the two models have the same weights, as far as linears and convolutions are looked at")
    return layers


def resize(layers: Layers, shapes: Shapes, rank: int | None = None, share: float | None = None) -> Layers:
    """Every layer as LoRA of at most `rank`, or of as many singular values as hold `share` of their squared sum.

    LoHa and LoKr become LoRA. What is no change of a matrix (biases, norms, whole differences) stays.
    Raises ValueError for neither or both, for numbers out of range, and for DoRA, whose scale belongs to the product.
    """
    if (rank is None) == (share is None):
        raise ValueError("give a rank or a share, one of the two")
    if rank is not None:
        _check_rank(rank)
    elif not 0 < share <= 1:
        raise ValueError(f"share={share:g}: more than 0 and at most 1 is needed")

    def one(entry: Entry, shape: tuple[int, ...]) -> Entry:
        if deltas.rank_of(entry) is None:
            return entry
        change, strength = _delta(entry, shape), {name: entry[name] for name in ("strength",) if name in entry}
        return {**_factored(change, rank, share), **strength}

    return {
        part: {path: one(entry, shapes[part].get(path, ())) for path, entry in entries.items()}
        for part, entries in layers.items()
    }


def merge(sources: Sequence[tuple[Layers, float]], shapes: Shapes, rank: int | None = None) -> Layers:
    """One adapter that does what several do together, each times its strength.

    rank: None = exact, LoRAs side by side (their ranks add up), other changes of a matrix as a whole difference; else
    all of them as LoRA of that rank (Eq. 1). Raises ValueError for DoRA.
    """
    if rank is not None:
        _check_rank(rank)
    together: dict[str, dict[str, list[tuple[Entry, float]]]] = {}
    for layers, strength in sources:
        for part, entries in layers.items():
            for path, entry in entries.items():
                t = float(strength) * float(entry.get("strength", 1.0))
                together.setdefault(part, {}).setdefault(path, []).append((entry, t))
    return {
        part: {path: _sum(entries, shapes[part].get(path), rank) for path, entries in paths.items()}
        for part, paths in together.items()
    }


def _sum(entries: Sequence[tuple[Entry, float]], shape: tuple[int, ...] | None, rank: int | None) -> Entry:
    """shape: the weight's; None = of a norm or an embedding, whose changes are added up as they are."""
    merged: dict[str, np.ndarray] = {}
    for entry, t in entries:
        for name in _ADDED:
            if name in entry:
                merged[name] = merged.get(name, np.float32(0)) + np.float32(t) * np.asarray(entry[name], np.float32)
    changes = [(entry, t) for entry, t in entries if deltas.rank_of(entry) is not None or "diff" in entry]
    if not changes:
        return merged
    if rank is None and all(deltas.is_low_rank(entry) for entry, _ in changes):
        return {**merged, **_side_by_side(changes)}
    change = np.sum([np.float32(t) * _delta(entry, shape or entry["diff"].shape) for entry, t in changes], axis=0)
    return {**merged, **({"diff": change} if rank is None or shape is None else _factored(change, rank, None))}


def _side_by_side(entries: Sequence[tuple[Entry, float]]) -> Entry:
    scales = [np.float32(t) * np.asarray(deltas.scale_of(entry)) for entry, t in entries]
    ups = [scale * np.asarray(entry["lora_up"], np.float32) for scale, (entry, _) in zip(scales, entries, strict=True)]
    down = np.concatenate([np.asarray(entry["lora_down"], np.float32) for entry, _ in entries])
    return {"lora_down": down, "lora_up": np.concatenate(ups, axis=1), "alpha": np.float32(len(down))}


def _factored(change: np.ndarray, rank: int | None, share: float | None) -> Entry:
    """(Eq. 1) of a weight's change, of as many singular values as are asked for and are not zero."""
    out, *inside = change.shape
    u, s, v = np.linalg.svd(change.reshape(out, -1).astype(np.float32), full_matrices=False)
    if share is not None:
        energy = np.cumsum(np.square(s.astype(np.float64)))
        rank = int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-6))) + 1  # what rounding left is nothing
    rank = max(1, min(rank, int((s > 0).sum())))
    root, kernel = np.sqrt(s[:rank]), inside[1:]
    return {
        "lora_down": (root[:, None] * v[:rank]).reshape(rank, *inside),
        "lora_up": (u[:, :rank] * root).reshape(out, rank, *[1] * len(kernel)),
        "alpha": np.float32(rank),
    }


def _delta(entry: Entry, shape: tuple[int, ...]) -> np.ndarray:
    if "dora_scale" in entry:
        raise ValueError("a DoRA's change hangs on the weights that it is for: merge it into a model, then extract")
    return np.asarray(deltas.delta(entry, shape), np.float32)


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"rank={rank}: at least 1 is needed")
