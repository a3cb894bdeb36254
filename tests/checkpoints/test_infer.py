"""The config of a single file from its shapes alone."""

import dataclasses
import json

import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, infer, keys_compvis, layout
from sd_jax.models.presets import SD15, CLIPTextConfig, ModelSpec, UNetConfig, VAEConfig
from sd_jax.types import NoiseScheduleConfig
from tests.checkpoints.tiny import SPEC, shapes_only

# Of the family, but for its widths: 8 and 12 heads, 32 groups
REDUCED = ModelSpec(
    unet=UNetConfig(block_out_channels=(64, 128, 128), attention_blocks=(False, True, True), cross_attention_dim=96),
    vae=VAEConfig(sample_size=256, block_out_channels=(32, 64, 64), layers_per_block=1),
    text_encoder=CLIPTextConfig(
        vocab_size=600,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        max_position_embeddings=32,
        eos_token_id=599,
        pad_token_id=599,
    ),
)
ONE_BLOCK = dataclasses.replace(
    REDUCED,
    unet=UNetConfig(block_out_channels=(64,), attention_blocks=(True,), layers_per_block=1, cross_attention_dim=96),
)


def parts_of(spec, parts=layout.PARTS):
    file = {}
    for part in parts:
        tensors = shapes_only(layout.LAYOUTS[part](getattr(spec, part)))
        file |= keys_compvis.from_diffusers(part, tensors, getattr(spec, part))
    return keys_compvis.split(file, "test", "ema")


@pytest.mark.parametrize("spec", [SD15, REDUCED, ONE_BLOCK], ids=["sd15", "reduced", "one_block"])
def test_shapes_say_the_config(spec):
    assert infer.infer(parts_of(spec), {}, "test") == spec


def test_old_text_encoders_without_their_level():
    parts = parts_of(SD15)
    parts["text_encoder"] = {n.removeprefix("text_model."): t for n, t in parts["text_encoder"].items()}
    assert infer.infer(parts, {}, "test") == SD15


def test_header_of_our_own_files_says_what_shapes_do_not():
    header = {infer.SPEC_KEY: json.dumps(SPEC.to_dict())}
    assert infer.infer(parts_of(SPEC), header, "test") == SPEC
    # Another tool may have put other weights under our header
    assert infer.infer(parts_of(REDUCED), header, "test") == REDUCED
    assert infer.infer(parts_of(REDUCED), {infer.SPEC_KEY: '{"unet": 3}'}, "test") == REDUCED


@pytest.mark.parametrize(
    ("said", "meant"),
    [("v", "v_prediction"), ("epsilon", "epsilon"), ("v_prediction",) * 2, ("", "epsilon")],
)
def test_prediction_type_of_the_header(said, meant):
    spec = infer.infer(parts_of(REDUCED), {"modelspec.prediction_type": said}, "test")
    assert spec.noise_schedule == NoiseScheduleConfig(prediction_type=meant)


@pytest.mark.parametrize(
    ("part", "config", "said"),
    [
        (
            "unet",
            dataclasses.replace(REDUCED.unet, block_out_channels=(40, 128, 128)),
            "U-Net of 40 .* 32 groups",
        ),
        ("vae", dataclasses.replace(REDUCED.vae, block_out_channels=(16, 64, 64)), "VAE of 16 channels, .* 32 groups"),
        ("text_encoder", dataclasses.replace(REDUCED.text_encoder, hidden_size=64), "of 64 channels, .* 12 heads"),
    ],
)
def test_widths_that_the_family_cannot_divide(part, config, said):
    with pytest.raises(CheckpointError, match=said):
        infer.infer(parts_of(dataclasses.replace(REDUCED, **{part: config}), (part,)), {}, "a.safetensors")


def test_missing_keys_are_named():
    parts = parts_of(REDUCED)
    del parts["unet"]["out.2.weight"]
    with pytest.raises(CheckpointError, match=r"^a: not a network .* model.diffusion_model.out.2.weight is missing"):
        infer.infer(parts, {}, "a")


def test_nothing_is_read():
    with pytest.raises(AssertionError, match="a tensor was read"):
        np.asarray(parts_of(REDUCED)["vae"]["quant_conv.weight"])
