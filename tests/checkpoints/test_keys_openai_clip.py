"""OpenAI's names of a whole CLIP <-> transformers': names of real files, which rows are which, and what is refused."""

import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, keys_clip, keys_openai_clip
from sd_jax.checkpoints.tensors import lazy
from sd_jax.models.families import CLIPS
from sd_jax.models.presets import TINY_CLIP
from tests.checkpoints.tiny_clip import random_tensors

# As they stand in OpenAI's ViT-L-14.pt
KNOWN = {
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.encoder.layers.23.self_attn.v_proj.bias": "visual.transformer.resblocks.23.attn.in_proj_bias",
    "vision_model.encoder.layers.0.layer_norm2.bias": "visual.transformer.resblocks.0.ln_2.bias",
    "vision_model.encoder.layers.7.mlp.fc2.weight": "visual.transformer.resblocks.7.mlp.c_proj.weight",
    "visual_projection.weight": "visual.proj",
    "text_model.encoder.layers.11.self_attn.q_proj.weight": "transformer.resblocks.11.attn.in_proj_weight",
    "text_projection.weight": "text_projection",
    "logit_scale": "logit_scale",
}


def file_of(tensors):
    return keys_openai_clip.from_transformers(tensors, TINY_CLIP)


@pytest.mark.parametrize("name", CLIPS)
def test_names(name):
    """Of n layers, each with 12 tensors, and q, k and v in one."""
    config = CLIPS[name]
    table = keys_openai_clip.names(config)
    assert table.keys() == keys_clip.shapes(config).keys()
    layers = config.text_config.num_hidden_layers + config.vision_config.num_hidden_layers
    assert len(set(table.values())) == 12 * layers + 5 + 8 + 1  # text, vision, scale
    if name == "clip_vit_l_14":
        assert KNOWN.items() <= table.items()


def test_rows_and_transpositions():
    tensors = random_tensors()
    file = file_of(tensors)
    for tower, prefix in (("text", ""), ("vision", "visual.")):
        layer = f"{tower}_model.encoder.layers.1.self_attn"
        stacked = [tensors[f"{layer}.{part}_proj.weight"].read() for part in "qkv"]
        found = file[f"{prefix}transformer.resblocks.1.attn.in_proj_weight"].read()
        np.testing.assert_array_equal(found, np.concatenate(stacked), strict=True)
    np.testing.assert_array_equal(file["visual.proj"].read(), tensors["visual_projection.weight"].read().T, strict=True)
    assert file["visual.proj"].shape == (48, 24) and file["text_projection"].shape == (32, 24)
    back = keys_openai_clip.to_transformers(file, TINY_CLIP, "test")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name].read(), tensor.read(), strict=True)


def test_what_is_read_besides():
    file = file_of(random_tensors())
    numbers = {name: lazy(np.asarray(8)) for name in (*keys_openai_clip.OPENAI_NUMBERS, "attn_mask")}
    wrapped = {f"module.{name}": tensor for name, tensor in (file | numbers).items()}
    assert keys_openai_clip.modern(wrapped) == keys_openai_clip.modern(file | numbers) == file
    kept = ("visual.", "logit_scale")
    custom = {name if name.startswith(kept) else f"text.{name}": tensor for name, tensor in file.items()}
    assert keys_openai_clip.modern(custom) == file


def test_faults_are_named_as_in_the_file():
    file = file_of(random_tensors())
    del file["visual.ln_pre.bias"]
    file |= {"visual.extra": lazy(np.zeros(3)), "visual.proj": lazy(np.zeros((24, 48), np.float32))}
    name = "visual.transformer.resblocks.0.attn.in_proj_bias"
    file[name] = file[name].rows(0, 100)
    with pytest.raises(
        CheckpointError,
        match=r"^a: not the CLIP of its config: visual\.ln_pre\.bias is missing; visual\.extra is unexpected; "
        r"visual\.transformer\.resblocks\.0\.attn\.in_proj_bias is \(100,\), not \(144,\); visual\.proj is \(24, 48\), "
        r"not \(48, 24\)$",
    ):
        keys_openai_clip.to_transformers(file, TINY_CLIP, "a")
