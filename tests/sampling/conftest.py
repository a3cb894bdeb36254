import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.models.networks import Networks
from sd_jax.models.presets import TINY_SHAPES
from sd_jax.prompts.tokenize import train_tokenizer
from sd_jax.sampling.pipeline import Pipeline


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


@pytest.fixture(scope="module")
def one_thread():
    """In torch: more wait for each other longer than a network of this size takes."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
