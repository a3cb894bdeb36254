"""ESRGAN's networks: sizes, and what they are made of; equality with spandrel's is in test_parity_rrdb.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.models import rrdb
from sd_jax.models.presets import ModelSpec, RRDBConfig, SRVGGConfig

SMALL = {"features": 4, "blocks": 1, "growth": 2}
SIZES = [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (1, 4)]


def shape_of(config, height, width, dtype=jnp.float32):
    network = rrdb.upscaler(config, dtype)
    made, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.zeros((2, height, width, 3)))
    assert made.dtype == jnp.float32
    return made.shape


@pytest.mark.parametrize(("scale", "unshuffle"), SIZES)
def test_sizes(scale, unshuffle):
    assert shape_of(RRDBConfig(scale, unshuffle, **SMALL), 8, 12) == (2, 8 * scale, 12 * scale, 3)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_sizes_of_the_compact_one(scale):
    assert shape_of(SRVGGConfig(scale, 4, 1), 5, 7, jnp.bfloat16) == (2, 5 * scale, 7 * scale, 3)


def test_sizes_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="picture of 12x6: this upscaler takes multiples of 4 pixels"):
        shape_of(RRDBConfig(1, 4, **SMALL), 6, 12)


@pytest.mark.parametrize("fields", [{"scale": 3}, {"unshuffle": 3}, {"scale": 0}])
def test_configs_that_cannot_be(fields):
    with pytest.raises(ValueError, match="scales are 1, 2, 4, 8 or 16"):
        RRDBConfig(**fields)


def test_pixels_become_channels_and_back():
    """Channel, row, column: the first channel of a square is red at its top left, the second red beside it."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6, 3)), jnp.float32)
    channels = rrdb.pixels_to_channels(x, 2)
    assert channels.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(channels[1, 1, 2], x[1, 2:4, 4:6].transpose(2, 0, 1).ravel())
    np.testing.assert_array_equal(rrdb.channels_to_pixels(channels, 2), x)


def test_a_compact_network_of_zeros_repeats_pixels(initialise):
    network = rrdb.SRVGGNet(SRVGGConfig(2, 4, 1))
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 3, 4, 3)), jnp.float32)
    params = jax.tree.map(jnp.zeros_like, initialise(network, image))
    made = network.apply({"params": params}, image)
    np.testing.assert_allclose(made, image.repeat(2, 1).repeat(2, 2), atol=1e-6)


def test_specs_tell_the_two_apart():
    for config in (RRDBConfig(2, 2, **SMALL), SRVGGConfig(4, 8, 2), None):
        spec = ModelSpec(upscaler=config)
        assert ModelSpec.from_dict(spec.to_dict()) == spec


def test_what_a_new_dense_block_adds_is_small():
    block = rrdb._DenseBlock(2, jnp.float32, jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 4)), jnp.float32)
    made, _ = jax.jit(block.init_with_output)(jax.random.key(0), x)
    assert 0 < np.linalg.norm(made - x) < 0.05 * np.linalg.norm(x)
