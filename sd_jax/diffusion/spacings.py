"""How the noise levels of a ladder are spread: one short function for each name that people know.

Each takes (steps, sigmas), where sigmas are those of the discrete schedule, ascending, and returns the noise levels at
which the model is called, descending, [steps]; the end, 0 or the smallest, is not among them. In numpy, float64.

    name                    even in                               is
    normal                  timestep                              k-diffusion get_sigmas, ComfyUI and A1111 Normal,
                                                                  A1111 Uniform; diffusers' Euler and Heun: linspace
    sgm_uniform             timestep, the last one left out       ComfyUI, A1111 SGM Uniform
    simple                  timestep, rounded to whole ones       ComfyUI, A1111 Simple
    ddim_uniform            timestep, from timestep 1 upwards     ComfyUI, A1111 DDIM
    karras                  sigma^(1/7)                           k-diffusion, all others
    exponential             log sigma                             k-diffusion, all others; diffusers' use_lu_lambdas
    log_linear              log sigma, the smallest is the end    k-diffusion's x2 latent upscaler, diffusers' Euler
    polyexponential         log sigma, bent by rho                k-diffusion, ComfyUI, A1111 (rho 1: exponential)
    kl_optimal              arctan sigma                          ComfyUI (A1111 stops one step before its end)
    linear_quadratic        sigma at first, then quadratic        ComfyUI, Mochi
    beta                    quantiles of a beta law, in timestep  ComfyUI
    beta_webui              the same, in sigma                    A1111 Beta, diffusers' use_beta_sigmas
    align_your_steps        a table of optimal steps              ComfyUI, NVIDIA
    align_your_steps_webui  the same, stretched                   A1111 Align Your Steps
    lcm                     steps of LCM's distillation           diffusers' LCMScheduler
    leading, trailing, linspace                                   diffusers' timestep_spacing

Schedules that k-diffusion gives a sigma_min and a sigma_max run between the ends of the discrete schedule, as in
ComfyUI and A1111. ComfyUI's `normal` appends no zero where the smallest sigma is one already: never so here.
"""

import numpy as np
from scipy import special


