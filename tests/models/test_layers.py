import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax import flops
from sd_jax.models.layers import (
    Downsample,
    GroupNorm,
    LayerNorm,
    Upsample,
    convolve,
    moments_by_rows,
    moments_in_one_pass,
    timestep_embedding,
)

NHWC = jax.lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))
PLAIN = nn.Conv(8, (3, 3), padding=((1, 1), (1, 1)), conv_general_dilated=convolve)


def picture(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(0.3, 1.0, shape), dtype)


@pytest.mark.parametrize("shape", [(2, 6, 4, 16), (3, 10, 16), (1, 16)])
def test_group_norm_is_flax_group_norm(shape, initialise):
    x = picture(*shape)
    ours, theirs = GroupNorm(4, 1e-5), nn.GroupNorm(4, epsilon=1e-5)
    params = initialise(ours, x)
    np.testing.assert_allclose(ours.apply({"params": params}, x), theirs.apply({"params": params}, x), atol=2e-6)


def test_group_norm_survives_an_offset_far_above_the_spread(initialise):
    """E[x^2] - E[x]^2 in float32 would lose the variance of such an input altogether."""
    x = picture(2, 16, 16, 8) + 1000.0
    params = initialise(GroupNorm(4), x)
    exact = np.asarray(x, np.float64).reshape(2, 256, 4, 2)
    exact = (exact - exact.mean((1, 3), keepdims=True)) / np.sqrt(exact.var((1, 3), keepdims=True) + 1e-5)
    exact = exact.reshape(x.shape) * np.asarray(params["scale"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(GroupNorm(4).apply({"params": params}, x), exact, atol=2e-3)


def test_group_norm_gradient_is_that_of_flax(initialise, assert_trees_close):
    x, weights = picture(2, 4, 4, 8), picture(2, 4, 4, 8, seed=1)
    params = initialise(GroupNorm(4), x)
    gradient = lambda m: jax.grad(lambda p, y: (m.apply({"params": p}, y) * weights).sum(), (0, 1))(params, x)  # noqa: E731
    assert_trees_close(gradient(GroupNorm(4)), gradient(nn.GroupNorm(4, epsilon=1e-5)))


def test_group_norm_takes_its_statistics_in_float32(initialise):
    x = picture(1, 32, 32, 8, dtype=jnp.bfloat16) + jnp.asarray(8, jnp.bfloat16)
    params = initialise(GroupNorm(4), x)
    half = GroupNorm(4, dtype=jnp.bfloat16).apply({"params": params}, x)
    full = GroupNorm(4).apply({"params": params}, x.astype(jnp.float32))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), full, atol=2e-2)


@pytest.mark.parametrize("moments", [moments_by_rows, moments_in_one_pass])
def test_both_ways_to_the_moments_agree(moments):
    x = picture(2, 6, 5, 3) + jnp.asarray([0.0, 10.0, -1000.0])[None, None, None]
    mean, variance = moments(x)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(mean, exact.mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(variance, exact.var((1, 2)), rtol=1e-3)


def test_layer_norm_is_flax_layer_norm(initialise):
    x = picture(2, 5, 16)
    params = initialise(LayerNorm(), x)
    np.testing.assert_allclose(
        LayerNorm().apply({"params": params}, x), nn.LayerNorm(1e-5).apply({"params": params}, x), atol=2e-6
    )
    assert LayerNorm(dtype=jnp.bfloat16).apply({"params": params}, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_group_norm_names_the_channels_that_do_not_divide():
    with pytest.raises(ValueError, match="6 channels do not divide into norm_num_groups=4"):
        GroupNorm(4).init(jax.random.key(0), jnp.zeros((1, 2, 2, 6)))


@pytest.mark.parametrize(
    ("size", "new"),
    [((4, 4), None), ((3, 5), None), ((1, 1), None), ((3, 5), (5, 9)), ((3, 5), (6, 9)), ((1, 2), (1, 4))],
)
def test_upsample_is_nearest_and_a_convolution(size, new, initialise):
    """With a new size, of the picture without its last row or column: nothing is seen of what was left out."""
    x = picture(2, *size, 8)
    params = initialise(Upsample(), x)
    nearest = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    nearest = nearest if new is None else nearest[:, : new[0], : new[1]]
    expected = nn.Conv(8, (3, 3), padding=1).apply({"params": params["conv"]}, nearest)
    np.testing.assert_allclose(Upsample().apply({"params": params}, x, new), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 7), (9, 12)])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (4, 2)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 1), (0, 1)), ((2, 0), (1, 3))])
