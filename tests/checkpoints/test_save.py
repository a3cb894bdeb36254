"""Every form there and back, on disk: values, config, tokenizer; and what happens to what was there."""

import dataclasses
import datetime
import hashlib
import json
import resource
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sd_jax.checkpoints import CheckpointError, inspect, read, save_diffusers, save_single_file
from sd_jax.checkpoints.load import load_checkpoint, open_checkpoint
from sd_jax.checkpoints.save import save_checkpoint
from sd_jax.checkpoints.tensors import dtype_of
from sd_jax.checkpoints.tokenizer_files import special_ids
from sd_jax.models.families import FAMILIES, SD2_BASE
from sd_jax.models.presets import TinyVAEConfig
from sd_jax.prompts.tokenize import load_tokenizer
from tests.checkpoints.tiny import SPEC, SPECS, X2_UPSCALER, assert_same, compvis_file, random_params

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


def test_the_latent_upscaler_there_and_back(tmp_path, tokenizer):
    params = random_params(X2_UPSCALER)
    for format in ("diffusers", "native"):
        save_checkpoint(tmp_path / format, X2_UPSCALER, params, tokenizer, format=format)
        loaded = load_checkpoint(tmp_path / format)
        assert loaded.spec == X2_UPSCALER
        assert_same(loaded.params, params)
    assert loaded.notes[0].startswith("prediction type edm")
    other = load_checkpoint(tmp_path / "diffusers", text_encoder=tmp_path / "diffusers" / "text_encoder")
    assert other.spec == X2_UPSCALER
    with pytest.raises(CheckpointError, match="single files have no place for the x2 latent upscaler: use 'diffusers'"):
        save_checkpoint(tmp_path / "a.safetensors", X2_UPSCALER, params, format="single_file")
    text = dataclasses.replace(X2_UPSCALER.text_encoder, context_norm=True)
    with pytest.raises(CheckpointError, match="the x2 latent upscaler's pipeline has \\(1, False\\)"):
        save_checkpoint(tmp_path / "b", dataclasses.replace(X2_UPSCALER, text_encoder=text), params, tokenizer)
    assert inspect.inspect(tmp_path / "diffusers")["family"] == "Stable Diffusion x2 latent upscaler"


def cast(params, dtype):
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({name: leaf.astype(dtype_of(dtype)) for name, leaf in flat.items()})


