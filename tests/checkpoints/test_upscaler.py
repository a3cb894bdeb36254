"""Files of upscalers."""

import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, files, read_safetensors, write_torch
from sd_jax.checkpoints.beside import open_beside
from sd_jax.checkpoints.upscaler import open_upscaler, save_upscaler
from tests.checkpoints import tiny_upscalers

LAYOUTS = ("esrgan", "bsrgan", "real_esrgan", "compact")
WITHIN = {"real_esrgan": "params_ema.", "compact": "params."}


def tensors_of(layout):
    return tiny_upscalers.compact() if layout == "compact" else tiny_upscalers.rrdb(layout)


def assert_same(path, tensors):
    found = files.read(path)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_to_the_bit(tmp_path, layout):
    theirs = tensors_of(layout)
    read_safetensors.write(tmp_path / "a.safetensors", theirs)
    opened = open_upscaler(tmp_path / "a.safetensors")
    assert opened.layout == layout
    for name in ("b.safetensors", "b.pth"):
        save_upscaler(tmp_path / name, opened.config, opened.params, layout)
        within = WITHIN.get(layout, "") if name == "b.pth" else ""  # as the published files have it
        assert_same(tmp_path / name, {within + key: array for key, array in theirs.items()})
        again = open_upscaler(tmp_path / name)
        assert (again.config, again.layout) == (opened.config, layout)
    with pytest.raises(FileExistsError):
        save_upscaler(tmp_path / "b.pth", opened.config, opened.params)


def test_half_precision_and_the_own_layout(tmp_path):
    half = {name: array.astype(np.float16) for name, array in tiny_upscalers.rrdb("esrgan").items()}
    write_torch.write(tmp_path / "a.pth", half)
    opened = open_upscaler(tmp_path / "a.pth")
    save_upscaler(tmp_path / "same.safetensors", opened.config, opened.params, "esrgan")
    assert_same(tmp_path / "same.safetensors", half)
    save_upscaler(tmp_path / "b.safetensors", opened.config, opened.params, dtype="float32")
    found = files.read(tmp_path / "b.safetensors")
    assert "conv_up2.weight" in found and found["conv_up2.weight"].dtype == np.float32


def test_of_two_the_average_is_read(tmp_path):
    last, average = tiny_upscalers.rrdb("real_esrgan", seed=1), tiny_upscalers.rrdb("real_esrgan", seed=2)
    write_torch.write_object(tmp_path / "a.pth", {"params": last, "params_ema": average})
    params = open_upscaler(tmp_path / "a.pth").params
    kernel = average["conv_hr.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(np.asarray(params["conv_hr"]["kernel"]), kernel)


def test_what_lies_beside_is_listed(tmp_path):
    write_torch.write_object(tmp_path / "a.pth", {"params": tiny_upscalers.compact(), "mean": np.zeros(3)})
    with pytest.raises(CheckpointError, match=r"a\.pth: .*mean is unexpected"):
        open_upscaler(tmp_path / "a.pth")


def test_opened_beside_others(tmp_path):
    write_torch.write(tmp_path / "a.pth", tiny_upscalers.rrdb("esrgan"))
    opened = open_beside("upscaler", tmp_path / "a.pth")
    assert opened.config == tiny_upscalers.RRDB and opened.tokenizer is None
    assert opened.params["body_1"]["rdb3"]["conv5"]["kernel"].shape == (3, 3, 24, 8)


def test_refused(tmp_path):
    read_safetensors.write(tmp_path / "a.safetensors", tiny_upscalers.compact())
    opened = open_upscaler(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"b\.onnx: an upscaler is called \*\.safetensors, or \*\.pth"):
        save_upscaler(tmp_path / "b.onnx", opened.config, opened.params)
    with pytest.raises(CheckpointError, match="body.0.bias is missing"):
        save_upscaler(tmp_path / "b.pth", opened.config, {"body_0": {"kernel": opened.params["body_0"]["kernel"]}})
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
