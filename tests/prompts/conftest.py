import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.models.clip_text import CLIPText
from sd_jax.models.presets import TINY
from sd_jax.prompts.tokenize import train_tokenizer

CAPTIONS = ["a photo of a red circle, a blue square, and a small green star on the left of a cat"] * 4


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A tokenizer to which every word of CAPTIONS is one token."""
    return train_tokenizer(CAPTIONS, tmp_path_factory.mktemp("words") / "tokenizer", 700)


@pytest.fixture(scope="session")
def make_encoder(words):
    """`make_encoder(positions)` -> `encode(ids)` of a tiny random CLIP. It refuses more than one row at once."""

    def make(positions=77):
        config = dataclasses.replace(
            TINY.text_encoder,
            vocab_size=words.vocab_size,
            eos_token_id=words.eos_token_id,
            max_position_embeddings=positions,
        )
        network, rng = CLIPText(config), np.random.default_rng(0)
        shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, positions), jnp.int32))["params"]
        params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.1, 0.3, leaf.shape), jnp.float32), shapes)
        apply = jax.jit(lambda ids: network.apply({"params": params}, ids))

        def encode(ids):
            assert ids.shape == (1, positions) and ids.dtype == np.int32
            return apply(ids)

        return encode

    return make


@pytest.fixture(scope="session")
def encode(make_encoder):
    return make_encoder(77)
