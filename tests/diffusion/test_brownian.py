"""The Brownian path: one path whatever is asked of it, with the statistics of Brownian motion."""

import functools

import jax
import numpy as np

from sd_jax.diffusion.brownian import increments, path
from sd_jax.diffusion.noise import image_keys, starting_noise, step_noise

SHAPE = (32, 32, 2)
values = jax.jit(functools.partial(path, shape=SHAPE))
drawn = jax.jit(functools.partial(increments, shape=SHAPE))


def test_increments_add_up_whatever_the_steps():
    """A long interval is the sum of its parts, to the rounding of float32."""
    keys, fine = image_keys(0, 2), np.geomspace(14.6, 0.03, 25).astype(np.float32)
    parts = [drawn(keys, a, (b,))[0] * np.sqrt(a - b) for a, b in zip(fine[:-1], fine[1:], strict=True)]
    for first, last in [(0, 24), (0, 12), (7, 9)]:
        whole = drawn(keys, fine[first], (fine[last],))[0] * np.sqrt(fine[first] - fine[last])
        np.testing.assert_allclose(sum(parts[first:last]), whole, atol=1e-5 * np.sqrt(fine[first]))


def test_increments_are_independent_standard_normal():
    levels = np.append(np.geomspace(80, 0.002, 10), 0).astype(np.float32)
    noise = np.concatenate([drawn(image_keys(1, 2), a, (b,)) for a, b in zip(levels[:-1], levels[1:], strict=True)])
    flat = noise.reshape(len(noise) * 2, -1)
    assert flat.dtype == np.float32
    np.testing.assert_allclose(flat.mean(1), 0, atol=4 / np.sqrt(flat.shape[1]))
    np.testing.assert_allclose(flat.var(1), 1, atol=4 * np.sqrt(2 / flat.shape[1]))
    correlation = np.corrcoef(np.concatenate([flat, starting_noise(image_keys(1, 2), SHAPE).reshape(2, -1)]))
    assert np.all(np.abs(correlation - np.eye(len(correlation))) < 5 / np.sqrt(flat.shape[1]))


def test_variance_grows_with_sigma_from_zero():
    times = np.array([0, 0.03, 1, 14.6, 4000], np.float32)
    w = np.asarray(values(image_keys(0, 2), times))
    assert np.all(w[0] == 0)
    np.testing.assert_allclose(w[1:].var((1, 2, 3, 4)), times[1:], rtol=0.1)


def test_overlapping_intervals_share_their_noise():
    """As the two draws of dpmpp_sde do: the covariance of two increments is the length of what they share."""
    noise = [drawn(image_keys(0, 2), np.float32(4), (np.float32(end),)).ravel() for end in (3, 1)]
    np.testing.assert_allclose(np.corrcoef(noise)[0, 1], np.sqrt(1 / 3), atol=0.05)


def test_an_image_has_its_path_in_any_batch():
    times = np.array([0.1, 0.5, 2, 7, 100], np.float32)
    here, there = values(image_keys(5, 2), times), values(image_keys(6, 2), times)
    np.testing.assert_array_equal(here[:, 1], there[:, 0])
    assert np.abs(np.corrcoef(np.ravel(here[:, 0]), np.ravel(here[:, 1]))[0, 1]) < 0.1


def test_a_path_is_not_made_of_the_steps_noise():
    keys = image_keys(0, 2)
    noise = [drawn(keys, np.float32(4), (np.float32(3),))[0], *(step_noise(keys, i, SHAPE) for i in range(4))]
    assert np.all(np.abs(np.corrcoef(np.reshape(noise, (5, -1))) - np.eye(5)) < 0.1)


def test_an_empty_interval_has_no_noise():
    assert np.all(np.asarray(drawn(image_keys(0, 2), np.float32(2), (np.float32(2),))) == 0)
