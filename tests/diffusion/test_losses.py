"""The training side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion.losses import denoising_losses, draw_timesteps, min_snr_weights, noised
from sd_jax.diffusion.noise import example_keys, image_keys
from sd_jax.diffusion.predictions import PREDICTIONS
from sd_jax.diffusion.schedules import alphas_cumprod, sigmas_of
from sd_jax.types import NoiseScheduleConfig

SD = NoiseScheduleConfig()

FORMULAS = {
    "epsilon": lambda snr, g: np.minimum(snr, g) / snr,
    "v_prediction": lambda snr, g: np.minimum(snr, g) / (snr + 1),
    "sample": lambda snr, g: np.minimum(snr, g),
    "flow": lambda snr, g: np.minimum(snr, g) / (np.sqrt(snr) + 1) ** 2,
}


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_min_snr(name, gamma):
    sigmas = sigmas_of(SD)
    weights = min_snr_weights(jnp.asarray(sigmas, jnp.float32), name, gamma)
    np.testing.assert_allclose(weights, FORMULAS[name](sigmas**-2, gamma), rtol=1e-5)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_min_snr_has_limits(name):
    ends = min_snr_weights(jnp.asarray([0.0, jnp.inf]), name, 5.0)
    np.testing.assert_allclose(ends, [5 if name == "sample" else 0, 1 if name == "epsilon" else 0], atol=1e-6)


def test_no_min_snr_weighs_all_alike():
    np.testing.assert_array_equal(min_snr_weights(jnp.asarray([0.1, 5.0]), "epsilon", None), [1, 1])


def test_min_snr_loss_is_one_number_for_every_prediction_type():
    """The same x0 answered in four ways costs the same, since the weight is defined for the error of x0."""
    x0, n, answer = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 4, 4, 2)), jnp.float32)
    timesteps = jnp.asarray([10, 200, 600, 999])
    costs = []
    for name, row in PREDICTIONS.items():
        cfg = NoiseScheduleConfig(prediction_type=name)
        batch = noised(x0, n, timesteps, cfg)
        s = batch.sigma[:, None, None, None]
        output = row.target(answer, (batch.x - answer) / s, s)
        error, weight = denoising_losses(lambda *_, output=output: output, x0, n, timesteps, None, cfg, 5.0)
        costs.append(error * weight)
    np.testing.assert_allclose(costs, np.broadcast_to(costs[2], (4, 4)), rtol=2e-4)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction"])
def test_noised_is_the_variance_preserving_mixture(name):
    cfg = NoiseScheduleConfig(prediction_type=name)
    x0, n = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 4, 2)), jnp.float32)
    timesteps = np.array([0, 500, 999])
    abar = alphas_cumprod(cfg)[timesteps][:, None, None, None]
    batch = noised(x0, n, jnp.asarray(timesteps), cfg)
    np.testing.assert_allclose(batch.model_input, np.sqrt(abar) * x0 + np.sqrt(1 - abar) * n, atol=1e-6)
    want = n if name == "epsilon" else np.sqrt(abar) * n - np.sqrt(1 - abar) * x0
    np.testing.assert_allclose(batch.target, want, atol=1e-6)


def test_losses_are_per_example_and_float32():
    def predict(x, timestep, conditioning):
        assert timestep.dtype == jnp.float32
        return (conditioning[:, None, None, None] * x).astype(jnp.bfloat16)

    latents = jnp.zeros((2, 4, 4, 2), jnp.bfloat16)
    error, weight = denoising_losses(
        predict, latents, jnp.ones_like(latents), jnp.asarray([999, 999]), jnp.asarray([0.0, 2.0]), SD
    )
    assert error.dtype == weight.dtype == jnp.float32
    c_in_x = np.sqrt(1 - alphas_cumprod(SD)[999])
    np.testing.assert_allclose(error, [1, (2 * c_in_x - 1) ** 2], rtol=0.02)
    np.testing.assert_array_equal(weight, [1, 1])


def test_uniform_timesteps():
    timesteps = draw_timesteps(image_keys(0, 4000), 0, 1000)
    assert timesteps.dtype == jnp.int32 and timesteps.min() >= 0 and timesteps.max() <= 999
    counts, _ = np.histogram(timesteps, 10, (0, 1000))
    assert np.all(np.abs(counts - 400) < 100)


def test_stratified_timesteps_cover_every_part():
    places = jnp.arange(100)
    keys = example_keys(jax.random.key(0), 3, places)
    timesteps = draw_timesteps(keys, 1, 1000, strata=(places, 100))
    np.testing.assert_array_equal(np.asarray(timesteps) // 10, places)
    some = draw_timesteps(keys[50:], 1, 1000, strata=(places[50:], 100))
    np.testing.assert_array_equal(some, timesteps[50:])
