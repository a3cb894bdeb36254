"""The running average of the weights that samples are made from."""

import jax
import jax.numpy as jnp

from sd_jax.types import Params


def update(average: Params, params: Params, decay: float, step: jax.Array) -> Params:
    """average <- d * average + (1 - d) * params, d = min(decay, (1 + step) / (10 + step)).

    The bound lets a short run forget its initialisation (Tarvainen & Valpola 2017; TensorFlow's num_updates).
    """
    step = step.astype(jnp.float32)
    d = jnp.minimum(jnp.float32(decay), (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: a + (1.0 - d).astype(a.dtype) * (p.astype(a.dtype) - a), average, params)
