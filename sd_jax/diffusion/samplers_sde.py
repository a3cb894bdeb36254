"""Single-step samplers that renew part of the noise at every step.

An ancestral step goes down past sigma_next to sigma_down and adds noise up to sigma_next again (Ho et al. 2020, arXiv
2006.11239; eta is that of Song et al. 2021, arXiv 2010.02502, Eq. 16, said of x = x0 + sigma n):

    sigma_up   = min(1, eta sqrt(1 - (sigma_next / sigma)^2)) sigma_next
    sigma_down = sqrt(sigma_next^2 - sigma_up^2)                                                            (1)

A step to sigma_next = 0 adds nothing. The samplers equal k-diffusion's functions of the same names, ddpm ComfyUI's and
ddim diffusers'. `samplers_ode.py` says what a step takes and returns.
"""

import jax
import jax.numpy as jnp

from sd_jax.diffusion.samplers_ode import midpoint, move


def ancestral(sigma, sigma_next, eta):
    """(sigma_down, sigma_up) of Eq. 1."""
    ratio = sigma_next / sigma
    up = jnp.minimum(eta * jnp.sqrt((1 - ratio) * (1 + ratio)), 1)
    down = jnp.sqrt(jnp.maximum((1 - eta) * (1 + eta) + (eta * ratio) ** 2, 0))
    return sigma_next * down, sigma_next * up


def euler_ancestral(denoise, x, state, at):
    """Euler's step down to sigma_down, then noise; k-diffusion's.

    Order 1, 1 call a step, stochastic (eta 1, s_noise 1).
    """
    denoised = denoise(x, at.sigma)
    sigma_down, sigma_up = ancestral(at.sigma, at.sigma_next, at.options.eta)
    x = move(x, denoised, at.sigma, sigma_down)
    return x + at.options.s_noise * sigma_up * at.noise[0], denoised, state


def ddpm(denoise, x, state, at):
    """DDPM: Ho et al. 2020 (arXiv 2006.11239), Algorithm 2, with the posterior variance (their beta tilde).

    Their mean and variance, said of x = x0 + sigma n, are those of Eq. 1 for eta = 1: ddpm is euler_ancestral without
    its options. Order 1, 1 call a step, stochastic.
    """
    denoised = denoise(x, at.sigma)
    sigma_down, sigma_up = ancestral(at.sigma, at.sigma_next, 1.0)
    return move(x, denoised, at.sigma, sigma_down) + sigma_up * at.noise[0], denoised, state


def ddim(denoise, x, state, at):
    """DDIM: Song et al. 2021 (arXiv 2010.02502), Eq. 12 and 16. Order 1, 1 call a step, deterministic unless eta > 0.

    Divided by sqrt(abar) their equation is x' = x0 + sigma_down epsilon + sigma_up noise, with Eq. 1: eta = 0, the
    default, is Euler's step, eta = 1 is DDPM. What tells ddim from euler are the ends of its ladder (`schedules.py`,
    Eq. 3).
    """
    denoised = denoise(x, at.sigma)
    if at.noise is None:
        return move(x, denoised, at.sigma, at.sigma_next), denoised, state
    sigma_down, sigma_up = ancestral(at.sigma, at.sigma_next, at.options.eta)
    return move(x, denoised, at.sigma, sigma_down) + sigma_up * at.noise[0], denoised, state


def dpm_2_ancestral(denoise, x, state, at):
    """DPM-Solver-2 (Lu et al. 2022, arXiv 2206.00927, Algorithm 1) down to sigma_down, then noise; k-diffusion's.

    Order 2 at eta = 0, 2 calls a step, 1 on a step to 0, stochastic (eta 1, s_noise 1). As in k-diffusion no noise is
    added where sigma_down = 0, not even where sigma_next > 0 (eta > 1).
    """
    denoised = denoise(x, at.sigma)
    sigma_down, sigma_up = ancestral(at.sigma, at.sigma_next, at.options.eta)
    sigma_up = jnp.where(sigma_down > 0, sigma_up, 0)
    x = midpoint(denoise, x, denoised, at.sigma, sigma_down)
    return x + at.options.s_noise * sigma_up * at.noise[0], denoised, state


def dpmpp_2s_ancestral(denoise, x, state, at):
    """DPM-Solver++(2S): Lu et al. 2022 (arXiv 2211.01095), Algorithm 1 (r = 1/2), down to sigma_down, then noise.

    The whole step goes towards D as it is at sqrt(sigma sigma_down). Order 2 at eta = 0, 2 calls a step, 1 on a step to
    0, stochastic (eta 1, s_noise 1).
    """
    denoised = denoise(x, at.sigma)
    sigma_down, sigma_up = ancestral(at.sigma, at.sigma_next, at.options.eta)

    def through_the_middle():
        sigma_mid = jnp.sqrt(at.sigma * sigma_down)
        denoised_mid = denoise(move(x, denoised, at.sigma, sigma_mid), sigma_mid)
        return move(x, denoised_mid, at.sigma, sigma_down)

    x_down = jax.lax.cond(sigma_down > 0, through_the_middle, lambda: denoised)
    return x_down + at.options.s_noise * sigma_up * at.noise[0], denoised, state


def dpmpp_sde_ends(at):
    """Where the two noise intervals of dpmpp_sde end; both begin at sigma."""
    return at.sigma ** (1 - at.options.r) * at.sigma_next**at.options.r, at.sigma_next


def dpmpp_sde(denoise, x, state, at):
    """DPM-Solver++ (stochastic) of k-diffusion: two ancestral stages of the SDE solver of Lu et al. (arXiv 2211.01095).

    The first stage goes to sigma_mid, at the fraction r of the step in log(sigma), the second from sigma towards
    D + (D_mid - D) / (2 r). Two draws a step: the noise over (sigma, sigma_mid), then that over (sigma, sigma_next),
    two intervals of one Brownian path. Order 2 at eta = 0, 2 calls a step, 1 on a step to 0, stochastic (eta 1,
    s_noise 1, r 1/2).
    """
    eta, s_noise = at.options.eta, at.options.s_noise
    denoised = denoise(x, at.sigma)
    sigma_mid, _ = dpmpp_sde_ends(at)

    def two_stages():
        down, up = ancestral(at.sigma, sigma_mid, eta)
        x_mid = move(x, denoised, at.sigma, down) + s_noise * up * at.noise[0]
        towards = denoised + (denoise(x_mid, sigma_mid) - denoised) / (2 * at.options.r)
        down, up = ancestral(at.sigma, at.sigma_next, eta)
        return move(x, towards, at.sigma, down) + s_noise * up * at.noise[1]

    return jax.lax.cond(at.sigma_next > 0, two_stages, lambda: denoised), denoised, state
