"""python -m sd_jax.checkpoints.convert IN OUT."""

import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from sd_jax.checkpoints import read
from sd_jax.checkpoints.convert import convert, main
from sd_jax.checkpoints.load import load_checkpoint
from sd_jax.checkpoints.read_safetensors import open_file, write
from sd_jax.checkpoints.save import save_checkpoint
from tests.checkpoints.tiny import SPEC, SPECS, assert_same, compvis_file, random_params


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params, tokenizer):
    path = tmp_path_factory.mktemp("convert") / "folder"
    save_checkpoint(path, SPEC, params, tokenizer)
    return str(path)


def header(spec) -> dict[str, str]:
    return {"sd_jax.spec": json.dumps(spec.to_dict())}


def test_through_every_form(tmp_path, params, tokenizer, folder, capsys):
    single, native, back = (str(tmp_path / name) for name in ("a.safetensors", "native", "back"))
    assert main([folder, single]) == 0
    assert main([single, native, "--format=native", f"--tokenizer={tokenizer}"]) == 0
    assert main([native, back, "--weights=raw"]) == 0
    assert capsys.readouterr().out.count(" -> ") == 3
    for path, kind in ((single, "single_file"), (native, "native"), (back, "diffusers")):
        loaded = load_checkpoint(path)
        assert loaded.kind == kind and loaded.spec == SPEC
        assert_same(loaded.params, params)


@pytest.mark.parametrize("kind", [kind for kind in SPECS if kind not in ("sd1", "sd2_file")])  # the latter: one way
def test_every_family_from_file_to_folder_and_back(tmp_path, tokenizer, kind):
    spec, file, out = SPECS[kind], tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = compvis_file(spec)
    write(file, tensors, header(spec))
    convert(file, tmp_path / "folder", tokenizer=str(tokenizer))
    opened = convert(tmp_path / "folder", out)
    assert opened.spec.unet == spec.unet
    assert_same({name: array for name, array in read(out).items() if array.size}, tensors)


@pytest.mark.parity
@pytest.mark.parametrize("legacy", [False, True])
def test_from_a_pickled_file(tmp_path, legacy):
    torch = pytest.importorskip("torch")
    tensors = compvis_file()
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not legacy)
    convert(tmp_path / "a.ckpt", tmp_path / "b.safetensors", config=SPEC)
    assert_same({name: array for name, array in read(tmp_path / "b.safetensors").items() if array.size}, tensors)


def test_options(tmp_path, folder):
    target = tmp_path / "half"
    assert main([folder, str(target), "--dtype=bfloat16"]) == 0
    assert {a.dtype.name for a in read(target / "unet" / "diffusion_pytorch_model.safetensors").values()} == {
        "bfloat16"
    }
    assert json.loads((target / "text_encoder" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_what_the_file_does_not_say_is_given(tmp_path, folder, tokenizer, capsys):
    bare, out = str(tmp_path / "bare.safetensors"), str(tmp_path / "out.safetensors")
    write(bare, compvis_file())  # its heads and groups are not those of the family
    assert main([bare, out, f"--config={folder}", "--prediction_type=v_prediction"]) == 0
    assert "prediction type v_prediction: said by prediction_type=" in capsys.readouterr().out
    opened = load_checkpoint(out)
    assert opened.spec.unet == SPEC.unet and opened.spec.noise_schedule.prediction_type == "v_prediction"
    assert main([bare, out, f"--config={folder}", "--prediction_type=noise", "--overwrite"]) == 1
    assert "prediction_type='noise' is not one of" in capsys.readouterr().err


def test_parts_are_lacking_or_taken_from_elsewhere(tmp_path, params):
    unet, out, whole = (tmp_path / f"{name}.safetensors" for name in ("unet", "out", "whole"))
    write(unet, compvis_file(parts=("unet",)), header(SPEC))
    convert(unet, out)
    assert load_checkpoint(out).params.keys() == {"unet"}
    save_checkpoint(whole, SPEC, other := random_params(seed=1), format="single_file")
    assert main([str(unet), str(out), f"--vae={whole}", f"--text_encoder={whole}", "--overwrite"]) == 0
    loaded = load_checkpoint(out)
    assert_same(loaded.params, {**other, "unet": params["unet"]})


def test_memory_is_that_of_a_few_tensors(tmp_path, tokenizer):
    tensors = compvis_file()
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    rows = np.zeros((2**17, tensors[name].shape[1]), np.float32)  # 17 MB
    many = {f"{name}": rows}
    spec = SPEC.to_dict()
    spec["text_encoder"]["vocab_size"] = len(rows)
    write(tmp_path / "a.safetensors", tensors | many, {"sd_jax.spec": json.dumps(spec)})
    tracemalloc.start()
    try:
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype="float16")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert open_file(tmp_path / "b.safetensors").tensors[name].dtype == np.float16
    assert peak < rows.nbytes  # half of it is written; with the whole of it in float32 besides it would be more


def test_errors_are_one_line(tmp_path, folder, capsys):
    single = str(tmp_path / "a.safetensors")
    assert main([folder, single]) == 0
    for arguments, said in [
        ([str(tmp_path / "nowhere"), str(tmp_path / "b")], "no such checkpoint"),
        ([folder, single], "already exists"),
        ([single, str(tmp_path / "b")], "tokenizer"),  # neither in the file, nor here, nor on a hub
        ([folder, str(tmp_path / "b"), "--format=single_file"], "is called *.safetensors"),
    ]:
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert main([folder, single, "--overwrite"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_as_a_command(tmp_path):
    command = [sys.executable, "-m", "sd_jax.checkpoints.convert", tmp_path / "nowhere", tmp_path / "b"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (
        ended.returncode == 1 and ended.stderr.count("\n") == 1 and ended.stderr.startswith("error: no such checkpoint")
    )
