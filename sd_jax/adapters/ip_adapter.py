"""IP-Adapter (Ye et al. 2023, arXiv 2308.06721): a picture beside the prompt, which every cross-attention reads.

    out = Attn(q, k, v) + t Attn(q, W_k c, W_v c)                                                        (1)

q, k and v are the cross-attention's own, c the tokens of the picture, W_k and W_v learnt for each of them, t the
strength. The sum goes on to `to_out`. Tokens come from CLIP's vision tower, which stays as it is:

    base   c = norm(W f + b), four tokens of the projected features f                                    (2)
    plus   c = norm(W_out z + b_out), sixteen tokens, learnt queries z that read the states h of the layer before the
           last (a perceiver: Jaegle et al. 2021), some times in turn:
           x = W_in h + b_in,   z <- z + Attn(z', [x', z']),   z <- z + W_2 gelu(W_1 z'),  ' = a norm    (3)

Where there is no picture, as beside a negative prompt, f is zeros in (2), and in (3) h is of a picture that is zero
after CLIP's normalisation. Of several pictures at once the tokens stand in one row.

Semantics: tencent-ailab/IP-Adapter ip_adapter/{ip_adapter,resampler,attention_processor}.py, and diffusers'.
"""

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sd_jax.models.attention import attention
from sd_jax.models.presets import UNetConfig
from sd_jax.types import AnyArray, Params

KINDS = ("base", "plus")
_EPSILON = 1e-5  # of torch.nn.LayerNorm
HEAD = 64  # channels of a head of (3), whatever the width
_TOKENS = {"base": 4, "plus": 16}
_DEPTH = 4  # of (3), in the published ones


@flax.struct.dataclass
class IPAdapter:
    """Weights, by their names in files and in torch's layout, a linear's being (outputs, inputs).

    projection: (2) `proj.weight`, `norm.bias`, ...; or (3) `latents`, `layers.0.0.to_kv.weight`, ...
    layers: {"down_blocks_0/.../attn2": {"to_k_ip", "to_v_ip"}}; and `strength`, times t, where layers differ.
    tokens: c, for each row of the batch that the U-Net is called with, once there is a picture.
    """

    projection: dict[str, AnyArray]
    layers: dict[str, dict[str, AnyArray]]
    tokens: Float[AnyArray, "batch tokens width"] | None = None

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return "plus" if "latents" in self.projection else "base"

    @property
    def width_in(self) -> int:
        """Of what (2) or (3) reads: the projected features', or the states'."""
        return self.projection["proj_in.weight" if self.kind == "plus" else "proj.weight"].shape[1]

    @property
    def width(self) -> int:
        """Of the tokens: that of the text's states."""
        return self.projection["norm_out.weight" if self.kind == "plus" else "norm.weight"].shape[0]


def layers_of(config: UNetConfig) -> dict[str, int]:
    """{path of a cross-attention: its width}, in the order in which files count them: down, up, middle."""
    channels, depth = config.block_out_channels, len(config.block_out_channels)
    found = {}
    for side, extra in (("down", 0), ("up", 1)):
        for i in range(depth):
            level = i if side == "down" else depth - 1 - i
            for j in range((config.layers_per_block + extra) * config.attention_blocks[level]):
                for k in range(config.of_block("transformer_layers_per_block", level)):
                    found[f"{side}_blocks_{i}/attentions_{j}/transformer_blocks_{k}/attn2"] = channels[level]
    for k in range(config.of_block("transformer_layers_per_block", -1)):
        found[f"mid_block/attentions_0/transformer_blocks_{k}/attn2"] = channels[-1]
    return found


def check_fits(adapter: IPAdapter, config: UNetConfig) -> None:
    """Raises ValueError where it is for another U-Net."""
    if adapter.width != config.cross_attention_dim:
        raise ValueError(
            f"an IP-Adapter beside text states that are {adapter.width} wide, and this model's are "
            f"{config.cross_attention_dim}: take one that was made for this family"
        )
    found = {path: np.shape(entry["to_k_ip"])[0] for path, entry in adapter.layers.items()}
    if found != layers_of(config):
        odd = sorted({path for path, _ in found.items() ^ layers_of(config).items()})
        raise ValueError(f"an IP-Adapter for other cross-attentions than this model's, such as {odd[0]}")


