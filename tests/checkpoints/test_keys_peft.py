"""diffusers' and PEFT's names of tensors, and the scales in their settings."""

import json

import numpy as np
import pytest

from sd_jax.checkpoints import keys_peft
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.keys_peft import Layer
from tests.checkpoints.tiny import SPECS
from tests.checkpoints.tiny_adapters import random_layers

QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "text_encoder.text_model.encoder.layers.1.self_attn.k_proj"


@pytest.mark.parametrize(
    ("name", "module", "what"),
    [
        (f"{QUERY}.lora_A.weight", QUERY, "lora_down"),
        (f"{QUERY}.lora_B.default_0.weight", QUERY, "lora_up"),
        (f"base_model.model.{QUERY}.lora_A.weight", QUERY, "lora_down"),
        (f"{QUERY}.lora_magnitude_vector", QUERY, "dora_scale"),
        (f"{QUERY}.lora_magnitude_vector.weight", QUERY, "dora_scale"),
        (f"{QUERY}.lora_magnitude_vector.default.weight", QUERY, "dora_scale"),
        (f"{QUERY}.lora.up.weight", QUERY, "lora_up"),
        (QUERY.replace("attn1.to_q", "attn1.processor.to_q_lora.down.weight"), QUERY, "lora_down"),
        (QUERY.replace("to_q", "processor.to_out_lora.up.weight"), QUERY.replace("to_q", "to_out.0"), "lora_up"),
        (QUERY.replace("to_q", "processor.to_q.lora_A.weight"), QUERY, "lora_down"),
        (f"{KEY}.lora_linear_layer.down.weight", KEY, "lora_down"),
        (KEY.replace("k_proj", "to_k_lora.up.weight"), KEY, "lora_up"),
        (KEY.replace("k_proj", "to_out_lora.down.weight"), KEY.replace("k_proj", "out_proj"), "lora_down"),
        (f"{KEY.replace('text_model.', '')}.lora_B.weight", KEY.replace("text_model.", ""), "lora_up"),
    ],
)
def test_spellings_of_a_layer(name, module, what):
    assert keys_peft.split(name) == (module, what)
    layer = keys_peft.read_names(SPECS["sd1"])[module]
    assert layer == keys_peft.read_names(SPECS["sd1"])[module.split(".", 1)[1]]  # without its part in front
    assert layer.part == name.removeprefix("base_model.model.").split(".")[0]


@pytest.mark.parametrize("name", ["unet.conv_in.weight", "unet.conv_in.lora_A.bias", "lora_A", "unet.x.lokr_w1"])
def test_other_tensors_are_not_split(name):
    assert keys_peft.split(name) is None


def test_text_encoders_without_their_part_are_read_where_there_is_one():
    name = "text_model.encoder.layers.0.mlp.fc1"
    assert keys_peft.read_names(SPECS["sd2"])[name].part == "text_encoder"
    assert keys_peft.read_names(SPECS["sdxl_refiner"])[name].part == "text_encoder_2"
    assert name not in keys_peft.read_names(SPECS["sdxl"])
    assert "conv_in" in keys_peft.read_names(SPECS["sdxl"])


# Scales


LAYER = Layer("unet", "down_blocks_0/attentions_0/proj_in", "kernel", (32, 32, 1, 1), True)
TEXT = Layer("text_encoder", "text_model/encoder/layers_1/mlp/fc1", "kernel", (64, 32), True)
NAME, TEXT_NAME = "unet.down_blocks.0.attentions.0.proj_in", "text_encoder.text_model.encoder.layers.1.mlp.fc1"


