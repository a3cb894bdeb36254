"""A tiny model of shapes world and tiny judges, all of random weights, as files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.checkpoints import aesthetic, clip
from sd_jax.models.aesthetic import AestheticConfig, AestheticHead
from sd_jax.models.clip import CLIP
from sd_jax.models.presets import TINY_CLIP
from tests.sampling.conftest import pipe, tokenizer  # noqa: F401

HEAD = AestheticConfig("linear", TINY_CLIP.projection_dim)


def random_like(init, *inputs):
    shapes, rng = jax.eval_shape(init, jax.random.key(0), *inputs), np.random.default_rng(0)
    draw = lambda path, leaf: jnp.asarray(  # noqa: E731
        rng.normal(float(path[-1].key == "scale"), 0.2, leaf.shape), leaf.dtype
    )
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def files(pipe, tokenizer, tmp_path_factory):  # noqa: F811
    """A folder with model/, clip/ and head.safetensors."""
    folder = tmp_path_factory.mktemp("judges")
    pipe.save(folder / "model")
    text = dataclasses.replace(
        TINY_CLIP.text_config, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    config = dataclasses.replace(TINY_CLIP, text_config=text)
    clip.save_clip(folder / "clip", config, random_like(CLIP.of(config).init), tokenizer=tokenizer)
    head = random_like(AestheticHead(HEAD).init, jnp.zeros((1, HEAD.width)))
    aesthetic.save(folder / "head.safetensors", HEAD, head)
    return folder
