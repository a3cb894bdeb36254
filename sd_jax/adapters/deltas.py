"""What the LoRA family adds to a layer's weight W, computed from the arrays that its files hold, and added to it.

    LoRA     dW = s B A                        (Hu et al. 2021, arXiv 2106.09685)                         (1)
    LoCon    dW = s B * C * A, C the core of a Tucker decomposition of a convolution's kernel             (2)
    LoHa     dW = s (B1 A1) . (B2 A2)          elementwise (Hyeon-Woo et al. 2021, arXiv 2108.06098)      (3)
    LoKr     dW = s kron(W1, W2)               each whole or of two factors (Yeh et al. 2023, 2309.14859) (4)
    whole    dW = D                                                                                       (5)
    DoRA     W' = m (W + dW) / |W + dW|        by rows of outputs, or of inputs (Liu et al. 2024, 2402.09353) (6)

s = alpha / rank. A layer's arrays, its *entry*, keep the layout of files, torch's: a linear's weight is (out, in), a
convolution's (out, in, height, width). Names are those of the files; which rule holds follows from them:

    lora_down (r, in[, h, w]), lora_up (out, r[, 1, 1]), lora_mid (r, r, h, w)                            (1), (2)
    hada_w1_a (out, r), hada_w1_b (r, in h w), hada_w2_a, hada_w2_b, hada_t1 and hada_t2 (r, r, h, w)     (3)
    lokr_w1 or lokr_w1_a and lokr_w1_b, lokr_w2 or lokr_w2_a and lokr_w2_b, lokr_t2                       (4)
    diff, diff_b; w_norm, b_norm of norms                                                                 (5)
    dora_scale (out, 1[, 1, 1]) or (1, in[, 1, 1]), beside one of the first three                         (6)
    alpha ()      beside the first three
    strength ()   of this layer alone, where layers differ; times the adapter's

With a strength t, W + t dW is meant, and for (6) W + t (W' - W), so that 0 gives the model back. (peft takes t into dW
instead, which at 0 leaves m W / |W|.)
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from sd_jax.types import AnyArray, Params

Entry = Mapping[str, AnyArray]  # the arrays of one layer, by the names above
Layers = Mapping[str, Mapping[str, Entry]]  # {part: {"down_blocks_0/.../to_q": entry}}
Strength = float | AnyArray

_SHAPED = ("lora_down", "lora_up", "lora_mid", "hada_t1", "hada_t2")
_BIAS = {"bias": ("diff_b", "b_norm")}
_WEIGHT = {"kernel": ("diff",), "embedding": ("diff",), "scale": ("w_norm", "diff")}


def rank_of(entry: Entry) -> int | None:
    """The rank that alpha is divided by; None where nothing is of low rank."""
    if "lora_down" in entry:
        return entry["lora_down"].shape[0]
    if "hada_w1_b" in entry:
        return entry["hada_w1_b"].shape[0]
    for factor in ("lokr_w2_b", "lokr_w1_b"):
        if factor in entry:
            return entry[factor].shape[0]
    return None


def scale_of(entry: Entry) -> Float[Array, ""]:
    """s, float32."""
    rank = rank_of(entry)
    if rank is None or "alpha" not in entry:
        return jnp.float32(1)
    return jnp.asarray(entry["alpha"], jnp.float32) / jnp.float32(rank)


def is_low_rank(entry: Entry) -> bool:
    """Whether B (A x) is all that it adds, (1), which needs no dW."""
    return set(entry) <= {"lora_down", "lora_up", "alpha", "strength"}


def delta(entry: Entry, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """dW of (1) to (5), float32, of the weight's shape in torch's layout."""
    e = {name: jnp.asarray(value, jnp.float32) for name, value in entry.items()}
    if "lora_mid" in e:
        up, down = _matrix(e["lora_up"]), _matrix(e["lora_down"])
        whole = jnp.einsum("mnhw,om,ni->oihw", e["lora_mid"], up, down)
    elif "lora_down" in e:
        whole = _matrix(e["lora_up"]) @ _matrix(e["lora_down"])
    elif "hada_w1_a" in e:
        whole = _hada(e, "1") * _hada(e, "2")
    elif "lokr_w1" in e or "lokr_w1_a" in e:
        whole = _kron(e, shape)
    elif "diff" in e:
        return e["diff"].reshape(shape)
    else:
        return jnp.zeros(shape, jnp.float32)
    return scale_of(entry) * whole.reshape(shape)


def merged(weight: Float[Array, "..."], entry: Entry, strength: Strength) -> Float[Array, "..."]:
    """W + t dW, or with DoRA W + t (W' - W) (Eq. 6); float32, in torch's layout."""
    w = jnp.asarray(weight, jnp.float32)
    t = jnp.asarray(strength, jnp.float32) * jnp.asarray(entry.get("strength", 1.0), jnp.float32)
    d = delta(entry, w.shape)
    if "dora_scale" not in entry:
        return w + t * d
    m, v = jnp.asarray(entry["dora_scale"], jnp.float32), w + d
    if m.ndim < 2 or m.shape[0] == w.shape[0]:  # by rows of outputs
        m, axes = m.reshape(-1, *[1] * (w.ndim - 1)), tuple(range(1, w.ndim))
    else:
        m, axes = m.reshape(1, -1, *[1] * (w.ndim - 2)), (0, *range(2, w.ndim))
    norm = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(jnp.square(v), axis=axes, keepdims=True)))  # as the paper trains it
    return w + t * (m / (norm + jnp.finfo(jnp.float32).tiny) * v - w)


def merge(params: Params, entries: Mapping[str, Entry], strength: Strength) -> Params:
    """A part's parameters with the entries' changes in them, each array in the dtype that it has.

    entries: by path. Raises KeyError where a path leads to no layer, or a layer lacks what an entry changes.
    """
    flat = flatten_dict(params, sep="/")
    for path, entry in entries.items():
        t = jnp.asarray(strength, jnp.float32) * jnp.asarray(entry.get("strength", 1.0), jnp.float32)
        weight = next((name for name in _WEIGHT if f"{path}/{name}" in flat), None)
        if weight is None:
            raise KeyError(f"{path} is no layer of this network")
        at = f"{path}/{weight}"
        if weight == "kernel":
            flat[at] = _as(flat[at], from_torch(merged(to_torch(flat[at]), entry, strength)))
        else:
            change = next((entry[name] for name in _WEIGHT[weight] if name in entry), None)
            flat[at] = flat[at] if change is None else _plus(flat[at], t, change)
        for name in _BIAS["bias"]:
            if name in entry:
                flat[f"{path}/bias"] = _plus(flat[f"{path}/bias"], t, entry[name])
    return unflatten_dict(flat, sep="/")


def to_torch(kernel: Any) -> Any:
    """A kernel (in, out) or (h, w, in, out) as torch has it."""
    return kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T


def from_torch(weight: Any) -> Any:
    return weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T


def _matrix(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)


def _plus(leaf: Array, t: Array, change: AnyArray) -> Array:
    changed = jnp.asarray(leaf, jnp.float32) + t * jnp.asarray(change, jnp.float32).reshape(leaf.shape)
    return _as(leaf, changed)


def _as(leaf: Any, changed: Array) -> Array:
    return changed.astype(leaf.dtype)


def _hada(e: Mapping[str, Array], which: str) -> Array:
    """One factor of (3). The core's last two axes are the kernel's."""
    a, b = e[f"hada_w{which}_a"], e[f"hada_w{which}_b"]
    if f"hada_t{which}" in e:  # here a is (r, out) and b (r, in)
        return jnp.einsum("ijhw,jp,io->ophw", e[f"hada_t{which}"], b, a)
    return a @ b


def _kron(e: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    first = e["lokr_w1"] if "lokr_w1" in e else e["lokr_w1_a"] @ e["lokr_w1_b"]
    if "lokr_w2" in e:
        second = e["lokr_w2"]
    elif "lokr_t2" in e:
        second = jnp.einsum("ijhw,jp,io->ophw", e["lokr_t2"], e["lokr_w2_b"], e["lokr_w2_a"])
    else:
        second = e["lokr_w2_a"] @ e["lokr_w2_b"]
    out, into = first.shape
    second = second.reshape(shape[0] // out, shape[1] // into, -1)
    return jnp.einsum("ab,cdk->acbdk", first, second).reshape(shape)