@pytest.mark.parametrize(
    ("format", "dtype"),
    [("diffusers", "float16"), ("single_file", "bfloat16"), ("native", "float16")],
)
def test_half_precision(tmp_path, params, tokenizer, format, dtype):
    path = tmp_path / FORMATS[format]
    save_checkpoint(path, SPEC, params, tokenizer, format=format, dtype=dtype)
    assert_same(load_checkpoint(path).params, cast(params, dtype))
    assert_same(load_checkpoint(path, dtype="float32").params, cast(cast(params, dtype), "float32"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", [kind for kind in SPECS if kind != "sd2_file"])  # which a folder cannot hold whole
def test_file_to_folder_to_file(tmp_path, tokenizer, kind, dtype):
    """Every kind, to the bit; without anything but what the first file holds."""
    spec, params = SPECS[kind], random_params(SPECS[kind])
    first, folder, last = tmp_path / "a.safetensors", tmp_path / "b", tmp_path / "c.safetensors"
    save_checkpoint(first, spec, params, format="single_file", dtype=dtype)
    from_file = open_checkpoint(first)
    assert from_file.spec == spec
    save_checkpoint(folder, from_file.spec, from_file.params, tokenizer)
    from_folder = open_checkpoint(folder)
    assert from_folder.spec == spec
    assert_same(from_folder.params, cast(params, dtype))
    save_checkpoint(last, from_folder.spec, from_folder.params, format="single_file")
    assert_same(read(last), read(first))


def test_native_with_two_text_encoders(tmp_path, tokenizer):
    params = random_params(SPECS["sdxl"])
    save_checkpoint(tmp_path / "a", SPECS["sdxl"], params, tokenizer, format="native")
    loaded = load_checkpoint(tmp_path / "a")
    assert loaded.spec == SPECS["sdxl"]
    assert_same(loaded.params, params)


def test_a_last_layer_that_is_not_read(tmp_path, tokenizer):
    """SD 2's files have one, and a projection, and keep them; its folders end with the layer that is read."""
    spec, params = SPECS["sd2_file"], random_params(SPECS["sd2_file"])
    save_checkpoint(tmp_path / "a.safetensors", spec, params, format="single_file")
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert loaded.spec == spec
    assert_same(loaded.params, params)
    save_checkpoint(tmp_path / "b", spec, params, tokenizer)
    loaded = load_checkpoint(tmp_path / "b")
    read_layers = {"num_hidden_layers": 2, "clip_skip": 1, "projection_dim": None}
    assert loaded.spec == dataclasses.replace(spec, text_encoder=dataclasses.replace(spec.text_encoder, **read_layers))
    kept = dict(params["text_encoder"]["text_model"])
    kept["encoder"] = {name: layer for name, layer in kept["encoder"].items() if name != "layers_2"}
    assert_same(loaded.params, {**params, "text_encoder": {"text_model": kept}})


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
        (dict(params={**params, "text_encoder_2": {}}, tokenizer=tokenizer), CheckpointError, "of no second text enc"),
    ]:
        with pytest.raises(error, match=said):
            save_checkpoint(tmp_path / "model", SPEC, **arguments)
        assert not list(tmp_path.iterdir())
    without = {"vae": params["vae"]}
    with pytest.raises(CheckpointError, match=r"cannot write .*a\.safetensors: the model has no U-Net"):
        save_checkpoint(tmp_path / "a.safetensors", SPEC, without, format="single_file")


def text_encoder_reads(part, **how):
    spec = SPECS["sdxl"] if part == "text_encoder_2" else SPECS["sd2"]
    return dataclasses.replace(spec, **{part: dataclasses.replace(getattr(spec, part), **how)})


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            text_encoder_reads("text_encoder_2", clip_skip=1),
            r"text_encoder_2 with clip_skip, context_norm \(1, False\)",
        ),
        (text_encoder_reads("text_encoder", clip_skip=2, context_norm=False), "text_encoder with context_norm=False"),
    ],
)
def test_what_no_pipeline_of_diffusers_reads(tmp_path, tokenizer, spec, said):
    with pytest.raises(CheckpointError, match=said):
        save_checkpoint(tmp_path / "model", spec, random_params(spec), tokenizer)
    assert not list(tmp_path.iterdir())


def test_models_that_are_not_whole(tmp_path, tokenizer):
    params = random_params(SPECS["sdxl"])
    some = {part: params[part] for part in ("unet", "text_encoder_2")}
    save_checkpoint(tmp_path / "a.safetensors", SPECS["sdxl"], some, format="single_file")
    assert_same(load_checkpoint(tmp_path / "a.safetensors").params, some)
    some = {part: params[part] for part in ("unet", "vae")}
    save_checkpoint(tmp_path / "b", SPECS["sdxl"], some)  # nothing in it needs a tokenizer
    index = json.loads((tmp_path / "b" / "model_index.json").read_text())
    assert index["text_encoder"] == index["tokenizer_2"] == [None, None] and index["unet"][0] == "diffusers"
    assert_same(load_checkpoint(tmp_path / "b").params, some)


def test_tiny_vaes(tmp_path, tokenizer):
    blocks = {"num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1)}
    vae = TinyVAEConfig(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), **blocks)
    spec = dataclasses.replace(SPEC, vae=vae)
    params = random_params(spec)
    save_checkpoint(tmp_path / "a", spec, params, tokenizer)
    loaded = load_checkpoint(tmp_path / "a")
    assert loaded.spec == spec
    assert_same(loaded.params, params)
    with pytest.raises(CheckpointError, match="no place for a tiny VAE: write a diffusers folder instead"):
        save_checkpoint(tmp_path / "a.safetensors", spec, params, format="single_file")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def with_schedule(spec, **changes):
    return dataclasses.replace(spec, noise_schedule=dataclasses.replace(spec.noise_schedule, **changes))


