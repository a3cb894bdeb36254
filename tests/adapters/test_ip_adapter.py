"""What an IP-Adapter adds to a cross-attention, and what it makes of a picture's features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.adapters import ip_adapter, lora
from sd_jax.adapters.hooks import hooked, merge
from sd_jax.adapters.ip_adapter import IPAdapter, layers_of
from sd_jax.models.families import SD15, SDXL
from sd_jax.models.networks import Networks
from sd_jax.models.presets import TINY
from sd_jax.types import Conditioning
from tests.adapters.shapes import shapes_of

CONFIG = TINY.unet


@pytest.fixture(scope="module")
def params():
    networks, rng = Networks.of(TINY), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: networks.init("unet", jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def adapter(params):
    made = ip_adapter.init(jax.random.key(0), "base", 12, CONFIG, params)
    rng = np.random.default_rng(1)
    return made.replace(tokens=jnp.asarray(rng.normal(size=(2, 4, CONFIG.cross_attention_dim)), jnp.float32))


def inputs():
    x = jax.random.normal(jax.random.key(5), (2, 8, 8, 4))
    return x, jnp.array([3.0, 700.0]), Conditioning(jax.random.normal(jax.random.key(6), (2, 5, 32)))


def say(params, adapters, remat="none"):
    on = hooked(Networks.of(TINY, remat=remat), adapters)
    return on.unet.apply({"params": params}, *inputs())


def test_cross_attentions_are_counted_as_files_count_them():
    """By the numbers that h94's files have: 1, 3, ... 31 and 139, the middle last."""
    sd15, sdxl = list(layers_of(SD15.unet).items()), list(layers_of(SDXL.unet).items())
    assert len(sd15) == 16 and len(sdxl) == 70
    assert sd15[0] == ("down_blocks_0/attentions_0/transformer_blocks_0/attn2", 320)
    assert sd15[6] == ("up_blocks_1/attentions_0/transformer_blocks_0/attn2", 1280)
    assert sd15[-1] == ("mid_block/attentions_0/transformer_blocks_0/attn2", 1280)
    assert sdxl[0] == ("down_blocks_1/attentions_0/transformer_blocks_0/attn2", 640)
    assert sdxl[24] == ("up_blocks_0/attentions_0/transformer_blocks_0/attn2", 1280)
    assert sdxl[-1] == ("mid_block/attentions_0/transformer_blocks_9/attn2", 1280)


def test_every_cross_attention_of_the_unet_is_counted(params):
    found = {path.removesuffix("/to_q") for path in shapes_of({"unet": params})["unet"] if path.endswith("attn2/to_q")}
    assert found == set(layers_of(CONFIG))


def test_it_attends_beside_the_text():
    rng = np.random.default_rng(0)
    q, tokens = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 6))
    k, v = rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    wanted = np.zeros((2, 3, 4))
    for b, head in np.ndindex(2, 2):
        own = slice(2 * head, 2 * head + 2)
        scores = q[b, :, own] @ (tokens[b] @ k.T)[:, own].T / np.sqrt(2)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        wanted[b, :, own] = weights @ (tokens[b] @ v.T)[:, own]
    layers = {"attn2": {"to_k_ip": k, "to_v_ip": v, "strength": np.float32(0.5)}}
    made = IPAdapter({}, jax.tree.map(np.float32, layers), jnp.asarray(tokens, jnp.float32))
    got = ip_adapter.attend(made, 0.6, "attn2", jnp.asarray(q.reshape(6, 4), jnp.float32), 2)
    np.testing.assert_allclose(got, 0.3 * wanted.reshape(6, 4), atol=1e-5)


def test_tokens_of_the_text_make_the_texts_own_answer(params, adapter):
    """With W_k and W_v of the U-Net, as a new one has them, and the text for tokens, out = (1 + t) Attn(q, k, v)."""
    told = inputs()[2].context
    texts = adapter.replace(tokens=told)
    ours = jax.jit(lambda t: say(params, [(texts, t)]))
    outs = {  # the same by weights: twice the last layer's kernel
        f"{path}/to_out_0": {"diff": params_at(params, path)["to_out_0"]["kernel"].T} for path in layers_of(CONFIG)
    }
    theirs = say(merge({"unet": params}, {"unet": outs}, {"unet": 0.7})["unet"], [])
    np.testing.assert_allclose(ours(0.7), theirs, atol=2e-5 * float(jnp.abs(theirs).max()))
    base = say(params, [])
    np.testing.assert_allclose(ours(0.0), base, atol=1e-5)
    assert float(jnp.abs(theirs - base).max()) > 0.02


def params_at(params, path):
    for name in path.split("/"):
        params = params[name]
    return params


def test_a_lora_on_the_queries_and_on_the_last_layer_counts(params, adapter):
    targets = lora.targets_of(shapes_of({"unet": params}), ["attn2/(to_q|to_out_0)$"], 2, 2.0)
    trained, fixed = lora.split(lora.init(jax.random.key(0), targets))
    rng = np.random.default_rng(2)
    draw = lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)  # noqa: E731
    layers = lora.join(jax.tree.map(draw, trained), fixed)
    both = say(params, [(adapter, 1.0), (layers, 0.8)])
    merged = say(merge({"unet": params}, layers, {"unet": 0.8})["unet"], [(adapter, 1.0)])
    np.testing.assert_allclose(both, merged, atol=2e-5 * float(jnp.abs(merged).max()))
    assert float(jnp.abs(both - say(params, [(adapter, 1.0)])).max()) > 0.01


def test_remat_changes_no_gradient(params, adapter):
    def loss(layers, remat):
        return jnp.mean(say(params, [(adapter.replace(layers=layers), 1.0)], remat) ** 2)

    plain, again = (jax.jit(jax.grad(lambda x, r=r: loss(x, r)))(adapter.layers) for r in ("none", "blocks"))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), plain, again)


def test_without_a_picture(params, adapter):
    with pytest.raises(ValueError, match="there is no picture that it could show: give image_prompt="):
        say(params, [(adapter.replace(tokens=None), 1.0)])


@pytest.mark.parametrize(("kind", "shape", "count"), [("base", (3, 12), 4), ("plus", (3, 10, 12), 16)])
def test_a_new_one(params, kind, shape, count):
    made = ip_adapter.init(jax.random.key(0), kind, 12, CONFIG, params)
    ip_adapter.check_fits(made, CONFIG)
    assert (made.kind, made.width_in, made.width) == (kind, 12, CONFIG.cross_attention_dim)
    tokens = ip_adapter.project(made.projection, jax.random.normal(jax.random.key(1), shape))
    assert tokens.shape == (3, count, CONFIG.cross_attention_dim)
    np.testing.assert_allclose(tokens.mean(-1), 0, atol=1e-5)  # its last step is a norm that is new
    np.testing.assert_allclose(tokens.std(-1), 1, atol=1e-2)
    at = "mid_block/attentions_0/transformer_blocks_0/attn2"
    np.testing.assert_array_equal(made.layers[at]["to_v_ip"], params_at(params, at)["to_v"]["kernel"].T)


def test_one_of_another_unet(adapter):
    with pytest.raises(ValueError, match="text states that are 32 wide, and this model's are 768: take one"):
        ip_adapter.check_fits(adapter, SD15.unet)
    fewer = {path: entry for path, entry in adapter.layers.items() if "mid" not in path}
    with pytest.raises(ValueError, match="other cross-attentions than this model's, such as mid_block/"):
        ip_adapter.check_fits(adapter.replace(layers=fewer), CONFIG)
