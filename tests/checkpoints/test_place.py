"""From files onto devices: the same values, in memory of their own, one copy; slices only where there is a mesh."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError
from sd_jax.checkpoints.place import _shard, gather, place
from sd_jax.checkpoints.read_safetensors import open_file, write
from sd_jax.checkpoints.tensors import Tensor, lazy
from tests.environment import with_devices

ROOT = Path(__file__).parents[2]


def tree() -> dict:
    rng = np.random.default_rng(0)
    return {
        "unet": {"conv": {"kernel": rng.standard_normal((3, 3, 8, 16), np.float32), "bias": np.zeros(16, np.float32)}},
        "vae": {
            "scale": rng.standard_normal(7, np.float32).astype(ml_dtypes.bfloat16),
            "count": np.arange(3, dtype=np.int32),
        },
    }


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("kind", [lazy, np.asarray, jnp.asarray])
def test_values_are_those_of_the_tensors(dtype, kind):
    placed = place(jax.tree.map(kind, tree()), dtype)
    assert jax.tree.structure(placed) == jax.tree.structure(tree())
    for got, want in zip(jax.tree.leaves(placed), jax.tree.leaves(tree()), strict=True):
        want = want if dtype is None or want.dtype == np.int32 else want.astype(dtype)
        assert isinstance(got, jax.Array) and got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got), want)


def test_nothing_is_shared_with_what_was_given():
    given = {"a": np.ones(1024, np.float32)}
    placed, gathered = place(given, "float32"), gather(given)
    given["a"][:] = 5
    assert (np.asarray(placed["a"]) == 1).all() and (gathered["a"] == 1).all()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices have memory of their own")
def test_jax_takes_the_memory_over():
    gathered = gather(tree())
    for array in jax.tree.leaves(gathered["unet"]):
        assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data


def test_a_slice_does_not_keep_the_whole_alive():
    array = gather({"a": np.arange(4096, dtype=np.float32).reshape(64, 64)})["a"]
    part = _shard(array, (slice(0, 16), slice(None)))
    np.testing.assert_array_equal(part, array[:16])
    assert not np.shares_memory(part, array) and part.ctypes.data % 64 == 0
    assert _shard(array, (slice(None), slice(None))) is array


def test_placed_arrays_may_be_donated(tmp_path):
    write(tmp_path / "a.safetensors", {"a": np.ones((64, 64), np.float32)})
    tensors = open_file(tmp_path / "a.safetensors").tensors
    placed = place(tensors, None)
    doubled = jax.jit(lambda x: x + x, donate_argnums=0)(placed["a"])
    assert placed["a"].is_deleted()
    assert (np.asarray(doubled) == 2).all() and (np.asarray(place(tensors, None)["a"]) == 1).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(value):
    broken = {"unet": {"conv_in": {"bias": np.array([1, value], np.float32), "kernel": np.ones(2, np.float32)}}}
    for read in (lambda: place(broken, "float32", where="a.ckpt"), lambda: gather(broken, where="a.ckpt")):
        with pytest.raises(CheckpointError, match=r"^a.ckpt: unet/conv_in/bias has 1 values that are not finite"):
            read()


def test_what_float16_cannot_hold_is_named():
    with pytest.raises(CheckpointError, match=r"^a.ckpt: unet/x has values beyond float16's 65504"):
        place({"unet": {"x": np.full(3, 1e6, np.float32)}}, "float16", where="a.ckpt")


def test_after_a_failure_nothing_more_is_read():
    begun = []

    def tensor(number):
        def read():
            begun.append(number)
            time.sleep(0.01)
            return np.full(2, np.nan, np.float32)

        return Tensor((2,), np.dtype(np.float32), read)

    with pytest.raises(CheckpointError):
        place({f"{number:03}": tensor(number) for number in range(100)}, None)
    assert len(begun) < 50


# On a mesh of eight simulated devices

SHARDED = """
import json, pathlib, sys
import jax, numpy as np
from sd_jax import sharding
from sd_jax.checkpoints.place import place
from sd_jax.checkpoints.read_safetensors import open_file

def most() -> int:  # bytes; unlike getrusage it knows nothing of the parent's peak
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
tensors = {name: tensor.transpose(1, 0) for name, tensor in open_file(sys.argv[1]).tensors.items()}
shardings = sharding.state_shardings(tensors, mesh)
small = {"small": tensors.pop("small")}
place(small, "float32", {"small": shardings.pop("small")})  # what JAX itself needs
before = most()
placed = place(tensors, "float32", shardings)
print(json.dumps({
    "peak": most() - before,
    "right": all(np.array_equal(np.asarray(placed[name]), np.asarray(tensors[name])) for name in tensors),
    "as asked": all(placed[name].sharding == shardings[name] for name in tensors),
    "shards": sorted({tuple(shard.data.shape) for array in placed.values() for shard in array.addressable_shards}),
    "devices": len(jax.devices()),
}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
def test_sharded_loading_keeps_slices_only(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"{i}": rng.standard_normal((2048, 2048), np.float32) for i in range(6)}  # 16.8 MB each
    write(tmp_path / "a.safetensors", {**tensors, "small": np.ones((128, 128), np.float32)})
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": with_devices(8),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["devices"] == 8 and said["right"] and said["as asked"]
    assert said["shards"] == [[1024, 1024]]  # a quarter on each; the two of `data` hold the same
    nbytes = sum(array.nbytes for array in tensors.values())
    assert said["peak"] < 2 * nbytes + 2 * 2**24 + 25e6  # two copies over all devices, two tensors in hand
