"""What every loss is told besides the model and the batch, and the numbers of its random draws."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int32, Key
from ml_collections import ConfigDict

from sd_jax.models.networks import Networks

# The numbers of an example's draws: each use of randomness has its own, and keeps it, so that runs can be repeated
TIMESTEP, NOISE, POSTERIOR, DROPOUT, OFFSET, PYRAMID, PERTURBATION, LEVEL = range(8)
SMALL_PICTURE, GUIDANCE, ADAPTER, MASK = range(8, 12)

Keys = Key[Array, " batch"]  # of the examples of a step


class EmptyPrompt(NamedTuple):
    """What stands in for a caption that is left out: its ids or, where no encoder is at hand, what they encode to."""

    ids: Int32[np.ndarray, " positions"] | None  # of all its chunks; None where text is cached
    states: tuple[Float[np.ndarray, "tokens width"], Float[np.ndarray, " width"] | None] | None = None
    # context and pooled; None where captions come as ids


class Context(NamedTuple):
    networks: Networks
    config: ConfigDict
    empty: EmptyPrompt | None  # None for methods that read no captions
