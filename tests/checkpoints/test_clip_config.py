"""What the settings of published CLIPs say, and what is refused."""

import copy
import dataclasses

import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, clip_config, keys_clip, keys_openai_clip
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.models.families import CLIPS
from sd_jax.models.presets import TINY_CLIP

# mlfoundations/open_clip src/open_clip/model_configs, as they stand there
OPEN_CLIP = {
    "clip_vit_h_14": {
        "embed_dim": 1024,
        "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    },
    "clip_vit_g_14": {
        "embed_dim": 1024,
        "vision_cfg": {
            "image_size": 224,
            "layers": 40,
            "width": 1408,
            "head_width": 88,
            "mlp_ratio": 4.3637,
            "patch_size": 14,
        },
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    },
    "clip_vit_bigg_14": {
        "embed_dim": 1280,
        "vision_cfg": {
            "image_size": 224,
            "layers": 48,
            "width": 1664,
            "head_width": 104,
            "mlp_ratio": 4.9231,
            "patch_size": 14,
        },
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1280, "heads": 20, "layers": 32},
    },
    "clip_vit_b_32": {
        "embed_dim": 512,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    },
}
# openai/clip-vit-large-patch14-336's config.json, what matters of it: the "_dict"s overrule
TRANSFORMERS_L_336 = {
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {"eos_token_id": 2, "hidden_size": 1, "model_type": "clip_text_model", "pad_token_id": 1},
    "text_config_dict": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "eos_token_id": 2},
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
    "vision_config_dict": None,
}


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_published_settings_of_open_clip(name):
    assert clip_config.from_open_clip({"model_cfg": OPEN_CLIP[name]}, "a") == CLIPS[name]


@pytest.mark.parametrize("name", CLIPS)
def test_settings_come_back(name):
    config = dataclasses.replace(CLIPS[name], image_std=(0.5, 0.25, 0.125))
    said = clip_config.to_open_clip(config, "a")
    assert clip_config.from_open_clip(said, "a") == config
    if name in OPEN_CLIP:
        for key in ("vision_cfg", "text_cfg"):
            assert OPEN_CLIP[name][key].items() <= said["model_cfg"][key].items()
    assert clip_config.from_transformers(*clip_config.to_transformers(config, "float32"), "a") == config


def test_old_settings_of_transformers():
    assert clip_config.from_transformers(TRANSFORMERS_L_336, None, "a") == CLIPS["clip_vit_l_14_336"]


def shapes_of(name, dtype=np.float32, norms=np.float32):
    """Tensors that nobody reads, by OpenAI's names."""
    config = CLIPS[name]
    tensors = {
        n: Tensor(shape, np.dtype(dtype if len(shape) > 1 else norms), lambda: None)
        for n, shape in keys_clip.shapes(config).items()
    }
    return keys_openai_clip.from_transformers(tensors, config)


OPENAI = ("clip_vit_b_32", "clip_vit_b_16", "clip_vit_l_14", "clip_vit_l_14_336")


@pytest.mark.parametrize("name", CLIPS)
def test_shapes_tell_the_published_ones(name, caplog):
    """OpenAI's by the types or by a number in the archive; what has neither mark is LAION's, with gelu."""
    file, half = shapes_of(name), shapes_of(name, np.float16)
    number = Tensor((), np.dtype(np.int64), lambda: None)
    if name in OPENAI:
        assert clip_config.from_shapes(half, half, "a") == CLIPS[name]
        assert clip_config.from_shapes(file, {**file, "context_length": number}, "a") == CLIPS[name]
        assert not caplog.records
    said = clip_config.to_open_clip(CLIPS[name], "a")
    laion = clip_config.from_open_clip({**said, "model_cfg": {**said["model_cfg"], "quick_gelu": False}}, "a")
    assert (laion == CLIPS[name]) == (name not in OPENAI)
    for unmarked in (file, shapes_of(name, np.float16, np.float16)):
        assert clip_config.from_shapes(unmarked, unmarked, "a") == laion
        assert caplog.records.pop().getMessage().startswith("a: it does not say its activation, gelu is taken")


