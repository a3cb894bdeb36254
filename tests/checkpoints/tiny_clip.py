"""A small random CLIP for the tests of this room, made without torch."""

import numpy as np
from flax import traverse_util

from sd_jax.checkpoints import keys_clip
from sd_jax.checkpoints.tensors import lazy
from sd_jax.models.presets import TINY_CLIP


def random_tensors(config=TINY_CLIP, half=False):
    """{transformers' name: Tensor}; with `half` in the types of OpenAI's files: float16 matrices, float32 norms."""
    rng = np.random.default_rng(0)

    def draw(shape):
        return rng.normal(size=shape).astype(np.float16 if half and len(shape) > 1 else np.float32)

    return {name: lazy(np.asarray(draw(shape))) for name, shape in keys_clip.shapes(config).items()}


def random_params(config=TINY_CLIP, half=False):
    """The same as a tree by our names."""
    ours = keys_clip.from_transformers(random_tensors(config, half), config, "the test")
    return traverse_util.unflatten_dict(ours, sep="/")
