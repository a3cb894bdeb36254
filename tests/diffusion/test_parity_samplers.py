"""Whole trajectories of analytic models against k-diffusion's functions, diffusers' schedulers and restated equations.

`REFERENCES` says for every sampler what it is compared with. Ours and k-diffusion's run in float64; diffusers'
schedulers keep their coefficients, some their state, in float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion import samplers_multistep as multi
from sd_jax.diffusion import samplers_restart
from sd_jax.diffusion.denoiser import make_denoiser
from sd_jax.diffusion.samplers import SAMPLERS, SamplerOptions, count_draws, sample
from sd_jax.diffusion.schedules import alphas_cumprod, make_ladder
from sd_jax.types import NoiseScheduleConfig
from tests.reference import diffusers, k_diffusion

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # torch tensors in diffusers
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
SD = NoiseScheduleConfig()
SHAPE = (2, 4, 4, 3)
LATENTS = np.random.default_rng(0).standard_normal(SHAPE)

REFERENCES = {
    "euler": "k-diffusion (with churn), diffusers EulerDiscreteScheduler",
    "euler_ancestral": "k-diffusion",
    "heun": "k-diffusion (with churn), diffusers HeunDiscreteScheduler",
    "heunpp2": "ComfyUI's equations restated",
    "dpm_2": "k-diffusion (with churn)",
    "dpm_2_ancestral": "k-diffusion",
    "lms": "k-diffusion",
    "dpmpp_2s_ancestral": "k-diffusion",
    "dpmpp_sde": "k-diffusion",
    "dpmpp_2m": "k-diffusion",
    "dpmpp_2m_sde": "k-diffusion (midpoint)",
    "dpmpp_2m_sde_heun": "k-diffusion (heun)",
    "dpmpp_3m_sde": "k-diffusion",
    "ddpm": "diffusers DDPMScheduler, ComfyUI's equations restated",
    "ddim": "diffusers DDIMScheduler (any eta)",
    "plms": "diffusers PNDMScheduler (skip_prk_steps)",
    "pndm": "diffusers PNDMScheduler (skip_prk_steps)",
    "uni_pc": "diffusers UniPCMultistepScheduler (bh1)",
    "uni_pc_bh2": "diffusers UniPCMultistepScheduler (bh2)",
    "deis": "ComfyUI's equations restated; with log for its time, diffusers DEISMultistepScheduler",
    "ipndm": "diffusers IPNDMScheduler",
    "lcm": "diffusers LCMScheduler",
    "restart": "A1111's equations restated",
}


def test_every_sampler_has_a_reference():
    assert REFERENCES.keys() == SAMPLERS.keys()


def close(ours, theirs, rtol):
    theirs = np.asarray(theirs)
    difference = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    print(f"relative difference {difference:.1e}")
    assert difference < rtol


# --- a network and its denoiser --------------------------------------------------------------------------------------


def network(xp, x, t):
    """In jax.numpy and in torch: an epsilon that is nonlinear in x and not blind to the timestep."""
    t = xp.reshape(t, (-1, 1, 1, 1)) / 1000
    return xp.tanh(x * (0.8 + 0.4 * t) + 0.3 * xp.sin(9 * t)) + 0.1 * xp.cos(3 * x)


def ours(sampler, schedule, steps, cfg=SD, dtype=jnp.float64, **kwargs):
    with jax.enable_x64(dtype == jnp.float64):
        ladder = make_ladder(schedule, steps, cfg, sampler)
        denoise = make_denoiser(lambda x, t, _: network(jnp, x, t), cfg)
        x = jnp.asarray(LATENTS, dtype) * jnp.asarray(ladder.start, dtype)
        end = jax.jit(functools.partial(sample, denoise, sampler=sampler))(x, jnp.asarray(ladder.sigmas), **kwargs)
        assert end.dtype == dtype
        return np.asarray(end) * ladder.end


def recorded(count):
    return np.random.default_rng(1).standard_normal((count, *SHAPE))


# --- k-diffusion -----------------------------------------------------------------------------------------------------

CHURN = {"s_churn": 7.0, "s_tmin": 0.2, "s_tmax": 9.0, "s_noise": 1.01}
K_DIFFUSION = [
    ("euler", {}),
    ("euler", CHURN),
    ("euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.6, "s_noise": 0.9}),
    ("heun", {}),
    ("heun", CHURN),
    ("dpm_2", {}),
    ("dpm_2", CHURN),
    ("dpm_2_ancestral", {}),
    ("dpm_2_ancestral", {"eta": 0.6, "s_noise": 0.9}),
    ("dpm_2_ancestral", {"eta": 1.3}),
    ("lms", {}),
    ("lms", {"order": 2}),
    ("dpmpp_2s_ancestral", {}),
    ("dpmpp_2s_ancestral", {"eta": 0.6, "s_noise": 0.9}),
    ("dpmpp_sde", {}),
    ("dpmpp_sde", {"eta": 0.6, "s_noise": 0.9, "r": 0.4}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"eta": 0.6, "s_noise": 0.9}),
    ("dpmpp_2m_sde_heun", {}),
    ("dpmpp_2m_sde_heun", {"eta": 0.0}),
    ("dpmpp_3m_sde", {}),
    ("dpmpp_3m_sde", {"eta": 0.6, "s_noise": 0.9}),
]


@pytest.mark.parametrize(("schedule", "steps"), [("normal", 1), ("karras", 2), ("karras", 20), ("normal", 20)])
@pytest.mark.parametrize(("sampler", "options"), K_DIFFUSION)
def test_k_diffusion(sampler, options, schedule, steps, monkeypatch):
    import torch

    if steps == 1 and sampler.startswith(("dpmpp_2m_sde", "dpmpp_3m_sde")):
        pytest.skip("k-diffusion's own fails on a single step")

    class Network(torch.nn.Module):
        def forward(self, x, t):
            return network(torch, x, t)

    reference = k_diffusion()
    model = reference.external.DiscreteEpsDDPMDenoiser(Network(), torch.from_numpy(alphas_cumprod(SD)), quantize=False)
    sigmas = torch.from_numpy(make_ladder(schedule, steps, SD).sigmas.astype(float))
    given = SamplerOptions(**options)
    draws = recorded(count_draws(sampler, steps, given))
    drawn = iter(torch.from_numpy(draws))
    kwargs, theirs_too = {}, {}
    if len(draws):
        kwargs = {"noise": draws}
        if "s_churn" in options:
            monkeypatch.setattr(torch, "randn_like", lambda x: next(drawn))
        else:
            theirs_too = {"noise_sampler": lambda *_: next(drawn)}
    name = sampler
    if sampler == "dpmpp_2m_sde_heun":
        name, theirs_too["solver_type"] = "dpmpp_2m_sde", "heun"
    walk = getattr(reference.sampling, f"sample_{name}")
    theirs = walk(model, torch.from_numpy(LATENTS) * sigmas[0], sigmas, disable=True, **options, **theirs_too)
    assert theirs.dtype == torch.float64
    close(ours(sampler, schedule, steps, options=given, **kwargs), theirs, 1e-9)
    if (schedule, steps) == ("karras", 20):
        close(ours(sampler, schedule, steps, dtype=jnp.float32, options=given, **kwargs), theirs, 2e-5)


# --- diffusers, on its own timesteps ---------------------------------------------------------------------------------


def _diffusers_loop(scheduler, steps, **kwargs):
    import torch

    scheduler.set_timesteps(steps)
    x = torch.from_numpy(LATENTS) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        given = {key: value(i) for key, value in kwargs.items()}
        output = network(torch, scheduler.scale_model_input(x, t).double(), t.double())
        x = scheduler.step(output, t, x, **given).prev_sample
    return x


def _scheduler(name, prediction_type="epsilon", **kwargs):
    return getattr(diffusers(), name)(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        **{"steps_offset": 1} | kwargs,
    )


DDIM = {"set_alpha_to_one": False, "clip_sample": False}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("sampler", "schedule", "name", "kwargs"),
    [
        ("euler", "normal", "EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
        ("euler", "karras", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("euler", "trailing", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("heun", "normal", "HeunDiscreteScheduler", {"timestep_spacing": "linspace"}),
        ("heun", "karras", "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("ddim", "leading", "DDIMScheduler", {"timestep_spacing": "leading", **DDIM}),
        ("ddim", "trailing", "DDIMScheduler", {"timestep_spacing": "trailing", **DDIM}),
    ],
)
def test_diffusers(sampler, schedule, name, kwargs, prediction_type):
    if name == "HeunDiscreteScheduler" and prediction_type == "sample":
        pytest.skip("not in diffusers")
    theirs = _diffusers_loop(_scheduler(name, prediction_type, **kwargs), 20)
    close(ours(sampler, schedule, 20, NoiseScheduleConfig(prediction_type=prediction_type)), theirs, 2e-5)


def test_ddim_leading_with_steps_that_do_not_divide():
    """37 does not divide 1000; leading spacing is even all the same."""
    theirs = _diffusers_loop(_scheduler("DDIMScheduler", **DDIM), 37)
    close(ours("ddim", "leading", 37), theirs, 2e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_with_noise(eta):
    import torch

    draws = recorded(20)
    noise = {"eta": lambda i: eta, "variance_noise": lambda i: torch.from_numpy(draws[i])}
    theirs = _diffusers_loop(_scheduler("DDIMScheduler", **DDIM), 20, **noise)
    close(ours("ddim", "leading", 20, noise=draws, options=SamplerOptions(eta=eta)), theirs, 2e-5)


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("sampler", ["plms", "pndm"])
def test_plms(sampler, steps):
    theirs = _diffusers_loop(_scheduler("PNDMScheduler", skip_prk_steps=True), steps)
    close(ours(sampler, "leading", steps), theirs, 2e-5)


# --- diffusers and restated equations, on given noise levels ---------------------------------------------------------


def denoised(xp, x, sigma):
    """A nonlinear denoiser of one noise level, in numpy, jax.numpy and torch."""
    scale = (1 + sigma * sigma) ** 0.5
    return x / scale**2 + 0.5 * (sigma / scale) * xp.tanh(2 * x / scale + 0.3 * xp.log(sigma))


def walked(sampler, sigmas, start=None, **kwargs):
    """Ours in float64 from LATENTS * sigmas[0]."""
    with jax.enable_x64(True):
        sigmas = jnp.asarray(sigmas, jnp.float64)
        x = jnp.asarray(LATENTS) * (sigmas[0] if start is None else start)
        denoise = functools.partial(denoised, jnp)
        return np.asarray(jax.jit(lambda x, s: sample(denoise, x, s, sampler, **kwargs))(x, sigmas))


def _on_sigmas(scheduler, sigmas):
    """A scheduler of diffusers with prediction_type="sample" from LATENTS sqrt(1 + sigma^2), in our coordinates."""
    import torch

    x = torch.from_numpy(LATENTS)
    for t, sigma in zip(scheduler.timesteps, torch.from_numpy(sigmas[:-1]).double(), strict=True):
        x = scheduler.step(denoised(torch, x * (1 + sigma**2) ** 0.5, sigma), t, x).prev_sample
    return x * float(1 + sigmas[-1] ** 2) ** 0.5


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_uni_pc(variant, order, steps):
    """bh1 of diffusers gives NaN on a step to 0 (an infinite B(h) times no correction), so it stops at sigma_min."""
    final = "zero" if variant == "bh2" else "sigma_min"
    kwargs = {"solver_order": order, "solver_type": variant, "use_karras_sigmas": True, "final_sigmas_type": final}
    scheduler = _scheduler("UniPCMultistepScheduler", "sample", **kwargs)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    sigmas = scheduler.sigmas.numpy()
    theirs = _on_sigmas(scheduler, sigmas)
    if final == "sigma_min":  # the last step goes nowhere; ours are told by a model that is not called again
        sigmas = np.append(sigmas[:-1], np.nextafter(sigmas[-2], 0))
    sampler = {"bh1": "uni_pc", "bh2": "uni_pc_bh2"}[variant]
    start = np.sqrt(1 + sigmas[0].astype(float) ** 2)
    close(walked(sampler, sigmas, start, options=SamplerOptions(order=order)), theirs, 1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_in_log_sigma(order):
    """Ours has another time; with log(sigma) for it, it is diffusers' logrho."""
    scheduler = _scheduler("DEISMultistepScheduler", "sample", solver_order=order)
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(0)
    sigmas = scheduler.sigmas.numpy()
    row = SAMPLERS["deis"]._replace(table=functools.partial(multi.deis, time=jnp.log))
    start = np.sqrt(1 + sigmas[0].astype(float) ** 2)
    close(walked(row, sigmas, start, options=SamplerOptions(order=order)), _on_sigmas(scheduler, sigmas), 1e-5)


