"""What `python -m sd_jax.checkpoints.inspect` says of a file, or what is wrong with it."""

import dataclasses
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from sd_jax.checkpoints import inspect
from sd_jax.checkpoints.read_safetensors import write
from sd_jax.checkpoints.save import save_checkpoint
from sd_jax.models.presets import TinyVAEConfig
from tests.checkpoints import pickles
from tests.checkpoints.reduced import REDUCED
from tests.checkpoints.tiny import SPEC, compvis_file, random_diffusers

HEADER = {"sd_jax.spec": json.dumps(SPEC.to_dict())}


@pytest.fixture(scope="module")
def contents():
    return compvis_file()


@pytest.fixture
def said(capsys):
    """path -> the lines as a dict."""

    def run(path):
        assert inspect.main([str(path)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        lines = [line.split(": ", 1) for line in out.splitlines()]
        assert all(len(line) == 2 and line[1] for line in lines), out
        assert len(dict(lines)) == len(lines)
        return dict(lines)

    return run


@pytest.fixture
def fault(capsys):
    """path -> the one line on stderr."""

    def run(path):
        assert inspect.main([str(path)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and str(path) in err
        return err

    return run


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("sd1", "Stable Diffusion 1"),
        ("sd1_inpainting", "Stable Diffusion 1 inpainting"),
        ("sd1_lcm", "Stable Diffusion 1 (LCM)"),
        ("sd2_depth", "Stable Diffusion 2 depth"),
        ("upscaler", "Stable Diffusion x4 upscaler"),
        ("sdxl", "Stable Diffusion XL base"),
        ("sdxl_refiner", "Stable Diffusion XL refiner"),
    ],
)
def test_families(tmp_path, said, name, family):
    spec = REDUCED[name]
    write(tmp_path / "a.safetensors", compvis_file(spec))
    lines = said(tmp_path / "a.safetensors")
    assert lines["family"] == family
    assert lines["components"] == ", ".join(spec.parts) and lines["missing"] == "tokenizer"
    assert lines["prediction_type"] == spec.noise_schedule.prediction_type and lines["prediction_reason"]


def test_all_that_is_said(tmp_path, said, contents, params):
    half = {n: a.astype(np.float16) if n.startswith("first_stage") else a for n, a in contents.items()}
    ema = {
        f"model_ema.diffusion_model{n.removeprefix('model.diffusion_model.').replace('.', '')}": a
        for n, a in contents.items()
        if n.startswith("model.diffusion_model.")
    }
    tables = {"sqrt_recip_alphas_cumprod": np.array([1, np.inf], np.float32)}  # of a schedule that ends in noise
    metadata = {**HEADER, "modelspec.title": "two\nlines", "ss_base": "x" * 500, "modelspec.prediction_type": "epsilon"}
    write(tmp_path / "a.safetensors", {**half, **ema, **tables}, metadata)
    lines = said(tmp_path / "a.safetensors")
    counts = {part: sum(leaf.size for leaf in _leaves(params[part])) for part in params}
    assert lines == {
        "file": str(tmp_path / "a.safetensors"),
        "format": "safetensors",
        "family": "Stable Diffusion 1",
        "prediction_type": "epsilon",
        "prediction_reason": "said by the header that we wrote",
        "zero_snr": "no",
        "components": "unet, vae, text_encoder",
        "missing": "tokenizer",
        "resolution": "32x32",
        "latent_channels": "4",
        "ema": "yes",
        "precision": "unet float32, vae float16, text_encoder float32",
        "parameters": f"{sum(counts.values())} ({', '.join(f'{part} {count}' for part, count in counts.items())})",
        "weights": "all finite",
        "metadata.modelspec.title": repr("two\nlines"),
        "metadata.ss_base": "x" * 200 + "...",
        "metadata.modelspec.prediction_type": "epsilon",
        "metadata.sd_jax.spec": HEADER["sd_jax.spec"][:200] + "...",
    }


def _leaves(tree):
    return [leaf for value in tree.values() for leaf in (_leaves(value) if isinstance(value, dict) else [value])]


def test_what_is_missing(tmp_path, said):
    write(tmp_path / "a.safetensors", compvis_file(REDUCED["sd1"], parts=("unet",)))
    lines = said(tmp_path / "a.safetensors")
    assert (lines["components"], lines["missing"]) == ("unet", "vae, text_encoder, tokenizer")
    assert lines["ema"] == "no" and lines["resolution"] == "512x512"


def test_models_that_are_not_opened_are_told(tmp_path, said):
    spec = REDUCED["sd1"]
    editing = dataclasses.replace(spec, unet=dataclasses.replace(spec.unet, in_channels=8))
    write(tmp_path / "a.safetensors", compvis_file(editing))
    assert said(tmp_path / "a.safetensors")["family"] == "Stable Diffusion 1 InstructPix2Pix"


TINY_VAE = dataclasses.replace(
    SPEC,
    vae=TinyVAEConfig(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
)


@pytest.mark.parametrize(
    ("tensors", "family", "components"),
    [
        ({"lora_unet_x.lora_down.weight": np.zeros((4, 4))}, "LoRA", "none"),
        ({"emb_params": np.zeros((2, 768))}, "textual inversion embedding", "none"),
        ({"control_model.input_blocks.0.0.weight": np.zeros((4, 4))}, "ControlNet", "none"),
        ({"foo": np.zeros((4, 4))}, "unknown", "none"),
        ({}, "unknown", "none"),
        (compvis_file(parts=("vae",)), "VAE", "vae"),
        ({n: np.asarray(t) for n, t in random_diffusers("vae", TINY_VAE).items()}, "tiny VAE", "vae"),
        (
            {n: np.asarray(t) for n, t in random_diffusers("text_encoder").items()},
            "CLIP text encoder",
            "text_encoder",
        ),
    ],
)
def test_files_that_are_no_models(tmp_path, said, tensors, family, components):
    write(tmp_path / "a.safetensors", tensors, {"ss_network_dim": "4"})
    lines = said(tmp_path / "a.safetensors")
    assert (lines["family"], lines["components"]) == (family, components)
    assert lines["tensors"] == str(len(tensors)) and lines["weights"] == "all finite"
    assert lines["metadata.ss_network_dim"] == "4"


def test_eight_bits(tmp_path, said, contents):
    write(tmp_path / "a.safetensors", {n: a.astype(ml_dtypes.float8_e4m3fn) for n, a in contents.items()}, HEADER)
    assert said(tmp_path / "a.safetensors")["precision"] == "float8_e4m3fn"


@pytest.mark.parametrize("write_it", [pickles.zipped, pickles.legacy])
def test_pickles(tmp_path, said, write_it):
    parameters = pickles.table({"*": pickles.tensor()})
    body = pickles.table({"string_to_param": parameters, "made_by": pickles.call("some.trainer", "State")})
    lines = said(write_it(tmp_path / "a.pt", body))
    assert lines["family"] == "textual inversion embedding" and lines["format"].startswith("pickle of torch")
    assert "some.trainer.State (UNKNOWN), " in lines["imports"] + ", "
    assert "torch._utils._rebuild_tensor_v2 (what torch writes)" in lines["imports"]


def test_folders(tmp_path, said, params, tokenizer):
    save_checkpoint(tmp_path / "a", SPEC, params, tokenizer)
    lines = said(tmp_path / "a")
    assert (lines["format"], lines["family"], lines["missing"]) == ("diffusers folder", "Stable Diffusion 1", "none")
    assert lines["prediction_reason"] == f"said by {tmp_path}/a/scheduler/scheduler_config.json"
    lines = said(tmp_path / "a" / "vae")
    assert (lines["family"], lines["components"], lines["precision"]) == ("VAE", "vae", "float32")
    save_checkpoint(tmp_path / "b", SPEC, {"vae": params["vae"]}, format="native")
    lines = said(tmp_path / "b")
    assert (lines["format"], lines["missing"]) == ("workdir of sd_jax", "unet, text_encoder, tokenizer")


@pytest.mark.parametrize(("value", "said"), [(np.nan, "NaN"), (-np.inf, "infinite")])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_no_numbers(tmp_path, fault, contents, value, said, dtype):
    name = "first_stage_model.decoder.conv_out.bias"
    write(tmp_path / "a.safetensors", {**contents, name: np.array([0, value, 0], dtype)}, HEADER)
    assert f"{name} has values that are {said}" in fault(tmp_path / "a.safetensors")


def test_faults(tmp_path, fault, contents):
    path = tmp_path / "a.safetensors"
    swap = {"model.diffusion_model.": "first_stage_model.", "first_stage_model.": "model.diffusion_model."}
    swapped = {next((n.replace(a, b) for a, b in swap.items() if n.startswith(a)), n): t for n, t in contents.items()}
    write(path, swapped)
    assert "two components are swapped" in fault(path)
    write(path, {**contents, "foo": np.zeros(1)}, HEADER)
    assert "unexpected in a single file of SD 1.x: foo" in fault(path)
    path.write_text("just words, whatever the name says")
    assert "not a safetensors file" in fault(path)
    path.write_bytes(b"")
    assert "an empty file" in fault(path)
    fault(tmp_path / "nowhere")
    fault(tmp_path)


def test_the_command(tmp_path):
    (tmp_path / "a.safetensors").write_text("words")
    command = [sys.executable, "-m", "sd_jax.checkpoints.inspect", str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path}/a.safetensors: ") and done.stderr.count("\n") == 1
