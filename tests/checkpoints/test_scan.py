"""The scanner: what it prints and how it exits, of files of each kind. (Hostile ones: test_hostile.)"""

import subprocess
import sys

import numpy as np
import pytest

from sd_jax.checkpoints.imports import is_weapon, verdict
from sd_jax.checkpoints.pickle_machine import Global
from sd_jax.checkpoints.read_safetensors import write
from sd_jax.checkpoints.scan import main, scan
from tests.checkpoints.pickles import call, imported, legacy, pickled, table, tensor, zipped

LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"
WRITERS = pytest.mark.parametrize("writer", [zipped, legacy])


@WRITERS
def test_what_torch_writes(tmp_path, capsys, writer):
    path = writer(tmp_path / "a.ckpt", table({"a": tensor()}))
    assert main([str(path)]) == 0
    names = ("torch._utils._rebuild_tensor_v2", "torch.FloatStorage", "collections.OrderedDict")
    assert capsys.readouterr() == ("".join(f"{path}: {name} (what torch writes)\n" for name in names), "")


@WRITERS
def test_known_and_unknown_names(tmp_path, capsys, writer):
    lightning = table({"a": tensor(), "callbacks": imported(LIGHTNING, "ModelCheckpoint")})
    good = writer(tmp_path / "good.ckpt", lightning)
    bad = writer(tmp_path / "bad.ckpt", table({"a": tensor(), "b": call("shutil", "rmtree"), "c": imported("m", "C")}))
    assert main([str(good)]) == 0
    assert f"{good}: {LIGHTNING}.ModelCheckpoint (harmless)\n" in capsys.readouterr().out
    assert main([str(good), str(bad)]) == 1
    out, err = capsys.readouterr()
    for name in ("shutil.rmtree", "m.C"):
        assert f"{bad}: {name} (UNKNOWN: would have run when unpickled by torch.load)\n" in out
    assert err == "" and out.count("UNKNOWN") == 2


def test_every_pickle_of_a_file_is_seen(tmp_path):
    body = table({"a": tensor()})
    path = zipped(tmp_path / "a.pt", body, **{"constants.pkl": pickled(imported("m", "constant"))})
    assert Global("m", "constant") in scan(path)[0]
    whole = legacy(tmp_path / "b.pt", body, {}).read_bytes()
    assert whole.endswith(b"]q\x00.")
    path.write_bytes(whole[:-6] + pickled(b"](" + imported("m", "key") + b"e"))
    assert Global("m", "key") in scan(path)[0]


def test_what_stands_before_damage_is_seen(tmp_path, capsys):
    path = tmp_path / "a.ckpt"
    path.write_bytes(pickled(call("os", "system"))[:-1] + b"\xff")
    assert main([str(path)]) == 1
    out, err = capsys.readouterr()
    assert "os.system (UNKNOWN" in out and err.startswith(f"error: {path}: ") and err.count("\n") == 1


def test_safetensors_and_what_cannot_be_read(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    write(path, {"a": np.ones(2, np.float32)})
    assert main([str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: holds no code\n"
    page = tmp_path / "a.ckpt"
    page.write_bytes(b"<html></html>")
    for wrong in (page, tmp_path / "missing.ckpt"):
        assert main([str(wrong)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and str(wrong) in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "name", "said", "weapon"),
    [
        ("torch", "bfloat16", "what torch writes", False),
        ("torch.cuda", "HalfStorage", "what torch writes", False),
        ("torch", "_utils._rebuild_tensor_v2", "UNKNOWN", False),  # the same in one text, but not the same name
        ("collections.OrderedDict", "__init__", "UNKNOWN", False),
        ("numpy._core.multiarray", "scalar", "harmless", False),
        ("__torch__.m", "M", "TorchScript", False),
        ("builtins", "set", "harmless", False),
        ("builtins", "getattr", "UNKNOWN", False),
        ("builtins", "eval", "UNKNOWN", True),
        ("__builtin__", "execfile", "UNKNOWN", True),
        ("os", "system", "UNKNOWN", True),
        ("os.path", "os.system", "UNKNOWN", True),
        ("posix", "system", "UNKNOWN", True),
        ("osprey", "system", "UNKNOWN", False),
        ("code", "interact", "UNKNOWN", True),
        ("code.models", "Configuration", "UNKNOWN", False),
        ("m", "a\nb", "UNKNOWN", False),
    ],
)
def test_verdicts(module, name, said, weapon):
    wanted = Global(module, name)
    assert verdict(wanted).startswith(said) and is_weapon(wanted) == weapon
    assert "\n" not in str(wanted)


def test_as_a_command(tmp_path):
    path = zipped(tmp_path / "a.ckpt", table({"a": tensor(), "b": call("os", "system")}))
    command = [sys.executable, "-m", "sd_jax.checkpoints.scan", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr == ""
    assert f"{path}: os.system (UNKNOWN: would have run when unpickled by torch.load)" in done.stdout
