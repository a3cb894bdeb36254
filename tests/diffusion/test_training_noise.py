"""Noise that is not white, against its formulas in float64 and against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion.noise import image_keys, normal
from sd_jax.diffusion.training_noise import perturbed, with_offset, with_pyramid
from tests.reference import diffusers

DRAW = 5
SHAPES = [(12, 20, 4), (9, 8, 1)]
jitted_pyramid = jax.jit(with_pyramid, static_argnums=(2, 3))


def white(count, shape):
    return normal(image_keys(0, count), 1, shape)


def numbers(i, *folds):
    """The key of image i, folded: the draws as the module's words describe them."""
    key = image_keys(0, 8)[i]
    for fold in folds:
        key = jax.random.fold_in(key, fold)
    return key


def test_offset():
    n = white(3, SHAPES[0])
    got = with_offset(n, image_keys(0, 3), DRAW, 0.3)
    for i in range(3):
        b = np.asarray(jax.random.normal(numbers(i, DRAW), (4,)), np.float64)
        want = np.asarray(n[i], np.float64) + 0.3 * b
        np.testing.assert_allclose(got[i], want, atol=1e-6)
    moved = np.asarray(got - n)
    assert np.ptp(moved, axis=(1, 2)).max() < 1e-6 and np.unique(moved[:, 0, 0].round(5)).size == 12


def test_perturbed():
    n = white(3, SHAPES[0])
    got = perturbed(n, image_keys(0, 3), DRAW, 0.1)
    for i in range(3):
        xi = np.asarray(jax.random.normal(numbers(i, DRAW), SHAPES[0]), np.float64)
        np.testing.assert_allclose(got[i], np.asarray(n[i], np.float64) + 0.1 * xi, atol=1e-6)


def stretched_by_hand(x, height, width):
    """Bilinear, pixel by pixel: the four neighbours of a centre, those beyond the edge being the edge."""
    out = np.zeros((height, width, x.shape[-1]))
    for y in range(height):
        for z in range(width):
            for row, of_row in neighbours(y, height, x.shape[0]):
                for column, of_column in neighbours(z, width, x.shape[1]):
                    out[y, z] += of_row * of_column * x[row, column]
    return out


def neighbours(place, size, count):
    at = max(0.0, (place + 0.5) * count / size - 0.5)
    low = min(int(at), count - 1)
    return [(low, 1 - (at - low)), (min(low + 1, count - 1), at - low)]


def stretched_by_torch(x, height, width):
    diffusers()  # or the test is skipped
    import torch

    stretched = torch.nn.Upsample(size=(height, width), mode="bilinear")(torch.from_numpy(x).permute(2, 0, 1)[None])
    return stretched[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("discount", [0.35, 0.9])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stretched", [stretched_by_hand, pytest.param(stretched_by_torch, marks=pytest.mark.parity)])
def test_pyramid(stretched, shape, discount):
    """As its authors' loop goes, but for the last line: c is that of all draws, not of these.

    c is known because the sum is linear: the squares of what each number of noise gives to each pixel.
    """
    height, width, channels = shape
    n = white(3, shape)
    got = jitted_pyramid(n, image_keys(0, 3), DRAW, discount)
    for i in range(3):
        total, variance = 2**0.5 * np.asarray(n[i], np.float64), 2.0
        for k in range(1, 10):
            of_ratio, of_noise = jax.random.split(numbers(i, DRAW, k))
            ratio = float(jax.random.uniform(of_ratio, (), jnp.float32, 2.0, 4.0)) ** k
            h, w = max(1, int(height / ratio)), max(1, int(width / ratio))
            drawn = jax.random.normal(of_noise, (height // 2**k, width // 2**k, channels))
            coarse = np.asarray(drawn, np.float64)[:h, :w]
            total = total + discount**k * stretched(coarse, height, width)
            alone = stretched(np.eye(h * w).reshape(h, w, h * w), height, width)
            variance += discount ** (2 * k) * np.mean(np.sum(alone**2, axis=-1))
            if h == 1 or w == 1:
                break
        np.testing.assert_allclose(got[i], total / variance**0.5, atol=2e-6)


def test_pyramid_has_unit_variance_and_moves_means():
    n = white(1024, (8, 8, 4))
    got = np.asarray(jitted_pyramid(n, image_keys(0, 1024), DRAW, 0.6))
    assert abs(np.mean(got**2) - 1) < 0.03
    assert np.std(got.mean(axis=(1, 2))) > 2 * np.std(np.asarray(n).mean(axis=(1, 2)))


@pytest.mark.parametrize("make", [with_offset, with_pyramid, perturbed])
def test_an_image_does_not_see_its_neighbours(make):
    n, keys = white(5, (5, 4, 2)), image_keys(0, 5)
    run = jax.jit(lambda n, keys: make(n, keys, DRAW, 0.4))
    np.testing.assert_allclose(run(n, keys)[3:], run(n[3:], keys[3:]), atol=1e-6)
    assert len({float(x) for x in run(n, keys)[:, 0, 0, 0]}) == 5
