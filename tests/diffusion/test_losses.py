"""The training side: every loss and weighting against its paper's formula, written here in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion.losses import denoising_losses, min_snr_weights, noised
from sd_jax.diffusion.predictions import PREDICTIONS
from sd_jax.types import NoiseScheduleConfig
from tests.reference import diffusers

SD = NoiseScheduleConfig()
TIMESTEPS = np.array([0, 1, 37, 400, 777, 998, 999])
SHAPE = (len(TIMESTEPS), 6, 4, 3)
X0, N, XI = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)


def abar_of(name, zero_snr=False):
    """abar of Stable Diffusion's schedule (float64), and of the others that there are."""
    if name == "rectified_flow":
        t = (np.arange(1000) + 0.5) / 1000
        return (1 - t) ** 2 / ((1 - t) ** 2 + t**2)
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    if zero_snr:  # Lin et al. 2023, Algorithm 1; 4.9e-8 for 0
        root = np.sqrt(abar)
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        abar[-1] = 4.8973451890853435e-08
    return abar


def answer(x, t):
    """A network."""
    return 0.3 * x - 0.4 + 1e-4 * t[:, None, None, None]


# (sqrt(abar), sqrt(1 - abar), x0, n, the input's noise) -> network input, target
PAPERS = {
    # Ho et al. 2020, Eq. 14
    "epsilon": lambda a, b, x0, n, seen: (a * x0 + b * seen, n),
    # Salimans & Ho 2022, Appendix D
    "v_prediction": lambda a, b, x0, n, seen: (a * x0 + b * seen, a * n - b * x0),
    # Salimans & Ho 2022, section 4: x
    "sample": lambda a, b, x0, n, seen: (a * x0 + b * seen, x0),
    # Lipman et al. 2023, Eq. 22 and 23 at time 1 - t; t = sigma / (1 + sigma), sigma = b / a
    "flow": lambda a, b, x0, n, seen: ((a * x0 + b * seen) / (a + b), n - x0),
    # Karras et al. 2022, Eq. 8 and Table 1 with sigma_data = 1
    "edm": lambda a, b, x0, n, seen: (a * x0 + b * seen, b * x0 - a * n),
}
# Hang et al. 2023: snr = abar / (1 - abar)
MIN_SNR = {
    "epsilon": lambda snr, g: np.minimum(snr, g) / snr,
    "v_prediction": lambda snr, g: np.minimum(snr, g) / (snr + 1),
    "sample": lambda snr, g: np.minimum(snr, g),
    "flow": lambda snr, g: np.minimum(snr, g) / (np.sqrt(snr) + 1) ** 2,
    "edm": lambda snr, g: np.minimum(snr, g) / (snr + 1),
}
SCHEDULES = {
    "scaled_linear": NoiseScheduleConfig(),
    "rectified_flow": NoiseScheduleConfig(beta_schedule="rectified_flow"),
    "zero_snr": NoiseScheduleConfig(rescale_betas_zero_snr=True),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("perturbation", [0.0, 0.1])
@pytest.mark.parametrize("gamma", [None, 1.0, 5.0])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_loss_is_the_formula(name, gamma, perturbation, schedule):
    abar = abar_of(schedule, schedule == "zero_snr")[TIMESTEPS]
    x0, n, xi = (x.astype(np.float64) for x in (X0, N, XI))
    seen = n + perturbation * xi  # Ning et al. 2023: the input's noise, not the target's
    a, b = (np.sqrt(x)[:, None, None, None] for x in (abar, 1 - abar))
    given, target = PAPERS[name](a, b, x0, n, seen)
    told = np.log(b / a)[:, 0, 0, 0] / 4 if name == "edm" else TIMESTEPS
    error = np.mean((answer(given, told) - target) ** 2, axis=(1, 2, 3))
    weight = np.ones(len(abar)) if gamma is None else MIN_SNR[name](abar / (1 - abar), gamma)

    cfg = NoiseScheduleConfig(**{**vars(SCHEDULES[schedule]), "prediction_type": name})
    ours = denoising_losses(
        lambda x, t, told: answer(x, t),
        jnp.asarray(X0),
        jnp.asarray(N),
        jnp.asarray(TIMESTEPS),
        None,
        cfg,
        gamma,
        jnp.asarray(N + np.float32(perturbation) * XI) if perturbation else None,
    )
    np.testing.assert_allclose(ours[0], error, rtol=1e-6)
    np.testing.assert_allclose(ours[1], weight, rtol=1e-6)
    batch = noised(jnp.asarray(X0), jnp.asarray(N), jnp.asarray(TIMESTEPS), cfg)
    np.testing.assert_allclose(batch.target, target, atol=1e-6)
    np.testing.assert_allclose(batch.sigma, np.sqrt((1 - abar) / abar), rtol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_min_snr_over_the_whole_schedule(name, gamma):
    abar = abar_of("scaled_linear")
    weights = min_snr_weights(jnp.asarray(np.sqrt((1 - abar) / abar), jnp.float32), name, gamma)
    np.testing.assert_allclose(weights, MIN_SNR[name](abar / (1 - abar), gamma), rtol=1e-6)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_min_snr_has_limits(name):
    ends = min_snr_weights(jnp.asarray([0.0, jnp.inf]), name, 5.0)
    np.testing.assert_allclose(ends, [5 if name == "sample" else 0, 1 if name == "epsilon" else 0], atol=1e-6)


def test_no_min_snr_weighs_all_alike():
    np.testing.assert_array_equal(min_snr_weights(jnp.asarray([0.1, 5.0]), "epsilon", None), [1, 1])


def test_min_snr_loss_is_one_number_for_every_prediction_type():
    """The same x0 answered in any of these ways costs the same, since the weight is defined for the error of x0."""
    x0, n, told = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 4, 4, 2)), jnp.float32)
    timesteps = jnp.asarray([10, 200, 600, 999])
    costs = []
    for name, row in PREDICTIONS.items():
        cfg = NoiseScheduleConfig(prediction_type=name)
        batch = noised(x0, n, timesteps, cfg)
        s = batch.sigma[:, None, None, None]
        output = row.target(told, (batch.x - told) / s, s)
        error, weight = denoising_losses(lambda *_, output=output: output, x0, n, timesteps, None, cfg, 5.0)
        costs.append(error * weight)
    np.testing.assert_allclose(costs, np.broadcast_to(costs[2], (len(PREDICTIONS), 4)), rtol=2e-4)