def test_deis():
    """ComfyUI's sums of 10,000 terms over the time of EDM's VP schedule, and its constants."""
    sigmas = make_ladder("normal", 20, SD).sigmas.astype(float)
    beta_d = 2 * (np.log(0.002**2 + 1) / 1e-3 - np.log(80**2 + 1)) / (1e-3 - 1)
    beta_min = np.log(80**2 + 1) - beta_d / 2
    t = (np.sqrt(beta_min**2 + 2 * beta_d * np.log(sigmas**2 + 1)) - beta_min) / beta_d
    x, slopes = LATENTS * sigmas[0], []
    for i in range(20):
        slopes = [(x - denoised(np, x, sigmas[i])) / sigmas[i], *slopes][:3]
        order = min(3, i + 1) if sigmas[i + 1] > 0 else 1
        tau = np.linspace(t[i], t[i + 1], 10_001)
        growth = np.exp(beta_d / 2 * tau**2 + beta_min * tau)
        d_sigma = (beta_d * tau + beta_min) * growth / 2 / np.sqrt(growth - 1 + 1e-30)
        for j in range(order):
            basis = np.prod([(tau - t[i - k]) / (t[i - j] - t[i - k]) for k in range(order) if k != j], axis=0)
            integral = np.trapezoid(d_sigma * basis, tau) if order > 1 else sigmas[i + 1] - sigmas[i]
            x = x + integral * slopes[j]
    close(walked("deis", sigmas), x, 1e-7)


