"""What a hypernetwork computes, and how a new one is made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.adapters import hypernetwork
from sd_jax.adapters.hypernetwork import ACTIVATIONS, INITIALISATIONS, Hypernetwork

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (5, 8))


def shapes(network):
    return jax.tree.map(lambda leaf: leaf.shape, network.layers)


def test_a_new_one_has_its_structure():
    make = lambda key: hypernetwork.init(key, (8, 6), (1, 1.5, 1), "relu", layer_norm=True)  # noqa: E731
    network = jax.jit(make)(KEY)
    norm = lambda n: {"norm_weight": (n,), "norm_bias": (n,)}  # noqa: E731
    layer = lambda n, m: {"weight": (m, n), "bias": (m,), **norm(m)}  # noqa: E731
    eight, six = [layer(8, 12), layer(12, 8)], [layer(6, 9), layer(9, 6)]
    assert shapes(network) == {"8": {"k": eight, "v": eight}, "6": {"k": six, "v": six}}
    assert network.layer_norm and network.dropout == (0, 0, 0) and float(network.strength) == 1
    leaves = jax.tree.leaves(network.layers)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves) and len({leaf.tobytes() for leaf in leaves}) > 16
    assert not hypernetwork.init(KEY, (8,)).layer_norm


@pytest.mark.parametrize(
    ("name", "deviation", "uniform"),
    [
        ("normal", 0.01, False),
        ("xavier_uniform", (2 / 300) ** 0.5, True),
        ("xavier_normal", (2 / 300) ** 0.5, False),
        ("kaiming_uniform", (2 / 100) ** 0.5, True),
        ("kaiming_normal", (2 / 100) ** 0.5, False),
    ],
)
def test_initialisations(name, deviation, uniform):
    assert len(INITIALISATIONS) == 5
    layer = hypernetwork.init(KEY, (100,), (1, 2, 1), weight_init=name, layer_norm=True).layers["100"]["v"][0]
    weight = np.asarray(layer["weight"])  # (200, 100): the deviation of 20,000 draws is within 2% of its mean
    assert abs(weight.std() / deviation - 1) < 0.02 and abs(weight.mean()) < 0.03 * deviation
    assert (np.abs(weight).max() < 1.74 * deviation) == uniform
    assert not layer["bias"].any() and not layer["norm_bias"].any()
    assert abs(np.asarray(layer["norm_weight"]).std() / 0.01 - 1) < 0.2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"layer_structure": (2, 1)}, r"layer_structure=\(2, 1\): give widths that begin and end with 1"),
        ({"layer_structure": (1,)}, "layer_structure"),
        ({"layer_structure": (1, 0, 1)}, "layer_structure"),
        ({"layer_structure": (1, float("nan"), 1)}, "layer_structure"),
        ({"activation": "Relu6"}, "activation='Relu6' is unknown: did you mean relu6"),
        ({"weight_init": "xavier"}, "weight_init='xavier' is unknown: did you mean xavier_"),
        ({"dropout": (0, 1, 0)}, "dropout"),
        ({"dropout": (0, 0.3)}, "dropout"),
        ({"widths": ()}, "of no widths"),
    ],
)
def test_what_is_none(given, said):
    with pytest.raises(ValueError, match=said):
        hypernetwork.init(KEY, **{"widths": (8,), **given})


def test_it_is_added_to_what_is_read():
    network = hypernetwork.init(KEY, (8,), weight_init="xavier_normal")
    for which in "kv":
        first, second = network.layers["8"][which]
        added = (X @ first["weight"].T) @ second["weight"].T
        for strength in (0.0, 1.0, -0.7):
            got = hypernetwork.apply(network.replace(strength=jnp.float32(strength)), X, which, 8)
            np.testing.assert_allclose(got, X + strength * added, atol=1e-5)
    np.testing.assert_array_equal(hypernetwork.apply(network, X[:, :6], "k", 6), X[:, :6])  # of another width


def test_activations_stand_between_layers_and_behind_the_last_where_asked():
    network = hypernetwork.init(KEY, (8,), (1, 1), "relu", weight_init="xavier_normal")
    (layer,) = network.layers["8"]["k"]
    inner = X @ layer["weight"].T
    np.testing.assert_allclose(hypernetwork.apply(network, X, "k", 8), X + inner, atol=1e-6)
    asked = network.replace(activate_output=True)
    np.testing.assert_allclose(hypernetwork.apply(asked, X, "k", 8), X + jax.nn.relu(inner), atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_keep_shape_and_type(name):
    for dtype in (jnp.float32, jnp.bfloat16):
        y = ACTIVATIONS[name](X.astype(dtype))
        assert y.shape == X.shape and y.dtype == dtype
    assert np.isfinite(np.asarray(jax.grad(lambda x: ACTIVATIONS[name](x).sum())(X))).all()


def test_dropout_is_for_training_alone():
    network = hypernetwork.init(KEY, (8,), (1, 64, 1), weight_init="xavier_normal", dropout=(0, 0.25, 0))
    network.layers["8"]["k"][0]["weight"] = jnp.zeros((512, 8))
    network.layers["8"]["k"][0]["bias"] = jnp.ones(512)
    network.layers["8"]["k"][1]["weight"] = jnp.ones((8, 512)) / 512
    rows = jnp.zeros((200, 8))
    np.testing.assert_allclose(hypernetwork.apply(network, rows, "k", 8), 1.0, atol=1e-5)
    drop = lambda keys, rows=rows: np.asarray(hypernetwork.apply(network, rows, "k", 8, keys))  # noqa: E731
    keys = jax.random.split(jax.random.key(3), 4)  # of four pictures of 50 rows each
    dropped = drop(keys)
    assert abs(dropped.mean() - 1) < 0.01 and abs(dropped[:, 0].std() / (0.25 / 0.75 / 512) ** 0.5 - 1) < 0.2
    assert len({picture.tobytes() for picture in dropped.reshape(4, 50, 8)}) == 4
    np.testing.assert_array_equal(drop(keys[2:3], rows[:50]), dropped[100:150])  # whatever lies beside it
    assert np.abs(drop(jax.random.split(jax.random.key(4), 4)) - dropped).max() > 0.01


def test_another_strength_or_other_weights_compile_nothing():
    apply = jax.jit(lambda network, x: hypernetwork.apply(network, x, "k", 8))
    one = hypernetwork.init(KEY, (8,), (1, 2, 1), "tanh", True)
    two = hypernetwork.init(jax.random.key(7), (8,), (1, 2, 1), "tanh", True)
    results = [apply(network.replace(strength=jnp.float32(t)), X) for network in (one, two) for t in (0.3, 1.0)]
    assert apply._cache_size() == 1
    assert len({np.asarray(y).tobytes() for y in results}) == 4


def test_it_works_in_the_type_of_what_is_read():
    network = hypernetwork.init(KEY, (8,), (1, 2, 1), "mish", True, "kaiming_normal")
    network = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), network)
    got = hypernetwork.apply(network, X.astype(jnp.bfloat16), "v", 8)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), hypernetwork.apply(network, X, "v", 8), atol=0.1)


def test_its_leaves_are_weights_and_strength():
    network = jax.eval_shape(lambda: hypernetwork.init(KEY, (8, 6)))
    leaves, treedef = jax.tree.flatten(network)
    assert len(leaves) == 2 * 2 * 2 * 2 + 1
    assert isinstance(jax.tree.unflatten(treedef, leaves), Hypernetwork)
    assert treedef != jax.tree.structure(network.replace(activation="relu"))