def test_a_perturbed_input_has_the_same_target():
    plain, perturbed = (noised(*map(jnp.asarray, (X0, N, TIMESTEPS)), SD, seen) for seen in (None, jnp.asarray(XI)))
    np.testing.assert_array_equal(plain.target, perturbed.target)
    np.testing.assert_allclose(
        perturbed.model_input - plain.model_input,
        np.sqrt(1 - abar_of("scaled_linear")[TIMESTEPS])[:, None, None, None] * (XI - N),
        atol=2e-6,
    )


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("name", ["v_prediction", "epsilon", "sample"])
def test_losses_are_finite_down_to_zero_snr(name, gamma):
    cfg = NoiseScheduleConfig(prediction_type=name, rescale_betas_zero_snr=True)
    x0, n = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 4, 2)), jnp.float32)
    timesteps = jnp.asarray([0, 998, 999])

    def loss(scale):
        predict = lambda x, *_: scale * x  # noqa: E731
        error, weight = denoising_losses(predict, x0, n, timesteps, None, cfg, gamma)
        return jnp.mean(error * weight), (error, weight)

    (value, (error, weight)), slope = jax.value_and_grad(loss, has_aux=True)(jnp.float32(0.5))
    assert all(np.isfinite(x).all() for x in (value, error, weight, slope))
    if name == "v_prediction":  # at pure noise the network sees n and should answer -x0
        np.testing.assert_allclose(error[2], np.mean((0.5 * n[2] + x0[2]) ** 2), rtol=2e-3)


def test_losses_are_per_example_and_float32():
    def predict(x, timestep, conditioning):
        assert timestep.dtype == jnp.float32
        return (conditioning[:, None, None, None] * x).astype(jnp.bfloat16)

    latents = jnp.zeros((2, 4, 4, 2), jnp.bfloat16)
    error, weight = denoising_losses(
        predict, latents, jnp.ones_like(latents), jnp.asarray([999, 999]), jnp.asarray([0.0, 2.0]), SD
    )
    assert error.dtype == weight.dtype == jnp.float32
    c_in_x = np.sqrt(1 - abar_of("scaled_linear")[999])
    np.testing.assert_allclose(error, [1, (2 * c_in_x - 1) ** 2], rtol=0.02)
    np.testing.assert_array_equal(weight, [1, 1])


@pytest.mark.parity
@pytest.mark.parametrize("zero_snr", [False, True])
def test_diffusers(zero_snr):
    """What its training scripts use; they compute abar in float32, so small 1 - abar have four digits."""
    library = diffusers()
    import torch
    from diffusers.training_utils import compute_snr

    scheduler = library.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_snr
    )
    x0, n, t = (torch.from_numpy(x) for x in (X0, N, TIMESTEPS))
    with np.errstate(divide="ignore"):
        snr = compute_snr(scheduler, t)
    for name, theirs in (("epsilon", n), ("v_prediction", scheduler.get_velocity(x0, n, t)), ("sample", x0)):
        cfg = NoiseScheduleConfig(prediction_type=name, rescale_betas_zero_snr=zero_snr)
        ours = noised(jnp.asarray(X0), jnp.asarray(N), jnp.asarray(TIMESTEPS), cfg)
        some = slice(None, -1) if zero_snr else slice(None)  # where snr is 0 they have 0 / 0, and abar is not ours
        np.testing.assert_allclose(ours.model_input, scheduler.add_noise(x0, n, t), atol=1e-3 if zero_snr else 1e-5)
        np.testing.assert_allclose(ours.target, theirs, atol=1e-3 if zero_snr else 1e-5)
        clipped = torch.clamp(snr, max=5.0)
        weights = {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[name]
        ours = min_snr_weights(ours.sigma, name, 5.0)
        np.testing.assert_allclose(ours[some], weights[some], rtol=2e-3 if zero_snr else 2e-4)
