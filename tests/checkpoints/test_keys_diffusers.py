"""diffusers' names <-> ours: examples, inverses, and the old spellings that are read."""

import dataclasses

import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, keys_diffusers
from sd_jax.checkpoints.tensors import lazy
from tests.checkpoints.tiny import SPEC, SPECS, kinds_and_parts, random_diffusers

EXAMPLES = [
    ("conv_in.weight", 4, "conv_in/kernel"),
    ("conv_in.bias", 1, "conv_in/bias"),
    ("time_embedding.linear_1.weight", 2, "time_embedding/linear_1/kernel"),
    ("down_blocks.0.resnets.1.norm1.weight", 1, "down_blocks_0/resnets_1/norm1/scale"),
    (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        2,
        "down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_q/kernel",
    ),
    ("mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.bias", 1, None),
    ("mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight", 2, None),
    (
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight",
        2,
        "mid_block/attentions_0/transformer_blocks_0/ff/net_2/kernel",
    ),
    ("down_blocks.2.downsamplers.0.conv.weight", 4, "down_blocks_2/downsamplers_0/conv/kernel"),
    ("decoder.mid_block.attentions.0.group_norm.weight", 1, "decoder/mid_block/attentions_0/group_norm/scale"),
    ("quant_conv.weight", 4, "quant_conv/kernel"),
    ("text_model.embeddings.token_embedding.weight", 2, "text_model/embeddings/token_embedding/embedding"),
    (
        "text_model.encoder.layers.11.self_attn.q_proj.weight",
        2,
        "text_model/encoder/layers_11/self_attn/q_proj/kernel",
    ),
    ("text_model.encoder.layers.0.layer_norm1.weight", 1, "text_model/encoder/layers_0/layer_norm1/scale"),
    ("text_model.final_layer_norm.bias", 1, "text_model/final_layer_norm/bias"),
    ("text_projection.weight", 2, "text_projection/kernel"),
    ("class_embedding.weight", 2, "class_embedding/embedding"),
    ("add_embedding.linear_1.weight", 2, "add_embedding/linear_1/kernel"),
    ("time_embedding.cond_proj.weight", 2, "time_embedding/cond_proj/kernel"),
    (
        "up_blocks.0.attentions.1.transformer_blocks.9.norm3.bias",
        1,
        "up_blocks_0/attentions_1/transformer_blocks_9/norm3/bias",
    ),
    ("encoder.layers.14.bias", 1, "encoder/layers_14/bias"),
    ("decoder.layers.3.conv.4.weight", 4, "decoder/layers_3/conv_4/kernel"),
]


@pytest.mark.parametrize(("theirs", "ndim", "ours"), EXAMPLES)
def test_names(theirs, ndim, ours):
    assert ours is None or keys_diffusers.our_name(theirs, ndim) == ours
    assert keys_diffusers.their_name(keys_diffusers.our_name(theirs, ndim)) == theirs


@pytest.mark.parametrize(("name", "part"), kinds_and_parts())
def test_there_and_back_is_the_identity(name, part):
    spec = SPECS[name]
    config, tensors = getattr(spec, part), random_diffusers(part, spec)
    ours = keys_diffusers.from_diffusers(part, tensors, config, "test")
    back = keys_diffusers.to_diffusers(part, ours, config, "test")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name].read(), tensor.read(), strict=True)


def test_layouts():
    tensors = random_diffusers("unet")
    ours = keys_diffusers.from_diffusers("unet", tensors, SPEC.unet, "test")
    conv, linear = tensors["conv_in.weight"].read(), tensors["time_embedding.linear_1.weight"].read()
    np.testing.assert_array_equal(ours["conv_in/kernel"].read()[2, 1, 3], conv[:, 3, 2, 1])  # OIHW -> HWIO
    np.testing.assert_array_equal(ours["time_embedding/linear_1/kernel"].read(), linear.T)
    spec = SPECS["sd2_upscaler"]  # tables stay as they are
    tensors = random_diffusers("unet", spec)
    ours = keys_diffusers.from_diffusers("unet", tensors, spec.unet, "test")
    table = tensors["class_embedding.weight"].read()
    np.testing.assert_array_equal(ours["class_embedding/embedding"].read(), table)


def test_old_names_of_vae_attention_are_read():
    tensors, old = random_diffusers("vae"), {}
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name, tensor in tensors.items():
        for new, before in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        is_linear = ".attentions." in name and tensor.ndim == 2
        old[name] = tensor.reshape(*tensor.shape, 1, 1) if is_linear and "query" in name else tensor
    assert "encoder.mid_block.attentions.0.query.weight" in old
    got = keys_diffusers.from_diffusers("vae", old, SPEC.vae, "test")
    want = keys_diffusers.from_diffusers("vae", tensors, SPEC.vae, "test")
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[name].read(), want[name].read()) for name in want)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_text_encoders_with_and_without_their_prefix(prefix):
    tensors = random_diffusers("text_encoder")
    file = {prefix + name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    file[f"{prefix}embeddings.position_ids"] = lazy(np.arange(77)[None])
    got = keys_diffusers.from_diffusers("text_encoder", file, SPEC.text_encoder, "test")
    assert got.keys() == keys_diffusers.from_diffusers("text_encoder", tensors, SPEC.text_encoder, "test").keys()


def test_projections_of_text_encoders():
    """Dropped where the model has no use for them, needed where it has."""
    config = SPECS["sdxl"].text_encoder_2
    tensors = random_diffusers("text_encoder_2", SPECS["sdxl"])
    ours = keys_diffusers.from_diffusers("text_encoder_2", tensors, config, "test")
    np.testing.assert_array_equal(
        ours["text_projection/kernel"].read(), tensors["text_projection.weight"].read().transpose()
    )
    without = dataclasses.replace(config, projection_dim=None)
    assert "text_projection/kernel" not in keys_diffusers.from_diffusers("text_encoder", tensors, without, "test")
    del tensors["text_projection.weight"]
    with pytest.raises(CheckpointError, match="not the second text encoder .* text_projection.weight is missing"):
        keys_diffusers.from_diffusers("text_encoder_2", tensors, config, "test")


def test_what_does_not_fit_raises():
    tensors = random_diffusers("unet")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: not the U-Net .* lora\.weight is unexpected"):
        keys_diffusers.from_diffusers("unet", tensors | {"lora.weight": lazy(np.ones(1))}, SPEC.unet, "a.safetensors")
    ours = keys_diffusers.from_diffusers("unet", tensors, SPEC.unet, "test")
    del ours["conv_in/bias"]
    with pytest.raises(CheckpointError, match=r"conv_in\.bias is missing"):
        keys_diffusers.to_diffusers("unet", ours, SPEC.unet, "test")
