"""What every sampler's step is given, and the single-step samplers of the probability-flow ODE.

With x = x0 + sigma n and D = denoise(x, sigma), Karras et al. 2022 (arXiv 2206.00364), Eq. 1 and 3, reads

    dx / dsigma = (x - D) / sigma                                                                           (1)

A step of any sampler takes (denoise, x, state, at) and returns (x at at.sigma_next, D, the new state); `state` is what
`init(x)` made and the sampler remembers, `at` is the `Step` below. A step to sigma_next = 0 gives D, unless a sampler's
docstring says otherwise. The samplers of this file equal k-diffusion's functions of the same names.

Churn (Karras et al. 2022, Algorithm 2, lines 4 to 6) lifts x before a step from sigma to sigma (1 + gamma) by fresh
noise; it is there only when the option `s_churn` is given, and takes one draw a step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class SamplerOptions(NamedTuple):
    """What can be asked of a sampler besides its name, in k-diffusion's words; each a traced scalar.

    None = the sampler's own default, which its row of `SAMPLERS` gives. Another value does not recompile, but giving
    an option that was None does, once. Which options a sampler reads is in its row too.
    """

    eta: Float[Array, ""] | float | None = None  # how much of the noise is renewed at a step: 0 none, 1 as in DDPM
    s_churn: Float[Array, ""] | float | None = None  # the sum of gamma over the steps, gamma at most sqrt(2) - 1
    s_tmin: Float[Array, ""] | float | None = None  # churn only where s_tmin <= sigma <= s_tmax
    s_tmax: Float[Array, ""] | float | None = None
    s_noise: Float[Array, ""] | float | None = None  # a factor on all fresh noise
    r: Float[Array, ""] | float | None = None  # where the inner point of a step lies in log(sigma), in (0, 1]
    order: Int[Array, ""] | int | None = None  # of a multistep sampler, from 1 to its default


class Step(NamedTuple):
    """Where on the ladder a step is, and what it may use."""

    index: Int[Array, ""]  # of the step, from 0
    steps: Int[Array, ""] | int  # how many are taken in all
    sigma: Float[Array, ""]
    sigma_next: Float[Array, ""]
    options: SamplerOptions  # None where the sampler reads nothing
    table: Any  # this step's entry of what the sampler's `table` made
    noise: Float[Array, "draws batch *dims"] | None = None  # unit variance; None: this run is deterministic


def stateless(x):
    """The `init` of samplers that remember nothing."""
    return ()


def move(x, denoised, sigma, sigma_next):
    """Along the straight line through x and D, from sigma to sigma_next: Euler's step of Eq. 1.

    x + (sigma_next - sigma) (x - D) / sigma, written so that nothing large cancels when sigma_next << sigma.
    """
    return denoised + (sigma_next / sigma) * (x - denoised)


def churn(x, at):
    """x and its noise level after churn: (x, sigma) themselves where there is none."""
    if at.noise is None:
        return x, at.sigma
    o = at.options
    gamma = jnp.minimum(o.s_churn / jnp.asarray(at.steps, x.dtype), 2**0.5 - 1)
    gamma = jnp.where((o.s_tmin <= at.sigma) & (at.sigma <= o.s_tmax), gamma, 0)
    added = at.sigma * jnp.sqrt(gamma * (gamma + 2))  # sqrt(sigma_hat^2 - sigma^2)
    return x + o.s_noise * added * at.noise[0], at.sigma * (1 + gamma)


def euler(denoise, x, state, at):
    """Karras et al. 2022 (arXiv 2206.00364), Algorithm 2 without corrector. Order 1, 1 call a step.

    Deterministic but for churn.
    """
    x, sigma = churn(x, at)
    denoised = denoise(x, sigma)
    return move(x, denoised, sigma, at.sigma_next), denoised, state


def heun(denoise, x, state, at):
    """Karras et al. 2022 (arXiv 2206.00364), Algorithm 2. Order 2, deterministic but for churn.

    2 calls a step; 1 on a step to sigma_next = 0, which is Euler's, since Eq. 1 has no slope there.
    """
    x, sigma = churn(x, at)
    denoised = denoise(x, sigma)
    predicted = move(x, denoised, sigma, at.sigma_next)

    def corrected():
        slope = (x - denoised) / sigma
        slope_next = (predicted - denoise(predicted, at.sigma_next)) / at.sigma_next
        return predicted + (at.sigma_next - sigma) * (slope_next - slope) / 2

    return jax.lax.cond(at.sigma_next > 0, corrected, lambda: predicted), denoised, state


def dpm_2(denoise, x, state, at):
    """DPM-Solver-2: Lu et al. 2022 (arXiv 2206.00927), Algorithm 1 (r_1 = 1/2), with Karras' churn as in k-diffusion.

    The slope of the whole step is that at sqrt(sigma sigma_next), halfway in log(sigma). Order 2, deterministic but for
    churn. 2 calls a step; 1 on a step to 0.
    """
    x, sigma = churn(x, at)
    denoised = denoise(x, sigma)
    return midpoint(denoise, x, denoised, sigma, at.sigma_next), denoised, state


def midpoint(denoise, x, denoised, sigma, sigma_next):
    """x at sigma_next by the slope at sqrt(sigma sigma_next); D where sigma_next = 0."""

    def through_the_middle():
        sigma_mid = jnp.sqrt(sigma * sigma_next)
        x_mid = move(x, denoised, sigma, sigma_mid)
        slope = (x_mid - denoise(x_mid, sigma_mid)) / sigma_mid
        return x + (sigma_next - sigma) * slope

    return jax.lax.cond(sigma_next > 0, through_the_middle, lambda: denoised)


def heunpp2_table(sigmas, options, start):
    """(sigma after next, sigma at the very start) for each step."""
    after = jnp.append(sigmas[2:], sigmas[-1])
    return after, jnp.broadcast_to(sigmas[start], after.shape)


def heunpp2(denoise, x, state, at):
    """Heun++ 2, of sd-webui-samplers-scheduler and ComfyUI; it has no paper.

    Looks two Euler steps ahead and weighs the three slopes by sigma_next / (3 sigma_0) and sigma_after / (3 sigma_0),
    the first slope taking the rest; two slopes and sigma_next / (2 sigma_0) on the last step but one. Since these are
    not the weights of a quadrature it is of order 1, with a smaller constant than euler. 3 calls a step, 2 on the last
    but one, 1 on the last, deterministic but for churn.
    """
    sigma_after, sigma_first = at.table
    x, sigma = churn(x, at)
    denoised = denoise(x, sigma)
    slope = (x - denoised) / sigma
    one_ahead = move(x, denoised, sigma, at.sigma_next)

    def euler_step():
        return one_ahead

    def two_slopes():
        slope_next = (one_ahead - denoise(one_ahead, at.sigma_next)) / at.sigma_next
        weight = at.sigma_next / (2 * sigma_first)
        return one_ahead + (at.sigma_next - sigma) * weight * (slope_next - slope)

    def three_slopes():
        denoised_next = denoise(one_ahead, at.sigma_next)
        two_ahead = move(one_ahead, denoised_next, at.sigma_next, sigma_after)
        slope_next = (one_ahead - denoised_next) / at.sigma_next
        slope_after = (two_ahead - denoise(two_ahead, sigma_after)) / sigma_after
        change = at.sigma_next * (slope_next - slope) + sigma_after * (slope_after - slope)
        return one_ahead + (at.sigma_next - sigma) * change / (3 * sigma_first)

    remaining = at.steps - 1 - at.index
    return jax.lax.switch(jnp.minimum(remaining, 2), [euler_step, two_slopes, three_slopes]), denoised, state
