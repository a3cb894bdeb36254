"""Noise levels: the discrete schedule that a network was trained with, and the ladders on which samplers walk down.

A discrete schedule of T steps has betas; with alpha = 1 - beta and abar_t = alpha_0 ... alpha_t (Ho et al. 2020),

    sigma_t = sqrt((1 - abar_t) / abar_t)                                                                   (1)

is its noise level in the variance-exploding convention x = x0 + sigma n. Between two timesteps log(sigma) is linear,
as in k-diffusion; so a fractional timestep has a sigma and a sigma has a fractional timestep.

A ladder is what one picture needs: sigmas [steps + 1], descending, and two factors,

    x = latents * start    before the first step, for starting noise `latents` of unit variance             (2)
    latents = x * end      after the last step

Nearly always start = sigmas[0], sigmas[-1] = 0 and end = 1. Only `ddim` and `plms` (or `pndm`) with a spacing of
diffusers are otherwise: those samplers live in the variance-preserving coordinates x / sqrt(1 + sigma^2), take the
noise as it is at the start and stop at abar_0 (set_alpha_to_one=False, the setting of Stable Diffusion) instead of at a
clean picture. So there

    start = sqrt(1 + sigmas[0]^2),    sigmas[-1] = sigma_0,    end = 1 / sqrt(1 + sigmas[-1]^2)             (3)

where `end` follows the same equation as ever, since 1 / sqrt(1 + 0) = 1. The spacing `leading` has this start whatever
the sampler is: in diffusers all schedulers have it there, those of Euler and Heun too. The spacing `log_linear` stops
at sigma_0, and end = 1 all the same.

All is computed in float64 by numpy; diffusers and k-diffusion compute in float32 (measured: sigma_0 of Stable Diffusion
differs by 1e-5 of itself, larger ones less).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sd_jax import names
from sd_jax.diffusion import spacings
from sd_jax.types import NoiseScheduleConfig

# --- the discrete schedule -------------------------------------------------------------------------------------------


def _cosine_betas(start: float, end: float, count: int) -> np.ndarray:
    """Nichol & Dhariwal 2021 (arXiv 2102.09672), Eq. 17; betas stop at 0.999. `start` and `end` play no part."""
    abar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - abar[1:] / abar[:-1], 0.999)


def _rectified_flow_betas(start: float, end: float, count: int) -> np.ndarray:
    """sigma = t / (1 - t) at the middles t of `count` equal parts of [0, 1]; `start` and `end` play no part.

    A network that predicts flow on it learns the straight line of Lipman et al. 2023 (arXiv 2210.02747, Eq. 20 to 23
    with sigma_min = 0) at evenly spread times, as in Stable Diffusion 3; `euler` on the schedule `normal` walks it.
    """
    t = (np.arange(count) + 0.5) / count
    abar = (1 - t) ** 2 / ((1 - t) ** 2 + t**2)
    return 1 - abar / np.append(1, abar[:-1])


BETA_SCHEDULES = {  # diffusers' names, and one that diffusers gives to no scheduler of betas
    "linear": lambda start, end, count: np.linspace(start, end, count),
    "scaled_linear": lambda start, end, count: np.linspace(start**0.5, end**0.5, count) ** 2,
    "squaredcos_cap_v2": _cosine_betas,
    "rectified_flow": _rectified_flow_betas,
}

# abar of the last timestep where it should be 0, so that its sigma (4518.76) stays finite: the value of ComfyUI and of
# A1111. diffusers' Euler and multistep schedulers have 2^-24 (sigma 4096), its DDIM 0. To the network the three are the
# same, for it sees x / sqrt(1 + sigma^2); schedules that start from the largest sigma, such as karras, differ by 10%.
ZERO_SNR_ABAR = 4.8973451890853435e-08


def betas(cfg: NoiseScheduleConfig) -> Float[np.ndarray, " timesteps"]:
    """The variances added at each timestep, float64. Raises ValueError for an unknown beta_schedule."""
    abar = alphas_cumprod(cfg)
    return _betas(cfg) if not cfg.rescale_betas_zero_snr else 1 - abar / np.append(1, abar[:-1])


def alphas_cumprod(cfg: NoiseScheduleConfig) -> Float[np.ndarray, " timesteps"]:
    """abar: how much of the variance is still the picture's at each timestep, float64.

    With rescale_betas_zero_snr, Lin et al. 2023 (arXiv 2305.08891), Algorithm 1: sqrt(abar) is shifted and scaled so
    that it ends at 0 (see ZERO_SNR_ABAR) and begins where it did.
    """
    abar = np.cumprod(1 - _betas(cfg))
    if not cfg.rescale_betas_zero_snr:
        return abar
    root = np.sqrt(abar)
    rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return np.append(rescaled[:-1], ZERO_SNR_ABAR)


def sigmas_of(cfg: NoiseScheduleConfig) -> Float[np.ndarray, " timesteps"]:
    """The noise level of each timestep, ascending, float64 (Eq. 1)."""
    abar = alphas_cumprod(cfg)
    return np.sqrt((1 - abar) / abar)


def sigma_to_timestep(sigma: Float[Array, "*shape"], log_sigmas: Float[Array, " timesteps"]) -> Float[Array, "*shape"]:
    """The fractional timestep of a noise level, log-interpolated and not rounded; beyond the ends, the end itself.

    Equals k-diffusion's `DiscreteSchedule.sigma_to_t(quantize=False)`.
    """
    return jnp.interp(jnp.log(sigma), log_sigmas, jnp.arange(log_sigmas.shape[0], dtype=log_sigmas.dtype))


def timestep_to_sigma(timestep: Float[np.ndarray, "*shape"], sigmas: Float[np.ndarray, " timesteps"]) -> np.ndarray:
    """Inverse of `sigma_to_timestep`, in numpy."""
    return spacings.at_timesteps(timestep, sigmas)


def _betas(cfg: NoiseScheduleConfig) -> np.ndarray:
    if cfg.beta_schedule not in BETA_SCHEDULES:
        raise ValueError(f"unknown beta_schedule {cfg.beta_schedule!r}: choose one of {', '.join(BETA_SCHEDULES)}")
    return BETA_SCHEDULES[cfg.beta_schedule](cfg.beta_start, cfg.beta_end, cfg.num_train_timesteps)


# --- ladders ---------------------------------------------------------------------------------------------------------

SCHEDULES = spacings.SPACINGS
DIFFUSERS_SPACINGS = ("leading", "trailing", "linspace")
# Samplers that begin and end as Eq. 3 says when they walk on a spacing of diffusers
VARIANCE_PRESERVING = ("ddim", "plms", "pndm")
# Samplers whose schedulers in diffusers take `leading` and `linspace` of one step more than asked for, less the last.
MULTISTEP = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "deis", "uni_pc", "uni_pc_bh2")


class Ladder(NamedTuple):
    """What one picture walks down; a pytree of float32, to be passed into the jitted function as an argument."""

    sigmas: Float[np.ndarray | Array, " steps_plus_1"]  # descending
    start: Float[np.ndarray | Array, ""]  # x = latents * start
    end: Float[np.ndarray | Array, ""]  # latents = x * end


def make_sigmas(
    schedule: str,  # a key of SCHEDULES
    steps: int,  # model calls of a sampler that needs one a step
    cfg: NoiseScheduleConfig,
    sampler: str = "euler",  # only matters to the spacings of diffusers
    *,
    family: str = "sd1",  # sd1 | sdxl | svd: whose table; only for align_your_steps
    rho: float | None = None,  # only for karras (None = 7) and polyexponential (None = 1)
    sigma_min: float | None = None,  # the ends, None = those of cfg; only for the schedules of spacings.RANGED
    sigma_max: float | None = None,
) -> Float[np.ndarray, " steps_plus_1"]:
    """The noise levels of a ladder, descending, float32; the last is 0, except of `log_linear` and as Eq. 3 says.

    `ddim_uniform` may give some steps more than asked for, and `beta` fewer (above a hundred), as they do in ComfyUI.
    Raises ValueError for an unknown schedule, for more steps than it has distinct noise levels for, and for an option
    that the schedule has not.
    """
    if schedule not in SCHEDULES:
        near = names.nearest(schedule, SCHEDULES)
        mend = f"did you mean {' or '.join(near)}? There are" if near else "choose one of"
        raise ValueError(f"unknown schedule {schedule!r}: {mend} {', '.join(SCHEDULES)}")
    if steps < 1:
        raise ValueError(f"steps is {steps}: at least 1 is needed")
    trained = sigmas_of(cfg)
    given, options = trained, {}
    if sigma_min is not None or sigma_max is not None:
        if schedule not in spacings.RANGED:
            raise ValueError(f"sigma_min and sigma_max are for the schedules {', '.join(spacings.RANGED)}")
        given = np.array([sigma_min or trained[0], sigma_max or trained[-1]], float)
        if not 0 < given[0] < given[1]:
            raise ValueError(f"sigma_min={given[0]:g} and sigma_max={given[1]:g}: 0 < sigma_min < sigma_max is needed")
    if rho is not None:
        if schedule not in spacings.BENT:
            raise ValueError(f"rho is for the schedules {', '.join(spacings.BENT)}")
        options["rho"] = rho
    if schedule in spacings.TABLED:
        options["family"] = family
    asked = steps + (schedule in ("leading", "linspace") and sampler in MULTISTEP)
    sigmas = SCHEDULES[schedule](asked, given, **options)
    sigmas = sigmas[:steps] if asked > steps else sigmas
    if np.any(np.diff(sigmas) >= 0):
        raise ValueError(f"schedule {schedule!r} has no {steps} different steps in {len(trained)} timesteps: use fewer")
    final = trained[0] if schedule == "log_linear" or _variance_preserving(schedule, sampler) else 0.0
    return np.append(sigmas, final).astype(np.float32)


def make_ladder(schedule: str, steps: int, cfg: NoiseScheduleConfig, sampler: str = "euler", **options) -> Ladder:
    """`make_sigmas` with the factors before the first and after the last step (Eq. 2 and 3). Raises as it does."""
    sigmas = make_sigmas(schedule, steps, cfg, sampler, **options)
    first, last = float(sigmas[0]), float(sigmas[-1])
    preserving = _variance_preserving(schedule, sampler)
    start = (1 + first**2) ** 0.5 if schedule == "leading" or preserving else first
    end = (1 + last**2) ** -0.5 if preserving else 1.0
    return Ladder(sigmas, np.asarray(start, np.float32), np.asarray(end, np.float32))


def _variance_preserving(schedule: str, sampler: str) -> bool:
    return schedule in DIFFUSERS_SPACINGS and sampler in VARIANCE_PRESERVING
