"""The residual block that the U-Net and the autoencoder share."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax.models.layers import ZEROS, Dtype, GroupNorm, as_many, conv, dense


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, + time, norm, SiLU, conv, + shortcut (diffusers' ResnetBlock2D; He et al. 2016).

    `time` is the embedded timestep, before its SiLU, of as many rows as `x`, or of fewer, which `x` repeats; None in
    the autoencoder. With `scale_shift` it scales and shifts the second norm's result (FiLM, Perez et al. 2018) where
    it is else added before that norm.
    """

    features: int
    norm_num_groups: int = 32
    epsilon: float = 1e-5
    scale_shift: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        time: Float[Array, "times time_width"] | None = None,
    ) -> Float[Array, "batch height width features"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = GroupNorm(self.norm_num_groups, self.epsilon, silu=True, name="norm1", **types)(x)
        h = conv(self.features, "conv1", self)(h)
        scale_shift = time is not None and self.scale_shift
        norm2 = GroupNorm(self.norm_num_groups, self.epsilon, silu=not scale_shift, name="norm2", **types)
        if time is not None:
            width = 2 * self.features if self.scale_shift else self.features
            time = as_many(dense(width, "time_emb_proj", self)(nn.silu(time)), x)[:, None, None, :]
        if scale_shift:
            scale, shift = jnp.split(time, 2, axis=-1)
            h = nn.silu(norm2(h) * (1 + scale) + shift)
        else:
            h = norm2(h if time is None else h + time)
        h = conv(self.features, "conv2", self, kernel_init=ZEROS)(h)
        if x.shape[-1] != self.features:
            x = conv(self.features, "conv_shortcut", self, kernel=1)(x)
        return x + h
