"""Files of LoRAs: those that diffusers and PEFT write are read here, ours load there; no layer is left over.

diffusers 0.42 misreads kohya files in which alpha differs from layer to layer (it looks for attention's layers by their
old names), so such are compared in its own layout alone.
"""

import logging

import numpy as np
import pytest

from sd_jax.checkpoints import keys_peft
from sd_jax.checkpoints.adapters import open_adapter, save_adapter
from sd_jax.checkpoints.load import open_checkpoint
from tests.checkpoints.tiny_adapters import random_layers
from tests.reference_families import tiny_family

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

KINDS = ("sd15", "sdxl")
# Of the U-Net and of text encoders, as PEFT's config takes them
UNET = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "time_emb_proj",
    "conv_shortcut",
]
TEXT = ["q_proj", "v_proj", "out_proj", "fc1"]


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    """(pipeline, spec) of a family, none of whose layers is tuned."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapters") / request.param
    pipeline = tiny_family(request.param, folder)
    return pipeline, open_checkpoint(folder).spec


@pytest.fixture
def pipeline(model):
    yield model[0]
    model[0].unload_lora_weights()


def parts(pipeline):
    names = [name for name in ("unet", "text_encoder", "text_encoder_2") if getattr(pipeline, name, None) is not None]
    return {name: getattr(pipeline, name) for name in names}


def tuned(network) -> dict:
    """{module's name: its LoRA in NumPy}, of PEFT's layers in a network."""
    from peft.tuners.lora.layer import LoraLayer

    found = {}
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            (adapter,) = module.scaling
            found[name] = {
                "lora_down": module.lora_A[adapter].weight.detach().numpy(),
                "lora_up": module.lora_B[adapter].weight.detach().numpy(),
                "scale": module.scaling[adapter],
            }
            if adapter in module.lora_magnitude_vector:
                found[name]["dora_scale"] = module.lora_magnitude_vector[adapter].weight.detach().numpy()
    return found


def assert_as_in_peft(layers, pipeline, spec):
    """The same layers, factors to the bit, and scales."""
    table = keys_peft.read_names(spec)
    networks = {part: tuned(network) for part, network in parts(pipeline).items()}
    assert set(layers) == {part for part, found in networks.items() if found}
    for part, found in networks.items():
        assert {table[f"{part}.{name}"].path for name in found} == set(layers.get(part, {})), part
        for name, theirs in found.items():
            entry = layers[part][table[f"{part}.{name}"].path]
            np.testing.assert_array_equal(entry["lora_down"], theirs["lora_down"], strict=True)
            np.testing.assert_array_equal(entry["lora_up"], theirs["lora_up"], strict=True)
            np.testing.assert_allclose(float(entry["alpha"]) / len(entry["lora_down"]), theirs["scale"], rtol=1e-6)
            assert ("dora_scale" in entry) == ("dora_scale" in theirs)
            if "dora_scale" in entry:
                assert entry["dora_scale"].shape == (len(entry["lora_up"]), 1, *[1] * (entry["lora_up"].ndim - 2))
                np.testing.assert_array_equal(entry["dora_scale"].reshape(-1), theirs["dora_scale"].reshape(-1))


def tune(pipeline, **settings):
    """PEFT's adapters on every part, of random values."""
    import torch
    from peft import LoraConfig

    generator = torch.Generator().manual_seed(0)
    for part, network in parts(pipeline).items():
        targets = UNET if part == "unet" else TEXT + ["text_projection"] * (part == "text_encoder_2")
        network.add_adapter(LoraConfig(r=3, target_modules=targets, **settings))
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator)


def save_by_diffusers(pipeline, folder, convert, with_metadata=True):
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    states = {part: get_peft_model_state_dict(network) for part, network in parts(pipeline).items()}
    if convert:
        states = {part: convert_state_dict_to_diffusers(state) for part, state in states.items()}
    metadata = _collate_lora_metadata(parts(pipeline)) if with_metadata else {}
    layers = {f"{part}_lora_layers": state for part, state in states.items()}
    type(pipeline).save_lora_weights(folder, **layers, **metadata)


PATTERNS = {"rank_pattern": {"to_q": 2, "fc1": 1}, "alpha_pattern": {"to_out.0": 7.5, "proj_in": 1, "q_proj": 4}}


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{"lora_alpha": 6}, {"lora_alpha": 6, **PATTERNS}, {"lora_alpha": 5, "use_rslora": True}, {"use_dora": True}],
    ids=["alpha", "patterns", "rslora", "dora"],
)
def test_what_diffusers_writes_is_read(pipeline, model, tmp_path, settings, convert):
    tune(pipeline, **settings)
    save_by_diffusers(pipeline, tmp_path, convert)
    opened = open_adapter(tmp_path, model[1])
    assert opened.format == "diffusers"
    assert_as_in_peft(opened.layers, pipeline, model[1])


