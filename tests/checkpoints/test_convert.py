"""python -m sd_jax.checkpoints.convert IN OUT."""

import json
import subprocess
import sys

import pytest

from sd_jax.checkpoints import read
from sd_jax.checkpoints.convert import main
from sd_jax.checkpoints.load import load_checkpoint
from sd_jax.checkpoints.save import save_checkpoint
from tests.checkpoints.tiny import SPEC, assert_same


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params, tokenizer):
    path = tmp_path_factory.mktemp("convert") / "folder"
    save_checkpoint(path, SPEC, params, tokenizer)
    return str(path)


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


def test_options(tmp_path, folder):
    target = tmp_path / "half"
    assert main([folder, str(target), "--dtype=bfloat16"]) == 0
    assert {a.dtype.name for a in read(target / "unet" / "diffusion_pytorch_model.safetensors").values()} == {
        "bfloat16"
    }
    assert json.loads((target / "text_encoder" / "config.json").read_text())["torch_dtype"] == "bfloat16"


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
