import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from benchmarks.timing import count_flops
from sd_jax.models.networks import Networks
from sd_jax.models.presets import TINY
from sd_jax.models.remat import POLICIES, wrapped
from sd_jax.models.unet import UNet
from sd_jax.types import Conditioning

CONFIG = dataclasses.replace(TINY.unet, block_out_channels=(32,), attention_blocks=(True,))


@pytest.fixture(scope="module")
def costs():
    """{policy: (bytes kept for the backward pass, arithmetic of value and gradient)}. Nothing is compiled."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    inputs = shape(4, 16, 16, 4), shape(4), Conditioning(shape(4, 8, 32))
    params = jax.eval_shape(UNet(CONFIG).init, jax.random.key(0), *inputs)["params"]

    def cost(remat):
        def loss(params, *inputs):
            return jnp.square(UNet(CONFIG, remat=remat).apply({"params": params}, *inputs)).mean()

        kept = jax.eval_shape(lambda *args: jax.vjp(loss, *args)[1], params, *inputs)
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
        return size, count_flops(jax.grad(loss), params, *inputs)

    return {remat: cost(remat) for remat in POLICIES}


def test_what_keeps_less_computes_more(costs):
    kept, flops = zip(*(costs[remat] for remat in ("none", "dots", "transformers", "blocks")), strict=True)
    assert flops[0] < flops[1] < flops[2] < flops[3] < 4 / 3 * flops[0]
    assert kept[3] < 0.5 * kept[1] < 0.5 * kept[0]
    assert kept[3] < kept[2] < kept[0]


def test_products_are_kept_and_scores_are_not(costs):
    """Of "dots": what it computes again is attention's products alone, whose axes of batch and heads are batch axes."""
    queries, words, width = 16 * 16, 8, 32
    attention = 2 * 2 * 4 * width * queries * (queries + words)  # q k^T and weights v, of both attentions of a block
    blocks = CONFIG.layers_per_block + 1 + CONFIG.layers_per_block + 1  # down, middle, up
    extra = costs["dots"][1] - costs["none"][1]
    assert 0.5 * blocks * attention <= extra <= blocks * attention


def test_unknown_name_is_told_with_those_that_there_are():
    for use in (lambda: wrapped(nn.Dense, "resnet", "most"), lambda: Networks.of(TINY, remat="most")):
        with pytest.raises(ValueError, match="config.remat='most' is unknown: use none, dots, transformers, blocks"):
            use()


def test_every_part_of_a_model_takes_the_name():
    networks = Networks.of(TINY, remat="blocks")
    assert {getattr(networks, part).remat for part in TINY.parts} == {"blocks"}
