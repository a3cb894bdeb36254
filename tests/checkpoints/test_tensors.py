"""Tensors to come: shapes and types at once, values when asked, a few rows at a time."""

import os
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError
from sd_jax.checkpoints.tensors import Tensor, all_finite, dtype_of, empty, joined, lazy, stored

FLOATS = [
    np.float64,
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
]


def in_file(folder, array: np.ndarray, before: bytes = b"12345678") -> Tensor:
    path = folder / "file"
    path.write_bytes(before + array.tobytes())
    return stored(path, "a.weight", array.shape, array.dtype, len(before))


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


# From memory and from files


@pytest.mark.parametrize("source", ["memory", "file"])
def test_changes_are_those_of_numpy(tmp_path, source):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tensor = lazy(array) if source == "memory" else in_file(tmp_path, array)
    changed = tensor.transpose(2, 0, 1).reshape(4, 6).cast(np.dtype(np.float16))
    want = array.transpose(2, 0, 1).reshape(4, 6).astype(np.float16)
    assert changed.shape == want.shape and changed.dtype == want.dtype and changed.ndim == 2
    np.testing.assert_array_equal(np.asarray(changed), want)
    assert tensor.transpose(2, 0, 1).read().flags.c_contiguous
    np.testing.assert_array_equal(tensor.rows(1, 2).transpose(0, 2, 1).read(), array[1:2].transpose(0, 2, 1))
    both = joined([tensor, tensor.rows(0, 1)]).transpose(1, 0, 2)
    np.testing.assert_array_equal(both.read(), np.concatenate([array, array[:1]]).transpose(1, 0, 2))


@pytest.mark.parametrize("source", ["memory", "file"])
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (70, 3), (33, 700, 3, 3), (3, 2, 2**18)])
def test_every_size_in_every_layout(tmp_path, source, shape):
    array = random(*shape)
    tensor = lazy(array) if source == "memory" else in_file(tmp_path, array)
    axes = tuple(reversed(range(len(shape))))
    for changed, want in [
        (tensor, array),
        (tensor.transpose(*axes), array.transpose(axes)),
        (tensor.cast(np.dtype(np.float16)), array.astype(np.float16)),
        (tensor.transpose(*axes).cast(np.dtype(ml_dtypes.bfloat16)), array.transpose(axes).astype(ml_dtypes.bfloat16)),
        (tensor.reshape(*shape, 1), array[..., None]),
    ]:
        got = changed.read()
        assert got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", [*FLOATS, np.int64, np.uint8, np.bool_], ids=lambda t: np.dtype(t).name)
def test_every_type_from_a_file(tmp_path, dtype):
    array = random(40, 9).astype(dtype)
    got = in_file(tmp_path, array, before=b"odd").transpose(1, 0).read()
    assert got.dtype == array.dtype and got.tobytes() == np.ascontiguousarray(array.T).tobytes()


def test_reshaped_into_what_no_view_can_have(tmp_path):
    array = random(6, 4)
    tensor = in_file(tmp_path, array).reshape(4, 6).transpose(1, 0)
    np.testing.assert_array_equal(tensor.read(), array.reshape(4, 6).T)


def test_a_file_that_ends_too_soon_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"short")
    tensor = stored(tmp_path / "file", "a.weight", (40, 9), np.dtype(np.float32), 8)
    for asked in (tensor, tensor.transpose(1, 0), tensor.rows(39, 40)):
        with pytest.raises(CheckpointError, match="file: cut short while it was read, at a.weight"):
            asked.read()


def test_a_file_that_was_replaced_is_not_read_as_the_old_one(tmp_path):
    tensor = in_file(tmp_path, random(40, 9))
    (tmp_path / "other").write_bytes((tmp_path / "file").read_bytes())
    os.replace(tmp_path / "other", tmp_path / "file")
    for asked in (tensor, tensor.transpose(1, 0), tensor.rows(39, 40)):
        with pytest.raises(CheckpointError, match="file: changed since it was opened: load it again"):
            asked.read()


