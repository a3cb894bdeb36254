"""Theorems on samplers: order of convergence, variance, number of model calls, independence of images, compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion import brownian
from sd_jax.diffusion.denoiser import make_denoiser
from sd_jax.diffusion.guidance import classifier_free
from sd_jax.diffusion.noise import image_keys, step_noise
from sd_jax.diffusion.samplers import SAMPLERS, SamplerOptions, count_draws, sample
from sd_jax.diffusion.samplers_restart import Segment, restart_ladder, segments_of, with_restarts
from sd_jax.diffusion.schedules import make_ladder
from sd_jax.types import Conditioning, NoiseScheduleConfig

SD = NoiseScheduleConfig()
MEAN, DEVIATION = 0.7, 0.5
SHAPE = (4, 4, 2)
LATENTS = np.random.default_rng(0).standard_normal((4, *SHAPE)).astype(np.float32)
STEPS = 24  # enough for restart to have one
DETERMINISTIC = [name for name in SAMPLERS if count_draws(name, STEPS) == 0]
STOCHASTIC = [name for name in SAMPLERS if count_draws(name, STEPS) > 0]


def gaussian(x, sigma):
    """The exact denoiser of x0 ~ N(MEAN, DEVIATION^2)."""
    keep = DEVIATION**2 / (DEVIATION**2 + sigma**2)
    return MEAN + keep * (x - MEAN)


def solution(x, sigma, sigma_end):
    """The probability-flow ODE of `gaussian`, solved."""
    return MEAN + (x - MEAN) * np.sqrt((DEVIATION**2 + sigma_end**2) / (DEVIATION**2 + sigma**2))


# --- convergence -----------------------------------------------------------------------------------------------------


def geometric(steps):
    return np.geomspace(10.0, 0.1, steps + 1)


def even(steps):
    return np.linspace(0.5, 0.1, steps + 1)


def gentle(steps):
    """Geometric in the end, but its first steps are so short that the low orders of a multistep start do no harm."""
    h = np.log(100) / steps
    grown = np.minimum(h, h**2 * 1.4 ** np.minimum(np.arange(2 * steps), 40))
    places = np.append(0, np.cumsum(grown))
    return 10.0 * np.exp(-places[places < np.log(100)])


def then_zero(steps):
    """For a sampler whose last step is of order 1: a step to 0 is exact."""
    return np.append(geometric(steps), 0.0)


ORDERS = [
    ("euler", 1, geometric, {}),
    ("ddim", 1, geometric, {}),
    ("heun", 2, geometric, {}),
    ("heunpp2", 1, geometric, {}),
    ("dpm_2", 2, geometric, {}),
    ("lms", 4, gentle, {}),
    ("lms", 3, gentle, {"order": 3}),
    ("plms", 3, even, {}),
    ("ipndm", 2, even, {}),
    ("deis", 3, gentle, {}),
    ("uni_pc", 3, then_zero, {}),
    ("uni_pc_bh2", 3, then_zero, {}),
    ("dpmpp_2m", 2, geometric, {}),
    ("euler_ancestral", 1, geometric, {"eta": 0.0}),
    ("dpm_2_ancestral", 2, geometric, {"eta": 0.0}),
    ("dpmpp_2s_ancestral", 2, geometric, {"eta": 0.0}),
    ("dpmpp_sde", 2, geometric, {"eta": 0.0}),
    ("dpmpp_2m_sde", 2, geometric, {"eta": 0.0}),
    ("dpmpp_2m_sde_heun", 2, geometric, {"eta": 0.0}),
    ("dpmpp_3m_sde", 2, geometric, {"eta": 0.0}),
]


@pytest.mark.parametrize(("sampler", "order", "ladder", "options"), ORDERS)
def test_order_of_convergence(sampler, order, ladder, options):
    """On ladders of all lengths by one compilation: they end a long one, of which the first steps are left out."""
    counts, length = np.array([32, 64, 128, 256]), 300
    options = SamplerOptions(**options)
    with jax.enable_x64(True):
        x = jnp.linspace(-20.0, 20.0, 8, dtype=jnp.float64).reshape(1, 2, 2, 2)
        noise = np.zeros((count_draws(sampler, length, options), *x.shape))
        run = jax.jit(lambda sigmas, start: sample(gaussian, x, sigmas, sampler, None, noise, None, options, start))
        errors = []
        for steps in counts:
            sigmas = ladder(steps)
            start = length + 1 - len(sigmas)
            end = run(np.append(np.linspace(20, sigmas[0], start, endpoint=False), sigmas), start)
            assert end.dtype == jnp.float64
            last = sigmas[sigmas > 0][-1]
            exact = solution(x, sigmas[0], last)
            errors.append(np.abs(end - (exact if sigmas[-1] else gaussian(exact, last))).max())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    print(f"{sampler}: slope {slope:.3f}, errors {errors}")
    assert run._cache_size() == 1
    assert abs(slope - order) < 0.2


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_solution_at_sigma_zero(sampler):
    x = jnp.asarray(LATENTS * 10)
    sigmas = np.append(np.geomspace(10, 0.01, 200), 0).astype(np.float32)
    end = jax.jit(lambda x, sigmas: sample(gaussian, x, sigmas, sampler))(x, sigmas)
    np.testing.assert_allclose(end, solution(np.asarray(x), 10, 0), atol=0.02)


# --- variance --------------------------------------------------------------------------------------------------------

CHAINS = [  # with their steps: more of them for what is of order 1
    ("euler_ancestral", {}, 400),
    ("dpm_2_ancestral", {}, 100),
    ("dpmpp_2s_ancestral", {}, 100),
    ("dpmpp_sde", {}, 100),
    ("dpmpp_sde", {"eta": 0.5}, 100),
    ("dpmpp_2m_sde", {}, 100),
    ("dpmpp_2m_sde", {"eta": 0.5}, 100),
    ("dpmpp_2m_sde_heun", {}, 100),
    ("dpmpp_3m_sde", {}, 100),
    ("ddpm", {}, 400),
    ("lcm", {}, 100),
    ("restart", {}, 100),
    ("ddim", {"eta": 0.7}, 400),
    ("euler", {"s_churn": 30.0}, 400),
    ("heun", {"s_churn": 30.0}, 100),
    ("dpm_2", {"s_churn": 30.0}, 100),
    ("heunpp2", {"s_churn": 30.0}, 400),
]


@pytest.mark.parametrize(("sampler", "options", "steps"), CHAINS)
def test_variance(sampler, options, steps):
    """The sampler is an affine map of x and its draws; image i is told the i-th of them, which gives every coefficient.

    So mean and variance are exact. They are near those of the data, not equal, since steps are finite. lcm is given the
    map that it is made for, from noise to the end of the ODE.
    """
    options = SamplerOptions(**options)
    sigmas = np.append(np.geomspace(20, 0.02, steps), 0)
    draws = count_draws(sampler, steps, options)
    told = np.eye(2 + draws)[:, :, None, None, None]  # of nothing, of x, then of the draws
    x = MEAN + told[1] * np.hypot(DEVIATION, sigmas[0])
    model = (
        gaussian
        if sampler != "lcm"
        else lambda x, sigma: MEAN + (x - MEAN) * jnp.sqrt(DEVIATION**2 / (DEVIATION**2 + sigma**2))
    )
    with jax.enable_x64(True):
        run = jax.jit(lambda x, sigmas, noise: sample(model, x, sigmas, sampler, noise=noise, options=options))
        ends = np.asarray(run(x, sigmas, told[2:])).ravel()
    coefficients, covariance = ends[1:] - ends[0], np.eye(1 + draws)
    if sampler == "dpmpp_sde":  # its two draws belong to overlapping intervals of one path
        for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            shared = np.sqrt((sigma - np.sqrt(sigma * following)) / (sigma - following))
            covariance[1 + 2 * i, 2 + 2 * i] = covariance[2 + 2 * i, 1 + 2 * i] = shared
    variance = coefficients @ covariance @ coefficients
    print(f"{sampler}: mean {ends[0]:.4f}, variance {variance:.4f}, of the data {DEVIATION**2}")
    np.testing.assert_allclose(ends[0], MEAN, atol=1e-3)
    np.testing.assert_allclose(variance, DEVIATION**2, rtol=0.05 if steps == 400 else 0.02)


def test_ancestral_variance_from_keys():
    """Against the exact variance of the discretised chain."""
    sigmas = np.append(np.geomspace(20, 0.02, 100), 0)
    variance = DEVIATION**2 + sigmas[0] ** 2
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        down = following**2 / sigma
        contraction = 1 + (down / sigma - 1) * sigma**2 / (DEVIATION**2 + sigma**2)
        variance = contraction**2 * variance + following**2 - down**2
    latents = np.random.default_rng(0).standard_normal((4, 64, 64, 2)).astype(np.float32)
    x, keys = jnp.asarray(MEAN + latents * np.float32(np.hypot(DEVIATION, sigmas[0]))), image_keys(0, 4)
    end = jax.jit(lambda x, sigmas: sample(gaussian, x, sigmas, "euler_ancestral", rng=keys))(x, sigmas)
    measured = float(jnp.var(end))
    print(f"euler_ancestral: variance {measured:.4f}, of the chain {variance:.4f}, of the data {DEVIATION**2}")
    np.testing.assert_allclose(measured, variance, rtol=0.03)
    np.testing.assert_allclose(float(end.mean()), MEAN, atol=0.02)


# --- noise -----------------------------------------------------------------------------------------------------------


def test_a_brownian_samplers_draws_are_increments_of_the_path():
    x, keys, sigmas = jnp.asarray(LATENTS[:2] * 10), image_keys(3, 2), np.array([10, 4, 1, 0.3], np.float32)
    increments = jax.jit(lambda *at: brownian.increments(keys, at[0], at[1:], SHAPE))
    ends = [(a, np.sqrt(a * b), b) for a, b in zip(sigmas[:-1], sigmas[1:], strict=True)]
    noise = np.concatenate([increments(*at) for at in ends])
    run = jax.jit(lambda rng, noise: sample(gaussian, x, sigmas, "dpmpp_sde", rng, noise))
    np.testing.assert_allclose(run(keys, None), run(None, noise), atol=2e-5)


def test_draw_d_is_the_step_noise_of_that_number():
    x, keys, sigmas = jnp.ones((2, *SHAPE)), image_keys(3, 2), np.array([10, 4, 1, 0.3], np.float32)
    noise = jax.jit(lambda keys: jnp.stack([step_noise(keys, draw, SHAPE) for draw in range(3)]))(keys)
    run = jax.jit(lambda rng, noise: sample(gaussian, x, sigmas, "lcm", rng, noise))
    np.testing.assert_allclose(run(keys, None), run(None, noise), atol=1e-6)


def test_more_steps_of_one_brownian_path_make_the_same_picture():
    x = jnp.asarray(LATENTS * 10)
    run = jax.jit(lambda keys, sigmas, start: sample(gaussian, x, sigmas, "dpmpp_2m_sde", rng=keys, start=start))
    fine = np.geomspace(10, 0.1, 241).astype(np.float32)
    coarse = np.append(np.linspace(20, 11, 180), fine[::4]).astype(np.float32)
    end, same, other = (
        run(image_keys(0, 4), fine, 0),
        run(image_keys(0, 4), coarse, 180),
        run(image_keys(9, 4), fine, 0),
    )
    likeness = [np.corrcoef(np.ravel(end), np.ravel(another))[0, 1] for another in (same, other)]
    print(f"correlation with the same path {likeness[0]:.3f}, with another {likeness[1]:.3f}")
    assert likeness[0] > 0.98 and likeness[1] < 0.5


def test_recorded_noise_replaces_keys():
    sigmas = np.array([10, 5, 1, 0], np.float32)
    x = jnp.ones((2, *SHAPE))
    zeros = sample(gaussian, x, sigmas, "euler_ancestral", noise=np.zeros((3, 2, *SHAPE), np.float32))
    assert np.ptp(zeros) < 1e-6
    with pytest.raises(ValueError, match="noise has the shape"):
        sample(gaussian, x, sigmas, "euler_ancestral", noise=np.zeros((2, 2, *SHAPE), np.float32))


def test_one_key_serves_a_batch():
    sigmas = np.array([10, 5, 1, 0.5], np.float32)
    run = jax.jit(lambda key: sample(gaussian, jnp.ones((2, *SHAPE)), sigmas, "euler_ancestral", rng=key))
    first, second = run(jax.random.key(0))
    assert not np.allclose(first, second)


# --- one image, one compilation --------------------------------------------------------------------------------------


def network(x, timestep, conditioning):
    """Something nonlinear that mixes nothing between images."""
    return jnp.tanh(x + conditioning.context.mean((1, 2))[:, None, None, None]) + timestep[:, None, None, None] / 999


def _conditioning(batch, value=0.3):
    return Conditioning(jnp.asarray(np.arange(batch)[:, None, None] * np.full((batch, 3, 2), value), jnp.float32))


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_sde"])
def test_batch_equals_singles(sampler):
    """With guidance and keys. Nothing but another shape is traced anew."""
    denoise = make_denoiser(network, SD)

    @jax.jit
    def pictures(ladder, latents, keys, cond, uncond, scale):
        guided = classifier_free(denoise, cond, uncond, scale)
        return sample(guided, latents * ladder.start, ladder.sigmas, sampler, rng=keys)

    for schedule, seed, prompt in [("normal", 0, 0.1), ("karras", 5, 0.3)]:
        ladder = make_ladder(schedule, 6, SD, sampler)
        inputs = (
            LATENTS,
            image_keys(seed, 4),
            _conditioning(4, prompt),
            _conditioning(4, -0.2),
            jnp.linspace(1.0, 7.0, 4),
        )
        batch = pictures(ladder, *inputs)
    assert pictures._cache_size() == 1
    for i in range(4):
        alone = pictures(ladder, *jax.tree.map(lambda a, i=i: a[i : i + 1], inputs))
        np.testing.assert_allclose(alone[0], batch[i], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_but_shapes_compiles(sampler):
    """Neither another ladder, nor another value of an option, nor another start, which equals a shorter ladder."""
    own = SAMPLERS[sampler].options
    count = count_draws(sampler, STEPS, own)
    noise = np.random.default_rng(0).standard_normal((count, *LATENTS.shape)).astype(np.float32)
    begin = None if sampler == "restart" else np.int32(20)

    @jax.jit
    def run(shift, sigmas, noise, options, start):
        x = LATENTS[: len(shift)] * sigmas[0 if start is None else start]
        denoise = lambda x, sigma: gaussian(x, sigma) + jnp.sin(x + shift[:, None, None, None])  # noqa: E731
        return sample(denoise, x, sigmas, sampler, noise=noise, options=options, start=start)

    for factor, start in [(1.0, begin and np.int32(0)), (0.8, begin)]:
        scale = lambda value, by=factor: np.asarray(min(value, 10) * by).astype(type(value))  # noqa: E731
        options = jax.tree.map(scale, own)
        sigmas = np.append(np.geomspace(10 * factor, 0.1, STEPS), 0).astype(np.float32)
        shift = np.linspace(0, 1, 4, dtype=np.float32)
        batch = run(shift, sigmas, noise, options, start)
        assert jnp.isfinite(batch).all()
    assert run._cache_size() == 1
    if begin is not None:
        used = count_draws(sampler, STEPS - 20, own)
        short = run(shift, sigmas[20:], noise[:used], options, None)
        np.testing.assert_allclose(batch, short, rtol=2e-5, atol=2e-5)


# --- the rest --------------------------------------------------------------------------------------------------------

CALLS = {  # on five steps to 0, and on five steps to 0.5
    **dict.fromkeys(SAMPLERS, (5, 5)),
    **dict.fromkeys(["heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "restart"], (9, 10)),
    "heunpp2": (12, 12),
    "plms": (6, 6),
    "pndm": (6, 6),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_model_calls(sampler):
    """Counted where they run: a step to sigma 0 costs one call."""
    counted = []

    def denoise(x, sigma):
        jax.debug.callback(lambda s: counted.append(float(s)), sigma)
        return gaussian(x, sigma)

    noise = np.zeros((count_draws(sampler, 5), 1, *SHAPE))
    run = jax.jit(lambda x, sigmas: sample(denoise, x, sigmas, sampler, noise=noise))
    for end, calls in zip((0, 0.5), CALLS[sampler], strict=True):
        counted.clear()
        jax.block_until_ready(run(jnp.ones((1, *SHAPE)), np.array([10, 6, 3, 2, 1, end], np.float32)))
        jax.effects_barrier()
        assert len(counted) == calls and all(s > 0 for s in counted)


@pytest.mark.parametrize("sampler", ["heun", "heunpp2", "dpmpp_sde", "lms", "plms", "uni_pc", "deis", "lcm", "restart"])
def test_one_step_to_zero_is_the_denoised_picture_in_float32(sampler):
    """Whatever the precision of x and of the model; one sampler of each kind."""
    x = jnp.ones((1, *SHAPE), jnp.bfloat16) * 3
    noise = np.ones((count_draws(sampler, 1), 1, *SHAPE))
    denoise = lambda x, sigma: gaussian(x, sigma).astype(jnp.bfloat16)  # noqa: E731
    end = jax.jit(lambda x, sigmas: sample(denoise, x, sigmas, sampler, noise=noise))(x, np.array([10.0, 0.0]))
    assert end.dtype == jnp.float32
    np.testing.assert_allclose(end, denoise(x.astype(jnp.float32), 10.0).astype(jnp.float32), rtol=1e-6)


def test_callback_hears_of_every_step():
    heard = {}

    def callback(step, x, denoised):
        heard[int(step)] = float(x.mean()), float(denoised.mean())

    sigmas = np.array([10, 5, 1, 0], np.float32)
    x = jnp.full((1, *SHAPE), 4.0)
    end = jax.jit(lambda x: sample(gaussian, x, sigmas, "euler", callback=callback))(x)
    jax.block_until_ready(end)
    jax.effects_barrier()
    assert sorted(heard) == [0, 1, 2]
    np.testing.assert_allclose(heard[0][0], 4.0)
    np.testing.assert_allclose(heard[2][1], float(end.mean()), rtol=1e-6)


def test_restart_ladder():
    """Down, up, and down again through levels that are the ladder's own, ends included."""
    plain = jnp.asarray(np.append(np.geomspace(10, 0.03, 24), 0), jnp.float32)
    expanded, segmented = jax.jit(restart_ladder), jax.jit(with_restarts, static_argnums=1)
    ladder = np.asarray(expanded(plain))
    assert len(ladder) == 24 + 1 + 1 and (ladder[0], ladder[-2], ladder[-1]) == (10, plain[-2], 0)
    [jump] = np.flatnonzero(np.diff(ladder) > 0)
    assert 0.05 < ladder[jump] < 0.2 < 1 < ladder[jump + 1] < 3
    assert ladder[jump] in ladder[jump + 1 :] and ladder[jump + 1] in ladder[:jump]
    np.testing.assert_array_equal(expanded(plain[5:]), plain[5:])  # 19 steps: no restart

    twice = np.asarray(segmented(plain, (Segment(0.1, 1.0, 3, 2), Segment(2.0, 5.0, 4, 1))))
    assert np.sum(np.diff(twice) > 0) == 3 and len(twice) == 25 + 2 * 4 + 5
    pointless = np.asarray(segmented(plain[-3:], (Segment(0.1, 2.0, 3, 1),)))
    assert np.all(np.diff(pointless) <= 0)


