"""Properties of the discrete schedules and of the ladders; parity is in test_parity_schedules.py."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion.denoiser import make_denoiser
from sd_jax.diffusion.samplers import sample
from sd_jax.diffusion.schedules import (
    BETA_SCHEDULES,
    DIFFUSERS_SPACINGS,
    MULTISTEP,
    SCHEDULES,
    ZERO_SNR_ABAR,
    alphas_cumprod,
    betas,
    make_ladder,
    make_sigmas,
    sigma_to_timestep,
    sigmas_of,
    timestep_to_sigma,
)
from sd_jax.types import NoiseScheduleConfig

SD = NoiseScheduleConfig()
FLOW = NoiseScheduleConfig(beta_schedule="rectified_flow", prediction_type="flow")
ZERO_SNR = NoiseScheduleConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_noise_grows_with_the_timestep(name):
    cfg = NoiseScheduleConfig(beta_schedule=name)
    abar, sigmas = alphas_cumprod(cfg), sigmas_of(cfg)
    assert sigmas.shape == (1000,) and sigmas.dtype == np.float64
    assert np.all(np.diff(sigmas) > 0) and np.all(np.isfinite(sigmas))
    np.testing.assert_allclose(1 / (1 + sigmas**2), abar, rtol=1e-9)


def test_rectified_flow_has_even_times():
    sigmas = sigmas_of(FLOW)
    np.testing.assert_allclose(sigmas / (1 + sigmas), (np.arange(1000) + 0.5) / 1000, rtol=1e-9)


def test_euler_walks_the_straight_line():
    """On the rectified flow, `euler` goes dz/dt = v in even steps of t (Esser et al. 2024, Eq. 1), with the v that a
    network says of z = (1 - t) x0 + t n and t."""
    n, picture = np.random.default_rng(0).standard_normal((2, 3, 4, 4, 2)).astype(np.float32)

    def velocity(z, timesteps, conditioning=None):  # of x0 ~ N(picture, 0.25)
        t = ((timesteps + 0.5) / 1000)[:, None, None, None]
        return ((t - 0.25 * (1 - t)) * (z - (1 - t) * picture) / (t**2 + 0.25 * (1 - t) ** 2)) - picture

    ladder = make_ladder("normal", 20, FLOW)
    ours = jax.jit(lambda x, sigmas: sample(make_denoiser(velocity, FLOW), x, sigmas, "euler"))(
        jnp.asarray(n) * ladder.start, jnp.asarray(ladder.sigmas)
    )
    times = np.append(np.linspace(0.9995, 0.0005, 20), 0.0)
    z = 0.9995 * n.astype(np.float64)  # t times the noise: at the first step nothing is known of the picture
    for t, after in zip(times[:-1], times[1:], strict=True):
        z = z + (after - t) * velocity(z, np.full(3, 1000 * t - 0.5))
    np.testing.assert_allclose(ours, z, atol=1e-4)
    spread = np.asarray(ours) - picture
    assert 0.3 < np.std(spread) < 0.7 and abs(np.corrcoef(spread.ravel(), n.ravel())[0, 1]) > 0.99


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


@pytest.mark.parametrize("sampler", ["euler", "ddim", "plms"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ladder(name, steps, sampler):
    ladder = make_ladder(name, steps, SD, sampler)
    sigmas = ladder.sigmas
    assert sigmas.shape == (steps + 1 + (name == "ddim_uniform" and steps == 7),)  # as ComfyUI: 1000 // 7 goes 8 times
    assert {part.dtype for part in ladder} == {np.dtype(np.float32)}
    assert np.all(np.diff(sigmas[:-1]) < 0) and sigmas[-2] >= sigmas[-1]
    assert sigmas[0] <= (14.615 if name.endswith("webui") else np.float32(sigmas_of(SD)[-1]))
    if name in DIFFUSERS_SPACINGS and sampler != "euler":
        abar = alphas_cumprod(SD)
        np.testing.assert_allclose(ladder.end, np.sqrt(abar[0]), rtol=1e-6)
    elif name == "log_linear":
        assert (sigmas[-1], ladder.end) == (np.float32(sigmas_of(SD)[0]), 1)
    else:
        assert (sigmas[-1], ladder.end) == (0, 1)
    if name == "leading" or (name in DIFFUSERS_SPACINGS and sampler != "euler"):
        np.testing.assert_allclose(ladder.start, np.sqrt(1 + sigmas[0].astype(float) ** 2), rtol=1e-6)
    else:
        assert ladder.start == sigmas[0]


def test_spacings_are_whole_timesteps():
    sigmas = sigmas_of(SD).astype(np.float32)
    want = {"leading": [751, 501, 251, 1], "trailing": [999, 749, 499, 249], "linspace": [999, 666, 333, 0]}
    for name, timesteps in want.items():
        np.testing.assert_array_equal(make_sigmas(name, 4, SD)[:-1], sigmas[timesteps])


@pytest.mark.parametrize(
    ("schedule", "steps", "cfg", "said"),
    [
        ("karas", 20, SD, "unknown schedule 'karas': did you mean karras\\? There are normal, karras"),
        ("SGM Uniform", 20, SD, "did you mean sgm_uniform"),
        ("xyz", 20, SD, "unknown schedule 'xyz': choose one of normal, karras"),
        ("normal", 0, SD, "at least 1"),
        ("leading", 1000, SD, "no 1000 different steps in 1000 timesteps"),
        ("leading", 1001, SD, "no 1001 different steps"),
        ("simple", 1001, SD, "no 1001 different steps"),
        ("lcm", 51, SD, "no 51 different steps"),
        ("trailing", 1001, SD, "no 1001 different steps"),
        ("linspace", 1001, SD, "no 1001 different steps"),
        ("normal", 20, NoiseScheduleConfig(beta_schedule="cosine"), "unknown beta_schedule 'cosine'"),
    ],
)
def test_mistakes_are_named(schedule, steps, cfg, said):
    with pytest.raises(ValueError, match=said):
        make_sigmas(schedule, steps, cfg)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_zero_terminal_snr(name):
    """sqrt(abar) is an affine function of what it was, with the same start and (almost) zero at the end."""
    cfg = NoiseScheduleConfig(beta_schedule=name, rescale_betas_zero_snr=True)
    before, after = np.sqrt(alphas_cumprod(NoiseScheduleConfig(beta_schedule=name))), np.sqrt(alphas_cumprod(cfg))
    np.testing.assert_allclose(after[0], before[0], rtol=1e-12)
    np.testing.assert_allclose(after[-1] ** 2, ZERO_SNR_ABAR, rtol=1e-12)
    slopes = np.diff(after)[:-1] / np.diff(before)[:-1]
    np.testing.assert_allclose(slopes, slopes[0], rtol=1e-6)
    np.testing.assert_allclose(np.cumprod(1 - betas(cfg)), after**2, rtol=1e-9)
    sigmas = sigmas_of(cfg)
    assert np.all(np.diff(sigmas) > 0)
    np.testing.assert_allclose(sigmas[-1], 4518.7637, rtol=1e-7)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "align_your_steps_webui"])
def test_ladders_of_zero_terminal_snr(name):
    sigmas = make_sigmas(name, 10, ZERO_SNR)
    assert np.all(np.isfinite(sigmas)) and np.all(np.diff(sigmas) < 0)
    if name in ("ddim_uniform", "leading"):  # these never show the network its last timestep
        assert sigmas[0] < 400
    else:
        np.testing.assert_allclose(sigmas[0], 4518.7637, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "measure"),
    [
        ("karras", lambda sigma: sigma ** (1 / 7)),
        ("exponential", np.log),
        ("polyexponential", np.log),
        ("kl_optimal", np.arctan),
        ("normal", lambda sigma: np.interp(np.log(sigma), np.log(sigmas_of(SD)), np.arange(1000))),
        ("sgm_uniform", lambda sigma: np.interp(np.log(sigma), np.log(sigmas_of(SD)), np.arange(1000))),
    ],
)
def test_even_in_their_measure(name, measure):
    sigmas = make_sigmas(name, 12, SD)[:-1].astype(float)
    places = measure(sigmas)
    np.testing.assert_allclose(np.diff(places), (places[-1] - places[0]) / 11, rtol=2e-3)
    assert sigmas[0] == np.float32(sigmas_of(SD)[-1])
    if name == "sgm_uniform":
        np.testing.assert_allclose(places[-1], 999 / 12, rtol=1e-4)
    else:
        np.testing.assert_allclose(sigmas[-1], sigmas_of(SD)[0], rtol=1e-6)


def test_options_of_a_schedule():
    ends = {"sigma_min": 0.1, "sigma_max": 10.0}
    for name in ("karras", "exponential", "polyexponential", "kl_optimal", "beta_webui"):
        np.testing.assert_allclose(make_sigmas(name, 9, SD, **ends)[[0, -2]], [10, 0.1], rtol=1e-6)
    bent = make_sigmas("polyexponential", 3, SD, rho=2.0, **ends)
    np.testing.assert_allclose(bent, [10, 0.1 * 100**0.25, 0.1, 0], rtol=1e-6)
    np.testing.assert_array_equal(make_sigmas("polyexponential", 9, SD), make_sigmas("exponential", 9, SD))
    np.testing.assert_allclose(make_sigmas("karras", 3, SD, rho=1.0, **ends), [10, 5.05, 0.1, 0], rtol=1e-6)
    np.testing.assert_array_equal(make_ladder("karras", 3, SD, rho=1.0, **ends).start, np.float32(10))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("normal", {"rho": 7.0}, "rho is for the schedules karras, polyexponential"),
        ("simple", {"sigma_max": 10.0}, "sigma_min and sigma_max are for the schedules karras"),
        ("karras", {"sigma_min": 20.0}, "0 < sigma_min < sigma_max is needed"),
        ("align_your_steps", {"family": "sd3"}, "no table for family 'sd3': only for sd1, sdxl, svd"),
    ],
)
def test_options_that_do_not_fit(name, options, said):
    with pytest.raises(ValueError, match=said):
        make_sigmas(name, 5, SD, **options)


def test_align_your_steps_tables():
    """NVIDIA's tables, as published; ComfyUI replaces the last entry by zero, A1111 appends zero."""
    published = {
        "sd1": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029],
        "sdxl": [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029],
        "svd": [700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002],
    }
    for family, table in published.items():
        np.testing.assert_allclose(make_sigmas("align_your_steps", 10, SD, family=family)[:-1], table[:-1], rtol=0.015)
        np.testing.assert_allclose(make_sigmas("align_your_steps_webui", 11, SD, family=family)[:-1], table, rtol=1e-6)
    between = make_sigmas("align_your_steps", 20, SD)
    np.testing.assert_allclose(between[::2], make_sigmas("align_your_steps", 10, SD), rtol=1e-6)
    np.testing.assert_allclose(between[1], math.sqrt(between[0] * between[2]), rtol=1e-6)