def test_ipndm():
    """diffusers' begins at an infinite noise level and ends by extrapolation: compared between these."""
    import torch

    scheduler = diffusers().IPNDMScheduler()
    scheduler.set_timesteps(21)
    scheduler.set_begin_index(1)
    alphas, betas = scheduler.alphas.double(), scheduler.betas.double()
    x = torch.from_numpy(LATENTS) * betas[1]
    for i in range(1, 20):
        sigma = betas[i] / alphas[i]
        epsilon = (x / alphas[i] - denoised(torch, x / alphas[i], sigma)) / sigma
        x = scheduler.step((epsilon - x * betas[i]) / alphas[i], scheduler.timesteps[i], x).prev_sample
    close(walked("ipndm", (betas / alphas)[1:21].numpy()), x / alphas[20], 1e-5)


def test_ipndm_to_zero():
    sigmas = np.append(np.linspace(10, 0.5, 8), 0)
    before = walked("ipndm", sigmas[:-1])
    close(walked("ipndm", sigmas), denoised(np, before, sigmas[-2]), 1e-12)


@pytest.mark.parametrize(("sampler", "name"), [("ddpm", "DDPMScheduler"), ("lcm", "LCMScheduler")])
def test_noising_schedulers(sampler, name, monkeypatch):
    import importlib

    import torch

    module = importlib.import_module(f"diffusers.schedulers.scheduling_{sampler}")
    scheduler = _scheduler(name, "sample", clip_sample=False)
    scheduler.set_timesteps(20)
    draws = recorded(20)
    drawn = iter(torch.from_numpy(draws))
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(drawn))
    abar = scheduler.alphas_cumprod.double()[scheduler.timesteps].numpy()
    sigmas = np.append(np.sqrt((1 - abar) / abar), 0)
    theirs = _on_sigmas(scheduler, sigmas)
    close(walked(sampler, sigmas, np.sqrt(1 + sigmas[0] ** 2), noise=draws), theirs, 2e-5)


