"""The aesthetic heads: normalised inside, dropout in training alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.models.aesthetic import KINDS, NUMBERS, AestheticHead
from sd_jax.models.presets import AestheticConfig

FEATURES = jnp.asarray(np.random.default_rng(1).normal(size=(5, 24)), jnp.float32)


@functools.cache
def made(kind: str):
    """-> (the head, random parameters, biases included, and its jitted function of both and of features)."""
    head, rng = AestheticHead(AestheticConfig(kind, 24)), np.random.default_rng(0)
    shapes = jax.eval_shape(head.init, jax.random.key(0), FEATURES)
    draw = lambda leaf: jnp.asarray(rng.normal(0, leaf.shape[0] ** -0.5, leaf.shape), jnp.float32)  # noqa: E731
    return head, jax.tree.map(draw, shapes), jax.jit(head.apply)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formula(kind):
    _, params, run = made(kind)
    x = np.asarray(FEATURES) / np.linalg.norm(FEATURES, axis=1, keepdims=True)
    if kind == "linear":
        layers = [params["params"]]
    else:
        layers = [params["params"][f"layers_{number}"] for number in NUMBERS[kind]]
    for i, layer in enumerate(layers):
        x = x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        if kind == "mlp_relu" and i < len(layers) - 1:
            x = np.maximum(x, 0)
    np.testing.assert_allclose(run(params, FEATURES), x[:, 0], rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_length_of_an_embedding_does_not_matter(kind):
    _, params, run = made(kind)
    np.testing.assert_allclose(run(params, FEATURES), run(params, 37.0 * FEATURES), rtol=1e-5)
    assert np.isfinite(run(params, jnp.zeros_like(FEATURES))).all()


def test_affine_unless_relu():
    for kind, affine in (("mlp", True), ("mlp_relu", False)):
        _, params, run = made(kind)
        middle = run(params, jnp.zeros_like(FEATURES))
        assert np.allclose(run(params, FEATURES) - middle, middle - run(params, -FEATURES), rtol=1e-3) == affine


def test_dropout_only_where_asked_for():
    head, params, run = made("mlp")
    dropped = jax.jit(lambda key: head.apply(params, FEATURES, False, rngs={"dropout": key}))
    a, b = (dropped(jax.random.key(i)) for i in range(2))
    assert not np.allclose(a, b) and not np.allclose(a, run(params, FEATURES))


def test_what_does_not_fit_is_named():
    head, params, _ = made("mlp")
    with pytest.raises(ValueError, match="embeddings of 7 numbers for a head of width 24"):
        head.apply(params, jnp.zeros((1, 7)))
    with pytest.raises(ValueError, match="kind='cubic'"):
        AestheticConfig("cubic", 4)
