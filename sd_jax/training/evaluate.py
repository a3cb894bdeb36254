"""What a model is worth on images that it does not learn from: the same images and the same draws at every evaluation.

Image i of evaluation batch b has the keys (seed, b, EVAL_STEP, i), so its timestep and its noise are fixed; two numbers
of a run differ by what was learnt between them, and not by luck.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sd_jax import sharding
from sd_jax.diffusion import noise
from sd_jax.training.context import Context
from sd_jax.training.method import Method
from sd_jax.types import AnyArray, Params

EVAL_STEP = 2**31 - 1  # the "step" that keys the draws; no run gets there


def make_evaluator(
    method: Method,
    context: Context,
    seed: int,
    batches: Sequence[dict[str, AnyArray]],  # the global ones, or with `place` this process' share of each
    place: Callable[[dict[str, AnyArray]], Any] = lambda batch: batch,  # -> the global batch, on the devices
    gather: Callable[[Params], Params] = lambda params: params,  # from where parameters lie to where they are used
    jit: Callable = sharding.jit,
) -> Callable[[Params], dict[str, float]]:
    """-> function of a whole model: `method.held_out` over all batches, each name after "held_out_".

    A mean is that of all images together, however they are spread over batches; a measure for which there was no image
    is left out. The model's parameters may lie on a mesh in any way, where `place` puts the batches on the same one:
    what comes back are scalars, the same in every process.
    """

    @jit
    def sums(params, batch, number):
        key = jax.random.fold_in(jax.random.key(seed), number)
        return method.held_out(context, gather(params), batch, noise.example_keys(key, EVAL_STEP, batch["slot"]))

    def evaluate(params: Params) -> dict[str, float]:
        totals: dict[str, np.ndarray] = {}
        for number, batch in enumerate(batches):
            for name, measured in jax.device_get(sums(params, place(batch), number)).items():
                totals[name] = totals.get(name, np.zeros(2)) + np.asarray(measured, np.float64)
        return {f"held_out_{name}": float(total / count) for name, (total, count) in totals.items() if count}

    return evaluate
