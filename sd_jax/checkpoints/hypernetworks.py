"""A1111's hypernetworks as files (`.pt`) <-> `Hypernetwork`, both ways.

    768: ({"linear.0.weight": ..., ...}, {...}), 320: ...     by width, the networks of keys and of values
    layer_structure, activation_func, is_layer_norm, activate_output, dropout_structure, use_dropout, last_layer_dropout
    step, name, weight_initialization, sd_checkpoint, sd_checkpoint_name, optional_info

Layers are numbered as torch.nn.Sequential numbers its modules, of which a layer has up to four: the linear one, its
activation (but "linear"), its norm, its dropout. The oldest files say `linear1` and `linear2` for `linear.0` and
`linear.1`, and nothing of the structure.

Format: A1111 stable-diffusion-webui, modules/hypernetworks/hypernetwork.py
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sd_jax.adapters import hypernetwork
from sd_jax.adapters.hypernetwork import Hypernetwork
from sd_jax.checkpoints import read_pickle, torch_pickle, write_torch
from sd_jax.checkpoints.aside import aside
from sd_jax.checkpoints.errors import CheckpointError, listing, shown
from sd_jax.checkpoints.files import kind, open_any
from sd_jax.checkpoints.layout import check_shapes
from sd_jax.checkpoints.pickle_machine import Stream
from sd_jax.checkpoints.tensors import Tensor, read_finite
from sd_jax.checkpoints.torch_zip import open_zip

_WHICH = ("k", "v")
_OLD = {"linear1": "linear.0", "linear2": "linear.1"}
_USUAL_DROPOUT = 0.3  # where a file says that there is dropout, and not how much
_MOST_LAYERS = 100
_OPTIMISER = "optimizer_state_dict."  # some of 2022 carry it


def load(path: str | os.PathLike) -> Hypernetwork:
    """One file, its arrays as they are in it; strength 1.

    Raises FileNotFoundError, and CheckpointError for what is no hypernetwork, listing what is missing, unexpected or of
    another shape than the file's own facts say.
    """
    path = Path(path)
    tensors = {_modern(name): tensor for name, tensor in open_any(path).tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_OPTIMISER)}
    if not is_hypernetwork(tensors):
        few = listing([shown(name, 50) for name in tensors], 5)
        raise CheckpointError(f"{path}: no hypernetwork, its tensors are {few}")
    facts = _facts(path)
    layer_structure, dropout = _structure(path, facts)
    activation = str(facts.get("activation_func") or "linear")
    try:
        hypernetwork.check(layer_structure, activation, dropout)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    activate_output, norm = bool(facts.get("activate_output", True)), bool(facts.get("is_layer_norm", False))
    names = list(_names(layer_structure, activation, activate_output, norm, dropout))
    widths = list(dict.fromkeys(name.split(".")[0] for name in tensors))
    shapes = {
        f"{width}.{number}.{name}": _shape(int(width), layer_structure, place, leaf)
        for width in widths
        for number in range(len(_WHICH))
        for place, leaf, name in names
    }
    check_shapes(shapes, tensors, "the hypernetwork that it says it is", path)

    def network(prefix: str) -> list[dict[str, np.ndarray]]:
        layers: list[dict[str, np.ndarray]] = [{} for _ in layer_structure[1:]]
        for place, leaf, name in names:
            layers[place][leaf] = read_finite(tensors[f"{prefix}.{name}"], f"{path}: {prefix}.{name}")
        return layers

    layers = {width: {which: network(f"{width}.{number}") for number, which in enumerate(_WHICH)} for width in widths}
    return Hypernetwork(layers, np.float32(1), layer_structure, activation, activate_output, dropout)


def is_hypernetwork(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are, by their names, the tensors of such a file."""
    names = [_modern(name).split(".") for name in tensors if not name.startswith(_OPTIMISER)]
    return bool(names) and all(
        len(name) == 5 and name[0].isdecimal() and name[1] in ("0", "1") and name[2] == "linear" for name in names
    )


