"""What a training run is made of between two steps."""

from collections.abc import Sequence

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
    frozen:    what the loss reads besides, {"vae": ..., ...}; not what was computed before (`setup.cached_parts`)
    averages:  running averages of `params` by their decay, {"0.9999": ...}
    opt_state: the optimiser's own
    decays:    the names in `averages` in the order of the config: samples are made from the first
    """

    step: jax.Array
    params: Params
    frozen: Params
    averages: dict[str, Params]
    opt_state: optax.OptState
    decays: tuple[str, ...] = flax.struct.field(pytree_node=False)  # JAX sorts the keys of a dict

    @property
    def raw_model(self) -> Params:
        return {**self.frozen, **self.params}

    @property
    def ema_model(self) -> Params:
        return {**self.frozen, **self.averages[self.decays[0]]}


def create(
    params: Params, frozen: Params, optimizer: optax.GradientTransformation, ema_decays: Sequence[float]
) -> TrainState:
    # The averages are copies: params are donated to the step, and a buffer cannot be donated twice
    copy = lambda: jax.tree.map(lambda p: p + jnp.zeros((), p.dtype), params)  # noqa: E731
    decays = tuple(f"{decay:g}" for decay in ema_decays)
    averages = {decay: copy() for decay in decays}
    return TrainState(jnp.zeros((), jnp.int32), params, frozen, averages, optimizer.init(params), decays)
