"""Theorems on samplers: order of convergence, variance, number of model calls, independence of images, compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion.denoiser import make_denoiser
from sd_jax.diffusion.guidance import classifier_free
from sd_jax.diffusion.noise import image_keys
from sd_jax.diffusion.samplers import SAMPLERS, sample
from sd_jax.diffusion.schedules import make_ladder
from sd_jax.types import Conditioning, NoiseScheduleConfig

SD = NoiseScheduleConfig()
MEAN, DEVIATION = 0.7, 0.5
SHAPE = (4, 4, 2)
LATENTS = np.random.default_rng(0).standard_normal((4, *SHAPE)).astype(np.float32)


def gaussian(x, sigma):
    """The exact denoiser of x0 ~ N(MEAN, DEVIATION^2)."""
    keep = DEVIATION**2 / (DEVIATION**2 + sigma**2)
    return MEAN + keep * (x - MEAN)


def solution(x, sigma, sigma_end):
    """The probability-flow ODE of `gaussian`, solved."""
    return MEAN + (x - MEAN) * np.sqrt((DEVIATION**2 + sigma_end**2) / (DEVIATION**2 + sigma**2))


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(sampler, order):
    counts = np.array([32, 64, 128, 256])
    with jax.enable_x64(True):
        x = jnp.linspace(-20.0, 20.0, 8, dtype=jnp.float64).reshape(1, 2, 2, 2)
        errors = []
        for steps in counts:
            sigmas = np.geomspace(10.0, 0.1, steps + 1)
            end = sample(gaussian, x, sigmas, sampler)
            assert end.dtype == jnp.float64
            errors.append(np.abs(end - solution(x, 10.0, 0.1)).max())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    print(f"{sampler}: slope {slope:.3f}, errors {errors}")
    assert abs(slope - order) < 0.2


@pytest.mark.parametrize("sampler", ["euler", "ddim", "heun", "dpmpp_2m"])
def test_solution_at_sigma_zero(sampler):
    x = jnp.asarray(LATENTS * 10)
    end = sample(gaussian, x, np.append(np.geomspace(10, 0.01, 200), 0).astype(np.float32), sampler)
    np.testing.assert_allclose(end, solution(np.asarray(x), 10, 0), atol=0.02)


def test_ancestral_variance():
    """Against the exact variance of the discretised chain, and near that of the data."""
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
    np.testing.assert_allclose(measured, DEVIATION**2, rtol=0.1)
    np.testing.assert_allclose(float(end.mean()), MEAN, atol=0.02)


def network(x, timestep, conditioning):
    """Something nonlinear that mixes nothing between images."""
    return jnp.tanh(x + conditioning.context.mean((1, 2))[:, None, None, None]) + timestep[:, None, None, None] / 999


def _conditioning(batch, value=0.3):
    return Conditioning(jnp.asarray(np.arange(batch)[:, None, None] * np.full((batch, 3, 2), value), jnp.float32))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_batch_equals_singles(sampler):
    denoise = make_denoiser(network, SD)
    ladder = make_ladder("karras", 6, SD, sampler)

    @jax.jit
    def pictures(latents, keys, cond, uncond, scale):
        guided = classifier_free(denoise, cond, uncond, scale)
        return sample(guided, latents * ladder.start, ladder.sigmas, sampler, rng=keys)

    inputs = LATENTS, image_keys(5, 4), _conditioning(4), _conditioning(4, -0.2), jnp.linspace(1.0, 7.0, 4)
    batch = pictures(*inputs)
    for i in range(4):
        alone = pictures(*jax.tree.map(lambda a, i=i: a[i : i + 1], inputs))
        np.testing.assert_allclose(alone[0], batch[i], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_but_shapes_compiles(sampler):
    traces = []

    @jax.jit
    def pictures(ladder, keys, cond, uncond, scale, shift):
        traces.append(1)
        predict = lambda x, t, c: network(x, t, c) + shift  # noqa: E731
        guided = classifier_free(make_denoiser(predict, SD), cond, uncond, scale)
        return sample(guided, LATENTS[:2] * ladder.start, ladder.sigmas, sampler, rng=keys) * ladder.end

    for schedule, seed, prompt, scale, shift in [("normal", 0, 0.3, 7.5, 0.0), ("karras", 9, 0.1, 2.0, 0.5)]:
        ladder = make_ladder(schedule, 5, SD, sampler)
        args = image_keys(seed, 2), _conditioning(2, prompt), _conditioning(2, 0.0)
        assert jnp.isfinite(pictures(ladder, *args, jnp.float32(scale), jnp.float32(shift))).all()
    assert sum(traces) == 1


@pytest.mark.parametrize(
    ("sampler", "end", "calls"),
    [("euler", 0, 5), ("euler_ancestral", 0, 5), ("ddim", 0, 5), ("dpmpp_2m", 0, 5), ("heun", 0, 9), ("heun", 0.5, 10)],
)
def test_model_calls(sampler, end, calls):
    """Counted where they run: Heun's last step to sigma 0 costs one call."""
    counted = []

    def denoise(x, sigma):
        jax.debug.callback(lambda s: counted.append(float(s)), sigma)
        return gaussian(x, sigma)

    sigmas = np.array([10, 6, 3, 2, 1, end], np.float32)
    x = jnp.ones((1, *SHAPE))
    noise = np.zeros((5, 1, *SHAPE))
    end = jax.jit(lambda x, sigmas: sample(denoise, x, sigmas, sampler, noise=noise))(x, sigmas)
    jax.block_until_ready(end)
    jax.effects_barrier()
    assert len(counted) == calls and all(s > 0 for s in counted)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_to_zero_is_the_denoised_picture(sampler):
    x = jnp.ones((1, *SHAPE)) * 3
    end = sample(gaussian, x, np.array([10.0, 0.0], np.float32), sampler, noise=np.ones((1, 1, *SHAPE)))
    np.testing.assert_allclose(end, gaussian(x, jnp.float32(10)), rtol=1e-6)


