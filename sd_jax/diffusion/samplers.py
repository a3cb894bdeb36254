"""The table of samplers and the one loop that runs them.

A sampler sees a model only as `denoise(x, sigma) -> x0` and walks down a ladder of sigmas. The loop is a single
`lax.scan`; everything but the sampler's name and the number of steps is traced, so another ladder of the same length,
another picture or another prompt does not recompile.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from sd_jax.diffusion import samplers_ode as ode
from sd_jax.diffusion.denoiser import Denoise, state_dtype
from sd_jax.diffusion.noise import step_noise


class Sampler(NamedTuple):
    """A row of the table; `samplers_ode.py` says what the two functions take and return."""

    step: Callable  # (denoise, x, state, sigma, sigma_next, noise) -> (x, denoised, state)
    init: Callable = ode.stateless  # (x) -> state
    stochastic: bool = False  # whether `step` reads its noise


SAMPLERS = {  # k-diffusion's and ComfyUI's names
    "euler": Sampler(ode.euler),
    "euler_ancestral": Sampler(ode.euler_ancestral, stochastic=True),
    "heun": Sampler(ode.heun),
    "ddim": Sampler(ode.ddim),
    "dpmpp_2m": Sampler(ode.dpmpp_2m, init=ode.dpmpp_2m_init),
}


def sample(
    denoise: Denoise,
    x: Float[Array, "batch *dims"],  # x0 + sigmas[0] * noise; from nothing, latents * ladder.start
    sigmas: Float[Array | np.ndarray, " steps_plus_1"],  # descending; traced
    sampler: str = "euler",  # a key of SAMPLERS
    rng: Key[Array, "*batch_or_none"] | None = None,  # a key per image, or one for all; stochastic samplers only
    noise: Float[Array | np.ndarray, "steps batch *dims"] | None = None,  # recorded draws, in place of rng
    callback: Callable[[Array, Array, Array], None] | None = None,  # on the host: (step, x before it, denoised)
) -> Float[Array, "batch *dims"]:
    """Walks x down from sigmas[0] to sigmas[-1]. Float32 throughout, whatever the model's dtype.

    To be called within jit. Image i of a batch gets what it would get alone, given the same key. The callback is
    only built in when given, must be the same object for the same jitted function, and may hear of steps out of order.
    Raises ValueError for an unknown sampler, and for a stochastic one without rng or noise.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    method = SAMPLERS[sampler]
    steps = sigmas.shape[0] - 1
    x = x.astype(state_dtype(x.dtype))
    sigmas = jnp.asarray(sigmas, x.dtype)
    if not method.stochastic:
        rng = noise = None
    elif noise is not None:
        noise = jnp.asarray(noise, x.dtype)
        if noise.shape != (steps, *x.shape):
            raise ValueError(f"noise has the shape {noise.shape}: {steps} steps of {x.shape} need {(steps, *x.shape)}")
    elif rng is None:
        raise ValueError(f"sampler {sampler!r} is stochastic: give it rng (a key per image) or noise")
    elif rng.ndim == 0:
        rng = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(x.shape[0]))

    def model(x, sigma):
        return denoise(x, sigma).astype(x.dtype)

    def body(carry, at):
        x, state = carry
        index, sigma, sigma_next, drawn = at
        if method.stochastic and drawn is None:
            drawn = step_noise(rng, index, x.shape[1:], x.dtype)
        x_next, denoised, state = method.step(model, x, state, sigma, sigma_next, drawn)
        if callback is not None:
            jax.debug.callback(callback, index, x, denoised)
        return (x_next, state), None

    ladder = (jnp.arange(steps), sigmas[:-1], sigmas[1:], noise)
    (x, _), _ = jax.lax.scan(body, (x, method.init(x)), ladder)
    return x
