"""Noise levels and timesteps against diffusers and k-diffusion, which compute theirs in float32.

ComfyUI and A1111 cannot be imported; what they publish is restated here, step by step, and REFERENCES says for every
schedule what it is compared with.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion.schedules import (
    DIFFUSERS_SPACINGS,
    MULTISTEP,
    SCHEDULES,
    alphas_cumprod,
    betas,
    make_ladder,
    make_sigmas,
    sigma_to_timestep,
    sigmas_of,
    timestep_to_sigma,
)
from sd_jax.types import NoiseScheduleConfig
from tests.reference import diffusers, k_diffusion

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # torch tensors in diffusers
]
SD = NoiseScheduleConfig()
ZERO_SNR = NoiseScheduleConfig(rescale_betas_zero_snr=True)
SIGMAS = sigmas_of(SD)
BETA_SCHEDULES_OF_DIFFUSERS = ("linear", "scaled_linear", "squaredcos_cap_v2")
STEPS = [1, 2, 5, 10, 20, 25, 50]  # those that divide 1000: elsewhere diffusers' DDIM skips beside its own timesteps


def _kwargs(cfg=SD):
    return {"beta_schedule": cfg.beta_schedule, "beta_start": cfg.beta_start, "beta_end": cfg.beta_end}


def close(ours, theirs, rtol):
    print(f"relative difference {np.max(np.abs(np.asarray(ours) / np.asarray(theirs) - 1)):.1e}")
    np.testing.assert_allclose(ours, theirs, rtol=rtol)


@pytest.mark.parametrize("name", BETA_SCHEDULES_OF_DIFFUSERS)
def test_betas(name):
    cfg = NoiseScheduleConfig(beta_schedule=name)
    theirs = diffusers().DDIMScheduler(**_kwargs(cfg))
    close(betas(cfg), theirs.betas.numpy(), 2e-6)
    close(alphas_cumprod(cfg), theirs.alphas_cumprod.numpy(), 5e-5)


@pytest.mark.parametrize("name", BETA_SCHEDULES_OF_DIFFUSERS)
def test_sigmas(name):
    cfg = NoiseScheduleConfig(beta_schedule=name)
    theirs = diffusers().EulerDiscreteScheduler(**_kwargs(cfg)).sigmas.numpy()
    # Theirs lose digits of 1 - abar where it is small: sigma_0 of the cosine schedule is 0.006.
    close(sigmas_of(cfg)[::-1], theirs[:-1], 5e-4 if name == "squaredcos_cap_v2" else 4e-5)


@pytest.mark.parametrize("steps", [2, 7, 20, 50])
def test_normal(steps):
    import torch

    abar = torch.from_numpy(alphas_cumprod(SD))
    theirs = k_diffusion().external.DiscreteSchedule(((1 - abar) / abar) ** 0.5, quantize=False).get_sigmas(steps)
    close(make_sigmas("normal", steps, SD)[:-1], theirs[:-1], 1e-6)
    euler = diffusers().EulerDiscreteScheduler(**_kwargs(), timestep_spacing="linspace")
    euler.set_timesteps(steps)
    close(make_sigmas("normal", steps, SD)[:-1], euler.sigmas[:-1], 1e-4)  # they interpolate sigma, not log(sigma)
    close(make_ladder("normal", steps, SD).start, euler.init_noise_sigma, 1e-5)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
def test_karras(steps):
    ends = sigmas_of(SD)
    theirs = k_diffusion().sampling.get_sigmas_karras(steps, float(ends[0]), float(ends[-1]))
    close(make_sigmas("karras", steps, SD)[:-1], theirs[:-1], 2e-6)
    if steps > 1:  # diffusers takes both ends from a ladder, which has but one with a single step
        heun = diffusers().HeunDiscreteScheduler(**_kwargs(), use_karras_sigmas=True)
        heun.set_timesteps(steps)
        close(make_sigmas("karras", steps, SD)[:-1], heun.sigmas[::2], 5e-5)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", DIFFUSERS_SPACINGS)
def test_spacings(spacing, steps):
    ddim = diffusers().DDIMScheduler(**_kwargs(), timestep_spacing=spacing, steps_offset=1, set_alpha_to_one=False)
    ddim.set_timesteps(steps)
    sigmas = make_sigmas(spacing, steps, SD, "ddim")
    np.testing.assert_array_equal(sigmas[:-1], sigmas_of(SD).astype(np.float32)[ddim.timesteps.numpy()])
    close(1 / (1 + sigmas[-1].astype(float) ** 2), ddim.final_alpha_cumprod.item(), 1e-6)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_spacings_of_other_samplers(spacing, steps):
    euler = diffusers().EulerDiscreteScheduler(**_kwargs(), timestep_spacing=spacing, steps_offset=1)
    euler.set_timesteps(steps)
    close(make_sigmas(spacing, steps, SD)[:-1], euler.sigmas[:-1], 5e-5)
    assert make_sigmas(spacing, steps, SD)[-1] == euler.sigmas[-1] == 0
    close(make_ladder(spacing, steps, SD).start, euler.init_noise_sigma, 5e-5)


def test_fractional_timesteps():
    import torch

    sigmas = sigmas_of(SD)
    theirs = k_diffusion().external.DiscreteSchedule(torch.from_numpy(sigmas), quantize=False)
    probes = np.concatenate([np.geomspace(0.01, 30, 50), sigmas[[0, 1, 500, 999]]])
    with jax.enable_x64(True):
        ours = sigma_to_timestep(jnp.asarray(probes), jnp.asarray(np.log(sigmas)))
    np.testing.assert_allclose(ours, theirs.sigma_to_t(torch.from_numpy(probes)), atol=1e-9)
    timesteps = np.array([0, 0.25, 17.5, 998.75, 999], np.float32)
    close(timestep_to_sigma(timesteps, sigmas), theirs.t_to_sigma(torch.from_numpy(timesteps)), 1e-9)


# --- the table of references -----------------------------------------------------------------------------------------
# Each: steps -> sigmas without the final zero.


def k_diffusion_function(name, **kwargs):
    return lambda n: getattr(k_diffusion().sampling, name)(n, float(SIGMAS[0]), float(SIGMAS[-1]), **kwargs)[:-1]


def discrete_schedule(n):
    import torch

    return k_diffusion().external.DiscreteSchedule(torch.from_numpy(SIGMAS), quantize=False).get_sigmas(n)[:-1]


def scheduler(name, **kwargs):
    def sigmas(n):
        made = getattr(diffusers(), name)(**_kwargs(), steps_offset=1, **kwargs)
        made.set_timesteps(n)
        assert made.sigmas[-1] == 0 or name.startswith("DEIS")  # which ends at the smallest sigma
        return made.sigmas[:-1]

    return sigmas


def timesteps_of(name, **kwargs):
    def sigmas(n):
        made = getattr(diffusers(), name)(**_kwargs(), **kwargs)
        made.set_timesteps(n)
        return SIGMAS[made.timesteps.numpy()]

    return sigmas


def comfy_sigma(t):
    low, high = math.floor(t), math.ceil(t)
    return math.exp((1 - (t - low)) * math.log(SIGMAS[low]) + (t - low) * math.log(SIGMAS[high]))


def comfy_sgm_uniform(n):
    return [comfy_sigma(t) for t in np.linspace(999, 0, n + 1)[:-1]]


def comfy_simple(n):
    return [SIGMAS[-(1 + int(k * (len(SIGMAS) / n)))] for k in range(n)]


def comfy_ddim_uniform(n):
    taken, t = [], 1
    while t < 1000:
        taken.insert(0, SIGMAS[t])
        t += 1000 // n
    return taken


def comfy_beta(n):
    from scipy import stats

    taken, last = [], None
    for k in range(n):
        t = int(np.rint(stats.beta.ppf(1 - k / n, 0.6, 0.6) * 999))
        if t != last:
            taken.append(SIGMAS[t])
        last = t
    return taken


def comfy_linear_quadratic(n):
    if n == 1:
        return [SIGMAS[-1]]
    linear = n // 2
    excess = linear - 0.025 * n
    quadratic = excess / (linear * (n - linear) ** 2)
    slope = 0.025 / linear - 2 * excess / (n - linear) ** 2
    removed = [k * 0.025 / linear for k in range(linear)]
    removed += [quadratic * k**2 + slope * k + quadratic * linear**2 for k in range(linear, n)]
    return [SIGMAS[-1] * (1 - part) for part in removed]


def comfy_kl_optimal(n):
    low, high = math.atan(SIGMAS[0]), math.atan(SIGMAS[-1])
    return [math.tan(k / (n - 1) * low + (1 - k / (n - 1)) * high) for k in range(n)]


def mochi(n):
    pytest.importorskip("transformers")
    diffusers()
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

    return SIGMAS[-1] * np.array(linear_quadratic_schedule(n, 0.025))


COMFY_AYS = {
    "sd1": "14.6146412293 6.4745760956 3.8636745985 2.6946151520 1.8841921177 1.3943805092 0.9642583904 0.6523686016 "
    "0.3977456272 0.1515232662 0.0291671582",
    "sdxl": "14.6146412293 6.3184485287 3.7681790315 2.1811480769 1.3405244945 0.8620721141 0.5550693289 0.3798540708 "
    "0.2332364134 0.1114188177 0.0291671582",
    "svd": "700.00 54.5 15.886 7.977 4.248 1.789 0.981 0.403 0.173 0.034 0.002",
}


def stretched(table, points):
    """Log-linear, from the small end, as NVIDIA's page has it."""
    logs = np.log(table[::-1])
    return np.exp(np.interp(np.linspace(0, 1, points), np.linspace(0, 1, len(table)), logs))[::-1]


