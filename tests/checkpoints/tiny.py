"""A small random model for the tests of this room: trees, single files and shapes, made without torch."""

import dataclasses
import math

import numpy as np
from flax import traverse_util

from sd_jax.checkpoints import keys_compvis, keys_diffusers, layout
from sd_jax.checkpoints.tensors import Tensor, lazy
from sd_jax.models.presets import TINY

VOCABULARY = 517  # of `tiny_tokenizer`
SPEC = dataclasses.replace(
    TINY,
    text_encoder=dataclasses.replace(
        TINY.text_encoder, vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1, pad_token_id=VOCABULARY - 1
    ),
)


def shapes_only(shapes: dict) -> dict[str, Tensor]:
    """Tensors that cannot be read."""
    return {name: Tensor(shape, np.dtype(np.float32), _unreadable) for name, shape in shapes.items()}


def _unreadable():
    raise AssertionError("a tensor was read where its shape should do")


def random_tensors(shapes: dict, dtype=np.float32, seed: int = 0) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    return {
        name: lazy(rng.standard_normal(math.prod(shape), np.float32).reshape(shape).astype(dtype))
        for name, shape in shapes.items()
    }


def random_diffusers(part: str, spec=SPEC, seed: int = 0) -> dict[str, Tensor]:
    """One network by diffusers' names."""
    return random_tensors(layout.LAYOUTS[part](getattr(spec, part)), seed=seed)


def compvis_file(spec=SPEC, seed: int = 0, parts=layout.PARTS) -> dict[str, np.ndarray]:
    """What a single file holds, as arrays."""
    file = {}
    for part in parts:
        file |= keys_compvis.from_diffusers(part, random_diffusers(part, spec, seed), getattr(spec, part))
    return {name: np.asarray(tensor) for name, tensor in file.items()}


def random_params(spec=SPEC, seed: int = 0, parts=layout.PARTS) -> dict:
    params = {}
    for part in parts:
        ours = keys_diffusers.from_diffusers(part, random_diffusers(part, spec, seed), getattr(spec, part), "random")
        params[part] = traverse_util.unflatten_dict({name: np.asarray(t) for name, t in ours.items()}, sep="/")
    return params


def assert_same(ours: dict, reference: dict) -> None:
    """The same names, types and bits."""
    ours, reference = (traverse_util.flatten_dict(tree, sep="/") for tree in (ours, reference))
    assert ours.keys() == reference.keys()
    for name in reference:
        a, b = np.asarray(ours[name]), np.asarray(reference[name])
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), name