def test_recorded_noise_replaces_keys():
    sigmas = np.array([10, 5, 1, 0], np.float32)
    x = jnp.ones((2, *SHAPE))
    zeros = sample(gaussian, x, sigmas, "euler_ancestral", noise=np.zeros((3, 2, *SHAPE), np.float32))
    assert np.ptp(zeros) < 1e-6
    with pytest.raises(ValueError, match="noise has the shape"):
        sample(gaussian, x, sigmas, "euler_ancestral", noise=np.zeros((2, 2, *SHAPE), np.float32))


def test_one_key_serves_a_batch():
    sigmas = np.array([10, 5, 1, 0.5], np.float32)
    first, second = sample(gaussian, jnp.ones((2, *SHAPE)), sigmas, "euler_ancestral", rng=jax.random.key(0))
    assert not np.allclose(first, second)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_half_precision_is_sampled_in_float32(sampler):
    denoise = lambda x, sigma: gaussian(x, sigma).astype(jnp.bfloat16)  # noqa: E731
    x = jnp.ones((1, *SHAPE), jnp.bfloat16)
    end = sample(denoise, x, np.array([3, 1, 0], np.float32), sampler, noise=np.zeros((2, 1, *SHAPE)))
    assert end.dtype == jnp.float32


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


def test_mistakes_are_named():
    x, sigmas = jnp.ones((1, *SHAPE)), np.array([1, 0], np.float32)
    with pytest.raises(ValueError, match="unknown sampler 'eular': choose one of euler, euler_ancestral"):
        sample(gaussian, x, sigmas, "eular")
    with pytest.raises(ValueError, match="'euler_ancestral' is stochastic: give it rng"):
        sample(gaussian, x, sigmas, "euler_ancestral")