@pytest.mark.parametrize(
    ("layer", "module", "settings", "alpha"),
    [
        (LAYER, NAME, {}, 4),
        (LAYER, NAME, {"unet.lora_alpha": 6}, 6),
        (LAYER, NAME, {"lora_alpha": 6.5}, 6.5),
        (LAYER, NAME, {"unet.lora_alpha": None}, 4),
        (LAYER, NAME, {"unet.lora_alpha": 6, "unet.use_rslora": True}, 12),  # 6 / sqrt(4) is 12 / 4
        (LAYER, NAME, {"text_encoder.lora_alpha": 6}, 4),
        (LAYER, NAME, {"unet.lora_alpha": 6, "unet.alpha_pattern": {"proj_in": 1}}, 1),
        (LAYER, NAME, {"unet.lora_alpha": 6, "unet.alpha_pattern": {"roj_in": 1}}, 6),
        (LAYER, NAME, {"unet.lora_alpha": 6, "unet.alpha_pattern": {"^proj_in": 1}}, 6),
        (LAYER, NAME, {"unet.alpha_pattern": {"^down_blocks.0.attentions.0.proj_in": 1}}, 1),
        (LAYER, NAME, {"unet.alpha_pattern": {"proj_out": 1, "attentions.0.proj_in": 2, "proj_in": 3}}, 2),
        (LAYER, NAME, {"unet.alpha_pattern": {r"down_blocks\..*\.proj_(in|out)": 2}}, 2),
        (TEXT, TEXT_NAME, {"text_encoder.alpha_pattern": {"encoder.layers.1.mlp.fc1": 2}}, 2),
        (TEXT, TEXT_NAME, {"text_encoder.alpha_pattern": {"^text_model.encoder.layers.1.mlp.fc1": 2}}, 2),
        (TEXT, TEXT_NAME.replace("text_model.", ""), {"text_encoder.alpha_pattern": {f"{TEXT_NAME[13:]}": 2}}, 2),
    ],
)
def test_alpha_as_peft_has_it(layer, module, settings, alpha):
    assert keys_peft.alpha_of(layer, module, 4, settings, "test") == alpha


@pytest.mark.parametrize(
    "settings",
    [
        {"unet.lora_alpha": "much"},
        {"unet.lora_alpha": float("nan")},
        {"unet.lora_alpha": True},
        {"unet.lora_alpha": 10**400},
        {"unet.lora_alpha": 1e300},
        {"unet.alpha_pattern": {f"layer_{i}": 1 for i in range(20_000)}},
        {"unet.alpha_pattern": [1]},
        {"unet.alpha_pattern": {"(": 1}},
        {"unet.alpha_pattern": {"(a|aa)+$": 1}},  # takes time without end
        {"unet.alpha_pattern": {".*.*.*.*x": 1}},
        {"unet.alpha_pattern": {"proj_in": {}}},
    ],
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(CheckpointError, match="^test: its alpha"):
        keys_peft.alpha_of(LAYER, NAME, 4, settings, "test")


@pytest.mark.parametrize("text", ["{", "[1]", "1" * 10000])
def test_a_header_that_is_damaged(text):
    with pytest.raises(CheckpointError, match="^test: its lora_adapter_metadata is not"):
        keys_peft.settings_in({keys_peft.METADATA: text}, "test")


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_settings_say_the_alpha_of_every_layer(kind):
    """Of ranks and alphas that differ from layer to layer; read back after a trip through JSON."""
    names = keys_peft.names(SPECS[kind])
    layers = random_layers(SPECS[kind])
    rng = np.random.default_rng(0)
    for part, entries in layers.items():
        for entry in entries.values():
            rank = int(rng.integers(1, 4))
            entry["lora_down"] = np.resize(entry["lora_down"], (rank, *entry["lora_down"].shape[1:]))
            entry["alpha"] = np.asarray(rng.choice([rank, 1.25, 8]), np.float32)
        named = {n: entries[layer.path] for n, layer in names.items() if layer.part == part and layer.path in entries}
        settings = json.loads(json.dumps(keys_peft.settings_of(part, named)))
        assert settings[f"{part}.use_dora"] is False
        for name, entry in named.items():
            rank = entry["lora_down"].shape[0]
            assert keys_peft.alpha_of(names[name], name, rank, settings, "test") == entry["alpha"]
