"""Training states in and out of Orbax: bits, which ones are kept, failures, and parameters alone."""

import collections
import gc
import logging
import os
import socket
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sd_jax.checkpoints import CheckpointError, native
from sd_jax.checkpoints.native import Checkpoints, read_params
from tests.checkpoints.test_save import files_of_at_most
from tests.checkpoints.tiny import SPEC, assert_same
from tests.environment import with_devices


def make_state(seed=0.0, size=4):
    params = {
        "unet": {
            "conv_in": {"kernel": jnp.arange(2.0 * size).reshape(2, size) + seed, "bias": jnp.ones(3, jnp.bfloat16)}
        },
        "vae": {"quant_conv": {"bias": jnp.arange(3.0)}},
    }
    average = lambda factor: {"unet": jax.tree.map(lambda p: p * jnp.asarray(factor, p.dtype), params["unet"])}  # noqa: E731
    return {
        "step": jnp.asarray(7, jnp.int32),
        "params": params,
        "ema": average(2),
        "averages": {"0.999": average(3), "0.99": average(4)},
        "opt_state": optax.adamw(1e-3).init(params["unet"]),
    }


def abstract(state):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def assert_states_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("data_state", [{"images": 5, "num_records": 9}, None])
def test_there_and_back(tmp_path, data_state):
    state, meta = make_state(), {"spec": SPEC.to_dict(), "tokenizer": "tokenizer"}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest_step() is None
    assert checkpoints.save(7, state, data_state, meta)
    checkpoints.close()

    checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
    assert checkpoints.latest_step() == 7
    got, data = checkpoints.restore(like=abstract(state))
    assert_states_equal(got, state)
    assert data == data_state
    assert checkpoints.meta()["step"] == 7 and checkpoints.meta()["spec"]["unet"]["sample_size"] == 8
    assert not checkpoints.save(7, make_state(1.0))  # already there
    assert_states_equal(checkpoints.restore(7, like=abstract(state))[0], state)
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "7").iterdir() if p.is_dir()) == ["data", "meta", "state"]


def test_last_and_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, best="held_out_loss")
    losses = [3.0, 1.0, None, float("nan"), 2.0, None]
    for step, loss in enumerate(losses, 1):
        metrics = {} if loss is None else {"held_out_loss": loss, "other": 0.0}
        checkpoints.save(step, make_state(step), metrics=metrics)
    checkpoints.wait()
    assert checkpoints.all_steps() == [2, 5, 6] and checkpoints.best_step() == 2
    checkpoints.close()

    checkpoints = Checkpoints(tmp_path, keep=2, best="held_out_loss")  # it remembers over a restart
    checkpoints.save(7, make_state(), metrics={"held_out_loss": 4.0})
    checkpoints.save(8, make_state(), metrics={"held_out_loss": 3.0})
    checkpoints.wait()
    assert checkpoints.all_steps() == [2, 7, 8] and checkpoints.best_step() == 2
    checkpoints.save(9, make_state(), metrics={"held_out_loss": 0.5})
    checkpoints.close()
    assert checkpoints.all_steps() == [8, 9] and checkpoints.best_step() == 9


def test_only_the_last_are_kept_without_a_metric(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (10, 9, 30):
        checkpoints.save(step, make_state(step), metrics={"loss": step})
    checkpoints.close()
    assert checkpoints.all_steps() == [30] and checkpoints.best_step() is None


def test_donated_buffers_do_not_reach_the_disk(tmp_path):
    """The step that follows a save overwrites the state in place while it is still being written."""
    state = {"params": {"a": jnp.zeros((1024, 1024))}}
    step = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep=9)
    for at in range(3):
        checkpoints.save(at, state)
        for _ in range(5):
            state = step(state)
    checkpoints.wait()
    for at in range(3):
        got = checkpoints.restore(at, like=abstract(state))[0]
        assert (got["params"]["a"] == 5.0 * at).all()
    checkpoints.close()


# Parameters alone


