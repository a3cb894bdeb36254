"""Properties of the discrete schedules and of the ladders; parity is in test_parity_schedules.py."""

import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion.schedules import (
    BETA_SCHEDULES,
    DIFFUSERS_SPACINGS,
    SCHEDULES,
    alphas_cumprod,
    make_ladder,
    make_sigmas,
    sigma_to_timestep,
    sigmas_of,
    timestep_to_sigma,
)
from sd_jax.types import NoiseScheduleConfig

SD = NoiseScheduleConfig()


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_noise_grows_with_the_timestep(name):
    cfg = NoiseScheduleConfig(beta_schedule=name)
    abar, sigmas = alphas_cumprod(cfg), sigmas_of(cfg)
    assert sigmas.shape == (1000,) and sigmas.dtype == np.float64
    assert np.all(np.diff(sigmas) > 0) and np.all(np.isfinite(sigmas))
    np.testing.assert_allclose(1 / (1 + sigmas**2), abar, rtol=1e-9)


def test_stable_diffusion_ends():
    np.testing.assert_allclose(sigmas_of(SD)[[0, -1]], [0.029167, 14.614643], rtol=2e-5)


def test_sigma_and_timestep_are_inverse():
    sigmas = sigmas_of(SD)
    timesteps = np.array([0, 0.25, 1, 17.5, 500, 998.9, 999])
    sigma = jnp.asarray(timestep_to_sigma(timesteps, sigmas), jnp.float32)
    back = sigma_to_timestep(sigma, jnp.asarray(np.log(sigmas), jnp.float32))
    np.testing.assert_allclose(back, timesteps, atol=2e-4)


def test_timesteps_stop_at_the_ends():
    log_sigmas = jnp.asarray(np.log(sigmas_of(SD)), jnp.float32)
    np.testing.assert_array_equal(sigma_to_timestep(jnp.asarray([1e-3, 100.0]), log_sigmas), [0, 999])


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ladder(name, steps, sampler):
    ladder = make_ladder(name, steps, SD, sampler)
    sigmas = ladder.sigmas
    assert sigmas.shape == (steps + 1,) and {part.dtype for part in ladder} == {np.dtype(np.float32)}
    assert np.all(np.diff(sigmas[:-1]) < 0) and sigmas[-2] >= sigmas[-1]
    assert sigmas[0] <= np.float32(sigmas_of(SD)[-1])
    if name in DIFFUSERS_SPACINGS and sampler == "ddim":
        abar = alphas_cumprod(SD)
        np.testing.assert_allclose(ladder.end, np.sqrt(abar[0]), rtol=1e-6)
        np.testing.assert_allclose(ladder.start, np.sqrt(1 + sigmas[0].astype(float) ** 2), rtol=1e-6)
    else:
        assert (sigmas[-1], ladder.start, ladder.end) == (0, sigmas[0], 1)


def test_spacings_are_whole_timesteps():
    sigmas = sigmas_of(SD).astype(np.float32)
    want = {"leading": [751, 501, 251, 1], "trailing": [999, 749, 499, 249], "linspace": [999, 666, 333, 0]}
    for name, timesteps in want.items():
        np.testing.assert_array_equal(make_sigmas(name, 4, SD)[:-1], sigmas[timesteps])


@pytest.mark.parametrize(
    ("schedule", "steps", "cfg", "said"),
    [
        ("karas", 20, SD, "unknown schedule 'karas': choose one of normal, karras"),
        ("normal", 0, SD, "at least 1"),
        ("leading", 1000, SD, "no 1000 different steps in 1000 timesteps"),
        ("leading", 1001, SD, "no 1001 different steps"),
        ("trailing", 1001, SD, "no 1001 different steps"),
        ("linspace", 1001, SD, "no 1001 different steps"),
        ("normal", 20, NoiseScheduleConfig(beta_schedule="cosine"), "unknown beta_schedule 'cosine'"),
    ],
)
def test_mistakes_are_named(schedule, steps, cfg, said):
    with pytest.raises(ValueError, match=said):
        make_sigmas(schedule, steps, cfg)
