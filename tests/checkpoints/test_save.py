"""Every form there and back, on disk: values, config, tokenizer; and what happens to what was there."""

import dataclasses
import json
import resource
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sd_jax.checkpoints import CheckpointError, read
from sd_jax.checkpoints.load import load_checkpoint, open_checkpoint
from sd_jax.checkpoints.save import save_checkpoint
from sd_jax.checkpoints.tensors import dtype_of
from tests.checkpoints.tiny import SPEC, assert_same, compvis_file, random_params

FORMATS = {"diffusers": "model", "single_file": "model.safetensors", "native": "model"}


@contextmanager
def files_of_at_most(size: int):
    """What a full disk does to a write, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back(tmp_path, params, tokenizer, format):
    path = tmp_path / FORMATS[format]
    save_checkpoint(path, SPEC, params, tokenizer, format=format)
    loaded = load_checkpoint(path)
    assert loaded.kind == format and loaded.spec == SPEC
    assert_same(loaded.params, params)
    if format == "single_file":
        assert loaded.tokenizer is None
    else:
        assert loaded.tokenizer == str(path / "tokenizer")
        for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
            assert (path / "tokenizer" / name).read_bytes() == (tokenizer / name).read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing is left beside it


@pytest.mark.parametrize(
    ("format", "dtype"),
    [("diffusers", "float16"), ("diffusers", "bfloat16"), ("single_file", "bfloat16"), ("native", "float16")],
)
def test_half_precision(tmp_path, params, tokenizer, format, dtype):
    path = tmp_path / FORMATS[format]
    save_checkpoint(path, SPEC, params, tokenizer, format=format, dtype=dtype)
    cast = lambda tree, to: traverse_util.unflatten_dict(  # noqa: E731
        {name: leaf.astype(dtype_of(to)) for name, leaf in traverse_util.flatten_dict(tree).items()}
    )
    assert_same(load_checkpoint(path).params, cast(params, dtype))
    assert_same(load_checkpoint(path, dtype="float32").params, cast(cast(params, dtype), "float32"))


def test_all_forms_in_a_row(tmp_path, params, tokenizer):
    save_checkpoint(tmp_path / "a", SPEC, params, tokenizer)
    save_checkpoint(tmp_path / "b.safetensors", SPEC, load_checkpoint(tmp_path / "a").params, format="single_file")
    lazily = open_checkpoint(tmp_path / "b.safetensors")
    save_checkpoint(tmp_path / "c", SPEC, lazily.params, format="native")
    save_checkpoint(tmp_path / "d", SPEC, load_checkpoint(tmp_path / "c").params, tokenizer)
    for part in ("unet", "vae", "text_encoder"):
        (file,) = [p.name for p in (tmp_path / "a" / part).glob("*.safetensors")]
        assert (tmp_path / "a" / part / file).read_bytes() == (tmp_path / "d" / part / file).read_bytes()
    assert read(tmp_path / "b.safetensors").keys() == compvis_file().keys()


def test_jax_arrays_are_saved(tmp_path, params):
    on_device = {part: {"leaves": None} for part in params}
    on_device = traverse_util.unflatten_dict(
        {name: jnp.asarray(leaf) for name, leaf in traverse_util.flatten_dict(params).items()}
    )
    save_checkpoint(tmp_path / "a.safetensors", SPEC, on_device, format="single_file")
    assert_same(load_checkpoint(tmp_path / "a.safetensors").params, params)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_there_stays(tmp_path, params, tokenizer, format):
    path = tmp_path / FORMATS[format]
    save_checkpoint(path, SPEC, params, tokenizer, format=format)
    other = random_params(seed=1)
    with pytest.raises(FileExistsError, match="already exists and is left as it is"):
        save_checkpoint(path, SPEC, other, tokenizer, format=format)
    assert_same(load_checkpoint(path).params, params)
    save_checkpoint(path, SPEC, other, tokenizer, format=format, overwrite=True)
    assert_same(load_checkpoint(path).params, other)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("format", FORMATS)
def test_a_write_that_fails_leaves_what_was_there(tmp_path, params, tokenizer, format):
    path = tmp_path / FORMATS[format]
    save_checkpoint(path, SPEC, params, tokenizer, format=format)
    with files_of_at_most(20_000), pytest.raises(OSError, match="could not write") as error:
        save_checkpoint(path, SPEC, random_params(seed=1), tokenizer, format=format, overwrite=True)
    assert error.value.filename == str(path) and "\n" not in str(error.value)
    assert_same(load_checkpoint(path).params, params)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_only_a_checkpoint_is_overwritten(tmp_path, params, tokenizer):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        save_checkpoint(tmp_path / "home", SPEC, params, tokenizer, overwrite=True)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", SPEC, params, tokenizer)


def test_what_cannot_be_saved(tmp_path, params, tokenizer):
    some = {part: params[part] for part in ("unet", "vae")}
    for arguments, error, said in [
        (dict(params=params), CheckpointError, "needs a tokenizer"),
        (dict(params=some, tokenizer=tokenizer), CheckpointError, "the model has no text encoder"),
        (dict(params=params, tokenizer=tmp_path), CheckpointError, "no tokenizer"),
        (dict(params=params, tokenizer=tokenizer, format="onnx"), ValueError, "format='onnx' is not one of diffusers"),
        (dict(params=params, format="single_file"), ValueError, r"is called \*\.safetensors"),
        (dict(params={**params, "unet": params["vae"]}, tokenizer=tokenizer), CheckpointError, "not the U-Net"),
    ]:
        with pytest.raises(error, match=said):
            save_checkpoint(tmp_path / "model", SPEC, **arguments)
        assert not list(tmp_path.iterdir())


def test_pooled_text_beside_the_timestep(tmp_path, tokenizer):
    """diffusers has a name for it, the CompVis layout has none."""
    unet = dataclasses.replace(SPEC.unet, addition_embed_type="text", addition_embed_type_num_heads=4)
    spec = dataclasses.replace(SPEC, unet=unet)
    params = random_params(spec)
    save_checkpoint(tmp_path / "model", spec, params, tokenizer)
    loaded = load_checkpoint(tmp_path / "model")
    assert loaded.spec == spec
    assert_same(loaded.params, params)
    with pytest.raises(CheckpointError, match="no place for unet/add_embedding.*: write a diffusers folder instead"):
        save_checkpoint(tmp_path / "model.safetensors", spec, params, format="single_file")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_native_takes_some_parts(tmp_path, params):
    save_checkpoint(tmp_path / "vae", SPEC, {"vae": params["vae"]}, format="native")
    loaded = load_checkpoint(tmp_path / "vae")
    assert_same(loaded.params, {"vae": params["vae"]})
    assert loaded.spec == SPEC and loaded.tokenizer is None


def test_tokenizers_as_transformers_5_writes_them(tmp_path, params, tokenizer):
    """tokenizer.json alone; older readers want the vocabulary and the merges beside it."""
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(str(tokenizer)).save_pretrained(str(tmp_path / "alone"))
    assert not (tmp_path / "alone" / "vocab.json").exists()
    save_checkpoint(tmp_path / "model", SPEC, params, tmp_path / "alone")
    for name, read_file in (("vocab.json", json.loads), ("merges.txt", str.split)):
        written, original = (p / name for p in (tmp_path / "model" / "tokenizer", tokenizer))
        assert read_file(written.read_text()) == read_file(original.read_text())
    assert load_checkpoint(tmp_path / "model").spec == SPEC


def test_headers_and_indexes(tmp_path, params, tokenizer):
    short = dataclasses.replace(SPEC.text_encoder, max_position_embeddings=24)
    params = {**params, "text_encoder": random_params(dataclasses.replace(SPEC, text_encoder=short))["text_encoder"]}
    save_checkpoint(tmp_path / "a", dataclasses.replace(SPEC, text_encoder=short), params, tokenizer)
    index = json.loads((tmp_path / "a" / "model_index.json").read_text())
    assert index["requires_safety_checker"] is False and index["feature_extractor"] == [None, None]
    # diffusers pads to the tokenizer's length: it must not pass the text encoder's positions
    assert json.loads((tmp_path / "a" / "tokenizer" / "tokenizer_config.json").read_text())["model_max_length"] == 24
    np.testing.assert_equal(load_checkpoint(tmp_path / "a").spec.text_encoder.max_position_embeddings, 24)