def test_rows_of_a_file_are_read_alone(tmp_path):
    in_file(tmp_path, random(40, 9))
    with (tmp_path / "file").open("r+b") as file:
        file.truncate(8 + 10 * 9 * 4)
    tensor = stored(tmp_path / "file", "a.weight", (40, 9), np.dtype(np.float32), 8)
    np.testing.assert_array_equal(tensor.rows(4, 8).rows(1, 3).read(), random(40, 9)[5:7])


@pytest.mark.parametrize("change", ["none", "transposed", "cast"])
def test_reading_costs_the_tensor_and_a_few_megabytes(tmp_path, change):
    tensor = in_file(tmp_path, random(512, 1024, 3, 3))  # 18.9 MB
    dtype = np.dtype(np.float16 if change == "cast" else np.float32)
    changed = tensor if change == "none" else tensor.transpose(2, 3, 1, 0).cast(dtype)
    tracemalloc.start()
    try:
        got = changed.read()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < got.nbytes + 6e6  # of 18.9 MB


def test_jax_arrays_and_tensors_are_taken_too():
    tensor = lazy(jnp.ones((2,), jnp.bfloat16))
    assert tensor.dtype == ml_dtypes.bfloat16 and lazy(tensor) is tensor


def test_arrays_begin_where_jax_takes_them_over():
    assert all(empty((3, n), np.dtype(np.float32)).ctypes.data % 64 == 0 for n in range(1, 20))


# Types


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_only_floats_are_cast(dtype):
    assert lazy(np.ones(2, np.float32)).cast(dtype_of(dtype)).read().dtype == dtype_of(dtype)
    assert lazy(np.ones(2, np.int64)).cast(dtype_of(dtype)).dtype == np.int64
    assert lazy(np.ones(2, np.float32)).cast(None).dtype == np.float32


def test_a_cast_of_a_cast_has_been_rounded_twice():
    array = random(100)
    twice = lazy(array).cast(dtype_of("float16")).cast(dtype_of("float32")).read()
    np.testing.assert_array_equal(twice, array.astype(np.float16).astype(np.float32))
    assert (twice != array).any()


def test_overflow_of_float16_is_named():
    for values in ([1e6], [np.inf, 1e6]):
        with pytest.raises(CheckpointError, match="conv_in has values beyond float16's 65504"):
            lazy(np.array(values, np.float32)).cast(dtype_of("float16"), "conv_in").read()
    assert np.isinf(lazy(np.array([np.inf], np.float32)).cast(dtype_of("float16")).read()).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda t: np.dtype(t).name)
def test_finite_to_the_bit(dtype):
    info = ml_dtypes.finfo(dtype)
    numbers = np.array([0, -1, info.max, info.min, info.smallest_subnormal], dtype)
    assert all_finite(numbers) and all_finite(numbers[:0]) and all_finite(numbers[:1].reshape(()))
    bits = np.arange(256 if info.bits == 8 else 2**16, dtype=f"u{min(info.bits // 8, 2)}")
    if info.bits > 16:  # the upper two bytes have the exponent and what tells NaN from infinity
        bits = bits.astype(f"u{info.bits // 8}") << (info.bits - 16)
    every = bits.view(dtype)
    with np.errstate(invalid="ignore"):  # ml_dtypes sees signalling NaNs
        finite = np.isfinite(every)
    assert 0 < (~finite).sum() < every.size / 4
    assert not any(all_finite(one) for one in every.reshape(-1, 1)[~finite])
    assert all_finite(every[finite])
    assert not all_finite(np.concatenate([np.zeros(10**6, dtype), every[~finite][:1]]))
    for other in (np.float32, ml_dtypes.bfloat16):  # without a warning
        assert not all_finite(lazy(every).cast(np.dtype(other)).read())


def test_whole_numbers_are_finite():
    assert all_finite(np.array([2**62, -1]))


def test_dtype_names():
    assert dtype_of(None) is None and dtype_of(jnp.bfloat16) == ml_dtypes.bfloat16
    for wrong in ("fp16", "int32", 3.5):
        with pytest.raises(ValueError, match="is not one of float32, float16, bfloat16"):
            dtype_of(wrong)
