"""Which arrays a layer's entry in an adapter has, and of which shapes: what "fits the layer" means.

The arrays are those of `sd_jax.adapters.deltas`; with a weight (out, in[, h, w]), r the rank:

    LoRA     lora_down (r, in[, h, w]), lora_up (out, r[, 1, 1]); with lora_mid (r, r, h, w), lora_down (r, in, 1, 1)
    LoHa     hada_w1_a (out, r), hada_w1_b (r, in h w), and so w2; with hada_t1 (r, r, h, w), (r, out) and (r, in)
    LoKr     lokr_w1 (a, b), or (a, r) and (r, b); lokr_w2 (c, d[, h, w]), or (c, r) and (r, d h w), or with lokr_t2
             (r, r, h, w), (r, c) and (r, d), where a c = out and b d = in
    besides  alpha (), dora_scale (out, 1[, 1, 1]) or (1, in[, 1, 1])
    whole    diff as the weight; diff_b (out,); of norms w_norm, b_norm too
"""

import math
from collections.abc import Mapping
from typing import Any

from sd_jax.checkpoints.keys_peft import Layer
from sd_jax.types import AnyArray

Entry = Mapping[str, AnyArray]
Shapes = dict[str, tuple[int, ...]]

_TITLES = {"lora": "LoRA", "hada": "LoHa", "lokr": "LoKr"}


def algorithm(entry: Mapping[str, Any]) -> str | None:
    """ "lora", "hada" or "lokr", with which its arrays' names begin; None for whole differences."""
    return next((start for start in _TITLES if any(name.startswith(f"{start}_") for name in entry)), None)


def title(entry: Mapping[str, Any]) -> str:
    """For people."""
    return "DoRA" if "dora_scale" in entry else _TITLES.get(algorithm(entry), "whole differences")


def problems(entry: Entry, layer: Layer) -> list[str]:
    """What keeps an entry from changing a layer: arrays that are missing, too many, or of other shapes."""
    kind = algorithm(entry)
    if kind is not None and layer.kind != "kernel":
        return [f"{_TITLES[kind]} is for linears and convolutions alone"]
    odd = [name for name in entry if kind and name.startswith(f"{kind}_") and not _is_factor(entry[name])]
    if odd:
        return [f"{name} is {entry[name].shape}, and a factor has two axes or four" for name in odd]
    wanted = _whole(entry, layer)
    if kind is not None:
        wanted |= _beside(entry, layer) | _FACTORS[kind](entry, layer)
    found = [f"{name} is missing" for name in wanted if name not in entry]
    found += [f"{name} has no meaning here" for name in entry if name not in wanted]
    return found + [
        f"{name} is {entry[name].shape}, not {shape}"
        for name, shape in wanted.items()
        if name in entry and entry[name].shape != shape
    ]


def _is_factor(array: AnyArray) -> bool:
    return array.ndim in (2, 4) and 0 not in array.shape


def _whole(entry: Entry, layer: Layer) -> Shapes:
    norm = layer.kind == "scale"
    shapes = {name: layer.shape for name in ("diff", *["w_norm"] * norm) if name in entry}
    if layer.has_bias:
        shapes |= {name: layer.shape[:1] for name in ("diff_b", *["b_norm"] * norm) if name in entry}
    return shapes


def _beside(entry: Entry, layer: Layer) -> Shapes:
    out, into, ones = layer.shape[0], layer.shape[1], (1,) * len(layer.shape[2:])
    shapes = {"alpha": ()} if "alpha" in entry else {}
    if "dora_scale" in entry:
        by_outputs = entry["dora_scale"].shape[:1] == (out,)
        shapes["dora_scale"] = (out, 1, *ones) if by_outputs else (1, into, *ones)
    return shapes


def _lora(entry: Entry, layer: Layer) -> Shapes:
    out, into, *kernel = layer.shape
    ones, rank = (1,) * len(kernel), _rank(entry, "lora_down")
    if "lora_mid" in entry:
        return {"lora_down": (rank, into, *ones), "lora_mid": (rank, rank, *kernel), "lora_up": (out, rank, *ones)}
    return {"lora_down": (rank, into, *kernel), "lora_up": (out, rank, *ones)}


def _hada(entry: Entry, layer: Layer) -> Shapes:
    out, into, *kernel = layer.shape
    shapes = {}
    for i in (1, 2):
        rank = _rank(entry, f"hada_w{i}_b")
        if "hada_t1" in entry:
            shapes |= {f"hada_t{i}": (rank, rank, *kernel), f"hada_w{i}_a": (rank, out), f"hada_w{i}_b": (rank, into)}
        else:
            shapes |= {f"hada_w{i}_a": (out, rank), f"hada_w{i}_b": (rank, into * math.prod(kernel))}
    return shapes


def _lokr(entry: Entry, layer: Layer) -> Shapes:
    out, into, *kernel = layer.shape
    if "lokr_w1_a" in entry and "lokr_w1_b" in entry:
        rank, a, b = _rank(entry, "lokr_w1_b"), entry["lokr_w1_a"].shape[0], entry["lokr_w1_b"].shape[1]
        first = {"lokr_w1_a": (a, rank), "lokr_w1_b": (rank, b)}
    else:
        a, b = entry["lokr_w1"].shape[:2] if "lokr_w1" in entry else (1, 1)
        first = {"lokr_w1": (a, b)}
    c, d, rank = _whole_part(out, a), _whole_part(into, b), _rank(entry, "lokr_w2_b")
    if "lokr_t2" in entry:
        return first | {"lokr_t2": (rank, rank, *kernel), "lokr_w2_a": (rank, c), "lokr_w2_b": (rank, d)}
    if "lokr_w2_a" in entry or "lokr_w2_b" in entry:
        return first | {"lokr_w2_a": (c, rank), "lokr_w2_b": (rank, d * math.prod(kernel))}
    return first | {"lokr_w2": (c, d, *kernel)}


def _whole_part(length: int, factor: int) -> int:
    """The other factor; 0, which no array has, where there is none."""
    return length // factor if length % factor == 0 else 0


def _rank(entry: Entry, name: str) -> int:
    return entry[name].shape[0] if name in entry else 1


_FACTORS = {"lora": _lora, "hada": _hada, "lokr": _lokr}
