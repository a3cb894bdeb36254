"""L2-SP: weights that are pulled back towards those that a run began with, so that it forgets less.

    theta <- theta - rate * strength * (theta - theta_0)                                                       (1)

Weight decay pulls towards nothing, which for a model that has been trained before is forgetting; the starting point is
the better place (Li et al. 2018, "Explicit inductive bias for transfer learning with convolutional networks", arXiv
1802.01483). There the pull is a part of the loss, (strength / 2) |theta - theta_0|^2; here, as weight decay in AdamW
(Loshchilov & Hutter 2019), it stands beside the gradient's step, so that no optimiser rescales it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from sd_jax.types import Params


class AnchorState(NamedTuple):
    count: Int[Array, ""]  # steps done
    start: Params  # theta_0; of the state, so that a run that resumes is pulled to where it began


def pull_to_start(rate: optax.Schedule, strength: float) -> optax.GradientTransformation:
    """Adds the pull of (Eq. 1) to updates that are already those of the weights, so behind the optimiser in a chain.

    theta_0 is what `init` is given.
    """

    def init(params):
        # Copies: params are donated to the step, and a buffer cannot be donated twice
        return AnchorState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates, state, params=None):
        pull = jnp.asarray(rate(state.count) * strength, jnp.float32)
        updates = jax.tree.map(
            lambda update, theta, start: update - pull.astype(theta.dtype) * (theta - start),
            *(updates, params, state.start),
        )
        return updates, AnchorState(optax.safe_increment(state.count), state.start)

    return optax.GradientTransformation(init, update)
