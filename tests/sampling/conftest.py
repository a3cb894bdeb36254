import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.models.clip import CLIP
from sd_jax.models.networks import Networks
from sd_jax.models.presets import SHAPES_CLIP, TINY_SHAPES
from sd_jax.prompts.tokenize import train_tokenizer
from sd_jax.sampling.clip import Clip
from sd_jax.sampling.pipeline import Pipeline

# Compiles in half of the time
ONE_LEVEL = dataclasses.replace(
    TINY_SHAPES,
    unet=dataclasses.replace(TINY_SHAPES.unet, block_out_channels=(16,), attention_blocks=(True,)),
    vae=dataclasses.replace(TINY_SHAPES.vae, block_out_channels=(8, 8)),
)


def random_params(spec, seed=0):
    """Every parameter random: fresh networks end in zeros, which would hide what conditions them."""
    networks, rng = Networks.of(spec), np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
    return {
        part: jax.tree.map(draw, jax.eval_shape(lambda key, part=part: networks.init(part, key), jax.random.key(0)))
        for part in spec.parts
    }


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    captions = ["a red circle above a blue square", "a small green star on the left"] * 4
    return train_tokenizer(captions, tmp_path_factory.mktemp("tokenizer") / "tokenizer", 560)


@pytest.fixture(scope="session")
def pipe(tokenizer):
    return Pipeline(TINY_SHAPES, random_params(TINY_SHAPES), tokenizer)


@pytest.fixture(scope="session")
def clip(tokenizer):
    """Of random weights, with the tokenizer of `pipe`."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text, vision = SHAPES_CLIP.text_config, SHAPES_CLIP.vision_config
    config = dataclasses.replace(
        SHAPES_CLIP,
        text_config=dataclasses.replace(text, num_hidden_layers=1, vocab_size=tokenizer.vocab_size, **ids),
        vision_config=dataclasses.replace(vision, num_hidden_layers=1, patch_size=16),
    )
    params, rng = jax.jit(CLIP.of(config).init)(jax.random.key(0)), np.random.default_rng(0)
    moved = lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype)  # noqa: E731
    return Clip(config, jax.tree.map(moved, params), tokenizer)


@pytest.fixture(scope="module")
def one_thread():
    """In torch: more wait for each other longer than a network of this size takes."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
