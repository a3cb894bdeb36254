"""Adapters that are hooked onto networks do what they do merged into weights, with the same gradients, and no more."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.adapters import deltas, lora
from sd_jax.adapters.hooks import hooked, merge
from sd_jax.models.networks import Networks
from sd_jax.models.presets import TINY
from sd_jax.types import Conditioning
from tests.adapters.shapes import shapes_of

# Linears, convolutions of every kind (strided, after doubling, of one place), and the text encoder
PATTERNS = ("unet/.*attn", ("unet/.*(resnets|samplers|proj_in)", 2), "text_encoder/.*(q_proj|fc1)$")
KINDS = {
    "lora": {},
    "loha": {"algorithm": "loha"},
    "lokr": {"algorithm": "lokr"},
    "dora": {"dora": True},
}


@pytest.fixture(scope="module")
def networks():
    return Networks.of(TINY)


@pytest.fixture(scope="module")
def params(networks):
    shapes = lambda part: jax.eval_shape(lambda: networks.init(part, jax.random.key(0)))  # noqa: E731
    zeros = lambda part: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes(part))  # noqa: E731
    return {part: _random(zeros(part), i) for i, part in enumerate(("unet", "text_encoder"))}


def _random(tree, seed, scale=0.2):
    """No leaf is left at zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32), tree)


def _layers(params, seed=0, **options):
    targets = lora.targets_of(shapes_of(params), PATTERNS, rank=3, alpha=2.0)
    layers = lora.init(jax.random.key(seed), targets, params=params, **options)
    trained, fixed = lora.split(layers)
    return lora.join(_random(trained, seed + 10), fixed)


def _inputs():
    x = jax.random.normal(jax.random.key(5), (2, 8, 8, 4))
    return x, jnp.array([3.0, 700.0]), Conditioning(jax.random.normal(jax.random.key(6), (2, 5, 32)))


IDS = jnp.array([[5, 6, 999, 999], [7, 999, 999, 999]], jnp.int32)


@pytest.fixture(scope="module")
def answers(networks):
    """params -> what the U-Net and the text encoder say, compiled once."""

    @jax.jit
    def both(params):
        return networks.unet.apply({"params": params["unet"]}, *_inputs()), networks.encode_text(params, IDS).context

    return both


def _hooked_answers(networks, params, adapters):
    on = hooked(networks, adapters)
    return on.unet.apply({"params": params["unet"]}, *_inputs()), on.encode_text(params, IDS).context


@pytest.mark.parametrize("kind", KINDS)
def test_hooked_is_merged(networks, params, answers, kind):
    layers = _layers(params, **KINDS[kind])
    there = jax.jit(lambda strength: _hooked_answers(networks, params, [(layers, strength)]))
    for strength in (0.3, 1.0):
        merged, base = answers(merge(params, layers, dict.fromkeys(layers, strength))), answers(params)
        for ours, theirs, before in zip(there(strength), merged, base, strict=True):
            assert float(jnp.abs(theirs - before).max()) > 0.02
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))


def test_several_add_up_and_strength_zero_is_none(networks, params, answers):
    first, second = _layers(params, 1), _layers(params, 2, algorithm="loha")
    adapters = [(first, 0.7), (second, -0.4), (second, 0.0)]
    there = jax.jit(lambda: _hooked_answers(networks, params, adapters))()
    merged = merge(merge(params, first, dict.fromkeys(first, 0.7)), second, dict.fromkeys(second, -0.4))
    for ours, theirs in zip(there, answers(merged), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))


def test_merging_with_the_opposite_strength_gives_the_weights_back(params):
    layers = _layers(params)
    there = merge(params, layers, dict.fromkeys(layers, 1.0))
    back = merge(there, layers, dict.fromkeys(layers, -1.0))
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), there, params))
    assert max(moved) > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, params)


@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_gradients_are_those_through_the_weights(params, remat):
    networks = Networks.of(TINY, remat=remat)
    layers = {"unet": _layers(params)["unet"]}
    trained, fixed = lora.split(layers)

    def hooks(trained):
        on = hooked(networks, [(lora.join(trained, fixed), jnp.float32(1))])
        return jnp.mean(on.unet.apply({"params": params["unet"]}, *_inputs()) ** 2)

    def weights(trained):
        together = merge(params, lora.join(trained, fixed), {"unet": 1.0})
        return jnp.mean(networks.unet.apply({"params": together["unet"]}, *_inputs()) ** 2)

    ours, theirs = jax.jit(jax.grad(hooks))(trained), jax.jit(jax.grad(weights))(trained)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs))
    assert largest > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), ours, theirs)


