"""The residual block that the U-Net and the autoencoder share."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax.models.layers import ZEROS, Dtype, GroupNorm, conv, dense


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, + time, norm, SiLU, conv, + shortcut (diffusers' ResnetBlock2D; He et al. 2016).

    `time` is the embedded timestep, before its SiLU; None in the autoencoder.
    """

    features: int
    norm_num_groups: int = 32
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        time: Float[Array, "batch time_width"] | None = None,
    ) -> Float[Array, "batch height width features"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = nn.silu(GroupNorm(self.norm_num_groups, self.epsilon, name="norm1", **types)(x))
        h = conv(self.features, "conv1", self)(h)
        if time is not None:
            h = h + dense(self.features, "time_emb_proj", self)(nn.silu(time))[:, None, None, :]
        h = nn.silu(GroupNorm(self.norm_num_groups, self.epsilon, name="norm2", **types)(h))
        h = conv(self.features, "conv2", self, kernel_init=ZEROS)(h)
        if x.shape[-1] != self.features:
            x = conv(self.features, "conv_shortcut", self, kernel=1)(x)
        return x + h