def test_gradients_of_a_convolution_are_those_of_lax(size, kernel, strides, padding):
    x, weights = picture(2, *size, 5), picture(*kernel, 5, 6)
    gradients = [
        jax.grad(lambda x, w: jnp.sin(by(x, w, strides, padding, dimension_numbers=NHWC)).sum(), argnums=(0, 1))  # noqa: B023
        for by in (convolve, jax.lax.conv_general_dilated)
    ]
    for ours, theirs in zip(*(gradient(x, weights) for gradient in gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_frozen_kernel_has_no_gradient_computed():
    x, weights = picture(2, 8, 8, 5), picture(3, 3, 5, 6)
    loss = lambda x, w: jnp.square(convolve(x, w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NHWC)).sum()  # noqa: E731
    once = flops.count(loss, x, weights)
    assert flops.count_gradient(loss, x, weights) == 2 * once
    assert flops.count_gradient(lambda w, x: loss(x, w), weights, x) == 2 * once
    assert flops.count_gradient(lambda both: loss(*both), (x, weights)) == 3 * once


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="others take every order alike")
@pytest.mark.parametrize("layer", [PLAIN, Downsample(), Upsample()], ids=["plain", "down", "up"])
def test_in_a_loop_every_convolution_is_one_that_the_cpu_has_a_fast_routine_for(layer, initialise):
    pictures = picture(3, 2, 8, 8, 8)
    params = initialise(layer, pictures[0])

    def of_all(params, pictures):
        loss = lambda params, x: jnp.square(layer.apply({"params": params}, x)).mean()  # noqa: E731
        return jax.lax.map(lambda x: jax.grad(loss, argnums=(0, 1))(params, x), pictures)

    program = jax.jit(of_all).lower(params, pictures).compile().as_text()
    orders = re.findall(r" convolution\(.*dim_labels=([^,]+)", program)
    assert "while(" in program and len(orders) >= 3 and set(orders) == {"b01f_01io->b01f"}


def test_downsample_pads_as_asked(initialise):
    x = picture(1, 6, 4, 8)
    params = initialise(Downsample(), x)
    halved = lambda padding: nn.Conv(8, (3, 3), 2, padding=(padding, padding)).apply({"params": params["conv"]}, x)  # noqa: E731
    np.testing.assert_allclose(Downsample().apply({"params": params}, x), halved((1, 1)), atol=1e-5)
    np.testing.assert_allclose(Downsample(asymmetric=True).apply({"params": params}, x), halved((0, 1)), atol=1e-5)
    assert halved((1, 1)).shape == (1, 3, 2, 8)


def test_timestep_embedding_takes_fractions():
    low, middle, high = timestep_embedding(jnp.asarray([500.0, 500.5, 501.0]), 32)
    assert low.shape == (32,) and low.dtype == jnp.float32
    np.testing.assert_allclose(low[:1], np.cos([500.0]), atol=1e-4)  # the first frequency is 1, cosines come first
    assert np.linalg.norm(middle - low) < np.linalg.norm(high - low)


@pytest.mark.parity
def test_timestep_embedding_is_that_of_diffusers():
    import torch
    from diffusers.models.embeddings import get_timestep_embedding

    timesteps = np.asarray([0.0, 1.0, 37.25, 999.0], np.float32)
    expected = get_timestep_embedding(torch.tensor(timesteps), 320, flip_sin_to_cos=True, downscale_freq_shift=0)
    np.testing.assert_allclose(timestep_embedding(jnp.asarray(timesteps), 320), expected.numpy(), atol=1e-4)
