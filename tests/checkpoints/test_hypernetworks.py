"""Hypernetworks as A1111's files, both ways."""

import jax
import numpy as np
import pytest

from sd_jax.adapters import hypernetwork
from sd_jax.checkpoints import CheckpointError, hypernetworks, read_safetensors, write_torch
from sd_jax.checkpoints.files import open_any

STRUCTURES = [
    {},
    {"layer_structure": (1, 2, 2, 1), "activation": "relu"},
    {"layer_structure": (1, 1.5, 1), "activation": "swish", "layer_norm": True, "activate_output": True},
    {"layer_structure": (1, 2, 2, 1), "activation": "mish", "layer_norm": True, "dropout": (0, 0.1, 0.35, 0)},
    {"dropout": (0, 0.5, 0.25)},  # behind the last layer too, where A1111 itself puts none
]


def of(widths=(8, 6), **words):
    """One of random numbers, norms and biases included; strength 1."""
    made, rng = jax.eval_shape(lambda: hypernetwork.init(jax.random.key(0), widths, **words)), np.random.default_rng(0)
    made = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), made)
    return made.replace(strength=np.float32(1))


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("given", STRUCTURES)
def test_round_trips(tmp_path, given):
    wanted = of(**given)
    hypernetworks.save(tmp_path / "style.pt", wanted.replace(strength=np.float32(0.5)), step=40)  # which is not in it
    assert_same(hypernetworks.load(tmp_path / "style.pt"), wanted)
    assert hypernetworks.is_hypernetwork(open_any(tmp_path / "style.pt").tensors)
    first = (tmp_path / "style.pt").read_bytes()
    hypernetworks.save(tmp_path / "style.pt", hypernetworks.load(tmp_path / "style.pt"), step=40, overwrite=True)
    assert (tmp_path / "style.pt").read_bytes() == first


def test_half_precision_stays(tmp_path):
    wanted = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), of())
    hypernetworks.save(tmp_path / "a.pt", wanted)
    found = hypernetworks.load(tmp_path / "a.pt")
    assert found.layers["8"]["k"][0]["weight"].dtype == np.float16 and found.strength.dtype == np.float32


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ({}, [0, 1]),
        ({"activation": "relu"}, [0, 2]),
        ({"activation": "relu", "activate_output": True}, [0, 2]),
        ({"layer_norm": True}, [0, 1, 2, 3]),
        ({"activation": "relu", "layer_norm": True}, [0, 2, 3, 4]),
        ({"activation": "relu", "layer_norm": True, "activate_output": True}, [0, 2, 3, 5]),
        ({"activation": "relu", "dropout": (0, 0.3, 0)}, [0, 3]),
        ({"layer_structure": (1, 2, 2, 1), "activation": "tanh", "dropout": (0, 0.3, 0, 0)}, [0, 3, 5]),
        (
            {"layer_structure": (1, 2, 2, 1), "activation": "tanh", "layer_norm": True, "dropout": (0, 0.3, 0.3, 0)},
            [0, 2, 4, 6, 8, 9],
        ),
    ],
)
def test_layers_are_numbered_as_modules_are(tmp_path, given, numbers):
    hypernetworks.save(tmp_path / "a.pt", of(widths=(4,), **given))
    names = list(open_any(tmp_path / "a.pt").tensors)
    wanted = [f"4.{part}.linear.{n}.{leaf}" for part in (0, 1) for n in numbers for leaf in ("weight", "bias")]
    assert names == wanted


def rewritten(path, change, network=None):
    """A file whose facts or tensors are changed, and what it was made of."""
    network = of(widths=(4,)) if network is None else network
    hypernetworks.save(path, network, overwrite=True)
    tensors = {name: np.asarray(tensor) for name, tensor in open_any(path).tensors.items()}
    parts = [
        {name.removeprefix(f"4.{n}."): array for name, array in tensors.items() if name.startswith(f"4.{n}.")}
        for n in (0, 1)
    ]
    facts = {"layer_structure": [1, 2, 1], "activation_func": network.activation, "activate_output": False}
    write_torch.write_object(path, change(parts, facts))
    return network


def test_the_oldest_files(tmp_path):
    """Of NovelAI's kind: two linear layers and nothing said; and with an optimiser's state in it."""
    names = {"linear.0": "linear1", "linear.1": "linear2"}
    old = lambda part: {names[name[:8]] + name[8:]: array for name, array in part.items()}  # noqa: E731
    moments = {"state": {0: {"step": 5, "exp_avg": np.ones((2, 2), np.float32)}}}
    wanted = rewritten(
        tmp_path / "a.pt", lambda parts, facts: {4: tuple(map(old, parts)), "optimizer_state_dict": moments}
    )
    assert_same(hypernetworks.load(tmp_path / "a.pt"), wanted.replace(activate_output=True, dropout=(0.0, 0.0, 0.0)))


