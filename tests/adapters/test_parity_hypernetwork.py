"""Hypernetworks against a restatement of A1111's in torch: alone, and in the attentions of diffusers' U-Net."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sd_jax
from sd_jax.adapters import hypernetwork
from sd_jax.adapters.hooks import hooked
from sd_jax.adapters.hypernetwork import ACTIVATIONS
from sd_jax.checkpoints import hypernetworks
from sd_jax.types import Conditioning
from tests.reference import diffusers
from tests.reference_pipeline import tiny_diffusers_pipeline

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

NOT_TORCHS_NAMES = {"linear": "Identity", "swish": "Hardswish"}


def torch_network(layer_structure, activation, activate_output, layer_norm, dropout, width):
    """What A1111 makes of these words: a Sequential, whose modules' numbers are in its files."""
    import torch

    named = {name.lower(): kind for name, kind in vars(torch.nn.modules.activation).items() if isinstance(kind, type)}
    modules, layers = [], len(layer_structure) - 1
    for i in range(layers):
        modules.append(torch.nn.Linear(int(width * layer_structure[i]), int(width * layer_structure[i + 1])))
        if activation != "linear" and (i < layers - 1 or activate_output):
            modules.append(named[NOT_TORCHS_NAMES.get(activation, activation).lower()]())
        if layer_norm:
            modules.append(torch.nn.LayerNorm(int(width * layer_structure[i + 1])))
        if dropout[i + 1]:
            modules.append(torch.nn.Dropout(dropout[i + 1]))
    return torch.nn.Sequential(*modules)


def both(path, widths, scale=0.3, **words):
    """(our hypernetwork, {width: (theirs for keys, theirs for values)}) of the same weights, by way of a file."""
    import torch

    made, rng = jax.eval_shape(lambda: hypernetwork.init(jax.random.key(0), widths, **words)), np.random.default_rng(0)
    hypernetworks.save(path, jax.tree.map(lambda leaf: rng.normal(0, scale, leaf.shape).astype(np.float32), made))
    saved = torch.load(path, weights_only=True)
    theirs = {}
    for width in widths:
        facts = (made.layer_structure, made.activation, made.activate_output, made.layer_norm, made.dropout, width)
        theirs[width] = tuple(torch_network(*facts).eval() for _ in "kv")
        for network, state in zip(theirs[width], saved[width], strict=True):
            network.load_state_dict({name.removeprefix("linear."): value for name, value in state.items()})
    return hypernetworks.load(path), theirs


def assert_equal_networks(ours, theirs, width, strength):
    import torch

    x = np.random.default_rng(1).normal(size=(7, width)).astype(np.float32)
    for which, network in zip("kv", theirs[width], strict=True):
        with torch.no_grad():
            wanted = torch.from_numpy(x) + network(torch.from_numpy(x)) * strength
        got = hypernetwork.apply(ours.replace(strength=np.float32(strength)), jnp.asarray(x), which, width)
        np.testing.assert_allclose(got, wanted.numpy(), atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(tmp_path, activation):
    pytest.importorskip("torch")
    ours, theirs = both(tmp_path / "a.pt", (16,), activation=activation, activate_output=True)
    assert_equal_networks(ours, theirs, 16, 1.0)


@pytest.mark.parametrize(
    ("layer_structure", "layer_norm", "activate_output", "share"),
    [
        *itertools.product([(1, 2, 1)], [False, True], [False, True], [0, 0.3]),
        ((1, 2, 2, 1), True, True, 0.3),
        ((1, 0.5, 1.5, 1), True, False, 0.3),
    ],
)
def test_structures(tmp_path, layer_structure, layer_norm, activate_output, share):
    pytest.importorskip("torch")
    words = {"layer_structure": layer_structure, "layer_norm": layer_norm, "activate_output": activate_output}
    words["dropout"] = (0, *(share for _ in layer_structure[2:]), 0)
    ours, theirs = both(tmp_path / "a.pt", (16, 12), activation="elu", **words)
    assert ours.dropout == words["dropout"]
    for width in (16, 12):
        assert_equal_networks(ours, theirs, width, 0.7)


class Attention:
    """Of diffusers' U-Net, with hypernetworks in their order: k = to_k(h_k(context)), v = to_v(h_v(context))."""

    def __init__(self, networks):
        self.networks = networks  # (by width, strength)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        import torch

        k = v = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        for of_width, strength in self.networks:
            if k.shape[-1] in of_width:
                of_k, of_v = of_width[k.shape[-1]]
                k, v = k + of_k(k) * strength, v + of_v(v) * strength
        heads = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(k)), heads(attn.to_v(v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[0](y)


def test_in_a_whole_unet(tmp_path):
    """Features of 32 and 64, a context of 48: of the first hypernetwork all three are changed, of the second one."""
    diffusers()
    import torch

    text = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 2}
    theirs = tiny_diffusers_pipeline(tmp_path / "base", unet={"cross_attention_dim": 48}, text_encoder=text)
    ours = sd_jax.load(tmp_path / "base")
    words = {"layer_structure": (1, 2, 1), "activation": "relu", "layer_norm": True}
    one, torch_one = both(tmp_path / "one.pt", (32, 48, 64), 0.2, **words)
    two, torch_two = both(tmp_path / "two.pt", (48,), 0.2, layer_structure=(1, 2, 2, 1), activation="tanh")
    rng = np.random.default_rng(2)
    latents = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    context = rng.normal(size=(2, 9, 48)).astype(np.float32)

    @jax.jit
    def predict(params, strengths, latents, context):
        unet = hooked(ours.networks, list(zip((one, two), strengths, strict=True))).unet
        return unet.apply({"params": params}, latents, jnp.full(2, 300.0), Conditioning(context))

    seen = []
    for strengths in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.4, -0.8)):
        theirs.unet.set_attn_processor(Attention(list(zip((torch_one, torch_two), strengths, strict=True))))
        with torch.no_grad():
            nchw = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
            wanted = theirs.unet(nchw, 300, encoder_hidden_states=torch.from_numpy(context)).sample
        wanted = wanted.numpy().transpose(0, 2, 3, 1)
        got = predict(ours.params["unet"], jnp.asarray(strengths), jnp.asarray(latents), jnp.asarray(context))
        assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 1e-5
        seen.append(wanted)
    assert predict._cache_size() == 1
    for a, b in zip(seen, seen[1:], strict=False):
        assert np.linalg.norm(a - b) / np.linalg.norm(b) > 1e-2
