"""Whole trajectories of one analytic network against k-diffusion's functions and diffusers' schedulers.

Ours and k-diffusion's run in float64; diffusers' schedulers keep their coefficients, some their state, in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion.denoiser import make_denoiser
from sd_jax.diffusion.samplers import sample
from sd_jax.diffusion.schedules import alphas_cumprod, make_ladder
from sd_jax.types import NoiseScheduleConfig
from tests.reference import diffusers, k_diffusion

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # torch tensors in diffusers
]
SD = NoiseScheduleConfig()
SHAPE = (2, 4, 4, 3)
LATENTS = np.random.default_rng(0).standard_normal(SHAPE)


def network(xp, x, t):
    """In jax.numpy and in torch: an epsilon that is nonlinear in x and not blind to the timestep."""
    t = xp.reshape(t, (-1, 1, 1, 1)) / 1000
    return xp.tanh(x * (0.8 + 0.4 * t) + 0.3 * xp.sin(9 * t)) + 0.1 * xp.cos(3 * x)


def ours(sampler, schedule, steps, cfg=SD, dtype=jnp.float64, **kwargs):
    with jax.enable_x64(dtype == jnp.float64):
        ladder = make_ladder(schedule, steps, cfg, sampler)
        denoise = make_denoiser(lambda x, t, _: network(jnp, x, t), cfg)
        x = jnp.asarray(LATENTS, dtype) * jnp.asarray(ladder.start, dtype)
        end = sample(denoise, x, ladder.sigmas, sampler, **kwargs)
        assert end.dtype == dtype
        return np.asarray(end) * ladder.end


def close(ours, theirs, rtol):
    theirs = np.asarray(theirs)
    difference = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    print(f"relative difference {difference:.1e}")
    assert difference < rtol


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("schedule", ["normal", "karras"])
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "heun", "dpmpp_2m"])
def test_k_diffusion(sampler, schedule, steps):
    import torch

    class Network(torch.nn.Module):
        def forward(self, x, t):
            return network(torch, x, t)

    reference = k_diffusion()
    model = reference.external.DiscreteEpsDDPMDenoiser(Network(), torch.from_numpy(alphas_cumprod(SD)), quantize=False)
    sigmas = torch.from_numpy(make_ladder(schedule, steps, SD).sigmas.astype(float))
    kwargs, their_kwargs = {}, {}
    if sampler == "euler_ancestral":
        draws = np.random.default_rng(1).standard_normal((steps, *SHAPE))
        recorded = iter(torch.from_numpy(draws))
        kwargs, their_kwargs = {"noise": draws}, {"noise_sampler": lambda *_: next(recorded)}
    walk = getattr(reference.sampling, f"sample_{sampler}")
    theirs = walk(model, torch.from_numpy(LATENTS) * sigmas[0], sigmas, disable=True, **their_kwargs)
    assert theirs.dtype == torch.float64
    close(ours(sampler, schedule, steps, **kwargs), theirs, 1e-9)
    if steps == 20:
        close(ours(sampler, schedule, steps, dtype=jnp.float32, **kwargs), theirs, 1e-5)


def _diffusers_loop(scheduler, steps):
    import torch

    scheduler.set_timesteps(steps)
    x = torch.from_numpy(LATENTS) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(torch, scheduler.scale_model_input(x, t).double(), t.double()), t, x).prev_sample
    return x


def _scheduler(name, prediction_type="epsilon", **kwargs):
    return getattr(diffusers(), name)(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        steps_offset=1,
        **kwargs,
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("sampler", "schedule", "name", "kwargs"),
    [
        ("euler", "normal", "EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
        ("euler", "karras", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("euler", "trailing", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("heun", "normal", "HeunDiscreteScheduler", {"timestep_spacing": "linspace"}),
        ("heun", "karras", "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("ddim", "leading", "DDIMScheduler", {"timestep_spacing": "leading"}),
        ("ddim", "trailing", "DDIMScheduler", {"timestep_spacing": "trailing"}),
    ],
)
def test_diffusers(sampler, schedule, name, kwargs, prediction_type):
    if name == "HeunDiscreteScheduler" and prediction_type == "sample":
        pytest.skip("not in diffusers")
    if name == "DDIMScheduler":
        kwargs = {**kwargs, "set_alpha_to_one": False, "clip_sample": False}
    theirs = _diffusers_loop(_scheduler(name, prediction_type, **kwargs), 20)
    close(ours(sampler, schedule, 20, NoiseScheduleConfig(prediction_type=prediction_type)), theirs, 2e-5)


def test_ddim_leading_with_steps_that_do_not_divide():
    """37 does not divide 1000; leading spacing is even all the same."""
    theirs = _diffusers_loop(_scheduler("DDIMScheduler", set_alpha_to_one=False, clip_sample=False), 37)
    close(ours("ddim", "leading", 37), theirs, 2e-5)
