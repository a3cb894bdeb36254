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