def init(
    key: PRNGKeyArray,
    kind: str,  # of KINDS
    width_in: int,  # of what it reads of the CLIP: `projection_dim` for base, `hidden_size` for plus
    config: UNetConfig,
    unet: Params,  # whose to_k and to_v the new ones start from
) -> IPAdapter:
    """A new one, float32, as the reference makes it: not the identity, for it attends as the text's attention does."""
    width, keys = config.cross_attention_dim, iter(jax.random.split(key, 8 + 8 * _DEPTH))

    def linear(outputs: int, inputs: int) -> Array:  # torch's: uniform, of variance 1 / (3 inputs)
        return jax.random.uniform(next(keys), (outputs, inputs), minval=-1, maxval=1) * inputs**-0.5

    def norm(name: str, size: int) -> dict[str, Array]:
        return {f"{name}.weight": jnp.ones(size), f"{name}.bias": jnp.zeros(size)}

    if kind == "base":
        outputs = _TOKENS[kind] * width
        projection = {"proj.weight": linear(outputs, width_in), "proj.bias": jnp.zeros(outputs), **norm("norm", width)}
    else:
        inner = -(-width // HEAD) * HEAD
        projection = {"latents": jax.random.normal(next(keys), (1, _TOKENS[kind], inner)) * inner**-0.5}
        projection |= {"proj_in.weight": linear(inner, width_in), "proj_in.bias": jnp.zeros(inner)}
        projection |= {"proj_out.weight": linear(width, inner), "proj_out.bias": jnp.zeros(width)}
        projection |= norm("norm_out", width)
        for i in range(_DEPTH):
            projection |= norm(f"layers.{i}.0.norm1", inner) | norm(f"layers.{i}.0.norm2", inner)
            projection[f"layers.{i}.0.to_q.weight"] = linear(inner, inner)
            projection[f"layers.{i}.0.to_kv.weight"] = linear(2 * inner, inner)
            projection[f"layers.{i}.0.to_out.weight"] = linear(inner, inner)
            projection |= norm(f"layers.{i}.1.0", inner)
            projection[f"layers.{i}.1.1.weight"] = linear(4 * inner, inner)
            projection[f"layers.{i}.1.3.weight"] = linear(inner, 4 * inner)
    layers = {}
    for path in layers_of(config):
        own = unet
        for name in path.split("/"):
            own = own[name]
        layers[path] = {f"{name}_ip": jnp.asarray(own[name]["kernel"], jnp.float32).T for name in ("to_k", "to_v")}
    return IPAdapter(projection, layers)


# -- The tokens of a picture -----------------------------------------------------------------------------------------


def project(
    projection: Mapping[str, AnyArray],
    features: Float[Array, "batch width_in"] | Float[Array, "batch states width_in"],  # f of (2), or h of (3)
) -> Float[Array, "batch tokens width"]:
    """c, in the dtype of the features."""
    weights = {name: jnp.asarray(leaf, features.dtype) for name, leaf in projection.items()}
    if "latents" in weights:
        return _resampled(weights, features)
    tokens = _linear(features, weights, "proj").reshape(len(features), -1, len(weights["norm.weight"]))
    return _norm(tokens, weights, "norm")


def _resampled(weights: Mapping[str, Array], h: Float[Array, "batch states width_in"]) -> Array:
    """(3)"""
    x = _linear(h, weights, "proj_in")
    z = jnp.repeat(weights["latents"], len(h), axis=0)
    for i in range(sum(name.endswith("to_kv.weight") for name in weights)):
        layer = f"layers.{i}"
        split = lambda y: y.reshape(*y.shape[:2], -1, HEAD)  # noqa: E731
        queries = _norm(z, weights, f"{layer}.0.norm2")
        both = jnp.concatenate([_norm(x, weights, f"{layer}.0.norm1"), queries], axis=1)
        k, v = jnp.split(_linear(both, weights, f"{layer}.0.to_kv"), 2, axis=-1)
        read = attention(split(_linear(queries, weights, f"{layer}.0.to_q")), split(k), split(v))
        z = z + _linear(read.reshape(*z.shape[:2], -1), weights, f"{layer}.0.to_out")
        inner = _linear(_norm(z, weights, f"{layer}.1.0"), weights, f"{layer}.1.1")
        z = z + _linear(jax.nn.gelu(inner, approximate=False), weights, f"{layer}.1.3")
    return _norm(_linear(z, weights, "proj_out"), weights, "norm_out")


def _linear(x: Float[Array, "*batch inputs"], weights: Mapping[str, Array], name: str) -> Array:
    y = jnp.einsum("...i,oi->...o", x, weights[f"{name}.weight"])
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


def _norm(x: Float[Array, "batch tokens width"], weights: Mapping[str, Array], name: str) -> Array:
    rows = x.astype(jnp.float32)
    centred = rows - rows.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    scale, bias = (weights[f"{name}.{leaf}"].astype(jnp.float32)[None, None] for leaf in ("weight", "bias"))
    return (centred * jax.lax.rsqrt(variance + _EPSILON) * scale + bias).astype(x.dtype)


# -- In a cross-attention --------------------------------------------------------------------------------------------


def attend(
    adapter: IPAdapter,
    strength: float | AnyArray,
    path: str,  # of the cross-attention
    q: Float[Array, "rows width"],  # its queries, of all pictures
    heads: int,
) -> Float[Array, "rows width"]:
    """t Attn(q, W_k c, W_v c) of (1), in the dtype of q. Raises ValueError where no picture is given."""
    if adapter.tokens is None:
        raise ValueError("an IP-Adapter is on and there is no picture that it could show: give image_prompt=")
    entry, batch = adapter.layers[path], len(adapter.tokens)
    tokens = jnp.asarray(adapter.tokens, q.dtype)
    split = lambda y: y.reshape(batch, -1, heads, y.shape[-1] // heads)  # noqa: E731
    k, v = (jnp.einsum("btc,wc->btw", tokens, jnp.asarray(entry[name], q.dtype)) for name in ("to_k_ip", "to_v_ip"))
    t = jnp.asarray(strength, jnp.float32) * jnp.asarray(entry.get("strength", 1.0), jnp.float32)
    return t.astype(q.dtype) * attention(split(q), split(k), split(v)).reshape(q.shape)