def test_without_metadata_the_scale_is_one_as_diffusers_has_it(pipeline, model, tmp_path):
    tune(pipeline, lora_alpha=6)
    save_by_diffusers(pipeline, tmp_path, convert=False, with_metadata=False)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(str(tmp_path))
    assert_as_in_peft(open_adapter(tmp_path, model[1]).layers, pipeline, model[1])
    assert {found["scale"] for found in tuned(pipeline.unet).values()} == {1.0}


def assert_unet_as_in_peft(layers, unet, spec):
    table, theirs = keys_peft.read_names(spec), tuned(unet)
    assert layers.keys() == {"unet"} and {table[name].path for name in theirs} == layers["unet"].keys()
    for name, wanted in theirs.items():
        entry = layers["unet"][table[name].path]
        np.testing.assert_array_equal(entry["lora_down"], wanted["lora_down"], strict=True)
        np.testing.assert_array_equal(entry["lora_up"], wanted["lora_up"], strict=True)
        np.testing.assert_allclose(float(entry["alpha"]) / len(entry["lora_down"]), wanted["scale"], rtol=1e-6)


def test_a_file_of_a_unet_alone(pipeline, model, tmp_path):
    tune(pipeline, lora_alpha=6, **PATTERNS)
    pipeline.unet.save_lora_adapter(tmp_path)
    assert_unet_as_in_peft(open_adapter(tmp_path, model[1]).layers, pipeline.unet, model[1])


def test_a_folder_of_peft(tmp_path):
    """Its settings are in the adapter_config.json beside the tensors."""
    peft = pytest.importorskip("peft")
    unet = tiny_family("sd15", tmp_path / "model").unet
    spec = open_checkpoint(tmp_path / "model").spec
    tuner = peft.get_peft_model(unet, peft.LoraConfig(r=3, target_modules=UNET, lora_alpha=6, **PATTERNS))
    tuner.save_pretrained(tmp_path / "adapter")
    assert_unet_as_in_peft(open_adapter(tmp_path / "adapter", spec).layers, tuner.base_model.model, spec)


# Ours there


def vary(layers, rng):
    """Ranks and alphas that differ from layer to layer."""
    for entries in layers.values():
        for entry in entries.values():
            rank = int(rng.integers(1, 4))
            entry["lora_down"] = np.resize(entry["lora_down"], (rank, *entry["lora_down"].shape[1:]))
            entry["lora_up"] = np.resize(entry["lora_up"], (len(entry["lora_up"]), rank, *entry["lora_up"].shape[2:]))
            entry["alpha"] = np.asarray(rng.choice([0.5, rank, 3]), np.float32)
    return layers


def load(pipeline, file, caplog):
    """What diffusers says of keys that it leaves over, it says as a warning."""
    for name in ("diffusers", "transformers", "peft"):
        logging.getLogger(name).propagate = True
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    assert not [
        r.message for r in caplog.records if "expected" in r.getMessage() or "missing" in r.getMessage().lower()
    ]


@pytest.mark.parametrize("case", ["kohya", "diffusers", "diffusers_varied", "diffusers_dora", "diffusers_fc"])
def test_ours_load_in_diffusers(pipeline, model, tmp_path, caplog, case):
    """Every linear and convolution of the model; last, text encoders of which only the linears behind attention are."""
    spec, file = model[1], tmp_path / "a.safetensors"
    layers = random_layers(spec, "dora" if case.endswith("dora") else "lora")
    if case.endswith("varied"):
        layers = vary(layers, np.random.default_rng(0))
    if case.endswith("fc"):
        layers = {p: {k: e for k, e in es.items() if p == "unet" or "/mlp/" in k} for p, es in layers.items()}
    save_adapter(file, layers, spec, case.split("_")[0])
    load(pipeline, file, caplog)
    assert_as_in_peft(layers, pipeline, spec)


def test_our_kohya_names_are_what_diffusers_takes_them_for(model, tmp_path):
    """Its own table from kohya's names to its layers, against ours, for every layer of the model."""
    pipeline, spec = model
    save_adapter(tmp_path / "a.safetensors", random_layers(spec), spec)
    converted, alphas = type(pipeline).lora_state_dict(
        str(tmp_path), weight_name="a.safetensors", unet_config=pipeline.unet.config
    )
    layers = {layer for layer in keys_peft.names(spec).values() if layer.kind == "kernel"}
    table = keys_peft.read_names(spec)
    assert len(alphas) == len(layers)
    written = random_layers(spec)
    for name, tensor in converted.items():
        module, what = keys_peft.split(name)
        entry = written[table[module].part][table[module].path]
        np.testing.assert_array_equal(entry[what], tensor.numpy(), strict=True)
    assert {table[keys_peft.split(name)[0]] for name in converted} == layers
