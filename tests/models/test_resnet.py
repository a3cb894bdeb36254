import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.models.resnet import ResnetBlock


@pytest.mark.parametrize("features", [8, 12])
def test_shortcut_appears_only_where_the_width_changes(features, initialise):
    x, time = jnp.ones((1, 4, 4, 8)), jnp.ones((1, 16))
    block = ResnetBlock(features, norm_num_groups=4)
    params = initialise(block, x, time)
    assert ("conv_shortcut" in params) == (features != 8)
    assert block.apply({"params": params}, x, time).shape == (1, 4, 4, features)


def test_without_time_there_is_no_projection_of_it(initialise):
    assert "time_emb_proj" not in initialise(ResnetBlock(8, norm_num_groups=4), jnp.ones((1, 4, 4, 8)))


def test_is_the_identity_plus_a_branch(initialise):
    """With a zero last convolution nothing but the input is left."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 8)), jnp.float32)
    block = ResnetBlock(8, norm_num_groups=4)
    params = initialise(block, x)
    params["conv2"] = {name: jnp.zeros_like(value) for name, value in params["conv2"].items()}
    np.testing.assert_array_equal(block.apply({"params": params}, x), x)