def at_timesteps(timesteps: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """The noise levels of fractional timesteps: log(sigma) is linear between whole ones."""
    return np.exp(np.interp(timesteps, np.arange(len(sigmas)), np.log(sigmas)))


# --- even in timestep ------------------------------------------------------------------------------------------------


def _normal(steps, sigmas):
    """Both ends included, fractions of timesteps kept."""
    return at_timesteps(np.linspace(len(sigmas) - 1, 0, steps), sigmas)


def _sgm_uniform(steps, sigmas):
    """`normal` of one step more, less the last: so that the distance to zero is a step like the others."""
    return _normal(steps + 1, sigmas)[:-1]


def _simple(steps, sigmas):
    """Every (T / steps)-th timestep from the noisiest one down, rounded towards it."""
    return sigmas[len(sigmas) - 1 - (np.arange(steps) * (len(sigmas) / steps)).astype(int)]


def _ddim_uniform(steps, sigmas):
    """Timesteps 1, 1 + k, 1 + 2 k, ... below T with k = T // steps: more of them than `steps` where k was rounded."""
    return sigmas[1 :: max(len(sigmas) // steps, 1)][::-1]


def _leading(steps, sigmas):
    """diffusers' timestep_spacing="leading" with steps_offset=1, the setting of Stable Diffusion."""
    timesteps = np.arange(steps)[::-1] * (len(sigmas) // steps) + 1
    return sigmas[np.minimum(timesteps, len(sigmas) - 1)]


def _trailing(steps, sigmas):
    """diffusers' timestep_spacing="trailing"."""
    return sigmas[np.round(len(sigmas) - np.arange(steps) * (len(sigmas) / steps)).astype(int) - 1]


def _linspace(steps, sigmas):
    """diffusers' timestep_spacing="linspace" as its DDIM has it: timesteps rounded to whole ones."""
    return sigmas[np.round(np.linspace(0, len(sigmas) - 1, steps)).astype(int)[::-1]]


def _lcm(steps, sigmas, original_steps=50):
    """Luo et al. 2023 (arXiv 2310.04378): of the 50 steps that the model was distilled on, every (50 / steps)-th."""
    origin = np.arange(original_steps, 0, -1) * (len(sigmas) // original_steps) - 1
    return sigmas[origin[(np.arange(steps) * (original_steps / steps)).astype(int)]]


# --- even in a function of sigma -------------------------------------------------------------------------------------


def _karras(steps, sigmas, rho=7.0):
    """Karras et al. 2022 (arXiv 2206.00364), Eq. 5."""
    return np.linspace(sigmas[-1] ** (1 / rho), sigmas[0] ** (1 / rho), steps) ** rho


def _exponential(steps, sigmas):
    """A geometric series."""
    return np.exp(np.linspace(np.log(sigmas[-1]), np.log(sigmas[0]), steps))


def _log_linear(steps, sigmas):
    """`exponential` of one step more, less the last, at which the ladder ends: diffusers' interpolation_type."""
    return _exponential(steps + 1, sigmas)[:-1]


def _polyexponential(steps, sigmas, rho=1.0):
    """log(sigma) falls as the rho-th power of a straight line."""
    low, high = np.log(sigmas[0]), np.log(sigmas[-1])
    return np.exp(low + np.linspace(1, 0, steps) ** rho * (high - low))


def _kl_optimal(steps, sigmas):
    """Even in arctan(sigma): the best in KL divergence for data of unit variance (Sabour et al. 2024, as below)."""
    return np.tan(np.linspace(np.arctan(sigmas[-1]), np.arctan(sigmas[0]), steps))


def _linear_quadratic(steps, sigmas, threshold=0.025):
    """Mochi's: half of the steps clear `threshold` of the noise in equal parts, the others go faster and faster.

    sigma_i = sigma_max (1 - f(i)), f(i) = threshold i / h + q max(i - h, 0)^2, h = steps // 2, q so that f(steps) = 1.
    """
    h, i = steps // 2, np.arange(steps)
    if h == 0:
        return sigmas[-1:]
    q = (1 - threshold * steps / h) / (steps - h) ** 2
    return sigmas[-1] * (1 - threshold * i / h - q * np.maximum(i - h, 0) ** 2)


# --- beta sampling ---------------------------------------------------------------------------------------------------
# Lee et al. 2024 (arXiv 2407.12173): more steps at both ends, by quantiles of the beta distribution Beta(0.6, 0.6).


def _beta(steps, sigmas):
    """Quantiles of timesteps, rounded to whole ones. Equal neighbours count once: beyond a hundred, fewer steps."""
    quantiles = special.betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, steps, endpoint=False))
    timesteps = np.rint(quantiles * (len(sigmas) - 1)).astype(int)
    return sigmas[timesteps[np.append(True, np.diff(timesteps) != 0)]]


def _beta_webui(steps, sigmas):
    """Quantiles of sigma itself, both ends included."""
    return sigmas[0] + special.betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, steps)) * (sigmas[-1] - sigmas[0])


# --- Align Your Steps ------------------------------------------------------------------------------------------------
# Sabour et al. 2024 (arXiv 2404.14507): tables of ten steps; other numbers of steps are interpolated in log(sigma). For
# SD and SDXL they are whole timesteps; A1111 has them as sigmas of three decimals, as NVIDIA's page prints them.

_AYS_TIMESTEPS = {
    "sd1": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
}
_AYS_SIGMAS = {
    "sd1": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def _stretch(table, points):
    places = np.linspace(0, len(table) - 1, points)
    return np.exp(np.interp(places, np.arange(len(table)), np.log(table)))


def _align_your_steps(steps, sigmas, family="sd1"):
    """The last entry of the table stands for the final zero: ten steps are the table's own."""
    if family in _AYS_TIMESTEPS:
        table = at_timesteps(np.array(_AYS_TIMESTEPS[family]) * (len(sigmas) - 1) / 999, sigmas)
    else:
        table = _ays_sigmas(family)
    return _stretch(table, steps + 1)[:-1]


def _align_your_steps_webui(steps, sigmas, family="sd1"):
    """The last entry of the table is the last step before the final zero: eleven steps are the table's own."""
    return _stretch(_ays_sigmas(family), steps)


def _ays_sigmas(family):
    if family not in _AYS_SIGMAS:
        raise ValueError(f"align_your_steps has no table for family {family!r}: only for {', '.join(_AYS_SIGMAS)}")
    return _AYS_SIGMAS[family]


SPACINGS = {
    "normal": _normal,
    "karras": _karras,
    "exponential": _exponential,
    "log_linear": _log_linear,
    "polyexponential": _polyexponential,
    "sgm_uniform": _sgm_uniform,
    "simple": _simple,
    "ddim_uniform": _ddim_uniform,
    "beta": _beta,
    "beta_webui": _beta_webui,
    "linear_quadratic": _linear_quadratic,
    "kl_optimal": _kl_optimal,
    "align_your_steps": _align_your_steps,
    "align_your_steps_webui": _align_your_steps_webui,
    "lcm": _lcm,
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
}
RANGED = (
    "karras",
    "exponential",
    "polyexponential",
    "kl_optimal",
    "linear_quadratic",
    "beta_webui",
)  # see only the ends
BENT = ("karras", "polyexponential")  # have a rho
TABLED = ("align_your_steps", "align_your_steps_webui")  # have a table for each family
