"""A whole CLIP in each of its files: to the bit there and back, and what is wrong with a file is said."""

import dataclasses
import json

import numpy as np
import pytest
from flax import traverse_util

from sd_jax.checkpoints import CheckpointError, write_torch
from sd_jax.checkpoints.clip import load_clip, open_clip, save_clip
from sd_jax.checkpoints.files import open_any
from sd_jax.checkpoints.read_safetensors import write
from sd_jax.checkpoints.tensors import lazy
from sd_jax.models.presets import TINY_CLIP
from tests.checkpoints.tiny_clip import random_params

PLACES = {"transformers": "a", "open_clip": "b", "single_file": "c.safetensors"}
GELU = dataclasses.replace(
    TINY_CLIP,
    text_config=dataclasses.replace(TINY_CLIP.text_config, hidden_act="gelu", pad_token_id=0),
    vision_config=dataclasses.replace(TINY_CLIP.vision_config, hidden_act="gelu"),
    image_mean=(0.5, 0.25, 0.125),
)


def assert_equal(params, expected):
    ours, theirs = (traverse_util.flatten_dict(tree, sep="/") for tree in (params, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(tensor), strict=True)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("config", [TINY_CLIP, GELU], ids=["quick_gelu", "gelu"])
@pytest.mark.parametrize(("format", "name"), [*PLACES.items(), ("single_file", "d.pt"), ("single_file", "e.bin")])
def test_round_trip_to_the_bit(format, name, config, half, tmp_path):
    params = random_params(config, half)
    save_clip(tmp_path / name, config, params, format)
    opened = open_clip(tmp_path / name)
    assert opened.config == config and opened.tokenizer is None
    assert_equal(opened.params, params)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_pickle_of_openais_kind_is_marked_by_its_numbers(tmp_path):
    """Heads of 64 channels and quick_gelu: as OpenAI's own, whose program takes nothing around the tensors."""
    towers = {
        "text_config": dataclasses.replace(TINY_CLIP.text_config, hidden_size=64, num_attention_heads=1),
        "vision_config": dataclasses.replace(TINY_CLIP.vision_config, hidden_size=128, num_attention_heads=2),
    }
    config = dataclasses.replace(TINY_CLIP, **towers)
    save_clip(tmp_path / "a.pt", config, random_params(config), "single_file")
    found = open_any(tmp_path / "a.pt")
    assert not found.metadata and int(found.tensors["input_resolution"].read()) == 32
    assert open_clip(tmp_path / "a.pt").config == config


def test_types(tmp_path):
    params = random_params()
    save_clip(tmp_path / "a", TINY_CLIP, params, dtype="float16")
    half = traverse_util.flatten_dict(load_clip(tmp_path / "a", dtype=None)[1], sep="/")
    assert {str(leaf.dtype) for leaf in half.values()} == {"float16"}
    full = traverse_util.flatten_dict(load_clip(tmp_path / "a")[1], sep="/")
    assert {str(leaf.dtype) for leaf in full.values()} == {"float32"}
    kernel = np.asarray(params["visual_projection"]["kernel"])
    np.testing.assert_array_equal(full["visual_projection/kernel"], kernel.astype(np.float16).astype(np.float32))


def test_a_tokenizer_travels_with_a_folder(tmp_path, tokenizer):
    text = dataclasses.replace(TINY_CLIP.text_config, vocab_size=517, eos_token_id=516, pad_token_id=516)
    config = dataclasses.replace(TINY_CLIP, text_config=text)
    save_clip(tmp_path / "a", config, random_params(config), tokenizer=tokenizer)
    assert open_clip(tmp_path / "a").tokenizer == tmp_path / "a"
    assert open_clip(tmp_path / "a").config == config
    with pytest.raises(ValueError, match="only a transformers folder carries a tokenizer"):
        save_clip(tmp_path / "b", config, random_params(config), "open_clip", tokenizer)


def test_nothing_is_lost_or_left(tmp_path):
    params = random_params()
    save_clip(tmp_path / "a", TINY_CLIP, params)
    with pytest.raises(FileExistsError, match="a already exists"):
        save_clip(tmp_path / "a", TINY_CLIP, params)
    del params["logit_scale"]
    with pytest.raises(
        CheckpointError, match=r"^cannot write .*b: not the CLIP of its config: logit_scale is missing$"
    ):
        save_clip(tmp_path / "b", TINY_CLIP, params)
    for kwargs in ({"format": "webdataset"}, {"format": "single_file"}):
        with pytest.raises(ValueError, match="is not one of|a single file is called"):
            save_clip(tmp_path / "b", TINY_CLIP, params, **kwargs)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_open_clip_cannot_say(tmp_path):
    mixed = dataclasses.replace(TINY_CLIP, text_config=GELU.text_config)
    for config in (mixed, dataclasses.replace(TINY_CLIP, vision_config=dataclasses.replace(
            TINY_CLIP.vision_config, layer_norm_eps=1e-6))):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"(hidden_act|layer_norm_eps)=.* has no place in .*'transformers'"):
            save_clip(tmp_path / "a", config, random_params(config), "open_clip")
        save_clip(tmp_path / config.text_config.hidden_act, config, random_params(config))
        assert open_clip(tmp_path / config.text_config.hidden_act).config.vision_config == config.vision_config


def test_wrong_places(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty: neither config\.json nor open_clip_config\.json in it"):
        open_clip(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_clip(tmp_path / "nothing.pt")
    for format, weights in (("transformers", "model.safetensors"), ("open_clip", "open_clip_model.safetensors")):
        save_clip(tmp_path / format, TINY_CLIP, random_params(), format)
        assert open_clip(tmp_path / format / weights).config == TINY_CLIP  # with the config beside it
        (tmp_path / format / weights).unlink()
        with pytest.raises(CheckpointError, match=rf"{format}: no {weights}"):
            open_clip(tmp_path / format)
    write(tmp_path / "text.safetensors", {"transformer.resblocks.0.ln_1.weight": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match="no whole CLIP: a vision tower"):
        open_clip(tmp_path / "text.safetensors")
    write(tmp_path / "alone.safetensors", {"vision_model.pre_layrnorm.weight": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"without its config\.json"):
        open_clip(tmp_path / "alone.safetensors")


@pytest.mark.parametrize("text", ["[]", "{", '{"model_cfg": 3}'])
def test_damaged_settings_of_a_single_file(text, tmp_path):
    save_clip(tmp_path / "a.safetensors", TINY_CLIP, random_params(), "single_file")
    write(tmp_path / "b.safetensors", open_any(tmp_path / "a.safetensors").tensors, {"open_clip_config": text})
    with pytest.raises(CheckpointError, match=r"b\.safetensors: (its open_clip_config is not|no model_cfg)"):
        open_clip(tmp_path / "b.safetensors")


def test_values_that_are_not_finite(tmp_path):
    params = random_params()
    params["logit_scale"] = lazy(np.asarray(np.inf, np.float32))
    save_clip(tmp_path / "a", TINY_CLIP, params)
    with pytest.raises(CheckpointError, match="a: logit_scale has 1 values that are not finite"):
        load_clip(tmp_path / "a")


def test_transformers_comes_first_where_a_folder_is_both(tmp_path):
    save_clip(tmp_path / "a", TINY_CLIP, random_params())
    (tmp_path / "a" / "open_clip_config.json").write_text(json.dumps({}))
    write_torch.write(tmp_path / "a" / "open_clip_pytorch_model.bin", {"x": np.zeros(3, np.float32)})
    assert open_clip(tmp_path / "a").config == TINY_CLIP
