"""Scaled dot-product attention, one entry with a choice of implementation, and the transformer blocks of the U-Net.

    softmax(q k^T / sqrt(D) + mask) v                                                   (Eq. 1, Vaswani et al. 2017)

Implementations
    plain    the whole [batch, heads, queries, keys] matrix of scores at once; fastest where it is small
    chunked  some of its rows after the others, recomputed in the backward pass: memory does not grow with its size
    cudnn    the flash attention of cuDNN through `jax.nn.dot_product_attention`; NVIDIA GPUs, 16-bit
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax import hardware
from sd_jax.models.layers import ZEROS, Dtype, GroupNorm, LayerNorm, as_many, conv, dense
from sd_jax.models.remat import wrapped

# Scores that a device holds at once. CPU: beyond 16 MB they fall out of the cache, and one (batch, head) pair after the
# other takes a third of the time. Elsewhere all pairs go together, or the device would idle: only memory sets a limit.
PLAIN_LIMIT = {"cpu": 2**22, "gpu": 2**28, "tpu": 2**28}
CHUNK_LIMIT = {"cpu": 2**24, "gpu": 2**27, "tpu": 2**27}


def choose_implementation(scores: int, head_dim: int, dtype: Dtype, backend: str) -> str:
    """cuDNN where it works, else plain up to `PLAIN_LIMIT` scores (of a device: batch x heads x queries x keys), else
    chunked."""
    if backend == "gpu" and jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    return "plain" if scores <= PLAIN_LIMIT[backend] else "chunked"


def shared_by() -> int:
    """Devices that share what is being traced: those of the mesh that the caller set (`jax.set_mesh`), else one.

    Under jit over a mesh shapes are those of the whole batch. Axes that are mapped by hand (pmap, shard_map) do not
    count: there shapes are those of one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh.auto_axes)


def attention(
    q_BxLxHxD: Float[Array, "batch queries heads dim"],
    k_BxSxHxD: Float[Array, "batch keys heads dim"],
    v_BxSxHxD: Float[Array, "batch keys heads dim"],
    causal: bool = False,
    implementation: str = "auto",
) -> Float[Array, "batch queries heads dim"]:
    """(Eq. 1). Scores and softmax are float32 whatever the inputs are; the result has the dtype of `v`.

    Causal attention is always plain: only the text encoders use it, on 77 tokens. Raises ValueError for an unknown
    implementation.
    """
    if causal:
        implementation = "plain"
    if implementation == "auto":
        batch, queries, heads, dim = q_BxLxHxD.shape
        scores = batch * heads * queries * k_BxSxHxD.shape[1] // shared_by()
        implementation = choose_implementation(scores, dim, v_BxSxHxD.dtype, hardware.backend())
    if implementation == "plain":
        return _plain(q_BxLxHxD, k_BxSxHxD, v_BxSxHxD, causal)
    if implementation == "chunked":
        return _chunked(q_BxLxHxD, k_BxSxHxD, v_BxSxHxD)
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q_BxLxHxD, k_BxSxHxD, v_BxSxHxD, implementation="cudnn")
    raise ValueError(f"attention implementation {implementation!r} is unknown: use auto, plain, chunked or cudnn")


