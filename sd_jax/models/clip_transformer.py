"""The transformer that both towers of CLIP are made of (Radford et al. 2021), by transformers' names.

    x <- x + attention(norm(x)),  x <- x + MLP(norm(x))

In OpenAI's weights the MLP has quick_gelu, `x sigmoid(1.702 x)`, in OpenCLIP's the exact gelu.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax.models.attention import attention
from sd_jax.models.layers import ZEROS, Dtype, LayerNorm, dense
from sd_jax.models.presets import CLIPTextConfig, CLIPVisionConfig
from sd_jax.models.remat import wrapped

Tokens = Float[Array, "batch tokens width"]


class Encoder(nn.Module):
    """The layers, one after the other."""

    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool  # a token sees those before it and itself (text), or all (pictures)
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x: Tokens) -> list[Tokens]:
        """-> the states before the first layer and behind each."""
        layer = wrapped(_Layer, "transformer", self.remat)
        states = [x]
        for i in range(self.config.num_hidden_layers):
            states.append(layer(self.config, self.causal, self.dtype, self.param_dtype, name=f"layers_{i}")(states[-1]))
        return states


def layer_norm(config: CLIPTextConfig | CLIPVisionConfig, name: str, like: nn.Module) -> LayerNorm:
    """In the dtypes of the module `like`."""
    return LayerNorm(config.layer_norm_eps, dtype=like.dtype, param_dtype=like.param_dtype, name=name)


class _Layer(nn.Module):
    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x):
        norm = lambda name: layer_norm(self.config, name, self)  # noqa: E731
        types = (self.dtype, self.param_dtype)
        x = x + _SelfAttention(self.config, self.causal, *types, name="self_attn")(norm("layer_norm1")(x))
        return x + _MLP(self.config, *types, name="mlp")(norm("layer_norm2")(x))


class _SelfAttention(nn.Module):
    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x):
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        split = lambda y: y.reshape(*y.shape[:2], heads, width // heads)  # noqa: E731
        q, k, v = (split(dense(width, f"{name}_proj", self)(x)) for name in "qkv")
        y = attention(q, k, v, causal=self.causal).reshape(x.shape)
        return dense(width, "out_proj", self, kernel_init=ZEROS)(y)


class _MLP(nn.Module):
    config: CLIPTextConfig | CLIPVisionConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x):
        h = dense(self.config.intermediate_size, "fc1", self)(x)
        h = h * nn.sigmoid(1.702 * h) if self.config.hidden_act == "quick_gelu" else nn.gelu(h, approximate=False)
        return dense(self.config.hidden_size, "fc2", self, kernel_init=ZEROS)(h)
