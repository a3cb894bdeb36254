"""OpenCLIP's names <-> transformers': names of real files, which rows are which, and what is not read."""

import dataclasses

import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, keys_compvis, keys_diffusers, keys_open_clip
from sd_jax.checkpoints.tensors import lazy
from sd_jax.models.families import OPENCLIP_BIGG, OPENCLIP_H
from tests.checkpoints.tiny import SPECS, random_diffusers

# As they stand in v2-1_768-ema-pruned.safetensors and sd_xl_base_1.0.safetensors
KNOWN = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.0.layer_norm1.weight": "transformer.resblocks.0.ln_1.weight",
    "text_model.encoder.layers.22.layer_norm2.bias": "transformer.resblocks.22.ln_2.bias",
    "text_model.encoder.layers.3.self_attn.q_proj.weight": "transformer.resblocks.3.attn.in_proj_weight",
    "text_model.encoder.layers.3.self_attn.v_proj.bias": "transformer.resblocks.3.attn.in_proj_bias",
    "text_model.encoder.layers.3.self_attn.out_proj.weight": "transformer.resblocks.3.attn.out_proj.weight",
    "text_model.encoder.layers.11.mlp.fc1.bias": "transformer.resblocks.11.mlp.c_fc.bias",
    "text_model.encoder.layers.11.mlp.fc2.weight": "transformer.resblocks.11.mlp.c_proj.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
SPEC = SPECS["sdxl"]
CONFIG = SPEC.text_encoder_2


@pytest.mark.parametrize("config", [OPENCLIP_H, OPENCLIP_BIGG])
def test_names(config):
    table = keys_open_clip.names(config)
    assert KNOWN.items() <= table.items()
    assert ("text_projection" in table.values()) == (config.projection_dim is not None)


def test_rows_and_transpositions():
    tensors = random_diffusers("text_encoder_2", SPEC)
    file = keys_open_clip.from_transformers(tensors, CONFIG)
    layer = "text_model.encoder.layers.1.self_attn"
    for leaf, joined in (("weight", "in_proj_weight"), ("bias", "in_proj_bias")):
        stacked = [tensors[f"{layer}.{part}_proj.{leaf}"].read() for part in "qkv"]
        np.testing.assert_array_equal(
            file[f"transformer.resblocks.1.attn.{joined}"].read(), np.concatenate(stacked), strict=True
        )
    np.testing.assert_array_equal(file["text_projection"].read(), tensors["text_projection.weight"].read().T)
    assert file["text_projection"].shape == (CONFIG.hidden_size, CONFIG.projection_dim) == (32, 24)
    back = keys_open_clip.to_transformers(file, CONFIG, "test")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name].read(), tensor.read(), strict=True)


def test_half_precision_stays():
    tensors = random_diffusers("text_encoder_2", SPEC)
    half = {name: lazy(tensor.read().astype(np.float16)) for name, tensor in tensors.items()}
    file = keys_open_clip.from_transformers(half, CONFIG)
    assert {tensor.read().dtype for tensor in file.values()} == {np.dtype(np.float16)}


def test_what_is_not_read():
    """SD 2's files have a projection that the model has no use for, and a scale of CLIP's loss."""
    without = dataclasses.replace(CONFIG, projection_dim=None)
    tensors = random_diffusers("text_encoder_2", SPEC)
    file = keys_open_clip.from_transformers(tensors, CONFIG) | {"logit_scale": lazy(np.ones((), np.float32))}
    found = keys_compvis.to_diffusers("text_encoder", file, without, "sd2", "test")
    assert found.keys() == tensors.keys() - {"text_projection.weight"}
    assert keys_compvis.to_diffusers("text_encoder_2", file, CONFIG, "sdxl", "test").keys() == tensors.keys()
    del file["text_projection"]
    with pytest.raises(
        CheckpointError,
        match=r"^a: not a second text encoder of SDXL: conditioner\.embedders\.1\.model\.text_projection is",
    ):
        keys_compvis.to_diffusers("text_encoder_2", file, CONFIG, "sdxl", "a")


@pytest.mark.parametrize("shape", [(64,), (96, 1, 1), ()])
def test_damaged_shapes(shape):
    file = keys_open_clip.from_transformers(random_diffusers("text_encoder_2", SPEC), CONFIG)
    for name in ("transformer.resblocks.0.attn.in_proj_bias", "text_projection"):
        damaged = file | {name: lazy(np.zeros(shape, np.float32))}
        with pytest.raises(CheckpointError, match=r"^a: "):
            theirs = keys_open_clip.to_transformers(damaged, CONFIG, "a")
            keys_diffusers.from_diffusers("text_encoder_2", theirs, CONFIG, "a")
    stack = file["transformer.resblocks.0.attn.in_proj_bias"].rows(0, 64)
    with pytest.raises(CheckpointError, match="^a: .*in_proj_bias is .64,.: it should stack 3 times 32 rows"):
        keys_open_clip.to_transformers(file | {"transformer.resblocks.0.attn.in_proj_bias": stack}, CONFIG, "a")