def test_restart_without_restarts_is_heun():
    assert segments_of(19) == ()
    x, sigmas = jnp.asarray(LATENTS * 10), np.append(np.geomspace(10, 0.1, 10), 0).astype(np.float32)
    run = jax.jit(lambda sampler: sample(gaussian, x, sigmas, sampler), static_argnums=0)
    np.testing.assert_array_equal(run("restart"), run("heun"))


def test_mistakes_are_named():
    x, sigmas = jnp.ones((1, *SHAPE)), np.array([1, 0], np.float32)
    with pytest.raises(ValueError, match="unknown sampler 'eular': the nearest are euler, "):
        sample(gaussian, x, sigmas, "eular")
    with pytest.raises(ValueError, match="unknown sampler 'DPM\\+\\+ 2M': the nearest are dpmpp_2m, "):
        sample(gaussian, x, sigmas, "DPM++ 2M")
    with pytest.raises(ValueError, match="'euler_ancestral' is stochastic: give it rng"):
        sample(gaussian, x, sigmas, "euler_ancestral")
    with pytest.raises(ValueError, match="'euler' is stochastic: give it rng"):
        sample(gaussian, x, sigmas, "euler", options=SamplerOptions(s_churn=1.0))
    with pytest.raises(ValueError, match="'heun' has no option eta: it has s_churn, s_tmin, s_tmax, s_noise"):
        sample(gaussian, x, sigmas, "heun", options=SamplerOptions(eta=1.0))
    with pytest.raises(ValueError, match="'dpmpp_2m' has no option eta: it has none"):
        sample(gaussian, x, sigmas, "dpmpp_2m", options=SamplerOptions(eta=1.0))
    with pytest.raises(ValueError, match="sigmas has 1 levels: a step needs 2"):
        sample(gaussian, x, sigmas[:1], "euler")
    with pytest.raises(ValueError, match="'restart' has a ladder of its own and no start"):
        sample(gaussian, x, sigmas, "restart", start=0)
