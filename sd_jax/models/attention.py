"""Scaled dot-product attention, one entry with a choice of implementation, and the transformer blocks of the U-Net.

    softmax(q k^T / sqrt(D) + mask) v                                                   (Eq. 1, Vaswani et al. 2017)

Implementations
    plain    the whole [heads, queries, keys] matrix at once; fastest where it is small
    chunked  slices of queries, one after the other: memory grows with the chunk, not with the square of the sequence
    cudnn    the flash attention of cuDNN through `jax.nn.dot_product_attention`; NVIDIA GPUs, 16-bit
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax.models.layers import Dtype, GroupNorm, LayerNorm, conv, dense

PLAIN_LIMIT = 1024 * 1024  # queries x keys of one head; beyond it the score matrix falls out of every cache
QUERY_CHUNK = 512


def choose_implementation(queries: int, keys: int, head_dim: int, dtype: Dtype, backend: str, masked: bool) -> str:
    """The implementation for these sizes: cuDNN where it works, else plain up to `PLAIN_LIMIT` scores, else chunked."""
    if backend == "gpu" and jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128 and not masked:
        return "cudnn"
    return "plain" if queries * keys < PLAIN_LIMIT else "chunked"


def attention(
    q_BxLxHxD: Float[Array, "batch queries heads dim"],
    k_BxSxHxD: Float[Array, "batch keys heads dim"],
    v_BxSxHxD: Float[Array, "batch keys heads dim"],
    causal: bool = False,
    implementation: str = "auto",
) -> Float[Array, "batch queries heads dim"]:
    """(Eq. 1). Scores and softmax are float32 whatever the inputs are; the result has the dtype of `v`.

    Raises ValueError for an unknown implementation, or for `causal` with any but the plain one.
    """
    if implementation == "auto":
        implementation = choose_implementation(
            q_BxLxHxD.shape[1], k_BxSxHxD.shape[1], q_BxLxHxD.shape[3], v_BxSxHxD.dtype, jax.default_backend(), causal
        )
    if causal and implementation != "plain":
        implementation = "plain"
    if implementation == "plain":
        return _plain(q_BxLxHxD, k_BxSxHxD, v_BxSxHxD, causal)
    if implementation == "chunked":
        return _chunked(q_BxLxHxD, k_BxSxHxD, v_BxSxHxD)
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q_BxLxHxD, k_BxSxHxD, v_BxSxHxD, implementation="cudnn")
    raise ValueError(f"attention implementation {implementation!r} is unknown: use auto, plain, chunked or cudnn")


def _plain(q, k, v, causal):
    scale = q.shape[-1] ** -0.5
    scores_BxHxLxS = jnp.einsum("blhd,bshd->bhls", q * jnp.asarray(scale, q.dtype), k).astype(jnp.float32)
    if causal:
        visible = jnp.tril(jnp.ones(scores_BxHxLxS.shape[-2:], bool))
        scores_BxHxLxS = jnp.where(visible[None, None], scores_BxHxLxS, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores_BxHxLxS, axis=-1).astype(v.dtype)
    return jnp.einsum("bhls,bshd->blhd", weights, v)


def _chunked(q, k, v):
    """`lax.map` over (batch, head) pairs and chunks of queries; each chunk is recomputed in the backward pass."""
    batch, queries, heads, dim = q.shape
    chunk = QUERY_CHUNK if queries % QUERY_CHUNK == 0 else queries
    as_pairs = lambda x: x.transpose(0, 2, 1, 3).reshape(batch * heads, x.shape[1], dim)  # noqa: E731
    q, k, v = as_pairs(q) * jnp.asarray(dim**-0.5, q.dtype), as_pairs(k), as_pairs(v)

    @jax.checkpoint
    def one_chunk(q_CxD, k_SxD, v_SxD):
        scores = (q_CxD @ k_SxD.T).astype(jnp.float32)
        return jax.nn.softmax(scores, axis=-1).astype(v_SxD.dtype) @ v_SxD

    def one_pair(pair):
        q_LxD, k_SxD, v_SxD = pair
        chunks = q_LxD.reshape(queries // chunk, chunk, dim)
        return jax.lax.map(lambda c: one_chunk(c, k_SxD, v_SxD), chunks).reshape(queries, dim)

    out = jax.lax.map(one_pair, (q, k, v))
    return out.reshape(batch, heads, queries, dim).transpose(0, 2, 1, 3)


class Attention(nn.Module):
    """Multi-head attention with diffusers' names: to_q, to_k, to_v (without bias), to_out_0.

    `context` = None attends to itself.
    """

    heads: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch queries width"],
        context: Float[Array, "batch keys context_width"] | None = None,
    ) -> Float[Array, "batch queries width"]:
        width = x.shape[-1]
        context = x if context is None else context
        split = lambda y: y.reshape(*y.shape[:2], self.heads, width // self.heads)  # noqa: E731
        q = split(dense(width, "to_q", self, False)(x))
        k = split(dense(width, "to_k", self, False)(context))
        v = split(dense(width, "to_v", self, False)(context))
        return dense(width, "to_out_0", self)(attention(q, k, v).reshape(x.shape))


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020): `net_2(a * gelu(b))`, `a, b = net_0(x)`, four times as wide inside. Exact gelu."""

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        width = x.shape[-1]
        projected = Projection(8 * width, self.dtype, self.param_dtype, name="net_0")(x)
        a, b = jnp.split(projected, 2, axis=-1)
        return dense(width, "net_2", self)(a * nn.gelu(b, approximate=False))


class Projection(nn.Module):
    """One linear layer named `proj`; a level of its own because diffusers' GEGLU has one."""

    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens features"]:
        return dense(self.features, "proj", self)(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a layer norm and added to its input."""

    heads: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], context: Float[Array, "batch words context_width"]
    ) -> Float[Array, "batch tokens width"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = lambda name: LayerNorm(name=name, **types)  # noqa: E731
        x = x + Attention(self.heads, name="attn1", **types)(norm("norm1")(x))
        x = x + Attention(self.heads, name="attn2", **types)(norm("norm2")(x), context)
        return x + FeedForward(name="ff", **types)(norm("norm3")(x))


class SpatialTransformer(nn.Module):
    """diffusers' Transformer2DModel of SD 1.x: a feature map as a sequence of its places, with 1x1 convolutions in and out."""

    heads: int
    norm_num_groups: int = 32
    remat: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        context: Float[Array, "batch words context_width"],
    ) -> Float[Array, "batch height width channels"]:
        batch, height, width, channels = x.shape
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        block = nn.remat(TransformerBlock) if self.remat else TransformerBlock
        h = GroupNorm(self.norm_num_groups, 1e-6, name="norm", **types)(x)
        h = conv(channels, "proj_in", self, kernel=1)(h).reshape(batch, height * width, channels)
        h = block(self.heads, name="transformer_blocks_0", **types)(h, context)
        return x + conv(channels, "proj_out", self, kernel=1)(h.reshape(x.shape))
