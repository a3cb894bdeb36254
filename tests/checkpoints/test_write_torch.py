"""What we write as torch.save does: our reader and torch read the same."""

import ml_dtypes
import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, write_torch
from sd_jax.checkpoints.files import open_any, read

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.asarray(2.5, np.float64),
    "half": np.linspace(-1, 1, 40, dtype=np.float16).reshape(2, 4, 5),
    "bf16": np.arange(5).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.float32),
    "counts": np.asarray([2**40, -1], np.int64),
    "many": np.arange(70_000, dtype=np.int32),  # more elements than two bytes count
    "bytes": np.arange(3, dtype=np.uint8),
    "flags": np.asarray([True, False]),
    "ü": np.ones(1, np.float32),
}


def test_read_back(tmp_path):
    write_torch.write(tmp_path / "a.pt", ARRAYS)
    found = read(tmp_path / "a.pt")
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_texts_around(tmp_path):
    write_torch.write(tmp_path / "a.pt", {"x": ARRAYS["half"]}, {"name": "n", "more": "ü"})
    found = open_any(tmp_path / "a.pt")
    assert found.metadata == {"name": "n", "more": "ü"} and list(found.tensors) == ["x"]


def test_types_that_torch_has_not(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.pt: torch has no storage of such a type: x \(uint16\)"):
        write_torch.write(tmp_path / "a.pt", {"x": np.zeros(3, np.uint16)})


NESTED = {
    768: ({"w": ARRAYS["half"], "b": ARRAYS["empty"]}, {"w": ARRAYS["b"]}),
    "list": [1, 1.5, ARRAYS["counts"], [], ()],
    "facts": {"none": None, "yes": True, "no": False, "large": 2**40, "below": -3, "text": "ü", "nothing": {}},
    "768.0": {"w": ARRAYS["flags"]},  # that its name is another's where they are joined by dots is no matter
}


def test_nested_objects(tmp_path):
    write_torch.write_object(tmp_path / "a.pt", {**NESTED, "768.0": None})
    found = read(tmp_path / "a.pt")
    assert list(found) == ["768.0.w", "768.0.b", "768.1.w", "list.2"]
    for name, array in zip(found, ("half", "empty", "b", "counts"), strict=True):
        np.testing.assert_array_equal(found[name], ARRAYS[array], strict=True)
    with pytest.raises(CheckpointError, match=r"no storage of such a type: 768\.1\.w \(uint16\); x\.0 \(uint32\)"):
        numbers = [np.zeros(3, np.uint16), np.zeros(3, np.uint32)]
        write_torch.write_object(tmp_path / "a.pt", {768: ({}, {"w": numbers[0]}), "x": [numbers[1]]})


@pytest.mark.parity
def test_torch_reads_nested_objects(tmp_path):
    import torch

    write_torch.write_object(tmp_path / "a.pt", NESTED)
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert_equal(found, NESTED)


def assert_equal(found, wanted):
    """Tensors of torch against arrays, in the same containers."""
    if isinstance(wanted, np.ndarray):
        np.testing.assert_array_equal(found.numpy(), wanted, strict=True)
    elif isinstance(wanted, dict | list | tuple):
        assert type(found) is type(wanted) and len(found) == len(wanted)
        keys = wanted if isinstance(wanted, dict) else range(len(wanted))
        for key in keys:
            assert_equal(found[key], wanted[key])
    else:
        assert type(found) is type(wanted) and found == wanted


@pytest.mark.parity
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_it(tmp_path, mmap):
    import torch

    write_torch.write(tmp_path / "a.pt", ARRAYS, {"name": "n"})
    found = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
    assert found["name"] == "n" and list(found["state_dict"]) == list(ARRAYS)
    for name, array in ARRAYS.items():
        theirs = found["state_dict"][name]
        theirs = theirs.float().numpy().astype(array.dtype) if theirs.dtype == torch.bfloat16 else theirs.numpy()
        np.testing.assert_array_equal(theirs, array, strict=True)
        if array.size:
            assert found["state_dict"][name].data_ptr() % array.itemsize == 0