def _plain(q, k, v, causal):
    scores_BxHxLxS = jnp.einsum("blhd,bshd->bhls", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if causal:
        visible = jnp.tril(jnp.ones(scores_BxHxLxS.shape[-2:], bool))
        scores_BxHxLxS = jnp.where(visible[None, None], scores_BxHxLxS, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores_BxHxLxS, axis=-1).astype(v.dtype)
    return jnp.einsum("bhls,bshd->blhd", weights, v)


def _chunked(q, k, v):
    """`lax.map` over chunks of queries, and on a CPU over (batch, head) pairs."""
    batch, queries, heads, dim = q.shape
    pairs, keys = batch * heads, k.shape[1]
    backend = hardware.backend()
    # Where devices share the batch, a loop over pairs would make each of them do all the work.
    together = 1 if backend == "cpu" and shared_by() == 1 else pairs
    chunk = min(queries, max(1, CHUNK_LIMIT[backend] * shared_by() // (together * keys)))
    chunks = -(-queries // chunk)

    def as_pairs(x):
        return x.transpose(0, 2, 1, 3).reshape(pairs // together, together, x.shape[1], dim)

    @jax.checkpoint
    def one_chunk(q_PxCxD, k_PxSxD, v_PxSxD):
        scores = jnp.einsum("pcd,psd->pcs", q_PxCxD, k_PxSxD, preferred_element_type=jnp.float32) * dim**-0.5
        # Divided by their sum after the product with v, which has far fewer numbers than the scores.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        out = jnp.einsum("pcs,psd->pcd", weights.astype(v.dtype), v_PxSxD, preferred_element_type=jnp.float32)
        return (out / weights.sum(-1, keepdims=True)).astype(v.dtype)

    def some_pairs(inputs):
        q_PxLxD, k_PxSxD, v_PxSxD = inputs
        if chunks == 1:
            return one_chunk(q_PxLxD, k_PxSxD, v_PxSxD)
        padded = jnp.pad(q_PxLxD, ((0, 0), (0, chunks * chunk - queries), (0, 0)))
        q_NxPxCxD = padded.reshape(together, chunks, chunk, dim).swapaxes(0, 1)
        out = jax.lax.map(lambda q_PxCxD: one_chunk(q_PxCxD, k_PxSxD, v_PxSxD), q_NxPxCxD)
        return out.swapaxes(0, 1).reshape(together, chunks * chunk, dim)[:, :queries]

    out = jax.lax.map(some_pairs, (as_pairs(q), as_pairs(k), as_pairs(v)))
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


@jax.checkpoint
def geglu(x: Float[Array, "batch tokens twice"]) -> Float[Array, "batch tokens half"]:
    """`a * gelu(b)` of the halves of the last axis, exact gelu, in float32; the backward pass starts from `x` again.

    By erf, not by erfc as in nn.gelu, of which XLA:CPU makes three passes over memory.
    """
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return (a * (0.5 * b * (1 + jax.lax.erf(b * 0.5**0.5)))).astype(x.dtype)


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020): `net_2(a * gelu(b))`, `a, b = net_0(x)`, four times as wide inside."""

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        width = x.shape[-1]
        projected = Projection(8 * width, self.dtype, self.param_dtype, name="net_0")(x)
        return dense(width, "net_2", self)(geglu(projected))


class Projection(nn.Module):
    """One linear layer named `proj`; a level of its own because diffusers' GEGLU has one."""

    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens features"]:
        return dense(self.features, "proj", self)(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a layer norm and added to its input.

    With `only_cross_attention` the first reads the context too. What comes before the context is computed once for rows
    of the context that share an `x`.
    """

    heads: int
    only_cross_attention: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], context: Float[Array, "rows words context_width"]
    ) -> Float[Array, "rows tokens width"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = lambda name: LayerNorm(name=name, **types)  # noqa: E731
        first = None
        if self.only_cross_attention:
            x, first = as_many(x, context), context
        x = x + Attention(self.heads, name="attn1", **types)(norm("norm1")(x), first)
        x = as_many(x, context)
        x = x + Attention(self.heads, name="attn2", **types)(norm("norm2")(x), context)
        return x + FeedForward(name="ff", **types)(norm("norm3")(x))


class SpatialTransformer(nn.Module):
    """diffusers' Transformer2DModel: a feature map as a sequence of its places, between two projections.

    These are 1x1 convolutions, or linears (`linear`), which differ in the shape of their kernels alone.
    """

    heads: int
    norm_num_groups: int = 32
    remat: str = "none"
    num_blocks: int = 1
    linear: bool = False
    only_cross_attention: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        context: Float[Array, "rows words context_width"],
    ) -> Float[Array, "rows height width channels"]:
        batch, height, width, channels = x.shape
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        block = wrapped(TransformerBlock, "transformer", self.remat)
        h = GroupNorm(self.norm_num_groups, 1e-6, name="norm", **types)(x)
        project = dense if self.linear else functools.partial(conv, kernel=1)
        h = project(channels, "proj_in", self)(h).reshape(batch, height * width, channels)
        for i in range(self.num_blocks):
            h = block(self.heads, self.only_cross_attention, name=f"transformer_blocks_{i}", **types)(h, context)
        h = h.reshape(-1, height, width, channels)
        return as_many(x, h) + project(channels, "proj_out", self, kernel_init=ZEROS)(h)
