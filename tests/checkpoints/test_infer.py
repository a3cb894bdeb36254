"""The config of a single file from its shapes alone."""

import dataclasses
import json

import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, infer, keys_compvis, layout, ldm_yaml
from sd_jax.models.families import FAMILIES, SD15, SDXL, TAESD
from sd_jax.models.presets import TinyVAEConfig
from tests.checkpoints.reduced import REDUCED, file_of, parts_of
from tests.checkpoints.tiny import SPEC, SPECS, shapes_only

# What shapes do not tell from another: Turbo's size, and what SD 2 predicts
TOLD = {name: spec for name, spec in FAMILIES.items() if name not in ("sdxl_turbo", "sd2_v")}


def inferred(spec, parts=None, metadata=None, said=None):
    return infer.infer(parts_of(spec, parts), keys_compvis.kind_of(spec), metadata or {}, "a.ckpt", said)


@pytest.mark.parametrize("spec", [*TOLD.values(), *REDUCED.values()], ids=[*TOLD, *(f"small_{n}" for n in REDUCED)])
def test_shapes_say_the_config(spec):
    assert inferred(spec) == spec


@pytest.mark.parametrize("name", ["sd15", "sd2_depth", "sd_x4_upscaler", "sdxl", "sdxl_refiner"])
def test_diffusers_names_say_the_same(name):
    spec = FAMILIES[name]
    kind = keys_compvis.kind_of(spec)
    parts = {part: shapes_only(layout.LAYOUTS[part](getattr(spec, part))) for part in spec.parts}
    assert infer.infer(parts, kind, {}, "test") == spec


def test_parts_that_are_missing_are_the_published_models():
    small = inferred(REDUCED["sdxl"], ("vae",))
    assert small.unet == SDXL.unet and small.text_encoder_2 == SDXL.text_encoder_2
    assert small.vae.block_out_channels == REDUCED["sdxl"].vae.block_out_channels
    alone = inferred(SDXL, ("unet",))  # whose pooled width is not there to be seen
    assert alone == SDXL


def test_old_text_encoders_without_their_level():
    parts = parts_of(SD15)
    parts["text_encoder"] = {n.removeprefix("text_model."): t for n, t in parts["text_encoder"].items()}
    assert infer.infer(parts, "sd1", {}, "test") == SD15


@pytest.mark.parametrize(
    "config",
    [
        TAESD,
        TinyVAEConfig(
            latent_channels=16,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 2),
            num_decoder_blocks=(3, 1),
        ),
    ],
)
def test_tiny_vaes(config):
    assert infer.vae(shapes_only(layout.vae(config)), "test", 0.18215) == config


@pytest.mark.parametrize("name", SPECS)
def test_header_of_our_own_files_says_what_shapes_do_not(name):
    spec = SPECS[name]
    kind, header = keys_compvis.kind_of(spec), {infer.SPEC_KEY: json.dumps(spec.to_dict())}
    assert infer.written(parts_of(spec), kind, header) == spec
    assert infer.written(parts_of(spec, ("unet",)), kind, header) == spec


def test_headers_that_are_not_this_files():
    """Another tool may have put other weights under our header."""
    header = {infer.SPEC_KEY: json.dumps(SPEC.to_dict())}
    assert infer.written(parts_of(REDUCED["sd1"]), "sd1", header) is None
    assert infer.written(parts_of(REDUCED["sdxl"]), "sdxl", header) is None
    for damaged in ('{"unet": 3}', "[]", "{", '{"unet": {"foo": 1}}'):
        assert infer.written(parts_of(SPEC), "sd1", {infer.SPEC_KEY: damaged}) is None
    assert infer.written(parts_of(SPEC), "sd1", {}) is None


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("unet", "layers_per_block", 10**9),  # which would take forever
        ("unet", "num_attention_heads", 0),
        ("unet", "num_attention_heads", "2"),
        ("unet", "block_out_channels", [32] * 1000),
        ("unet", "use_linear_projection", 1),
        ("vae", "scaling_factor", -1.0),
        ("vae", "scaling_factor", float("nan")),
        ("text_encoder", "hidden_act", 3),
        ("text_encoder", "num_hidden_layers", 10**9),
        ("noise_schedule", "prediction_type", "magic"),
        ("noise_schedule", "num_train_timesteps", 10**12),
    ],
)
def test_headers_that_mean_harm(part, field, value):
    data = SPEC.to_dict()
    data[part] = {**data[part], field: value}
    assert infer.written(parts_of(SPEC, ("vae",)), "sd1", {infer.SPEC_KEY: json.dumps(data)}) is None


