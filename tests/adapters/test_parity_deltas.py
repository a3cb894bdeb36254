"""What each algorithm adds to a weight, against peft 0.21 and lycoris-lora 4.1 with random arrays."""

import itertools
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.adapters import deltas

pytestmark = pytest.mark.parity
RANK, ALPHA = 4, 2.0


@pytest.fixture(scope="module")
def lycoris():
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("lycoris")


def layers():
    import torch

    torch.manual_seed(0)
    return {
        "linear": torch.nn.Linear(12, 20),
        "convolution": torch.nn.Conv2d(8, 12, 3, padding=1),
        "point": torch.nn.Conv2d(8, 12, 1),
    }


@pytest.mark.parametrize(
    ("kind", "dora"), [("point", None), *itertools.product(["linear", "convolution"], [None, "out", "in"])]
)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LoConModule", {}),
        ("LoConModule", {"use_tucker": True}),
        ("LohaModule", {}),
        ("LohaModule", {"use_tucker": True}),
        ("LokrModule", {"factor": 2}),
        ("LokrModule", {"factor": 4, "decompose_both": True, "lora_dim": 1}),
        ("LokrModule", {"factor": 2, "use_tucker": True}),
        ("LokrModule", {"full_matrix": True}),
    ],
)
def test_weights_are_those_of_lycoris(lycoris, kind, name, options, dora):
    import torch

    layer = layers()[kind]
    options = {"lora_dim": RANK, "alpha": ALPHA, **options}
    if dora:
        options |= {"weight_decompose": True, "wd_on_out": dora == "out"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = getattr(lycoris, name)("x", layer, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("org"):
                continue
            parameter.copy_(torch.rand_like(parameter) + 0.1)
        x = torch.randn(3, 12) if kind == "linear" else torch.randn(2, 8, 6, 5)
        # What it computes: of LoHa and LoKr `get_merged_weight` applies the scale twice
        theirs, before = module(x).numpy(), layer(x).numpy()
        state = {n.removesuffix(".weight"): value.numpy() for n, value in module.state_dict().items()}
        ours = np.array(deltas.merged(jnp.asarray(layer.weight.numpy()), state, 1.0))
        layer.weight.copy_(torch.from_numpy(ours))
        moved = np.abs(theirs - before).max()
        assert moved > 0.1
        np.testing.assert_allclose(layer(x).numpy(), theirs, rtol=1e-5, atol=1e-5 * moved)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize(("rslora", "dora"), [(False, False), (True, False), (False, True)])
def test_weights_are_those_of_peft(kind, rslora, dora):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    base = torch.nn.Sequential(layers()[kind])
    weight = base[0].weight.detach().numpy().copy()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_rslora=rslora, use_dora=dora)
    model = peft.get_peft_model(base, config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for adapter in (layer.lora_A, layer.lora_B):
            adapter["default"].weight.copy_(torch.randn_like(adapter["default"].weight))
        if dora:
            magnitude = layer.lora_magnitude_vector["default"].weight
            magnitude.copy_(torch.rand_like(magnitude) + 0.5)
    entry = {
        "lora_down": layer.lora_A["default"].weight.detach().numpy(),
        "lora_up": layer.lora_B["default"].weight.detach().numpy(),
        "alpha": np.float32(ALPHA * (RANK**0.5 if rslora else 1)),
    }
    if dora:
        entry["dora_scale"] = magnitude.detach().numpy().reshape(-1, *[1] * (weight.ndim - 1))
    else:
        np.testing.assert_allclose(
            deltas.delta(entry, weight.shape), layer.get_delta_weight("default").detach().numpy(), rtol=1e-5, atol=1e-5
        )
    merged = model.merge_and_unload()
    np.testing.assert_allclose(
        deltas.merged(jnp.asarray(weight), entry, 1.0), merged[0].weight.detach().numpy(), rtol=1e-5, atol=1e-5
    )
