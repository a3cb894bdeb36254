"""What the backward pass keeps of the forward pass and what it computes again, by name (`config.remat`).

What a gradient of a U-Net holds at once beside parameters, and its arithmetic (`python -m benchmarks.remat`: 64, 128
and 256 channels, two layers a block, batch 16, latents of 32x32, bfloat16, compiled for one TPU v5e; attention
plain):

    name          temporaries    arithmetic
    none          4.40 GB  1.00        1.00
    dots          1.57 GB  0.36        1.07
    transformers  1.19 GB  0.27        1.14
    blocks        1.02 GB  0.23        1.22

Where attention keeps no scores anyway (cuDNN, or in chunks) "dots" gains less. On a CPU all four hold the same (jaxlib
0.10): arithmetic alone changes.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax


def products(primitive, *inputs, **parameters) -> bool:
    """Convolutions, and matrix products that have no batch axes: linears, but not the scores of attention."""
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    convolves = "conv_general_dilated" in (primitive.name, *_within(**parameters))
    return convolves or dots(primitive, *inputs, **parameters)


def _within(call_jaxpr=None, **_) -> list[str]:
    """The operations of a function with a gradient of its own, as `layers.convolve` is on a CPU."""
    return [] if call_jaxpr is None else [equation.primitive.name for equation in call_jaxpr.eqns]


class Policy(NamedTuple):
    wraps: tuple[str, ...] = ()  # kinds of block that keep their inputs: "resnet", "transformer"
    keeps: Callable[..., bool] | None = None  # which results inside them are kept too; None = none


POLICIES = {
    "none": Policy(),
    "dots": Policy(("resnet", "transformer"), products),  # norms, activations and scores are computed again
    "transformers": Policy(("transformer",)),
    "blocks": Policy(("resnet", "transformer")),
}


def wrapped(block: type[nn.Module], kind: str, remat: str) -> type[nn.Module]:
    """The block's class as a network should use it. Raises ValueError for an unknown name."""
    policy = policy_of(remat)
    return nn.remat(block, policy=policy.keeps) if kind in policy.wraps else block


def policy_of(remat: str) -> Policy:
    """The row of POLICIES. Raises ValueError with the names that there are."""
    if remat not in POLICIES:
        raise ValueError(f"config.remat={remat!r} is unknown: use {', '.join(POLICIES)}")
    return POLICIES[remat]
