"""Opening what people have: variants, averages, another VAE, a tokenizer; and what is refused, in one line."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, read
from sd_jax.checkpoints.load import load_checkpoint
from sd_jax.checkpoints.read_safetensors import write
from sd_jax.checkpoints.save import save_checkpoint
from tests.checkpoints.tiny import SPEC, assert_same, compvis_file, random_params
from tests.reference_pipeline import tiny_tokenizer

HEADER = {"sd_jax.spec": json.dumps(SPEC.to_dict())}  # the widths of SPEC are not the family's


@pytest.fixture
def folder(tmp_path, params, tokenizer):
    save_checkpoint(tmp_path / "folder", SPEC, params, tokenizer)
    return tmp_path / "folder"


@pytest.fixture(scope="module")
def contents():
    return compvis_file()


def refused(path, **arguments) -> str:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# Single files


def test_averages_in_a_single_file(tmp_path, contents, params):
    prefix = "model.diffusion_model."
    names = [name for name in contents if name.startswith(prefix)]
    ema = {f"model_ema.diffusion_model{n.removeprefix(prefix).replace('.', '')}": contents[n] * 2 for n in names}
    file = {**contents, **ema, "model_ema.num_updates": np.array(3), "betas": np.zeros(1000)}
    write(tmp_path / "a.safetensors", file, HEADER)
    averaged, raw = (load_checkpoint(tmp_path / "a.safetensors", weights=w) for w in ("ema", "raw"))
    assert (averaged.weights, raw.weights) == ("ema", "raw")
    assert_same(raw.params, params)
    assert_same(
        {p: averaged.params[p] for p in ("vae", "text_encoder")}, {p: params[p] for p in ("vae", "text_encoder")}
    )
    np.testing.assert_array_equal(averaged.params["unet"]["conv_in"]["bias"], 2 * params["unet"]["conv_in"]["bias"])


def test_marks_of_v_prediction(tmp_path, contents):
    write(tmp_path / "a.safetensors", {**contents, "v_pred": np.zeros(0, np.float32)}, HEADER)
    schedule = load_checkpoint(tmp_path / "a.safetensors").spec.noise_schedule
    assert (schedule.prediction_type, schedule.rescale_betas_zero_snr) == ("v_prediction", False)
    both = {"v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros(0, np.float32)}
    write(tmp_path / "b.safetensors", {**contents, **both}, HEADER)
    schedule = load_checkpoint(tmp_path / "b.safetensors").spec.noise_schedule
    assert (schedule.prediction_type, schedule.rescale_betas_zero_snr) == ("v_prediction", True)


@pytest.mark.parametrize(
    ("part", "said"),
    [("first_stage_model.", "has no VAE .*vae="), ("cond_stage_model.", "has no text encoder")],
)
def test_parts_that_are_missing(tmp_path, contents, part, said):
    write(tmp_path / "a.safetensors", {n: a for n, a in contents.items() if not n.startswith(part)}, HEADER)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lora_unet_x.lora_down.weight"], "looks like a LoRA, not a whole model"),
        (["conditioner.embedders.1.model.ln_final.bias"], "looks like Stable Diffusion XL"),
        (["cond_stage_model.model.ln_final.bias"], "looks like Stable Diffusion 2"),
        (["first_stage_model.decoder.conv_in.weight"], "a VAE alone"),
        (["foo", "bar"], r"nothing that is known \(2 tensors: bar, foo\)"),
    ],
)
def test_other_architectures(tmp_path, names, said):
    write(tmp_path / "a.safetensors", dict.fromkeys(names, np.zeros((2, 2), np.float32)))
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(tmp_path / "a.safetensors")


def test_strictness(tmp_path, contents):
    path = tmp_path / "a.safetensors"
    write(path, {**contents, "foo.weight": np.zeros(1)}, HEADER)
    assert "unexpected in a single file of SD 1.x: foo.weight" in refused(path)
    write(path, {**contents, "model.diffusion_model.foo": np.zeros(1)}, HEADER)
    assert "model.diffusion_model.foo is unexpected" in refused(path)
    write(path, {**contents, "cond_stage_model.transformer.text_model.foo": np.zeros(1)}, HEADER)
    assert "text_model.foo is unexpected" in refused(path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "cut short" in refused(path)


def test_single_files_whose_widths_are_not_the_familys(tmp_path, contents):
    write(tmp_path / "a.safetensors", contents)
    assert "32 groups do not divide" in refused(tmp_path / "a.safetensors")


# Diffusers folders


def test_variants_and_shards(folder, params):
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = folder / part / f"{stem}.safetensors"
        file.rename(folder / part / f"{stem}.fp16.safetensors")
    whole = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = read(whole)
    shards = {name: f"shard-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shards.values()):
        write(folder / "vae" / shard, {name: tensors[name] for name in tensors if shards[name] == shard})
    whole.unlink()
    index = {"metadata": {}, "weight_map": shards}
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(load_checkpoint(folder).params, params)


def test_non_ema_weights(folder, params):
    tensors = read(folder / "unet" / "diffusion_pytorch_model.safetensors")
    raw = {name: tensor + 1 for name, tensor in tensors.items()}
    write(folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors", raw)
    assert_same(load_checkpoint(folder).params, params)
    bias = load_checkpoint(folder, weights="raw").params["unet"]["conv_in"]["bias"]
    np.testing.assert_array_equal(bias, params["unet"]["conv_in"]["bias"] + 1)


def test_folders_that_are_not_whole(folder):
    shutil.rmtree(folder / "scheduler")
    shutil.rmtree(folder / "tokenizer")
    loaded = load_checkpoint(folder)
    assert loaded.spec.noise_schedule.beta_schedule == "scaled_linear" and loaded.tokenizer is None

    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "only pickled weights (diffusion_pytorch_model.bin)" in refused(folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").unlink()
    assert "no diffusion_pytorch_model.safetensors in it" in refused(folder)
    (folder / "unet" / "config.json").write_text("{")
    assert f"{folder}/unet/config.json: not JSON" in refused(folder)
    shutil.rmtree(folder / "unet")
    assert f"{folder}/unet: no U-Net here" in refused(folder)


def test_other_pipelines(folder):
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "StableDiffusionXLPipeline with a text_encoder_2/" in refused(folder)


def test_features_are_named_by_file_and_key(folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "use_linear_projection": True}))
    assert f"{folder}/unet/config.json: use_linear_projection=True" in refused(folder)
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    assert "conv_in.weight is (32, 4, 3, 3), not (32, 9, 3, 3)" in refused(folder)


def test_parts_that_do_not_belong_together(tmp_path, params, tokenizer):
    editing = dataclasses.replace(SPEC, unet=dataclasses.replace(SPEC.unet, in_channels=8))
    save_checkpoint(tmp_path / "a", editing, random_params(editing), tokenizer)
    assert "takes 8 channels (an InstructPix2Pix model) and its VAE has 4" in refused(tmp_path / "a")
    other = dataclasses.replace(SPEC, unet=dataclasses.replace(SPEC.unet, cross_attention_dim=64))
    save_checkpoint(tmp_path / "b", other, random_params(other), tokenizer)
    assert "reads states of width 64 and its text encoder writes 32" in refused(tmp_path / "b")


def test_an_inpainting_model_opens_from_a_folder_and_from_a_single_file(tmp_path, tokenizer):
    inpainting = dataclasses.replace(SPEC, unet=dataclasses.replace(SPEC.unet, in_channels=9))
    for place, form in ((tmp_path / "folder", "diffusers"), (tmp_path / "file.safetensors", "single_file")):
        save_checkpoint(place, inpainting, random_params(inpainting), tokenizer, format=form)
        assert load_checkpoint(place).spec.unet.in_channels == 9


# Another autoencoder, another tokenizer


def test_vae_of_another_checkpoint(tmp_path, folder, params, tokenizer, contents):
    spec = dataclasses.replace(SPEC, vae=dataclasses.replace(SPEC.vae, block_out_channels=(32, 32), scaling_factor=0.5))
    other = random_params(spec, seed=1)
    save_checkpoint(tmp_path / "other", spec, other, tokenizer)
    save_checkpoint(tmp_path / "native", spec, {"vae": other["vae"]}, format="native")
    save_checkpoint(tmp_path / "single.safetensors", spec, other, format="single_file")
    vae = tmp_path / "other" / "vae"
    for path in ("other", "native", "single.safetensors", vae, vae / "diffusion_pytorch_model.safetensors"):
        loaded = load_checkpoint(folder, vae=tmp_path / path)
        assert_same(loaded.params, {**params, "vae": other["vae"]})
        assert loaded.spec == spec

    # A VAE alone, in CompVis names without their prefix, its widths the family's; in place of one that is missing
    family = dataclasses.replace(
        SPEC, vae=dataclasses.replace(SPEC.vae, block_out_channels=(32, 32), norm_num_groups=32)
    )
    alone = compvis_file(family, parts=("vae",))
    alone = {name.removeprefix("first_stage_model."): array for name, array in alone.items()}
    write(tmp_path / "vae.safetensors", alone)
    write(tmp_path / "a.safetensors", {n: a for n, a in contents.items() if not n.startswith("first_stage")}, HEADER)
    loaded = load_checkpoint(tmp_path / "a.safetensors", vae=tmp_path / "vae.safetensors")
    assert_same(loaded.params, {**params, "vae": random_params(family, parts=("vae",))["vae"]})
    assert "a VAE alone" in refused(tmp_path / "vae.safetensors")


def test_tokenizer_decides_the_special_ids(tmp_path, folder, contents):
    marks = {"eos_token": "e</w>", "pad_token": {"content": "!", "special": True}, "bos_token": "<|startoftext|>"}
    tiny_tokenizer(tmp_path / "own")
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(marks))
    vocabulary = json.loads((tmp_path / "own" / "vocab.json").read_text())
    write(tmp_path / "a.safetensors", contents, HEADER)
    for path in (folder, tmp_path / "a.safetensors"):
        loaded = load_checkpoint(path, tokenizer=tmp_path / "own")
        assert loaded.tokenizer == str(tmp_path / "own")
        assert loaded.spec.text_encoder.eos_token_id == vocabulary["e</w>"]
        assert loaded.spec.text_encoder.pad_token_id == 0
    (tmp_path / "own" / "vocab.json").write_text(json.dumps({**vocabulary, "e</w>": 49407}))
    assert "not this model's: its eos_token is 49407" in refused(folder, tokenizer=tmp_path / "own")


def test_arguments(folder):
    assert (
        load_checkpoint(str(folder), tokenizer="openai/clip-vit-large-patch14").tokenizer
        == "openai/clip-vit-large-patch14"
    )
    with pytest.raises(ValueError, match="weights='best' is neither"):
        load_checkpoint(folder, weights="best")
    with pytest.raises(ValueError, match="dtype='int8' is not one of"):
        load_checkpoint(folder, dtype="int8")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(folder, vae=folder / "nowhere")