def test_a_layer_of_its_own_strength(networks, params):
    layers = _layers(params)
    path = "down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_q"
    weighed = {"unet": {path: {**layers["unet"][path], "strength": jnp.float32(0.5)}}}
    alone = {"unet": {path: layers["unet"][path]}}
    say = jax.jit(lambda layers, t: hooked(networks, [(layers, t)]).unet.apply({"params": params["unet"]}, *_inputs()))
    ours, theirs = say(weighed, 1.0), say(alone, 0.5)
    np.testing.assert_array_equal(ours, theirs)


def test_norms_biases_and_whole_differences_are_merged(params):
    rng = np.random.default_rng(0)
    at = "down_blocks_0/resnets_0"
    resnet = params["unet"]["down_blocks_0"]["resnets_0"]
    kernel, scale = resnet["conv1"]["kernel"], resnet["norm1"]["scale"]
    diff = rng.normal(size=deltas.to_torch(kernel).shape).astype(np.float32)
    norm, bias = (rng.normal(size=scale.shape).astype(np.float32) for _ in range(2))
    layers = {f"{at}/conv1": {"diff": diff}, f"{at}/norm1": {"w_norm": norm, "b_norm": bias}}
    merged = deltas.merge(params["unet"], layers, 0.5)["down_blocks_0"]["resnets_0"]
    np.testing.assert_allclose(merged["conv1"]["kernel"], kernel + 0.5 * diff.transpose(2, 3, 1, 0), atol=1e-6)
    np.testing.assert_allclose(merged["norm1"]["scale"], scale + 0.5 * norm, atol=1e-6)
    np.testing.assert_allclose(merged["norm1"]["bias"], resnet["norm1"]["bias"] + 0.5 * bias, atol=1e-6)
    with pytest.raises(KeyError, match="mid_block/nowhere is no layer"):
        deltas.merge(params["unet"], {"mid_block/nowhere": {"diff": diff}}, 1.0)


def test_what_targets_refuses(params):
    with pytest.raises(ValueError, match="'unet/nothing' finds no linear or convolution of unet, text_encoder"):
        lora.targets_of(shapes_of(params), ["unet/nothing"], 4, 0.0)
    with pytest.raises(ValueError, match="config.adapter.rank=200: unet/.* is .* wide and gives .* numbers: give 1 to"):
        lora.targets_of(shapes_of(params), ["unet/.*attn1/to_q"], 200, 0.0)
    with pytest.raises(ValueError, match="config.adapter.algorithm='glora' is unknown: use lora, loha, lokr"):
        lora.init(jax.random.key(0), {}, "glora")


def test_ranks_and_alphas_by_pattern(params):
    rows = [("attn1/to_q$", 2), ("attn1/to_k$", 4, 8.0), "attn1/"]
    found = lora.targets_of(shapes_of(params), rows, rank=6, alpha=0.0, rslora=False)["unet"]
    at = "down_blocks_0/attentions_0/transformer_blocks_0/attn1"
    assert (found[f"{at}/to_q"].rank, found[f"{at}/to_q"].alpha) == (2, 2.0)
    assert (found[f"{at}/to_k"].rank, found[f"{at}/to_k"].alpha) == (4, 8.0)
    assert (found[f"{at}/to_v"].rank, found[f"{at}/to_v"].alpha) == (6, 6.0)
    rooted = lora.targets_of(shapes_of(params), ["attn1/"], rank=4, alpha=2.0, rslora=True)["unet"]
    assert rooted[f"{at}/to_v"].alpha == 4.0  # / rank 4 = 2 / sqrt(4)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_added_at_first(networks, params, kind):
    targets = lora.targets_of(shapes_of(params), PATTERNS, rank=3, alpha=2.0)
    layers = lora.init(jax.random.key(0), targets, params=params, **KINDS[kind])
    merged = merge(params, layers, dict.fromkeys(layers, 1.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, params)


def test_split_and_join(params):
    layers = _layers(params)
    trained, fixed = lora.split(layers)
    assert not any("alpha" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained))
    jax.tree.map(np.testing.assert_array_equal, lora.join(trained, fixed), layers)


@pytest.mark.parametrize(
    ("size", "factor", "pair"), [(36, -1, (6, 6)), (40, -1, (5, 8)), (40, 4, (4, 10)), (7, -1, (1, 7))]
)
def test_factors(size, factor, pair):
    assert lora.factors_of(size, factor) == pair


def test_half_precision_stays_what_it_is(params, answers):
    networks = Networks.of(TINY, "bfloat16")
    layers = {"unet": _layers(params)["unet"]}
    on = hooked(networks, [(layers, jnp.float32(1))])
    x, t, told = _inputs()
    half = dataclasses.replace(told, context=told.context.astype(jnp.bfloat16))
    there = jax.jit(lambda: on.unet.apply({"params": params["unet"]}, x.astype(jnp.bfloat16), t, half))()
    full, _ = answers(merge(params, layers, {"unet": 1.0}))
    assert float(jnp.abs(there.astype(jnp.float32) - full).mean() / jnp.abs(full).mean()) < 0.1