def test_ddpm():
    """ComfyUI's step, in variance-preserving coordinates."""
    sigmas, draws = make_ladder("karras", 20, SD).sigmas.astype(float), recorded(20)
    x = LATENTS * sigmas[0]
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        epsilon = (x - denoised(np, x, sigma)) / sigma
        abar, abar_next = 1 / (1 + sigma**2), 1 / (1 + following**2)
        alpha = abar / abar_next
        mean = (x * np.sqrt(abar) - (1 - alpha) * epsilon / np.sqrt(1 - abar)) / np.sqrt(alpha)
        x = (mean + np.sqrt((1 - alpha) * (1 - abar_next) / (1 - abar)) * draws[i]) / np.sqrt(abar_next)
    close(walked("ddpm", sigmas, noise=draws), x, 1e-9)


@pytest.mark.parametrize("churned", [False, True])
def test_heunpp2(churned):
    sigmas, draws = make_ladder("karras", 20, SD).sigmas.astype(float), recorded(20)
    x = LATENTS * sigmas[0]
    for i in range(20):
        gamma = min(7 / 20, 2**0.5 - 1) if churned and 0.2 <= sigmas[i] <= 9 else 0
        sigma, following = sigmas[i] * (1 + gamma), sigmas[i + 1]
        x = x + draws[i] * 1.01 * np.sqrt(sigma**2 - sigmas[i] ** 2)
        d = (x - denoised(np, x, sigma)) / sigma
        direction = d
        if i < 19:
            x_2 = x + d * (following - sigma)
            d_2 = (x_2 - denoised(np, x_2, following)) / following
        if i == 18:
            w_2 = following / (2 * sigmas[0])
            direction = (1 - w_2) * d + w_2 * d_2
        elif i < 18:
            after = sigmas[i + 2]
            x_3 = x_2 + d_2 * (after - following)
            d_3 = (x_3 - denoised(np, x_3, after)) / after
            w_2, w_3 = following / (3 * sigmas[0]), after / (3 * sigmas[0])
            direction = (1 - w_2 - w_3) * d + w_2 * d_2 + w_3 * d_3
        x = x + direction * (following - sigma)
    kwargs = {"noise": draws, "options": SamplerOptions(**CHURN)} if churned else {}
    close(walked("heunpp2", sigmas, **kwargs), x, 1e-9)


