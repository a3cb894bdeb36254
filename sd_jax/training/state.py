"""What a training run is made of between two steps."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from sd_jax.types import Params


@flax.struct.dataclass
class TrainState:
    """Random state is not here: every draw is keyed by (seed, step, place in the global batch).

    step:      optimiser steps done, int32 scalar
    params:    what is trained, {"unet": ..., ...}
    frozen:    what the loss reads besides, {"vae": ..., ...}
    ema:       the running average of `params`
    opt_state: the optimiser's own
    """

    step: jax.Array
    params: Params
    frozen: Params
    ema: Params
    opt_state: optax.OptState

    @property
    def raw_model(self) -> Params:
        return {**self.frozen, **self.params}

    @property
    def ema_model(self) -> Params:
        return {**self.frozen, **self.ema}


def create(params: Params, frozen: Params, optimizer: optax.GradientTransformation) -> TrainState:
    # The average is a copy: params are donated to the step, and a buffer cannot be donated twice
    average = jax.tree.map(lambda p: p + jnp.zeros((), p.dtype), params)
    return TrainState(jnp.zeros((), jnp.int32), params, frozen, average, optimizer.init(params))