@pytest.mark.parametrize(("weights", "factor"), [("ema", 2), ("raw", 1), ("ema:0.999", 3), ("ema:0.99", 4)])
def test_parameters_alone(tmp_path, weights, factor):
    state = make_state()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, meta={"spec": SPEC.to_dict()})
    checkpoints.save(4, make_state(1.0))
    checkpoints.close()
    params, meta, step, used = read_params(tmp_path, 3, weights)
    assert (step, used, meta["step"]) == (3, weights, 3)
    want = jax.tree.map(lambda p: p * jnp.asarray(factor, p.dtype), state["params"]["unet"])
    assert_same(params, {"unet": want, "vae": state["params"]["vae"]})  # the VAE has no average
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))

    half = read_params(tmp_path, None, weights, np.dtype(np.float16), without=("vae",))[0]
    assert list(half) == ["unet"] and half["unet"]["conv_in"]["kernel"].dtype == np.float16
    np.testing.assert_array_equal(half["unet"]["conv_in"]["kernel"], factor * (np.arange(8).reshape(2, 4) + 1))


def test_an_average_that_is_not_there(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state())
    checkpoints.close()
    for name in ("ema:0.9", "ema:", "ema:0.99.unet"):
        with pytest.raises(CheckpointError) as error:
            read_params(tmp_path, weights=name)
        assert str(error.value) == (
            f"{tmp_path}/1: no average weights={name!r} is in it, only raw, ema, ema:0.99, ema:0.999"
        )


def test_parameters_are_read_while_a_run_writes(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state())
    checkpoints.wait()
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert read_params(tmp_path)[2] == 1
    assert (tmp_path / "2.orbax-checkpoint-tmp").is_dir()
    checkpoints.close()


# What goes wrong


def test_states_of_another_config(tmp_path):
    state = make_state()
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(FileNotFoundError, match="no finished checkpoint is in"):
        checkpoints.restore(like=abstract(state))
    checkpoints.save(1, state)
    checkpoints.wait()
    other = make_state(size=5)
    del other["ema"]
    other["more"] = jnp.zeros(3)
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(like=abstract(other))
    said = str(error.value)
    assert said.startswith(f"{tmp_path}/1: not the state of this config") and "\n" not in said
    assert "more is missing" in said and "ema/unet/conv_in/bias is unexpected" in said
    assert "params/unet/conv_in/kernel is (2, 4) of float32, not (2, 5) of float32" in said
    assert "opt_state/0/mu/conv_in/kernel" in said
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 5 .* only 1"):
        checkpoints.restore(5, like=abstract(state))
    checkpoints.close()


def test_a_damaged_step_is_named(tmp_path):
    state = make_state()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    checkpoints.wait()
    (tmp_path / "1" / "meta" / "metadata").write_text("{")
    for use in (checkpoints.meta, lambda: read_params(tmp_path)):
        with pytest.raises(CheckpointError, match=f"^{tmp_path}/1: cannot be read .* remove it to go on"):
            use()
    (tmp_path / "1" / "state" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/1: cannot be read"):
        checkpoints.restore(1, like=abstract(state))
    checkpoints.close()


@pytest.mark.parametrize("call", ["wait", "save", "close"])
def test_a_save_that_fails_raises_once_and_leaves_nothing(tmp_path, caplog, call):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state())
    checkpoints.wait()
    noise = {"params": {str(i): jnp.asarray(np.random.default_rng(i).random(30_000)) for i in range(4)}}
    if call == "wait":  # NumPy arrays are written by another part of Orbax
        noise = jax.tree.map(np.asarray, noise)
    with files_of_at_most(50_000), caplog.at_level(logging.WARNING), pytest.raises(OSError) as error:
        checkpoints.save(2, noise)
        {"wait": checkpoints.wait, "save": lambda: checkpoints.save(3, noise), "close": checkpoints.close}[call]()
    assert error.value.filename == str(tmp_path) and "\n" not in str(error.value)
    assert "the checkpoint of step 2 was not written: " in str(error.value)
    assert "the last good one is of step 1" in str(error.value)
    gc.collect()  # tasks that nobody waited for speak up when they go
    assert not caplog.records  # the error says it all
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    if call == "wait":  # with room again, the run could go on
        checkpoints.save(3, noise)
        checkpoints.close()
        assert checkpoints.all_steps() == [1, 3]


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    usage = collections.namedtuple("usage", "free")(free=50)
    monkeypatch.setattr(native.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="step 2 was not written: the disk is full .* there is none before it") as error:
        checkpoints.save(2, make_state())
    assert error.value.filename == str(tmp_path) and not list(tmp_path.iterdir())
    monkeypatch.undo()
    checkpoints.save(2, make_state())
    checkpoints.close()