def comfy_align_your_steps(family):
    table = [float(word) for word in COMFY_AYS[family].split()]
    return lambda n: (table if n == 10 else stretched(table, n + 1))[:-1]


def diffusers_align_your_steps(family):
    def sigmas(n):
        from diffusers.schedulers import AysSchedules

        assert n == 10
        euler = diffusers().EulerDiscreteScheduler(**_kwargs())
        euler.set_timesteps(timesteps=AysSchedules[family])
        return euler.sigmas[:-1]

    return sigmas


def webui_align_your_steps(family):
    def sigmas(n):
        from diffusers.schedulers import AysSchedules

        table = [*AysSchedules[family][:-1], 0.029]
        return table if n == 11 else stretched(table, n)

    return sigmas


def webui_beta(n):
    from scipy import stats

    quantiles = [stats.beta.ppf(x, 0.6, 0.6) for x in 1 - np.linspace(0, 1, n)]
    return [SIGMAS[0] + q * (SIGMAS[-1] - SIGMAS[0]) for q in quantiles]


LINSPACE = {"timestep_spacing": "linspace"}
REFERENCES = [  # schedule, options, what it is compared with, how, tolerance (that of float32 betas and interpolation)
    ("normal", {}, "k-diffusion", discrete_schedule, 2e-6),
    ("normal", {}, "diffusers LMS, which interpolates sigma", scheduler("LMSDiscreteScheduler", **LINSPACE), 5e-4),
    ("karras", {}, "k-diffusion", k_diffusion_function("get_sigmas_karras"), 2e-6),
    ("karras", {"rho": 5.0}, "k-diffusion", k_diffusion_function("get_sigmas_karras", rho=5.0), 2e-6),
    ("karras", {}, "diffusers Euler", scheduler("EulerDiscreteScheduler", use_karras_sigmas=True), 5e-5),
    ("karras", {}, "diffusers DPM++", scheduler("DPMSolverMultistepScheduler", use_karras_sigmas=True), 5e-5),
    ("exponential", {}, "k-diffusion", k_diffusion_function("get_sigmas_exponential"), 2e-6),
    ("exponential", {}, "diffusers Euler", scheduler("EulerDiscreteScheduler", use_exponential_sigmas=True), 5e-5),
    ("exponential", {}, "diffusers DPM++, lu", scheduler("DPMSolverMultistepScheduler", use_lu_lambdas=True), 5e-5),
    ("log_linear", {}, "diffusers Euler", scheduler("EulerDiscreteScheduler", interpolation_type="log_linear"), 2e-5),
    ("polyexponential", {}, "k-diffusion", k_diffusion_function("get_sigmas_polyexponential"), 2e-6),
    ("polyexponential", {"rho": 1.7}, "k-diffusion", k_diffusion_function("get_sigmas_polyexponential", rho=1.7), 2e-6),
    ("sgm_uniform", {}, "ComfyUI, restated", comfy_sgm_uniform, 1e-6),
    ("simple", {}, "ComfyUI, restated", comfy_simple, 1e-6),
    ("ddim_uniform", {}, "ComfyUI, restated", comfy_ddim_uniform, 1e-6),
    ("beta", {}, "ComfyUI, restated with scipy.stats", comfy_beta, 1e-6),
    ("beta_webui", {}, "A1111, restated with scipy.stats", webui_beta, 1e-6),
    ("beta_webui", {}, "diffusers Euler", scheduler("EulerDiscreteScheduler", use_beta_sigmas=True), 5e-5),
    ("linear_quadratic", {}, "ComfyUI, restated", comfy_linear_quadratic, 1e-6),
    ("linear_quadratic", {}, "diffusers, Mochi's pipeline", mochi, 1e-6),
    ("kl_optimal", {}, "ComfyUI, restated", comfy_kl_optimal, 1e-6),
    ("align_your_steps", {}, "ComfyUI's table", comfy_align_your_steps("sd1"), 1e-6),
    ("align_your_steps", {"family": "sdxl"}, "ComfyUI's table", comfy_align_your_steps("sdxl"), 1e-6),
    ("align_your_steps", {"family": "svd"}, "ComfyUI's table", comfy_align_your_steps("svd"), 1e-6),
    ("align_your_steps", {}, "diffusers' table", diffusers_align_your_steps("StableDiffusionTimesteps"), 5e-5),
    (
        "align_your_steps",
        {"family": "sdxl"},
        "diffusers' table",
        diffusers_align_your_steps("StableDiffusionXLTimesteps"),
        5e-5,
    ),
    (
        "align_your_steps_webui",
        {},
        "A1111, restated on diffusers' table",
        webui_align_your_steps("StableDiffusionSigmas"),
        1e-6,
    ),
    (
        "align_your_steps_webui",
        {"family": "sdxl"},
        "A1111, restated on diffusers' table",
        webui_align_your_steps("StableDiffusionXLSigmas"),
        1e-6,
    ),
    ("lcm", {}, "diffusers LCM", timesteps_of("LCMScheduler"), 1e-6),
    ("trailing", {}, "diffusers DDIM", timesteps_of("DDIMScheduler", timestep_spacing="trailing"), 1e-6),
    ("leading", {}, "diffusers DDIM", timesteps_of("DDIMScheduler", timestep_spacing="leading", steps_offset=1), 1e-6),
    ("linspace", {}, "diffusers DDIM", timesteps_of("DDIMScheduler", **LINSPACE), 1e-6),
    ("linspace", {}, "diffusers DDPM", timesteps_of("DDPMScheduler", **LINSPACE), 1e-6),
]