@pytest.mark.parametrize(
    ("name", "said", "size"), [("sd1", "768x768", 192), ("sd1", "768x512", 64), ("sd1", "huge", 64), ("sdxl", "", 128)]
)
def test_resolution_of_the_header(name, said, size):
    spec = inferred(REDUCED[name], metadata={"modelspec.resolution": said})
    assert spec.unet.sample_size == size and spec.vae.sample_size == size * 4


def test_what_a_yaml_says():
    said = ldm_yaml.Said(heads=4, scale_factor=0.5, penultimate=True, schedule={"beta_end": 0.02})
    spec = inferred(REDUCED["sd1"], said=said)
    assert (spec.unet.num_attention_heads, spec.vae.scaling_factor, spec.text_encoder.clip_skip) == (4, 0.5, 2)
    assert spec.noise_schedule.beta_end == 0.02 and spec.noise_schedule.beta_start == 0.00085
    said = ldm_yaml.Said(head_channels=16, penultimate=False)
    spec = inferred(REDUCED["sd2_whole"], said=said)
    assert spec.unet.num_attention_heads == (4, 8) and spec.text_encoder.clip_skip == 1


@pytest.mark.parametrize(
    ("name", "part", "fields", "said"),
    [
        ("sd1", "unet", {"block_out_channels": (40, 64)}, "U-Net of 40 channels, which the family's 32 groups do not"),
        ("sd2", "unet", {"block_out_channels": (32, 128)}, "U-Net of 32 channels, .* heads of 64 channels do not"),
        ("sd1", "vae", {"block_out_channels": (16, 64, 64)}, "VAE of 16 channels, .* 32 groups do not"),
        ("sd1", "text_encoder", {"hidden_size": 64}, "text encoder of 64 channels, .* 12 heads do not"),
        ("sd2", "text_encoder", {"hidden_size": 96}, "text encoder of 96 channels, .* heads of 64 channels do not"),
    ],
)
def test_widths_that_the_family_cannot_divide(name, part, fields, said):
    spec = REDUCED[name]
    changed = dataclasses.replace(spec, **{part: dataclasses.replace(getattr(spec, part), **fields)})
    with pytest.raises(CheckpointError, match=f"^a.ckpt: a {said} divide: say the config by config="):
        inferred(changed, (part,))


@pytest.mark.parametrize("beside", [("text_encoder_2",), ()])
def test_numbers_that_are_no_sizes(beside):
    spec = REDUCED["sdxl"]
    changed = dataclasses.replace(
        spec, unet=dataclasses.replace(spec.unet, projection_class_embeddings_input_dim=6 * 256)
    )
    with pytest.raises(CheckpointError, match="^a.ckpt: a U-Net that is told 1536 values.* are not 6 sizes: say"):
        inferred(changed, ("unet", *beside))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "out.2.weight"),
        ("unet", "input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"),
        ("vae", "post_quant_conv.weight"),
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1.weight"),
    ],
)
def test_missing_keys_are_named(part, name):
    parts = parts_of(REDUCED["sd1"])
    del parts[part][name]
    with pytest.raises(CheckpointError, match=f"^a: not the .* of a known family: {name} is missing"):
        infer.infer(parts, "sd1", {}, "a")


def test_shapes_of_another_rank_are_named():
    parts = parts_of(REDUCED["sd1"])
    parts["unet"]["input_blocks.0.0.weight"] = next(iter(shapes_only({"x": (4,)}).values()))
    with pytest.raises(CheckpointError, match=r"input_blocks.0.0.weight is of shape \(4,\)"):
        infer.infer(parts, "sd1", {}, "a")


def test_nothing_is_read():
    with pytest.raises(AssertionError, match="a tensor was read"):
        np.asarray(file_of(REDUCED["sd1"], ("vae",))["first_stage_model.quant_conv.weight"])
