"""Running averages of the weights; samples are made from the first."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sd_jax.types import Params


def update(
    averages: dict[str, Params],  # by their decay, f"{decay:g}": jit sorts the names, so their order says nothing
    params: Params,
    step: jax.Array,  # steps done before this one, int32 scalar
    decays: Sequence[float],
) -> dict[str, Params]:
    """average <- d * average + (1 - d) * params, d = min(decay, (1 + step) / (10 + step)).

    The bound lets a short run forget its initialisation (Tarvainen & Valpola 2017; TensorFlow's num_updates).
    """
    step = step.astype(jnp.float32)

    def one(average: Params, decay: float) -> Params:
        d = jnp.minimum(jnp.float32(decay), (1.0 + step) / (10.0 + step))
        return jax.tree.map(lambda a, p: a + (1.0 - d).astype(a.dtype) * (p.astype(a.dtype) - a), average, params)

    return {f"{decay:g}": one(averages[f"{decay:g}"], decay) for decay in decays}