@pytest.mark.parametrize(("schedule", "options", "name", "reference", "rtol"), REFERENCES)
def test_reference(schedule, options, name, reference, rtol):
    """Where a reference has fewer step counts than we, it is asked for those it has."""
    counts = [10] if name == "diffusers' table" else [2, 7, 10, 11, 20, 30, 50, 150]
    for n in counts:
        if schedule == "lcm" and n > 50:
            continue
        theirs = np.asarray(reference(n), float)
        ours = make_sigmas(schedule, n, SD, **options)
        ours = ours if schedule == "log_linear" else ours[:-1]
        assert len(ours) == len(theirs)
        close(ours, theirs, rtol)


def test_every_schedule_has_a_reference():
    assert {row[0] for row in REFERENCES} == set(SCHEDULES)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 30])
@pytest.mark.parametrize("spacing", DIFFUSERS_SPACINGS)
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_spacings_of_multistep_samplers(name, spacing, steps):
    theirs = scheduler(name, timestep_spacing=spacing)(steps)
    for sampler in MULTISTEP:
        close(make_sigmas(spacing, steps, SD, sampler)[:-1], theirs, 5e-5)


@pytest.mark.parametrize("name", BETA_SCHEDULES_OF_DIFFUSERS)
def test_zero_terminal_snr(name):
    cfg = NoiseScheduleConfig(beta_schedule=name, rescale_betas_zero_snr=True)
    kwargs = _kwargs(cfg) | {"rescale_betas_zero_snr": True}
    theirs = diffusers().DDIMScheduler(**kwargs)
    np.testing.assert_allclose(betas(cfg)[:-1], theirs.betas.numpy()[:-1], rtol=2e-4, atol=2e-7)
    np.testing.assert_allclose(alphas_cumprod(cfg), theirs.alphas_cumprod.numpy(), rtol=2e-4, atol=1e-7)
    euler = diffusers().EulerDiscreteScheduler(**kwargs).sigmas.numpy()[:-1]
    ours = sigmas_of(cfg)[::-1]
    np.testing.assert_allclose(euler[0], 4096, rtol=1e-6)  # theirs; ours is ComfyUI's
    np.testing.assert_allclose(ours[0], math.sqrt(1 / 4.8973451890853435e-08 - 1), rtol=1e-9)
    np.testing.assert_allclose(ours[1:], euler[1:], rtol=1e-4, atol=2e-5 if name == "squaredcos_cap_v2" else 0)


def test_zero_terminal_snr_of_comfy():
    """Restated: from sigmas to sqrt(abar), shift, scale, and back."""
    root = (1 / (SIGMAS**2 + 1)) ** 0.5
    rescaled = [(r - root[-1]) * root[0] / (root[0] - root[-1]) for r in root]
    theirs = [((1 - r**2) / r**2) ** 0.5 for r in rescaled[:-1]] + [(1 / 4.8973451890853435e-08 - 1) ** 0.5]
    close(sigmas_of(ZERO_SNR), np.array(theirs), 1e-9)


@pytest.mark.parametrize("spacing", DIFFUSERS_SPACINGS)
def test_spacings_of_zero_terminal_snr(spacing):
    euler = diffusers().EulerDiscreteScheduler(
        **_kwargs(), timestep_spacing=spacing, steps_offset=1, rescale_betas_zero_snr=True
    )
    euler.set_timesteps(20)
    ours = make_sigmas("normal" if spacing == "linspace" else spacing, 20, ZERO_SNR)
    close(ours[1:-1], euler.sigmas[1:-1], 2e-3 if spacing == "linspace" else 1e-4)  # they interpolate sigma itself
