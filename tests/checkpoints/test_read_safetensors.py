"""Our reader and writer against the `safetensors` package, and against files that are not what they should be."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sd_jax.checkpoints import CheckpointError, read
from sd_jax.checkpoints.read_safetensors import DTYPES, open_file, write


def example(without=""):
    rng = np.random.default_rng(0)
    dtypes = [dtype for dtype in DTYPES.values() if not without or without not in dtype.name]
    arrays = {f"a.{dtype.name}": rng.integers(0, 2, (3, 5)).astype(dtype) for dtype in dtypes}
    return {**arrays, "scalar": np.array(3.5, np.float32), "empty": np.zeros((0, 4), np.float16)}


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape
        assert got[name].tobytes() == want[name].tobytes()


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(*shape, begin=0):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, begin + 4 * int(np.prod(shape))]}


def test_round_trip_of_every_type(tmp_path):
    arrays = example()
    write(tmp_path / "a.safetensors", arrays, {"format": "pt", "title": "naïve"})
    contents = open_file(tmp_path / "a.safetensors")
    assert contents.metadata == {"format": "pt", "title": "naïve"}
    assert_equal(read(tmp_path / "a.safetensors"), arrays)


def test_agrees_with_the_safetensors_package(tmp_path):
    arrays = example(without="float8")  # it cannot read those
    write(tmp_path / "ours.safetensors", arrays)
    assert_equal(safetensors.numpy.load_file(tmp_path / "ours.safetensors"), arrays)
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors")
    assert_equal(read(tmp_path / "theirs.safetensors"), arrays)


def test_one_float8_tensor_does_not_close_the_file(tmp_path):
    write(tmp_path / "a.safetensors", {"a": np.ones(3, ml_dtypes.float8_e4m3fn), "b": np.ones(2, np.float32)})
    assert read(tmp_path / "a.safetensors")["b"].tolist() == [1, 1]


def test_a_tensor_is_read_only_when_asked_for(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"a": np.arange(6, dtype=np.float32), "b": np.ones(3, np.float32)})
    tensors = open_file(path).tensors
    assert np.asarray(tensors["a"]).tolist() == [0, 1, 2, 3, 4, 5]
    assert tensors["a"].transpose(0).reshape(2, 3).shape == (2, 3)
    path.write_bytes(path.read_bytes()[:-1])  # it shrinks after it was opened
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        tensors["b"].read()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a safetensors file (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04" + b"\x08" * 60, "a pickled PyTorch file, not a safetensors file"),
        (b"\x80\x02\x8a\x0al\xfc\x9c\x46\xf9\x20\x6a\xa8", "a pickled PyTorch file, not a safetensors file"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"\xff" * 100, "not a safetensors file"),
        (struct.pack("<Q", 500) + b'{"a":', "cut short within its header"),
        (struct.pack("<Q", 5) + b'{"a":', "its header is damaged"),
        (struct.pack("<Q", 2) + b"[]", "its header is damaged"),
        (struct.pack("<Q", 10) + b'{"a": NaN}', "NaN is no number of JSON"),
        (struct.pack("<Q", 24) + b'{"__metadata__":{"a":1}}', "no table of tensors"),
        (struct.pack("<Q", 20_000_000) + b"{", "a header of 20000000 bytes"),
    ],
)
def test_foreign_and_damaged_files_are_named(tmp_path, content, said):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        open_file(path)
    assert str(path) in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("header", "size", "said"),
    [
        ({"a": entry(4)}, 15, "cut short: "),
        ({"a": entry(4)}, 17, "1 bytes too long"),
        ({"a": entry(2), "b": entry(2, begin=4)}, 12, "overlap or leave holes at byte 4"),
        ({"a": entry(2), "b": entry(2, begin=12)}, 20, "overlap or leave holes at byte 12"),
        ({"a": {**entry(4), "shape": [5]}}, 16, "a is (5,) of F32, but has 16 bytes"),
        ({"a": {**entry(4), "shape": [-4]}}, 16, "entry for a is damaged"),
        ({"a": {"dtype": "F32"}}, 16, "entry for a is damaged"),
        ({"a": {**entry(4), "dtype": "F4"}}, 16, "a is of type F4"),
        (b'{"a": {}, "a": {}}', 0, "a name occurs twice"),
    ],
)
def test_unsound_headers_are_refused(tmp_path, header, size, said):
    path = raw(tmp_path / "a.safetensors", header, b"\0" * size)
    with pytest.raises(CheckpointError) as error:
        open_file(path)
    assert str(path) in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(tmp_path / "a.safetensors")


def test_type_that_the_format_lacks(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such type: a \(complex128\)"):
        write(tmp_path / "a.safetensors", {"a": np.ones(2, np.complex128)})