V = {"prediction_type": "v_prediction"}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True}
HEADERS = {  # architecture, resolution, empty tensors
    "sd15": (FAMILIES["sd15"], "v1", "512x512", []),
    "sd15 v": (with_schedule(FAMILIES["sd15"], **ZERO_SNR), "v1", "512x512", ["v_pred", "ztsnr"]),
    "sd15_inpainting": (FAMILIES["sd15_inpainting"], "v1/inpaint", "512x512", []),
    "sd2_base": (SD2_BASE, "v2-512", "512x512", []),
    "sd2_v": (FAMILIES["sd2_v"], "v2-768-v", "768x768", []),
    "sd2_v zero": (with_schedule(FAMILIES["sd2_v"], **ZERO_SNR), "v2-768-v", "768x768", ["ztsnr"]),
    "sd2_inpainting": (FAMILIES["sd2_inpainting"], "v2-inpainting", "512x512", []),
    "sd2_depth": (FAMILIES["sd2_depth"], "v2-depth", "512x512", []),
    "sd_x4_upscaler": (FAMILIES["sd_x4_upscaler"], "x4-upscaler", "512x512", []),
    "sdxl": (FAMILIES["sdxl"], "xl-v1-base", "1024x1024", []),
    "sdxl v": (with_schedule(FAMILIES["sdxl"], **V), "xl-v1-base", "1024x1024", ["v_pred"]),
    "sdxl_inpainting": (FAMILIES["sdxl_inpainting"], "xl-v1-base/inpaint", "1024x1024", []),
    "sdxl_refiner": (FAMILIES["sdxl_refiner"], "xl-v1-refiner", "1024x1024", []),
}


@pytest.mark.parametrize("name", HEADERS)
def test_what_headers_say(name):
    spec, architecture, resolution, marks = HEADERS[name]
    said = save_single_file.modelspec(spec, "a title")
    assert said["modelspec.architecture"] == f"stable-diffusion-{architecture}"
    assert said["modelspec.resolution"] == resolution and said["modelspec.title"] == "a title"
    is_v = spec.noise_schedule.prediction_type == "v_prediction"
    assert said["modelspec.prediction_type"] == ("v" if is_v else "epsilon")
    assert save_single_file.marks(spec) == marks


def test_headers_on_disk(tmp_path):
    spec = with_schedule(SPECS["sdxl"], **ZERO_SNR)
    file = tmp_path / "My model.safetensors"
    save_checkpoint(file, spec, random_params(spec), format="single_file", dtype="float16")
    raw = file.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:begin])
    said = header["__metadata__"]
    assert said["modelspec.hash_sha256"] == "0x" + hashlib.sha256(raw[begin:]).hexdigest()
    assert said["modelspec.sai_model_spec"] == "1.0.0" and said["modelspec.title"] == "My model"
    assert datetime.date.fromisoformat(said["modelspec.date"]) <= datetime.datetime.now(datetime.UTC).date()
    for mark in ("v_pred", "ztsnr"):
        assert header[mark]["shape"] == [0]
    loaded = load_checkpoint(file)
    assert loaded.spec == spec


def test_tokenizers_pad_as_their_text_encoders_do(tmp_path, tokenizer):
    """One tokenizer is given, whose padding is its end; OpenCLIP pads with 0."""
    save_checkpoint(tmp_path / "a", SPECS["sdxl"], random_params(SPECS["sdxl"]), tokenizer)
    pads = {name: special_ids(tmp_path / "a" / name)["pad_token"] for name in ("tokenizer", "tokenizer_2")}
    assert pads == {"tokenizer": SPEC.text_encoder.eos_token_id, "tokenizer_2": 0}
    save_checkpoint(tmp_path / "b", SPECS["sd2"], random_params(SPECS["sd2"]), load_tokenizer(tokenizer))
    assert load_tokenizer(tmp_path / "b" / "tokenizer").pad_token_id == 0
    save_checkpoint(tmp_path / "c", SPECS["sdxl_refiner"], random_params(SPECS["sdxl_refiner"]), tokenizer)
    assert not (tmp_path / "c" / "tokenizer").exists() and special_ids(tmp_path / "c" / "tokenizer_2")["pad_token"] == 0


PIPELINES = {
    "sd15": "StableDiffusionPipeline",
    "sd15_inpainting": "StableDiffusionInpaintPipeline",
    "sd2_v": "StableDiffusionPipeline",
    "sd2_depth": "StableDiffusionDepth2ImgPipeline",
    "sd_x4_upscaler": "StableDiffusionUpscalePipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl_inpainting": "StableDiffusionXLInpaintPipeline",
    "sdxl_refiner": "StableDiffusionXLImg2ImgPipeline",
}


@pytest.mark.parametrize("model", PIPELINES)
def test_which_pipeline_a_folder_is_of(model):
    index = save_diffusers.index_of(FAMILIES[model])
    assert index["_class_name"] == PIPELINES[model]
    assert index.get("force_zeros_for_empty_prompt", False) == (model in ("sdxl", "sdxl_inpainting"))
    assert index.get("requires_aesthetics_score", False) == (model == "sdxl_refiner")


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
