"""Networks with adapters on: the base's modules and parameters stay as they are, and what is added comes from outside.

    y = f(x; W) + t s B (A x)          LoRA and LoCon, at the layers that it names             (1)
    y = f(x; W + t dW)                 the others of the family, by `deltas.merge`              (2)
    y = f(x + t h(x); W)               hypernetworks, before the keys and values of attention   (3)
    y = f(x + t Attn(q, c); W)         IP-Adapters, before the last layer of cross-attention    (4)

(1) costs little, and no gradient of W is ever formed. Linen tells an interceptor the path of the layer that is called
(`flax.linen.intercept_methods`), within `jit` and remat alike. Weights and strengths are arguments of the compiled
function, so that another adapter of the same shapes, or another strength, compiles nothing.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sd_jax.adapters import deltas, hypernetwork, ip_adapter
from sd_jax.adapters.deltas import Entry, Layers, Strength
from sd_jax.adapters.hypernetwork import Hypernetwork
from sd_jax.adapters.ip_adapter import IPAdapter
from sd_jax.models.layers import convolve
from sd_jax.models.networks import Networks
from sd_jax.types import Params

Adapter = Layers | Hypernetwork | IPAdapter
PARTS = ("unet", "text_encoder", "text_encoder_2")  # that adapters change


def parts_of(adapter: Adapter) -> tuple[str, ...]:
    """The parts of a model that it changes: those of its layers, or the U-Net alone."""
    return tuple(adapter) if isinstance(adapter, Mapping) else ("unet",)


def hooked(
    networks: Networks,
    adapters: Sequence[tuple[Adapter, Strength]],
    keys: Key[Array, " batch"] | None = None,  # of training's dropout, one for each picture; None = nothing is dropped
) -> Networks:
    """`networks` whose U-Net and text encoders have the adapters on, to be used within one trace."""
    changed = {}
    for part in PARTS:
        here = [(adapter, strength) for adapter, strength in adapters if part in parts_of(adapter)]
        if here:
            changed[part] = _Hooked(getattr(networks, part), part, here, keys)
    return networks._replace(**changed)


def merge(params: Mapping[str, Params], layers: Layers, strengths: Mapping[str, Strength]) -> dict[str, Params]:
    """A model's parameters, by part, with the adapter's changes in them. strengths: by part."""
    changed = {part: deltas.merge(params[part], entries, strengths[part]) for part, entries in layers.items()}
    return {**params, **changed}


class _Hooked:
    """A module with adapters on: as much of linen's interface as networks use."""

    def __init__(self, module: nn.Module, part: str, adapters: Sequence[tuple[Adapter, Strength]], keys: Any):
        self._module, self._keys = module, keys
        self._hypernetworks = [(a, t) for a, t in adapters if isinstance(a, Hypernetwork)]
        self._shown = [(a, t) for a, t in adapters if isinstance(a, IPAdapter)]
        self._queries: dict[tuple[str, ...], Any] = {}  # of cross-attentions, between their first layer and their last
        layers = [(a[part], t) for a, t in adapters if isinstance(a, Mapping)]
        chosen = lambda low: [  # noqa: E731
            ({path: entry for path, entry in a.items() if deltas.is_low_rank(entry) == low}, t) for a, t in layers
        ]
        self._added, self._merged = chosen(True), chosen(False)

    def apply(self, variables: Mapping[str, Params], *args, **kwargs) -> Any:
        params = variables["params"]
        for entries, strength in self._merged:
            params = deltas.merge(params, entries, strength) if entries else params
        with nn.intercept_methods(self._intercept):
            return self._module.apply({**variables, "params": params}, *args, **kwargs)

    def _intercept(self, call, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, nn.Dense | nn.Conv):
            return call(*args, **kwargs)
        (x,), path = args, module.path
        if path[-1] in ("to_k", "to_v") and path[-2].startswith("attn"):
            for number, (network, strength) in enumerate(self._hypernetworks):
                own = _folded(self._keys, f"{number}/{'/'.join(path[:-1])}")
                x = hypernetwork.apply(network.replace(strength=strength), x, path[-1][-1], x.shape[-1], own)
        if self._shown and path[-2:] == ("attn2", "to_out_0"):
            q = self._queries.pop(path[:-1])
            for adapter, strength in self._shown:
                x = x + ip_adapter.attend(adapter, strength, "/".join(path[:-1]), q, module.parent.heads)
        y = call(x, **kwargs)
        for entries, strength in self._added:
            entry = entries.get("/".join(path))
            if entry is not None:
                y = y + low_rank(x.astype(y.dtype), entry, strength, module)
        if self._shown and path[-2:] == ("attn2", "to_q"):
            self._queries[path[:-1]] = y
        return y


def _folded(keys: Key[Array, " batch"] | None, name: str) -> Key[Array, " batch"] | None:
    """Of the draws that are called so."""
    return None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, zlib.crc32(name.encode())))(keys)


def low_rank(
    x: Float[Array, "... inputs"], entry: Entry, strength: Strength, layer: nn.Dense | nn.Conv
) -> Float[Array, "... outputs"]:
    """t s B (A x), in the dtype of x. It is A x that t s scales: the outputs, and their gradient, have more numbers."""
    t = jnp.asarray(strength, jnp.float32) * jnp.asarray(entry.get("strength", 1.0), jnp.float32)
    down, up = (jnp.asarray(entry[name], x.dtype) for name in ("lora_down", "lora_up"))
    if isinstance(layer, nn.Conv):
        strides = (layer.strides,) * 2 if isinstance(layer.strides, int) else layer.strides or (1, 1)
        kernel, dimensions = deltas.from_torch(down), ("NHWC", "HWIO", "NHWC")
        h = convolve(x, kernel, strides, layer.padding, dimension_numbers=dimensions)
    else:
        h = x @ down.T
    return ((deltas.scale_of(entry) * t).astype(x.dtype) * h) @ up.reshape(up.shape[0], -1).T