def _karras(count, low, high):
    return np.linspace(high ** (1 / 7), low ** (1 / 7), count) ** 7


@pytest.mark.parametrize("steps", [10, 20, 40])
def test_restart(steps):
    """A1111's list of steps, and Heun's step."""
    sigmas = make_ladder("normal", steps, SD).sigmas.astype(float)
    again, times = {10: (0, 0), 20: (9, 1), 40: (10, 2)}[steps]
    if times:
        sigmas = np.append(_karras(steps - again * times, sigmas[-2], sigmas[0]), 0)
    moves, lowest = [], np.argmin(np.abs(sigmas - 0.1)) if times else None
    for i in range(len(sigmas) - 1):
        moves.append((sigmas[i], sigmas[i + 1]))
        if i + 1 == lowest:
            levels = _karras(again + 1, sigmas[lowest], sigmas[np.argmin(np.abs(sigmas - 2))])
            moves += [*zip(levels[:-1], levels[1:], strict=True)] * times
    assert len(moves) == steps
    draws = recorded(samplers_restart.restarts(steps))
    assert len(draws) == times
    drawn, x, last = iter(draws), LATENTS * sigmas[0], None
    for sigma, following in moves:
        if last is not None and last < sigma:
            x = x + next(drawn) * np.sqrt(sigma**2 - last**2)
        d = (x - denoised(np, x, sigma)) / sigma
        x_2 = x + d * (following - sigma)
        x = x + (d + (x_2 - denoised(np, x_2, following)) / following) / 2 * (following - sigma) if following else x_2
        last = following
    ladder = make_ladder("normal", steps, SD).sigmas
    close(walked("restart", ladder, noise=draws), x, 1e-9)