def test_shapes_of_something_else():
    file = shapes_of("clip_vit_b_32", np.float16)
    for name, problem in (
        ("visual.conv1.weight", "visual.conv1.weight is missing: no CLIP"),
        ("text_projection", "text_projection is missing"),
    ):
        without = {n: t for n, t in file.items() if n != name}
        with pytest.raises(CheckpointError, match=f"^a: {problem}"):
            clip_config.from_shapes(without, without, "a")
    odd = {**file, "token_embedding.weight": Tensor((100, 100), np.dtype(np.float32), lambda: None)}
    with pytest.raises(CheckpointError, match="a text tower of 100 channels does not divide into heads of 64"):
        clip_config.from_shapes(odd, odd, "a")


def changed(data, *path, value):
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("model_cfg", "vision_cfg", "no_ln_pre"), True, "no_ln_pre=True is not supported"),
        (("model_cfg", "vision_cfg", "timm_model_name"), "vit", "timm_model_name='vit' is not supported"),
        (("model_cfg", "vision_cfg", "pool_type"), "avg", "pool_type='avg' is not supported"),
        (("model_cfg", "vision_cfg", "layers"), [3, 4, 6, 3], "layers=.* is damaged"),
        (("model_cfg", "vision_cfg", "head_width"), 0, "head_width=0 is none of"),
        (("model_cfg", "text_cfg", "layers"), 10**9, "layers=1000000000 is more than any network has"),
        (("model_cfg", "text_cfg", "mlp_ratio"), float("inf"), "mlp_ratio=inf is more than any network has"),
        (("model_cfg", "text_cfg", "heads"), 5, "5 heads do not divide 32 channels"),
        (("model_cfg", "text_cfg", "hf_model_name"), "roberta", "hf_model_name='roberta' is not supported"),
        (("model_cfg", "multimodal_cfg"), {}, "multimodal_cfg={} is not supported"),
        (("model_cfg", "text_cfg"), None, "no model_cfg with"),
        (("preprocess_cfg", "interpolation"), "bilinear", "interpolation='bilinear' is not supported: only 'bicubic'"),
        (("preprocess_cfg", "resize_mode"), "squash", "resize_mode='squash' is not supported"),
        (("preprocess_cfg", "mean"), [0.5], "image_mean=.* must be three numbers"),
        (("preprocess_cfg", "std"), [0, 1, 1], "image_std=.* must be positive"),
    ],
)
def test_what_is_refused_of_open_clip(path, value, problem):
    data = clip_config.to_open_clip(TINY_CLIP, "a")
    with pytest.raises(CheckpointError, match=f"^a: {problem}"):
        clip_config.from_open_clip(changed(data, *path, value=value), "a")


@pytest.mark.parametrize(
    ("file", "path", "value", "problem"),
    [
        (0, ("model_type",), "siglip", "a/config.json: model_type='siglip', which is no whole CLIP"),
        (0, ("vision_config", "hidden_act"), "relu", "a/config.json: hidden_act='relu' is not supported"),
        (0, ("vision_config", "patch_size"), 7, "a/config.json: patch_size=7 does not divide image_size=32"),
        (0, ("vision_config", "num_attention_heads"), 5, "a/config.json: 5 heads do not divide 48 channels"),
        (0, ("vision_config", "num_channels"), 4, "a/config.json: num_channels=4: only 3"),
        (0, ("vision_config",), "x", "a/config.json: vision_config='x' is damaged"),
        (0, ("text_config", "hidden_size"), "x", "a/config.json: hidden_size='x' is damaged"),
        (1, ("resample",), 2, "a/preprocessor_config.json: resample=2 is not supported: only 3"),
        (1, ("do_center_crop",), False, "a/preprocessor_config.json: do_center_crop=False"),
        (1, ("size",), {"shortest_edge": 40}, "a/preprocessor_config.json: size=.*: the network reads 32x32"),
        (1, ("image_mean",), "x", "a/preprocessor_config.json: image_mean='x' is damaged"),
    ],
)
def test_what_is_refused_of_transformers(file, path, value, problem):
    both = list(clip_config.to_transformers(TINY_CLIP, "float32"))
    both[file] = changed(both[file], *path, value=value)
    with pytest.raises(CheckpointError, match=f"^({problem})"):
        clip_config.from_transformers(*both, "a")


def test_old_sizes_of_pictures():
    """A number where today a table stands, as in old preprocessor_config.json files."""
    whole, pixels = clip_config.to_transformers(TINY_CLIP, "float32")
    old = {**pixels, "size": 32, "crop_size": 32}
    assert clip_config.from_transformers(whole, old, "a") == TINY_CLIP
