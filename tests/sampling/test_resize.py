import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.sampling.resize import METHODS, resize_latents

NOISE = np.random.default_rng(0).standard_normal((2, 6, 5, 4)).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(12, 10), (9, 7), (6, 5), (4, 3), (1, 1), (6, 11)])
def test_sizes_and_what_is_flat_stays_flat(method, size):
    assert resize_latents(NOISE, *size, method).shape == (2, *size, 4)
    flat = jnp.broadcast_to(jnp.asarray([1.0, -2.0, 0.0, 0.5])[None, None, None], (2, 6, 5, 4))
    resized = resize_latents(flat, *size, method)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, np.broadcast_to(flat[:, :1, :1], resized.shape), atol=3e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_size_changes_nothing(method):
    np.testing.assert_allclose(resize_latents(NOISE, 6, 5, method), NOISE, atol=1e-6)


def test_values_by_hand():
    """Twice as wide: the new middles lie a quarter and three quarters of the way between the old ones."""
    row = np.asarray([0.0, 1.0, 3.0], np.float32).reshape(1, 1, 3, 1)
    values = lambda method: resize_latents(row, 1, 6, method).ravel()  # noqa: E731
    np.testing.assert_allclose(values("nearest"), [0, 0, 1, 1, 3, 3])
    np.testing.assert_allclose(values("bilinear"), [0, 0.25, 0.75, 1.5, 2.5, 3])
    # Keys' weights with a = -3/4 for what lies 5/4, 1/4, 3/4 and 7/4 away: -27, 225, 67 and -9 of 256.
    # Beyond the border the last value is repeated.
    expected = [-27, 67 - 9 * 3, 225 - 27 * 3, 225 + (67 - 9) * 3, 67 + (225 - 27) * 3, -27 + (225 + 67 - 9) * 3]
    np.testing.assert_allclose(values("bicubic"), np.asarray(expected) / 256, atol=1e-6)


def test_bislerp_turns_along_the_arc_and_keeps_lengths():
    pair = np.asarray([[3.0, 0.0], [0.0, 1.0]], np.float32).reshape(1, 1, 2, 2)
    between = resize_latents(pair, 1, 4)[0, 0]
    angles = np.asarray([0, 1, 3, 4]) * np.pi / 8
    lengths = np.asarray([3, 2.5, 1.5, 1])
    np.testing.assert_allclose(between, lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], -1), atol=1e-6)


def test_bislerp_of_vectors_without_an_arc_between_them():
    def between(first, second):
        return resize_latents(np.asarray([first, second], np.float32).reshape(1, 1, 2, 2), 1, 4)[0, 0]

    np.testing.assert_allclose(between([1, 1], [2, 2]), [[1, 1], [1, 1], [1, 1], [2, 2]], atol=1e-6)  # the first
    np.testing.assert_allclose(between([1, 0], [-3, 0])[1:3], [[0, 0], [-2, 0]], atol=1e-6)  # a blend
    np.testing.assert_allclose(between([0, 0], [2, 0])[1], [2 * np.sin(np.pi / 8) / 4, 0], atol=1e-6)


def test_bislerp_keeps_the_variance_of_noise_that_bilinear_loses():
    noise = np.random.default_rng(1).standard_normal((1, 48, 48, 4)).astype(np.float32)
    variance = {method: resize_latents(noise, 96, 96, method).var() for method in ("bilinear", "bislerp")}
    assert variance["bilinear"] < 0.45 and variance["bislerp"] > 0.8


def test_unknown_upscaler_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="unknown latent upscaler 'Bicubic2': did you mean bicubic"):
        resize_latents(NOISE, 4, 4, "Bicubic2")