def test_what_a_killed_run_left_is_cleared_at_the_next_start(tmp_path):
    Checkpoints(tmp_path).close()
    (tmp_path / "5.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.all_steps() == [] and not list(tmp_path.iterdir())
    checkpoints.close()


def test_a_step_half_removed_is_no_step(tmp_path):
    """Steps that are not kept are moved away whole before they are removed."""
    (tmp_path / "1" / "state").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        read_params(tmp_path)
    (tmp_path / ".removed" / "0").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (2, 3):
        checkpoints.save(step, make_state())
    checkpoints.wait()
    assert checkpoints.all_steps() == [3] and not (tmp_path / ".removed").exists()
    checkpoints.close()


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="no checkpoints can be kept here"):
        Checkpoints(tmp_path / "file" / "checkpoints")


# Several processes and devices


_ON_DEVICES = """
    import sys, jax, jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from sd_jax.checkpoints.native import Checkpoints
    directory, processes, process, port = sys.argv[1], *map(int, sys.argv[2:])
    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    mesh = Mesh(jax.devices(), ("fsdp",))
    where, everywhere = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    checkpoints = Checkpoints(directory)
    make = jax.jit(lambda add: (jnp.arange(64.0).reshape(8, 8) + add, add), out_shardings=(where, everywhere))
    if checkpoints.latest_step() is None:
        for step in (1, 2, 3):
            a, b = make(jnp.float32(step))
            checkpoints.save(step, {"params": {"a": a, "b": b}}, {"images": step, "num_records": 9})
        checkpoints.wait()
    else:
        shape = lambda like, where: jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=where)
        a, b = make(jnp.float32(0))
        got, data = checkpoints.restore(like={"params": {"a": shape(a, where), "b": shape(b, everywhere)}})
        got, step = got["params"], data["images"]
        want = make(jnp.float32(step))[0]
        assert jax.jit(lambda x, y: (x == y).all())(got["a"], want) and float(got["b"].addressable_data(0)) == step
        assert got["a"].sharding == where
        print("RESTORED", step, len(jax.devices()), checkpoints.all_steps())
    checkpoints.close()
"""


def on_devices(directory, processes, devices):
    """Runs it in so many processes of so many devices each; -> what each printed of its restoring."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "XLA_FLAGS": with_devices(devices)}
    flags = [[str(directory), str(processes), str(i), str(port)] for i in range(processes)]
    script = textwrap.dedent(_ON_DEVICES)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", script, *f], env=env, **pipes) for f in flags]
    ended = [process.communicate(timeout=120) for process in started]
    for process, (_, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [out.split("RESTORED ")[-1].strip() for out, _ in ended]


def test_other_processes_and_devices_go_on(tmp_path):
    """Written by two processes of two devices; read by one and by two, past a damaged one, on other devices."""
    on_devices(tmp_path, processes=2, devices=2)
    assert on_devices(tmp_path, processes=1, devices=2) == ["3 2 [1, 2, 3]"]
    damaged = next(path for path in (tmp_path / "3" / "state").glob("ocdbt.process_1/d/*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert on_devices(tmp_path, processes=2, devices=1) == ["2 2 [1, 2]"] * 2
    assert (tmp_path / "3.damaged").is_dir()
    assert on_devices(tmp_path, processes=1, devices=4) == ["2 4 [1, 2]"]


def test_saving_does_not_wait_for_the_disk(tmp_path):
    """The call returns once the state is copied; what it costs is Orbax's start of a save."""
    checkpoints = Checkpoints(tmp_path)
    state = {"params": {"a": jnp.asarray(np.random.default_rng(0).random((2048, 2048), np.float32))}}
    started = time.perf_counter()
    checkpoints.save(1, state)
    returned = time.perf_counter() - started
    checkpoints.wait()
    assert returned < 5  # a bound that no busy machine breaks: it must only not hang
    checkpoints.close()
