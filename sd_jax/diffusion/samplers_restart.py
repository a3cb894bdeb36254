"""Restart sampling: Xu et al. 2023 (arXiv 2306.14878), Algorithm 1, with the segments that A1111 chooses.

A restart ladder goes down, jumps up from sigma_low to sigma_high, where noise is added again,

    x(sigma_high) = x(sigma_low) + sqrt(sigma_high^2 - sigma_low^2) noise                                   (1)

and comes down to sigma_low a second time: the noise forgets errors that the ODE would carry on. So a ladder with jumps
is a plain array of sigmas that is not descending throughout, and one scan walks it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax.diffusion import samplers_ode as ode


class Segment(NamedTuple):
    """What is walked again. A ladder has no restart where both ends fall on the same level of it."""

    low: float  # sigma_low and sigma_high; the ladder's nearest levels are taken
    high: float
    steps: int  # from sigma_high to sigma_low, spaced as Karras et al. 2022, Eq. 5
    times: int  # how often


def segments_of(steps: int) -> tuple[Segment, ...]:
    """A1111's choice for so many steps; below 20 there is none."""
    if steps < 20:
        return ()
    return (Segment(0.1, 2.0, 9, 1) if steps < 36 else Segment(0.1, 2.0, steps // 4, 2),)


def restarts(steps: int) -> int:
    """How many jumps the ladder of `restart_ladder` has."""
    return sum(segment.times for segment in segments_of(steps))


def restart_ladder(sigmas: Float[Array, " levels"]) -> Float[Array, " levels_and_restarts"]:
    """The ladder that A1111's Restart makes of a descending one that ends in 0, with the same number of moves down.

    From 20 steps on the ladder's own levels are replaced by fewer of Karras' between the same ends, to make room for
    the restarts, so only its first and last positive level count. Traced: another ladder of that length does not
    recompile.
    """
    segments = segments_of(len(sigmas) - 1)
    if segments:
        steps = len(sigmas) - 1 - sum(segment.steps * segment.times for segment in segments)
        sigmas = jnp.append(_karras(sigmas[0], sigmas[-2], steps), sigmas[-1])
    return with_restarts(sigmas, segments)


def with_restarts(sigmas: Float[Array, " levels"], segments: tuple[Segment, ...]) -> Float[Array, " more_levels"]:
    """A descending ladder with the given segments walked again. Traced, except for the segments."""
    levels, places = [sigmas], [jnp.arange(len(sigmas)).astype(sigmas.dtype)]
    for segment in segments:
        low, high = (jnp.argmin(jnp.abs(sigmas[:-1] - level)) for level in (segment.low, segment.high))
        again = jnp.tile(_karras(sigmas[high], sigmas[low], segment.steps + 1), segment.times)
        levels.append(jnp.where(high < low, again, sigmas[low]))  # else moves of length 0, which call no model
        places.append(jnp.broadcast_to(low.astype(sigmas.dtype) + 0.5, again.shape))
    return jnp.concatenate(levels)[jnp.argsort(jnp.concatenate(places), stable=True)]


def _karras(first, last, count, rho=7):
    ramp = jnp.linspace(0, 1, count, dtype=first.dtype)
    sigmas = (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho
    return sigmas.at[-1].set(last).at[0].set(first)  # the ends themselves, so that no tiny jump is left


def restart_init(x):
    """No step came before: nothing is denoised yet."""
    return jnp.zeros_like(x)


def restart(denoise, x, denoised_last, at):
    """Xu et al. 2023 (arXiv 2306.14878), Algorithm 1, with Heun's step on the way down.

    Order 2 between jumps, 2 calls a step down, 1 on a step to 0, none on a jump (Eq. 1), stochastic (s_noise 1).
    """
    if at.noise is None:  # a ladder without restarts
        return ode.heun(denoise, x, denoised_last, at)

    def jump():
        added = jnp.sqrt((at.sigma_next - at.sigma) * (at.sigma_next + at.sigma))
        return x + at.options.s_noise * added * at.noise[0], denoised_last

    def down():
        x_next, denoised, _ = ode.heun(denoise, x, (), at._replace(noise=None))
        return x_next, denoised

    x, denoised = jax.lax.cond(at.sigma_next < at.sigma, down, jump)
    return x, denoised, denoised
