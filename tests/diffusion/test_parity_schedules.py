"""Noise levels and timesteps against diffusers and k-diffusion, which compute theirs in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion.schedules import (
    BETA_SCHEDULES,
    DIFFUSERS_SPACINGS,
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
STEPS = [1, 2, 5, 10, 20, 25, 50]  # those that divide 1000: elsewhere diffusers' DDIM skips beside its own timesteps


def _kwargs(cfg=SD):
    return {"beta_schedule": cfg.beta_schedule, "beta_start": cfg.beta_start, "beta_end": cfg.beta_end}


def close(ours, theirs, rtol):
    print(f"relative difference {np.max(np.abs(np.asarray(ours) / np.asarray(theirs) - 1)):.1e}")
    np.testing.assert_allclose(ours, theirs, rtol=rtol)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_betas(name):
    cfg = NoiseScheduleConfig(beta_schedule=name)
    theirs = diffusers().DDIMScheduler(**_kwargs(cfg))
    close(betas(cfg), theirs.betas.numpy(), 2e-6)
    close(alphas_cumprod(cfg), theirs.alphas_cumprod.numpy(), 5e-5)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
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