def test_beta_is_symmetric_and_counts_equal_timesteps_once():
    timesteps = np.interp(make_sigmas("beta", 20, SD)[:-1], sigmas_of(SD), np.arange(1000))
    np.testing.assert_allclose(timesteps[1:] + timesteps[:0:-1], 999, atol=1.01)  # Beta(a, a) is; rounding is not
    assert len(make_sigmas("beta", 300, SD)) < 301
    assert np.all(np.diff(make_sigmas("beta", 300, SD)) < 0)


def test_linear_quadratic_is_linear_then_quadratic():
    removed = 1 - make_sigmas("linear_quadratic", 12, SD).astype(float) / sigmas_of(SD)[-1]
    np.testing.assert_allclose(removed[:7], 0.025 / 6 * np.arange(7), atol=1e-6)
    np.testing.assert_allclose(np.diff(removed[6:], 2), np.diff(removed[6:], 2)[0], atol=1e-6)


@pytest.mark.parametrize("sampler", MULTISTEP)
def test_spacings_of_multistep_samplers(sampler):
    """diffusers spreads one timestep more than asked for and leaves out the cleanest."""
    sigmas = sigmas_of(SD).astype(np.float32)
    np.testing.assert_array_equal(make_sigmas("leading", 4, SD, sampler)[:-1], sigmas[[801, 601, 401, 201]])
    np.testing.assert_array_equal(make_sigmas("linspace", 4, SD, sampler)[:-1], sigmas[[999, 749, 500, 250]])
    np.testing.assert_array_equal(make_sigmas("trailing", 4, SD, sampler), make_sigmas("trailing", 4, SD))
