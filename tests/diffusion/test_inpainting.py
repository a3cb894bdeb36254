"""On a Gaussian whose places depend on each other, so that what is kept must reach what is redrawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion.inpainting import within_mask
from sd_jax.diffusion.samplers import sample
from sd_jax.diffusion.samplers_ode import SamplerOptions
from sd_jax.diffusion.schedules import make_ladder
from sd_jax.types import NoiseScheduleConfig

SIZE, MEAN = (4, 6), 0.3
SHAPE = (2, *SIZE, 3)
RNG = np.random.default_rng(0)
CLEAN, NOISE = RNG.standard_normal((2, *SHAPE)).astype(np.float32)
MASK = np.zeros((2, *SIZE, 1), np.float32)
MASK[0, 1:3, 2:5], MASK[1, :, :2] = 1, 1
LADDER = make_ladder("karras", 8, NoiseScheduleConfig(), "euler").sigmas.astype(np.float32)


def covariance(reach):
    """Of the places of a picture, which are alike the nearer they are."""
    places = np.stack(np.mgrid[: SIZE[0], : SIZE[1]], -1).reshape(-1, 2)
    return np.exp(-np.linalg.norm(places[:, None] - places[None], axis=-1) / reach)


def gaussian(reach, array=jnp.asarray):
    """The exact denoiser of x0 ~ N(MEAN, covariance), for NumPy's or JAX's arrays."""
    values, vectors = (array(part) for part in np.linalg.eigh(covariance(reach)))

    def denoise(x, sigma):
        flat = x.reshape(len(x), -1, x.shape[-1]) - MEAN
        sigma = sigma * np.ones(len(x), x.dtype) if np.ndim(sigma) == 0 else sigma
        keep = values[None, :, None] / (values[None, :, None] + sigma[:, None, None] ** 2)
        bases = vectors.astype(x.dtype)
        turned = keep.astype(x.dtype) * (bases.T[None] @ flat)
        return (bases[None] @ turned).reshape(x.shape) + MEAN

    return denoise


def in_float32(array):
    return jnp.asarray(array, jnp.float32)


def ours(sampler="euler", reach=2.0, begin=0, from_noise=False, mask=MASK, recorded=None, diffusers_start=True):
    start = jnp.asarray(LADDER[begin]) if diffusers_start else None
    arrays = (jnp.asarray(array) for array in (CLEAN, NOISE, mask))
    denoise = within_mask(gaussian(reach, in_float32), *arrays, start)
    x = LADDER[begin] * NOISE + (0 if from_noise else CLEAN)
    walk = lambda x: sample(denoise, x, LADDER[begin:], sampler, noise=recorded)  # noqa: E731
    return np.asarray(jax.jit(walk)(jnp.asarray(x)))


def by_diffusers(begin, from_noise, recorded=None):
    """The scheme of its inpainting pipeline, in float64: Euler's step, or with recorded noise Euler's ancestral one;
    then everything outside the mask is the picture with the first noise at the next level."""
    denoise, mask, clean, noise = gaussian(2.0, np.asarray), *(a.astype(np.float64) for a in (MASK, CLEAN, NOISE))
    sigmas = LADDER[begin:].astype(np.float64)
    x = sigmas[0] * noise + (0 if from_noise else clean)
    for i, (now, then) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        up = 0.0 if recorded is None else np.sqrt(then**2 * (now**2 - then**2) / now**2)
        down = np.sqrt(then**2 - up**2)
        x = x + (x - denoise(x, now)) / now * (down - now)
        x = x if recorded is None else x + up * recorded[i]
        x = (1 - mask) * (clean + then * noise) + mask * x
    return x


@pytest.mark.parametrize("from_noise", [False, True])
@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_equals_the_scheme_of_diffusers(sampler, begin, from_noise):
    steps = len(LADDER) - 1 - begin
    recorded = np.random.default_rng(1).standard_normal((steps, *SHAPE)) if sampler != "euler" else None
    expected = by_diffusers(begin, from_noise, recorded)
    draws = None if recorded is None else jnp.asarray(recorded, jnp.float32)
    difference = np.abs(ours(sampler, begin=begin, from_noise=from_noise, recorded=draws) - expected).max()
    print(f"{sampler} from step {begin}, from noise {from_noise}: {difference:.1e}")
    assert difference < 1e-5


def test_start_matters_only_where_the_walk_begins_with_something_else_outside():
    np.testing.assert_allclose(ours(), ours(diffusers_start=False), atol=1e-5)
    begin = 4  # where x0 weighs as much as the noise
    blind, seeing = (ours(begin=begin, from_noise=True, diffusers_start=b) for b in (True, False))
    assert np.abs(blind - seeing).max() > 1e-2


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpmpp_2m", "ddim", "uni_pc", "deis"])
def test_what_is_kept_comes_back_and_what_is_redrawn_does_not(sampler):
    made = ours(sampler)
    kept = np.broadcast_to(MASK == 0, SHAPE)
    np.testing.assert_allclose(made[kept], CLEAN[kept], atol=2e-6)
    assert np.abs(made - CLEAN)[~kept].min() > 1e-4


def test_churn_is_kept_out_of_what_is_kept():
    denoise = within_mask(gaussian(2.0, in_float32), *(jnp.asarray(array) for array in (CLEAN, NOISE, MASK)))
    options, key = SamplerOptions(s_churn=5.0), jax.random.key(0)
    made = sample(denoise, jnp.asarray(CLEAN + LADDER[0] * NOISE), LADDER, "euler", rng=key, options=options)
    kept = np.broadcast_to(MASK == 0, SHAPE)
    np.testing.assert_allclose(np.asarray(made)[kept], CLEAN[kept], atol=2e-6)


def test_what_is_redrawn_fits_what_is_around_it():
    """Where all places are nearly one, each takes the value of the others; where none knows another, it does not."""
    surroundings = np.where(MASK > 0, np.nan, CLEAN)
    expected = np.nanmean(surroundings, (1, 2), keepdims=True)
    off = {}
    for reach in (1e4, 1e-2):
        made = np.where(MASK > 0, ours(reach=reach), np.nan)
        off[reach] = np.nanmean(np.abs(made - expected))
    assert off[1e4] < 0.3 * off[1e-2]


def test_masks_of_one_colour():
    plain = sample(gaussian(2.0, in_float32), jnp.asarray(CLEAN + LADDER[0] * NOISE), LADDER, "euler")
    np.testing.assert_allclose(ours(mask=np.ones_like(MASK)), plain, atol=1e-6)
    np.testing.assert_allclose(ours(mask=np.zeros_like(MASK)), CLEAN, atol=2e-6)


def test_sigma_may_be_of_each_image():
    denoise = within_mask(gaussian(2.0, in_float32), *(jnp.asarray(array) for array in (CLEAN, NOISE, MASK)))
    sigma = jnp.asarray([0.5, 3.0])
    both = denoise(jnp.asarray(CLEAN), sigma)
    for i in range(2):
        alone = denoise(jnp.asarray(CLEAN), sigma[i])
        np.testing.assert_allclose(both[i], alone[i], atol=1e-6)
