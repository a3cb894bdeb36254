"""Binding a denoiser to its conditioning, with or without classifier-free guidance.

Ho & Salimans 2022 (arXiv 2207.12598), Eq. 6 in the notation that everybody uses (their w is scale - 1):

    D(x, sigma) = D_uncond + scale (D_cond - D_uncond)                                                      (1)

For x0, epsilon, v and flow alike this is the same equation, since at a given x and sigma each is an affine function of
the others.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax.diffusion.denoiser import ConditionedDenoise, Denoise
from sd_jax.diffusion.predictions import along_batch


def conditioned(denoise: ConditionedDenoise, conditioning: Any) -> Denoise:
    """`denoise(x, sigma)` of the conditioning alone: no guidance, half the work of `classifier_free`."""
    return lambda x, sigma: denoise(x, sigma, conditioning)


def classifier_free(
    denoise: ConditionedDenoise,
    cond: Any,  # a pytree whose arrays lead with the batch, such as a Conditioning
    uncond: Any,  # the same pytree with the same shapes
    scale: Float[Array, "..."],  # scalar or [batch]; traced, so another scale does not recompile; 1 = no guidance
) -> Denoise:
    """The guided `denoise(x, sigma)` of Eq. 1, by one call of the model on twice the batch: uncond, then cond."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), uncond, cond)

    def guided(x: Float[Array, "batch *dims"], sigma: Float[Array, "..."]) -> Array:
        sigma = jnp.broadcast_to(sigma, x.shape[:1])
        x0 = denoise(jnp.concatenate([x, x]), jnp.concatenate([sigma, sigma]), both)
        x0_uncond, x0_cond = jnp.split(x0, 2)
        return x0_uncond + along_batch(scale, x0_cond) * (x0_cond - x0_uncond)

    return guided
