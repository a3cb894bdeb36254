"""Random adapters of every algorithm, for the layers of a model."""

import math

import numpy as np

from sd_jax.checkpoints import keys_peft


def lora(rng, layer, rank=2, alpha=3.0):
    out, into, *kernel = layer.shape
    ones = (1,) * len(kernel)
    return {
        "lora_down": _random(rng, rank, into, *kernel),
        "lora_up": _random(rng, out, rank, *ones),
        "alpha": np.asarray(alpha, np.float32),
    }


def tucker(rng, layer, rank=2):
    out, into, *kernel = layer.shape
    if kernel != [3, 3]:
        return lora(rng, layer, rank)
    core = {"lora_mid": _random(rng, rank, rank, *kernel), "lora_down": _random(rng, rank, into, 1, 1)}
    return {**lora(rng, layer, rank), **core}


def dora(rng, layer, rank=2):
    return {**lora(rng, layer, rank), "dora_scale": _random(rng, layer.shape[0], *[1] * (len(layer.shape) - 1))}


def dora_by_inputs(rng, layer, rank=2):
    scale = _random(rng, 1, layer.shape[1], *[1] * len(layer.shape[2:]))
    return {**lora(rng, layer, rank), "dora_scale": scale}


def loha(rng, layer, rank=2):
    out, into, *kernel = layer.shape
    entry = {"alpha": np.asarray(1.5, np.float32)}
    for i in (1, 2):
        if kernel == [3, 3]:
            entry[f"hada_t{i}"] = _random(rng, rank, rank, 3, 3)
            entry |= {f"hada_w{i}_a": _random(rng, rank, out), f"hada_w{i}_b": _random(rng, rank, into)}
        else:
            entry |= {f"hada_w{i}_a": _random(rng, out, rank)}
            entry |= {f"hada_w{i}_b": _random(rng, rank, into * math.prod(kernel))}
    return entry


def lokr(rng, layer, rank=2):
    """Its forms in turn: the second whole, of two factors, with a core; the first of two factors."""
    out, into, *kernel = layer.shape
    a, b = (2, 2) if out % 2 == into % 2 == 0 else (1, 1)
    c, d = out // a, into // b
    entry = {"alpha": np.asarray(4.0, np.float32), "lokr_w1": _random(rng, a, b)}
    if kernel == [3, 3]:
        return entry | {
            "lokr_t2": _random(rng, rank, rank, 3, 3),
            "lokr_w2_a": _random(rng, rank, c),
            "lokr_w2_b": _random(rng, rank, d),
        }
    if kernel:
        return entry | {"lokr_w2": _random(rng, c, d, *kernel)}
    if "ff" in layer.path:
        del entry["lokr_w1"]
        entry |= {"lokr_w1_a": _random(rng, a, 1), "lokr_w1_b": _random(rng, 1, b)}
    return entry | {"lokr_w2_a": _random(rng, c, rank), "lokr_w2_b": _random(rng, rank, d)}


def whole(rng, layer):
    if layer.kind == "scale":
        return {"w_norm": _random(rng, *layer.shape), "b_norm": _random(rng, *layer.shape)}
    return {"diff": _random(rng, *layer.shape)} | ({"diff_b": _random(rng, layer.shape[0])} if layer.has_bias else {})


ALGORITHMS = {function.__name__: function for function in (lora, tucker, dora, dora_by_inputs, loha, lokr, whole)}
PLAIN = ("lora", "dora")  # that diffusers has names for


def random_layers(spec, algorithm="lora", seed=0, dtype=np.float32, **settings):
    """Of every layer of the U-Net and the text encoders that such an entry can change, alpha in float32."""
    rng = np.random.default_rng(seed)
    layers = {}
    for layer in keys_peft.names(spec).values():
        if layer.kind == "kernel" or algorithm == "whole":
            entry = ALGORITHMS[algorithm](rng, layer, **settings)
            cast = {name: array if name == "alpha" else array.astype(dtype) for name, array in entry.items()}
            layers.setdefault(layer.part, {})[layer.path] = cast
    return layers


def assert_same_layers(ours, reference):
    """The same parts, layers, arrays, types and bits."""
    assert {p: set(entries) for p, entries in ours.items()} == {p: set(entries) for p, entries in reference.items()}
    for part, entries in reference.items():
        for path, entry in entries.items():
            got = ours[part][path]
            assert got.keys() == entry.keys(), (part, path)
            for name, array in entry.items():
                there = np.asarray(array)
                assert got[name].dtype == there.dtype and got[name].shape == there.shape, (part, path, name)
                assert got[name].tobytes() == there.tobytes(), (part, path, name)


def _random(rng, *shape):
    return rng.standard_normal(shape, np.float32)
