"""What the tests of the networks share: random parameters, relative errors and weights of a torch reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sd_jax.checkpoints.keys_diffusers import from_diffusers
from sd_jax.checkpoints.tensors import lazy


@pytest.fixture(scope="session")
def initialise():
    """`initialise(module, *inputs)` -> random parameters in which no array is constant, biases and norms included."""

    def run(module, *inputs, seed=0, **keywords):
        shapes = jax.eval_shape(lambda key: module.init(key, *inputs, **keywords), jax.random.key(0))["params"]
        rng = np.random.default_rng(seed)
        draw = lambda path, leaf: jnp.asarray(  # noqa: E731
            rng.normal(1.0 if path[-1].key == "scale" else 0.0, 0.1, leaf.shape), leaf.dtype
        )
        return jax.tree_util.tree_map_with_path(draw, shapes)

    return run


@pytest.fixture(scope="session")
def relative_error():
    """`relative_error(ours, reference)` = |ours - reference| / |reference|, in the Euclidean norm."""

    def measure(ours, reference):
        ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
        assert ours.shape == reference.shape, f"{ours.shape} against {reference.shape}"
        return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))

    return measure


@pytest.fixture(scope="session")
def assert_trees_close(relative_error):
    """Every array within `tolerance` of the other's norm, or of the largest norm where its own is rounding noise."""

    def check(ours, reference, tolerance=1e-5):
        ours, reference = jax.tree.leaves(ours), jax.tree.leaves(reference)
        floor = 1e-3 * max(np.linalg.norm(leaf) for leaf in reference)
        for a, b in zip(ours, reference, strict=True):
            assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= tolerance * max(np.linalg.norm(b), floor)

    return check


@pytest.fixture(scope="session")
def from_torch():
    """`from_torch(part, module, config)` -> our parameters with the weights of a diffusers or transformers module."""

    def convert(part, module, config):
        tensors = {name: lazy(tensor.detach().numpy()) for name, tensor in module.state_dict().items()}
        ours = from_diffusers(part, tensors, config, "the reference")
        return traverse_util.unflatten_dict({name: jnp.asarray(np.asarray(t)) for name, t in ours.items()}, sep="/")

    return convert
