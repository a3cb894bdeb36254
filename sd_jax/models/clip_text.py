"""CLIP's text transformer (Radford et al. 2021), equal to transformers' CLIPTextModel(WithProjection)."""

import flax.linen as nn
import jax.numpy as jnp

from sd_jax.models.attention import attention
from sd_jax.models.layers import ZEROS, Dtype, LayerNorm, dense
from sd_jax.models.presets import CLIPTextConfig
from sd_jax.models.remat import wrapped
from sd_jax.types import Conditioning, TokenIds


class _SelfAttention(nn.Module):
    config: CLIPTextConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x):
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        split = lambda y: y.reshape(*y.shape[:2], heads, width // heads)  # noqa: E731
        q, k, v = (split(dense(width, f"{name}_proj", self)(x)) for name in "qkv")
        return dense(width, "out_proj", self, kernel_init=ZEROS)(attention(q, k, v, causal=True).reshape(x.shape))


class _MLP(nn.Module):
    config: CLIPTextConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x):
        h = dense(self.config.intermediate_size, "fc1", self)(x)
        h = h * nn.sigmoid(1.702 * h) if self.config.hidden_act == "quick_gelu" else nn.gelu(h, approximate=False)
        return dense(self.config.hidden_size, "fc2", self, kernel_init=ZEROS)(h)


class _Layer(nn.Module):
    config: CLIPTextConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x):
        parts = (self.config, self.dtype, self.param_dtype)
        norm = lambda name: _layer_norm(self.config, name, self)  # noqa: E731
        x = x + _SelfAttention(*parts, name="self_attn")(norm("layer_norm1")(x))
        return x + _MLP(*parts, name="mlp")(norm("layer_norm2")(x))


def _layer_norm(config, name, like):
    return LayerNorm(config.layer_norm_eps, dtype=like.dtype, param_dtype=like.param_dtype, name=name)


class _Embeddings(nn.Module):
    config: CLIPTextConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, ids):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype, "embedding_init": nn.initializers.normal(0.02)}
        words = nn.Embed(self.config.vocab_size, self.config.hidden_size, name="token_embedding", **types)
        places = nn.Embed(
            self.config.max_position_embeddings, self.config.hidden_size, name="position_embedding", **types
        )
        return words(ids) + places(jnp.arange(ids.shape[1], dtype=jnp.int32))[None]


class _Encoder(nn.Module):
    config: CLIPTextConfig
    dtype: Dtype
    param_dtype: Dtype
    remat: str

    @nn.compact
    def __call__(self, x):
        layer = wrapped(_Layer, "transformer", self.remat)
        states = [x]
        for i in range(self.config.num_hidden_layers):
            states.append(layer(self.config, self.dtype, self.param_dtype, name=f"layers_{i}")(states[-1]))
        return states


class _TextModel(nn.Module):
    config: CLIPTextConfig
    dtype: Dtype
    param_dtype: Dtype
    remat: str

    @nn.compact
    def __call__(self, ids, clip_skip):
        parts = (self.config, self.dtype, self.param_dtype)
        states = _Encoder(*parts, self.remat, name="encoder")(_Embeddings(*parts, name="embeddings")(ids))
        norm = _layer_norm(self.config, "final_layer_norm", self)
        last = norm(states[-1])
        context = states[-clip_skip]
        if self.config.context_norm:
            context = last if clip_skip == 1 else norm(context)
        # The first token that is the tokenizer's own end: argmax of ids breaks once tokens are added behind it
        end = jnp.argmax(ids == self.config.eos_token_id, axis=1)
        return Conditioning(context, last[jnp.arange(ids.shape[0]), end])


class CLIPText(nn.Module):
    """Token ids -> Conditioning."""

    config: CLIPTextConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, ids: TokenIds, clip_skip: int | None = None) -> Conditioning:
        """`clip_skip` counts layers from the end as A1111 does (1 = last); None = the config's.

        context: [batch, tokens, hidden_size], after the final layer norm if the config has `context_norm`; pooled:
        [batch, hidden_size], the last layer after that norm at the end token, or [batch, projection_dim] of it.
        Raises ValueError for more tokens than positions, or a clip_skip outside 1..num_hidden_layers.
        """
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"{ids.shape[1]} tokens, but max_position_embeddings is {self.config.max_position_embeddings}"
            )
        clip_skip = self.config.clip_skip if clip_skip is None else clip_skip
        if not 1 <= clip_skip <= self.config.num_hidden_layers:
            raise ValueError(f"clip_skip={clip_skip} is not within 1..{self.config.num_hidden_layers}")
        model = _TextModel(self.config, self.dtype, self.param_dtype, self.remat, name="text_model")
        states = model(ids, clip_skip)
        if self.config.projection_dim is None:
            return states
        return states.replace(pooled=dense(self.config.projection_dim, "text_projection", self, False)(states.pooled))
