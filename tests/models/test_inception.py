"""FID's InceptionV3 but for its weights; test_parity_judges.py compares it with torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sd_jax.models import inception


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def mixed(params, x, branches, pool, features):
    block = inception._Mixed(branches, pool, features, jnp.float32, jnp.float32)
    return np.asarray(block.apply({"params": params}, x))


def conv(kernel):
    """Parameters of a convolution whose normalisation does nothing."""
    features = kernel.shape[-1]
    zeros, ones = jnp.zeros(features), jnp.ones(features)
    return {
        "conv": {"kernel": jnp.asarray(kernel, jnp.float32)},
        "bn": {"scale": ones, "bias": zeros, "running_mean": zeros, "running_var": ones - 1e-3},
    }


def test_it_has_its_22_million_parameters():
    shapes = jax.eval_shape(inception.InceptionV3().init, jax.random.key(0), jnp.zeros((1, 75, 75, 3)))["params"]
    names = traverse_util.flatten_dict(shapes, sep="/")
    learnt = {name: leaf for name, leaf in names.items() if "running" not in name}
    # torchvision's inception_v3 has 23,834,568 without its auxiliary head, of which fc has 2048 * 1000 + 1000
    assert sum(leaf.size for leaf in learnt.values()) == 23_834_568 - 2_049_000
    assert names["Mixed_6b/branch7x7_2/conv/kernel"].shape == (1, 7, 128, 128)
    assert names["Mixed_7c/branch3x3dbl_3b/bn/running_var"].shape == (384,)


def test_averages_do_not_count_the_padding():
    x = np.ones((1, 4, 5, 1), np.float32)
    params = {"a": conv(np.ones((1, 1, 1, 1))), "branch_pool": conv(np.ones((1, 1, 1, 1)))}
    y = mixed(params, x, ((("a", 1, 1, 1),),), "average", 1)
    np.testing.assert_allclose(y, np.ones((1, 4, 5, 2)), rtol=1e-6)


def test_the_last_block_takes_the_maximum_around_each_place():
    x = np.abs(normal(1, 4, 5, 1))
    params = {"a": conv(np.ones((1, 1, 1, 1))), "branch_pool": conv(np.ones((1, 1, 1, 1)))}
    y = mixed(params, x, ((("a", 1, 1, 1),),), "max", 1)
    padded = np.pad(x[0, :, :, 0], 1, constant_values=-np.inf)
    expected = [[padded[i : i + 3, j : j + 3].max() for j in range(5)] for i in range(4)]
    np.testing.assert_allclose(y[0, :, :, 1], expected, rtol=1e-6)


def test_a_block_that_halves_joins_branches_and_maxima_of_whole_windows():
    x = np.abs(normal(1, 7, 8, 1))
    kernel = np.abs(normal(3, 3, 1, 1, seed=1))
    y = mixed({"a": conv(kernel)}, x, ((("a", 1, 3, 3),),), "max", None)
    windows = [[x[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3, 0] for j in range(3)] for i in range(3)]
    assert y.shape == (1, 3, 3, 2)
    np.testing.assert_allclose(y[0, :, :, 0], [[(w * kernel[..., 0, 0]).sum() for w in row] for row in windows], 1e-5)
    np.testing.assert_allclose(y[0, :, :, 1], [[w.max() for w in row] for row in windows], 1e-6)


def test_normalisation_is_by_running_statistics():
    x = normal(2, 3, 3, 4)
    parts = {
        name: normal(4, seed=i) for i, name in enumerate(("scale", "bias", "running_mean", "running_var"), start=1)
    }
    parts["running_var"] = np.abs(parts["running_var"])
    y = inception._FrozenBatchNorm(jnp.float32, jnp.float32).apply({"params": parts}, x)
    expected = (x - parts["running_mean"]) / np.sqrt(parts["running_var"] + 1e-3) * parts["scale"] + parts["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_small_pictures_are_named():
    with pytest.raises(ValueError, match="a picture of 80x64 is too small for Inception: its sides need 75 pixels"):
        inception.InceptionV3().apply({"params": {}}, jnp.zeros((1, 64, 80, 3)))