@pytest.mark.parametrize(
    ("facts", "dropout"),
    [
        ({"use_dropout": False, "last_layer_dropout": True}, (0, 0, 0, 0)),
        ({"use_dropout": True}, (0, 0.3, 0, 0)),
        ({"use_dropout": True, "last_layer_dropout": True}, (0, 0.3, 0.3, 0)),
        ({"use_dropout": True, "dropout_structure": [0, 0.1, 0, 0]}, (0, 0.1, 0, 0)),
    ],
)
def test_dropout_in_the_words_of_older_files(tmp_path, facts, dropout):
    network = of(widths=(4,), layer_structure=(1, 2, 2, 1), activation="relu", dropout=dropout)
    said = {"layer_structure": [1, 2, 2, 1], "activation_func": "relu", "activate_output": False, **facts}
    rewritten(tmp_path / "a.pt", lambda parts, _: {4: tuple(parts), **said}, network)
    assert hypernetworks.load(tmp_path / "a.pt").dropout == dropout


def cut(parts):
    return tuple({**part, "linear.0.bias": part["linear.0.bias"][:3]} for part in parts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda parts, facts: {4: parts, **facts, "is_layer_norm": True}, "4.0.linear.2.weight is missing"),
        (lambda parts, facts: {4: parts, **facts, "activation_func": "relu"}, "4.0.linear.1.weight is unexpected"),
        (lambda parts, facts: {4: parts, **facts, "layer_structure": [1, 3, 1]}, r"is \(8, 4\), not \(12, 4\)"),
        (lambda parts, facts: {4: cut(parts), **facts}, r"4.1.linear.0.bias is \(3,\), not \(8,\)"),
        (lambda parts, facts: {4: parts[:1], **facts}, "4.1.linear.0.weight is missing"),
        (
            lambda parts, facts: {4: parts, **facts, "activation_func": "prelu"},
            "activation='prelu' is unknown",
        ),
        (lambda parts, facts: {4: parts, **facts, "activation_func": [1]}, "is unknown"),
        (lambda parts, facts: {4: parts, **facts, "layer_structure": "1, 2, 1"}, "layer_structure is no short list"),
        (lambda parts, facts: {4: parts, **facts, "layer_structure": [1.0] * 101}, "layer_structure is no short list"),
        (lambda parts, facts: {4: parts, **facts, "layer_structure": [1, 2]}, "give widths that begin and end with 1"),
        (lambda parts, facts: {4: parts, **facts, "layer_structure": [1, float("inf"), 1]}, "begin and end with 1"),
        (lambda parts, facts: {4: parts, **facts, "dropout_structure": [0, 0.3]}, "as many shares as layer_structure"),
        (lambda parts, facts: {"x": parts, **facts}, "no hypernetwork, its tensors are x.0.linear.0.weight;"),
        (
            lambda parts, facts: {4: tuple({n: a * np.float32("nan") for n, a in part.items()} for part in parts)},
            "4.0.linear.0.weight holds numbers that are not finite",
        ),
        (
            lambda parts, facts: {4: tuple({n: a.astype(np.int32) for n, a in part.items()} for part in parts)},
            "4.0.linear.0.weight holds int32",
        ),
    ],
)
def test_what_is_none(tmp_path, change, said):
    rewritten(tmp_path / "a.pt", lambda parts, facts: change(tuple(parts), facts))
    with pytest.raises(CheckpointError, match=rf"a\.pt: .*{said}") as caught:
        hypernetworks.load(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


def test_other_files(tmp_path):
    read_safetensors.write(tmp_path / "a.safetensors", {"<sks>": np.ones((1, 768), np.float32)})
    with pytest.raises(CheckpointError, match="no hypernetwork, its tensors are <sks>"):
        hypernetworks.load(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"hypernetworks are called \*.pt"):
        hypernetworks.save(tmp_path / "a.safetensors", of())
    hypernetworks.save(tmp_path / "a.pt", of())
    with pytest.raises(FileExistsError):
        hypernetworks.save(tmp_path / "a.pt", of())


@pytest.mark.parity
@pytest.mark.parametrize("zip", [True, False])
def test_files_that_torch_wrote(tmp_path, zip):
    torch = pytest.importorskip("torch")
    network = of(widths=(4,), activation="relu", layer_structure=(1, 2, 2, 1), dropout=(0, 0.15, 0, 0))
    hypernetworks.save(tmp_path / "a.pt", network, step=9)
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert [name for name in found if isinstance(name, int)] == [4] and isinstance(found[4], tuple)
    facts = {name: value for name, value in found.items() if name != 4}
    assert facts == {
        "step": 9,
        "name": "a",
        "layer_structure": [1, 2, 2, 1],
        "activation_func": "relu",
        "is_layer_norm": False,
        "weight_initialization": None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
        "activate_output": False,
        "use_dropout": True,
        "dropout_structure": [0, 0.15, 0, 0],
        "last_layer_dropout": False,
        "optional_info": None,
    }
    torch.save(found, tmp_path / "b.pt", _use_new_zipfile_serialization=zip)
    assert_same(hypernetworks.load(tmp_path / "b.pt"), network)
