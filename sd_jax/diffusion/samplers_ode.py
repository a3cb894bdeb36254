"""Samplers of the probability-flow ODE, and the ancestral one that is Euler with fresh noise.

With x = x0 + sigma n and D = denoise(x, sigma), Karras et al. 2022 (arXiv 2206.00364), Eq. 1 and 3, reads

    dx / dsigma = (x - D) / sigma                                                                           (1)

A step of any of them takes (denoise, x, state, sigma, sigma_next, noise) and returns (x at sigma_next, D, the new
state); `state` is what `init(x)` made and the sampler remembers, `noise` is None for deterministic ones. They equal
k-diffusion's functions of the same names without churn.
"""

import jax
import jax.numpy as jnp


def stateless(x):
    """The `init` of samplers that remember nothing."""
    return ()


def _move(x, denoised, sigma, sigma_next):
    """Along the straight line through x and D, from sigma to sigma_next: Euler's step of Eq. 1.

    x + (sigma_next - sigma) (x - D) / sigma, written so that nothing large cancels when sigma_next << sigma.
    """
    return denoised + (sigma_next / sigma) * (x - denoised)


def euler(denoise, x, state, sigma, sigma_next, noise):
    """Karras et al. 2022 (arXiv 2206.00364), Algorithm 1 without corrector. Order 1, 1 call a step, deterministic."""
    denoised = denoise(x, sigma)
    return _move(x, denoised, sigma, sigma_next), denoised, state


def ddim(denoise, x, state, sigma, sigma_next, noise):
    """DDIM: Song et al. 2021 (arXiv 2010.02502), Eq. 12 with eta = 0. Order 1, 1 call a step, deterministic.

    Divided by sqrt(abar) their equation is x' = x0 + sigma' epsilon: Euler's step. What tells ddim from euler are the
    ends of its ladder (`schedules.py`, Eq. 3).
    """
    denoised = denoise(x, sigma)
    epsilon = (x - denoised) / sigma
    return denoised + sigma_next * epsilon, denoised, state


def euler_ancestral(denoise, x, state, sigma, sigma_next, noise):
    """Ancestral sampling, Ho et al. 2020 (arXiv 2006.11239), Algorithm 2, with Euler's step; k-diffusion's eta = 1.

    Down to sigma_down, then noise up to sigma_next: sigma_down^2 + sigma_up^2 = sigma_next^2, with
    sigma_up^2 = sigma_next^2 (sigma^2 - sigma_next^2) / sigma^2. Order 1, 1 call a step, stochastic.
    """
    ratio = sigma_next / sigma
    sigma_down = sigma_next * ratio
    sigma_up = sigma_next * jnp.sqrt((1 - ratio) * (1 + ratio))
    denoised = denoise(x, sigma)
    return _move(x, denoised, sigma, sigma_down) + sigma_up * noise, denoised, state


def heun(denoise, x, state, sigma, sigma_next, noise):
    """Karras et al. 2022 (arXiv 2206.00364), Algorithm 1. Order 2, deterministic.

    2 calls a step; 1 on a step to sigma_next = 0, which is Euler's, since Eq. 1 has no slope there.
    """
    denoised = denoise(x, sigma)
    predicted = _move(x, denoised, sigma, sigma_next)

    def corrected():
        slope = (x - denoised) / sigma
        slope_next = (predicted - denoise(predicted, sigma_next)) / sigma_next
        return predicted + (sigma_next - sigma) * (slope_next - slope) / 2

    return jax.lax.cond(sigma_next > 0, corrected, lambda: predicted), denoised, state


def dpmpp_2m_init(x):
    """No step came before: D is 0 and its sigma infinite, which makes the extrapolation below vanish."""
    return jnp.zeros_like(x), jnp.full((), jnp.inf, x.dtype)


def dpmpp_2m(denoise, x, state, sigma, sigma_next, noise):
    """DPM-Solver++(2M): Lu et al. 2022 (arXiv 2211.01095), Algorithm 2. Order 2, 1 call a step, deterministic.

    With h = log(sigma / sigma_next) it moves towards D extrapolated by half a step: D + (h / 2 h_last) (D - D_last).
    Plain D on the first step and on a step to sigma_next = 0.
    """
    denoised_last, sigma_last = state
    denoised = denoise(x, sigma)
    h = jnp.log(sigma / jnp.where(sigma_next > 0, sigma_next, sigma))
    h_last = jnp.log(sigma_last / sigma)
    extrapolated = denoised + h / (2 * h_last) * (denoised - denoised_last)
    return _move(x, extrapolated, sigma, sigma_next), denoised, (denoised, sigma)
