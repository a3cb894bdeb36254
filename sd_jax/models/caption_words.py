"""A VGG that learns from captions alone which words a picture answers to (Joulin et al. 2016, arXiv 1511.02251).

    logits = W mean_places h_L,   loss = mean_words BCE(sigmoid(logits), whether the caption has the word)       (Eq. 1)

Its trunk then measures perceptual distances (`models/perceptual.py`) where no published network is at hand.
"""

import flax.linen as nn
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from sd_jax.models.layers import Dtype, dense
from sd_jax.models.perceptual import VGGFeatures
from sd_jax.models.presets import FeaturesConfig
from sd_jax.types import Image, TokenIds


class CaptionWords(nn.Module):
    """Image -> a logit for every word of the vocabulary. Parameters: those of VGGFeatures, and `words`."""

    config: FeaturesConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Image) -> Float[Array, "batch words"]:
        """Image in [-1, 1]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        trunk = VGGFeatures(self.config.widths, self.config.depths, **types)
        nn.share_scope(self, trunk)
        pooled = trunk(image)[-1].mean(axis=(1, 2))
        return dense(self.config.vocab_size, "words", self)(pooled).astype(jnp.float32)


def words_loss(
    logits: Float[Array, "batch words"],
    ids: TokenIds,  # of the captions; every one of them counts as a word, those of start, end and padding too
) -> Float[Array, " batch"]:
    """(Eq. 1), float32. What every caption has teaches the bias and nothing else."""
    batch, words = logits.shape
    said = jnp.zeros((batch, words), jnp.float32).at[jnp.arange(batch)[:, None], ids].set(1.0)
    return optax.sigmoid_binary_cross_entropy(logits, said).mean(-1)
