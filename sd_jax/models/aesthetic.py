"""LAION's aesthetic predictors: a CLIP embedding -> how much people like the picture, about 1 to 10.

    V2, "mlp": width-1024-128-64-16-1 without activations, an affine map that was trained as five; "mlp_relu": the same
        with a ReLU behind all but the last. Layers are numbered as in torch's Sequential, dropout and ReLU counted.
    V1, "linear": one layer.

They read the projected embedding of a picture, which the module L2-normalises: V2 and V1's `l_14` that of OpenAI's
ViT-L/14 (width 768), V1's `b_32` and `b_16` that of those networks (512).

Source: christophschuhmann/improved-aesthetic-predictor, LAION-AI/aesthetic-predictor.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax.models.clip import normalised
from sd_jax.models.layers import Dtype, dense
from sd_jax.models.presets import AestheticConfig

WIDTHS = (1024, 128, 64, 16, 1)
DROPOUT = (0.2, 0.2, 0.1)  # behind the first layers
NUMBERS = {"mlp": (0, 2, 4, 6, 7), "mlp_relu": (0, 3, 6, 9, 11)}  # of the layers in torch's Sequential
KINDS = ("linear", *NUMBERS)


class AestheticHead(nn.Module):
    """Embeddings, of any length -> scores."""

    config: AestheticConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "batch width"],
        deterministic: bool = True,  # False: with dropout, which needs the random key "dropout"
    ) -> Float[Array, " batch"]:
        if features.shape[1] != self.config.width:
            raise ValueError(f"embeddings of {features.shape[1]} numbers for a head of width {self.config.width}")
        x = normalised(features).astype(self.dtype)
        if self.config.kind == "linear":
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.config.width, 1), self.param_dtype)
            bias = self.param("bias", nn.initializers.zeros, (1,), self.param_dtype)
            return (x @ kernel.astype(self.dtype))[:, 0] + bias.astype(self.dtype)
        for i, (number, width) in enumerate(zip(NUMBERS[self.config.kind], WIDTHS, strict=True)):
            x = dense(width, f"layers_{number}", self)(x)
            if self.config.kind == "mlp_relu" and width != WIDTHS[-1]:
                x = nn.relu(x)
            if i < len(DROPOUT):
                x = nn.Dropout(DROPOUT[i])(x, deterministic=deterministic)
        return x[:, 0]