def save(
    path: str | os.PathLike,
    network: Hypernetwork,
    step: int | None = None,  # at which training stopped; None = unknown
    overwrite: bool = False,
) -> None:
    """The inverse: what A1111 opens, called as the file is. The strength is not in it: it is given on use.

    Raises FileExistsError, and ValueError for another ending than .pt.
    """
    path = Path(path)
    if path.suffix != ".pt":
        raise ValueError(f"{path}: hypernetworks are called *.pt")
    structure, dropout = network.layer_structure, network.dropout
    names = list(_names(structure, network.activation, network.activate_output, network.layer_norm, dropout))
    networks = {
        int(width): tuple({name: layers[which][place][leaf] for place, leaf, name in names} for which in _WHICH)
        for width, layers in network.layers.items()
    }
    facts = {
        "step": step,
        "name": path.stem,
        "layer_structure": list(structure),
        "activation_func": network.activation,
        "is_layer_norm": network.layer_norm,
        "weight_initialization": None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
        "activate_output": network.activate_output,
        "use_dropout": any(dropout),
        "dropout_structure": list(dropout),
        "last_layer_dropout": len(dropout) > 1 and dropout[-2] != 0,
        "optional_info": None,
    }
    with aside(path, overwrite) as work:
        write_torch.write_object(work, {**networks, **facts})


def _names(
    layer_structure: tuple, activation: str, activate_output: bool, norm: bool, dropout: tuple
) -> Iterator[tuple[int, str, str]]:
    """(number of the layer, our name of a leaf, the file's) of all leaves of a network, in the file's order."""
    number, last = 0, len(layer_structure) - 2
    for place in range(last + 1):
        yield place, "weight", f"linear.{number}.weight"
        yield place, "bias", f"linear.{number}.bias"
        number += 1
        if activation != "linear" and (place < last or activate_output):
            number += 1
        if norm:
            yield place, "norm_weight", f"linear.{number}.weight"
            yield place, "norm_bias", f"linear.{number}.bias"
            number += 1
        if dropout[place + 1]:
            number += 1


def _shape(width: int, layer_structure: tuple, place: int, leaf: str) -> tuple[int, ...]:
    inputs, outputs = (int(width * times) for times in layer_structure[place : place + 2])
    return (outputs, inputs) if leaf == "weight" else (outputs,)


def _modern(name: str) -> str:
    for old, new in _OLD.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def _structure(path: Path, facts: Mapping[str, Any]) -> tuple[tuple, tuple]:
    """layer_structure and dropout, which older files say in other words."""
    layers = _numbers(path, facts, "layer_structure") or (1, 2, 1)
    dropout = _numbers(path, facts, "dropout_structure")
    if dropout is None:
        inner = [0.0] * (len(layers) - 2)
        if facts.get("use_dropout"):
            inner = [_USUAL_DROPOUT] * len(inner)
            inner[-1:] = [_USUAL_DROPOUT if facts.get("last_layer_dropout") else 0.0]
        dropout = (0.0, *inner, 0.0)
    return layers, dropout


def _numbers(path: Path, facts: Mapping[str, Any], name: str) -> tuple | None:
    numbers = facts.get(name)
    if numbers is None:
        return None
    if (
        type(numbers) not in (list, tuple)
        or not all(type(n) in (int, float) for n in numbers)
        or len(numbers) > _MOST_LAYERS
    ):
        raise CheckpointError(f"{path}: its {name} is no short list of numbers")
    return tuple(numbers)


def _facts(path: Path) -> dict[str, Any]:
    """What the file holds besides tensors, lists included; it has been opened before, and is sound."""
    form, root = kind(path), None
    if form == "zip":
        members = open_zip(path)
        top = read_pickle.top_folder(path, members)
        root = torch_pickle.load(Stream(str(path), read_pickle.unpacked(path, members[f"{top}data.pkl"])), {})
    elif form == "legacy":
        with path.open("rb") as file:
            stream = Stream(str(path), file)
            root = [torch_pickle.load(stream, {}) for _ in range(4)][3]  # behind magic number, version and machine
    return root if type(root) is dict else {}
