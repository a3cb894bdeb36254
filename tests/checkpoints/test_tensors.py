"""Tensors to come: shapes and types at once, values when asked."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError
from sd_jax.checkpoints.tensors import dtype_of, lazy


def test_changes_are_those_of_numpy():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tensor = lazy(array).transpose(2, 0, 1).reshape(4, 6).cast(np.dtype(np.float16))
    want = array.transpose(2, 0, 1).reshape(4, 6).astype(np.float16)
    assert tensor.shape == want.shape and tensor.dtype == want.dtype and tensor.ndim == 2
    np.testing.assert_array_equal(np.asarray(tensor), want)
    assert lazy(array).transpose(2, 0, 1).read().flags.c_contiguous


def test_jax_arrays_and_tensors_are_taken_too():
    tensor = lazy(jnp.ones((2,), jnp.bfloat16))
    assert tensor.dtype == ml_dtypes.bfloat16 and lazy(tensor) is tensor


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_only_floats_are_cast(dtype):
    assert lazy(np.ones(2, np.float32)).cast(dtype_of(dtype)).read().dtype == dtype_of(dtype)
    assert lazy(np.ones(2, np.int64)).cast(dtype_of(dtype)).dtype == np.int64
    assert lazy(np.ones(2, np.float32)).cast(None).dtype == np.float32


def test_overflow_of_float16_is_named():
    with pytest.raises(CheckpointError, match="conv_in has values beyond float16's 65504"):
        lazy(np.array([1e6], np.float32)).cast(dtype_of("float16"), "conv_in").read()
    assert np.isinf(lazy(np.array([np.inf], np.float32)).cast(dtype_of("float16")).read()).all()


def test_dtype_names():
    assert dtype_of(None) is None and dtype_of(jnp.bfloat16) == ml_dtypes.bfloat16
    for wrong in ("fp16", "int32", 3.5):
        with pytest.raises(ValueError, match="is not one of float32, float16, bfloat16"):
            dtype_of(wrong)
