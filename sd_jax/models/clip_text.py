"""CLIP's text transformer (Radford et al. 2021), equal to transformers' CLIPTextModel(WithProjection)."""

import flax.linen as nn
import jax.numpy as jnp

from sd_jax.models.clip_transformer import Encoder, layer_norm
from sd_jax.models.layers import Dtype, dense
from sd_jax.models.presets import CLIPTextConfig
from sd_jax.types import Conditioning, TokenIds


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


class _TextModel(nn.Module):
    config: CLIPTextConfig
    dtype: Dtype
    param_dtype: Dtype
    remat: str

    @nn.compact
    def __call__(self, ids, clip_skip):
        types = (self.dtype, self.param_dtype)
        words = _Embeddings(self.config, *types, name="embeddings")(ids)
        states = Encoder(self.config, True, *types, self.remat, name="encoder")(words)
        norm = layer_norm(self.config, "final_layer_norm", self)
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
