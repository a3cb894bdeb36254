"""LPIPS by (Eq. 2) on a tiny trunk; test_parity_judges.py compares the whole with torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.models.perceptual import LPIPS, VGGFeatures, _Weights

SIZE = {"widths": (4, 6), "depths": (1, 2)}


def image(seed=0, batch=2):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (batch, 8, 12, 3)), jnp.float32)


@jax.jit
def distance(params, a, b):
    return LPIPS(**SIZE).apply({"params": params}, a, b)


@pytest.fixture(scope="module")
def params(initialise):
    return initialise(LPIPS(**SIZE), image(), image())


def test_names_and_sizes_are_those_of_vgg16():
    shapes = jax.eval_shape(LPIPS().init, jax.random.key(0), *[jnp.zeros((1, 16, 16, 3))] * 2)["params"]
    convolutions = {name for name in shapes if name.startswith("features_")}
    assert convolutions == {f"features_{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}
    assert sum(leaf.size for name in convolutions for leaf in jax.tree.leaves(shapes[name])) == 14_714_688
    widths = [shapes[f"lin{i}"]["model_1"]["kernel"].shape for i in range(5)]
    assert widths == [(1, 1, width, 1) for width in (64, 128, 256, 512, 512)]


def test_equals_its_equation(params):
    a, b = image(0), image(1)
    trunk = {name: value for name, value in params.items() if name.startswith("features")}
    stages = [VGGFeatures(**SIZE).apply({"params": trunk}, x) for x in (a, b)]
    expected = np.zeros(2)
    for i, pair in enumerate(zip(*stages, strict=True)):
        of_a, of_b = (np.asarray(h, np.float64) / (np.linalg.norm(h, axis=-1, keepdims=True) + 1e-10) for h in pair)
        weights = np.asarray(params[f"lin{i}"]["model_1"]["kernel"], np.float64)[0, 0, :, 0]
        expected += (((of_a - of_b) ** 2) @ weights).mean(axis=(1, 2))
    assert np.abs(expected).min() > 1e-3
    np.testing.assert_allclose(distance(params, a, b), expected, rtol=1e-4)


def test_of_an_image_and_itself_it_is_zero(params):
    np.testing.assert_allclose(distance(params, image(), image()), [0.0, 0.0], atol=1e-12)


def test_new_weights_are_ones():
    """So that a trunk without them makes a distance."""
    y, variables = _Weights(jnp.float32).init_with_output(jax.random.key(0), image())
    assert variables["params"]["model_1"]["kernel"].shape == (1, 1, 3, 1)
    np.testing.assert_allclose(y, image().sum(-1), rtol=1e-5, atol=1e-6)


def test_its_gradient_is_that_of_the_distance(params):
    target, x, t = image(0), image(1), 0.1
    loss = jax.jit(lambda x: distance(params, target, x).sum())
    gradient = jax.jit(jax.grad(loss))(x)
    along = (float(loss(x + t * gradient)) - float(loss(x - t * gradient))) / (2 * t)
    assert along == pytest.approx(float(jnp.vdot(gradient, gradient)), rel=0.05)


def test_features_that_are_all_zero_have_a_finite_gradient(params):
    dark = {**params, "features_0": {**params["features_0"], "bias": jnp.full((4,), -1e3)}}  # no ReLU lets a thing by
    value, gradient = jax.value_and_grad(lambda x: distance(dark, image(), x).sum())(image(1))
    assert float(value) >= 0 and np.isfinite(gradient).all()


def test_half_precision_is_near(params):
    half = LPIPS(**SIZE, dtype=jnp.bfloat16).apply({"params": params}, image(), image(1))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, distance(params, image(), image(1)), rtol=0.1, atol=2e-3)


def test_small_images_are_named(params):
    with pytest.raises(ValueError, match="a picture of 9x1 is too small for LPIPS: its sides need 2 pixels"):
        distance(params, jnp.zeros((1, 1, 9, 3)), jnp.zeros((1, 1, 9, 3)))
