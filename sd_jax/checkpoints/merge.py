"""Merges checkpoints: python -m sd_jax.checkpoints.merge A B [C] OUT [--method=...] [--alpha=...] [--dtype=...] ...

    weighted_sum      (1 - alpha) A + alpha B         (1)
    add_difference    A + alpha (B - C)               (2)

computed in float32, in this order, and rounded once. All tensors of the parts that A, B (and C) have are merged, the
VAE too; parts that only A has are A's, and A says which parts there are. Numbers that are no floats are A's. Where A
takes more channels than B and C (inpainting, depth), the first channels of its first convolution are merged and the
others are A's, as A1111 merges. Tensors pass one at a time.
"""

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from flax import traverse_util

from sd_jax.checkpoints.convert import add_options, write_opened
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.load import Checkpoint, open_checkpoint
from sd_jax.checkpoints.tensors import Tensor, all_finite, dtype_of, is_float, lay_out, made

METHODS: dict[str, tuple[int, Callable]] = {  # how many checkpoints, and their formula
    "weighted_sum": (2, lambda alpha, a, b: (1 - alpha) * a + alpha * b),  # (1)
    "add_difference": (3, lambda alpha, a, b, c: a + alpha * (b - c)),  # (2)
}
_FIRST = "unet/conv_in/kernel"  # height, width, channels in, channels out
_NUMBERS = 2**18  # that are computed at a time
_MAY_DIFFER = {"sample_size", "eos_token_id", "pad_token_id"}  # without a meaning for tensors


def merge(
    sources: Sequence[str | Path],  # A, B (and C): whatever `load_checkpoint` opens, all of one architecture
    target: str | Path,
    method: str = "weighted_sum",
    alpha: float | int = 0.5,  # 0 = A; beyond 0 to 1 too
    format: str | None = None,  # None = "single_file" where the target is called *.safetensors, else "diffusers"
    dtype: str | None = None,  # of floats; None = A's
    weights: str = "ema",
    tokenizer: str | None = None,
    vae: str | Path | None = None,  # to put in as it is, in place of merged ones
    prediction_type: str | None = None,  # of all of them, whatever they say
    overwrite: bool = False,
) -> Checkpoint:
    """Returns A as it was opened, with the merged Tensors.

    Raises ValueError for another number of checkpoints than the method takes, CheckpointError naming the first
    difference where they are of different architectures, and as `load_checkpoint` and `save_checkpoint` do.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}")
    count, formula = METHODS[method]
    if len(sources) != count:
        raise ValueError(f"{method} takes {count} checkpoints, and {len(sources)} are given")
    wanted = dtype_of(dtype)
    given = {"weights": weights, "prediction_type": prediction_type}
    a = open_checkpoint(sources[0], tokenizer=tokenizer, vae=vae, **given)
    others = [open_checkpoint(path, **given) for path in sources[1:]]
    kept = () if vae is None else ("vae",)
    for path, other in zip(sources[1:], others, strict=True):
        _check_alike(a, other, sources[0], path, kept)

    trees = [traverse_util.flatten_dict(opened.params, sep="/") for opened in (a, *others)]
    merged = {}
    for name, first in trees[0].items():
        dtype_out = wanted or first.dtype
        asked = name.split("/")[0] not in kept and all(name in tree for tree in trees[1:]) and is_float(first.dtype)
        if asked:
            into = functools.partial(_merge_into, [tree[name] for tree in trees], formula, float(alpha), name)
            merged[name] = made(first.shape, np.dtype(np.float32), into).cast(dtype_out, f"{target}: {name}")
        else:
            merged[name] = first.cast(dtype_out, f"{target}: {name}")
    a = dataclasses.replace(a, params=traverse_util.unflatten_dict(merged, sep="/"))
    write_opened(a, target, format, None, overwrite)
    return a


def _merge_into(tensors: Sequence[Tensor], formula: Callable, alpha: float, name: str, out: np.ndarray) -> None:
    arrays = [np.asarray(tensor) for tensor in tensors]
    if name == _FIRST:
        lay_out(arrays[0], out)
        channels = min(array.shape[2] for array in arrays)
        out, arrays = out[:, :, :channels], [array[:, :, :channels] for array in arrays]
    rows = max(1, _NUMBERS // max(1, math.prod(out.shape[1:])))
    for begin in range(0, len(out), rows):
        result = formula(alpha, *(array[begin : begin + rows].astype(np.float32) for array in arrays))
        if not all_finite(result):
            raise CheckpointError(f"{name} is not finite once merged: one of the models is damaged")
        lay_out(result, out[begin : begin + rows])


def _check_alike(a: Checkpoint, other: Checkpoint, path_a: str | Path, path: str | Path, kept: Sequence[str]) -> None:
    """Raises CheckpointError naming the first difference that matters to tensors, or to what they mean."""
    for part in a.params:
        if part not in other.params or part in kept:
            continue
        ours, theirs = getattr(a.spec, part), getattr(other.spec, part)
        if type(ours) is not type(theirs):
            raise CheckpointError(f"{path} cannot be merged into {path_a}: one of them has a tiny VAE")
        for field in dataclasses.fields(ours):
            x, y = getattr(ours, field.name), getattr(theirs, field.name)
            fewer_channels = (part, field.name) == ("unet", "in_channels") and y < x
            if x != y and field.name not in _MAY_DIFFER and not fewer_channels:
                mend = ": the model that takes more channels comes first" if field.name == "in_channels" else ""
                raise CheckpointError(
                    f"{path} cannot be merged into {path_a}: its {part}.{field.name} is {y}, not {x}{mend}"
                )
    x, y = (opened.spec.noise_schedule.prediction_type for opened in (a, other))
    if x != y:
        raise CheckpointError(
            f"{path} cannot be merged into {path_a}: it predicts {y}, not {x} (prediction_type= says what all predict)"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sd_jax.checkpoints.merge",
        usage="%(prog)s A B [C] OUT [--method=...] [--alpha=...] [--dtype=...] ...",
        description="Merges checkpoints: (1 - alpha) A + alpha B, or A + alpha (B - C).",
    )
    parser.add_argument(
        "paths", metavar="PATH", nargs="+", help="workdirs, diffusers folders or single files; then OUT"
    )
    parser.add_argument("--method", choices=list(METHODS), default="weighted_sum", help="weighted_sum takes no C")
    parser.add_argument("--alpha", type=float, default=0.5, help="how much of B, or of B - C; default: 0.5")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: as A is stored")
    add_options(parser)
    options = vars(parser.parse_args(argv))
    *sources, target = options.pop("paths")
    started = time.perf_counter()
    try:
        merge(sources, target, **options)
    except (ValueError, OSError) as error:  # CheckpointError and FileNotFoundError among them
        print(f"error: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - started
    print(f"{options['method']} of {', '.join(sources)}, alpha {options['alpha']:g} -> {target} in {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
