"""What the tests of the networks share: random parameters, relative errors and weights of a torch reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


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
        floor = 1e-4 * max(np.linalg.norm(leaf) for leaf in reference)
        for a, b in zip(ours, reference, strict=True):
            assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= tolerance * max(np.linalg.norm(b), floor)

    return check


@pytest.fixture(scope="session")
def from_torch():
    """`from_torch(module)` -> our parameter tree with the weights of a diffusers or transformers module."""

    def convert(module):
        tree = {}
        for name, tensor in module.state_dict().items():
            if name.endswith("position_ids"):
                continue
            parts = []
            for part in name.split("."):
                parts[-1:] = [f"{parts[-1]}_{part}"] if part.isdigit() else [*parts[-1:], part]
            value = tensor.detach().numpy()
            if parts[-1] == "weight":
                parts[-1] = "scale" if value.ndim == 1 else "embedding" if "embedding" in parts[-2] else "kernel"
            if "time_embedding" in parts and parts[-1] == "embedding":
                parts[-1] = "kernel"
            if parts[-1] == "kernel":
                value = value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
            node = tree
            for part in parts[:-1]:
                node = node.setdefault(part, {})
            node[parts[-1]] = jnp.asarray(value)
        return tree

    return convert
