"""The same losses on one device and on several, whatever the mesh, in one process or in two that are joined by Gloo;
and checkpoints that each goes on from."""

import shutil
import signal
import time

import pytest

from tests.training import doors, processes

FLAGS = (
    "--config.data.num_examples=200",
    "--config.data.held_out=32",
    "--config.data.num_workers=0",
    "--config.batch_size=32",
)
STEPS = ("--config.total_steps=12", "--config.checkpoint_steps=4", "--config.eval_steps=6", "--config.sample_steps=0")
LOST_WITHIN = 60  # seconds in which a process must notice that another one is gone


def command(workdir, *flags, config=doors.TINY):
    return doors.command("train.py", *config, f"--workdir={workdir}", *FLAGS, *STEPS, *flags)


def run(workdir, num_processes, devices_each, *flags, **kwargs):
    done = processes.finish(processes.start(command(workdir, *flags, **kwargs), num_processes, devices_each))
    for code, _, err in done:
        assert code == 0, err[-3000:]
    return doors.losses(workdir)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone")
    run(workdir, 1, 1)
    return workdir


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The workdir of two processes with two devices each."""
    workdir = tmp_path_factory.mktemp("together")
    run(workdir, 2, 2, "--config.mesh.data=2", "--config.mesh.fsdp=2")
    return workdir


def differences(one, other):
    assert one.keys() == other.keys() and len(one) == 12
    return max(abs(one[step] - other[step]) for step in one)


def test_data_and_fsdp_give_the_losses_of_one_process(alone, together):
    assert differences(doors.losses(alone), doors.losses(together)) < 1e-5
    held_out = [{row["step"]: row.get("held_out_loss") for row in doors.rows(workdir)} for workdir in (alone, together)]
    assert held_out[0][6] == pytest.approx(held_out[1][6], abs=1e-5)


@pytest.mark.parametrize(
    ("devices", "flags"),
    [
        (2, ("--config.mesh.fsdp=2", "--config.grad_accumulation=2")),
        (2, ("--config.parallelism=pmap",)),
        pytest.param(8, ("--config.parallelism=pmap",), marks=pytest.mark.slow),
        pytest.param(8, ("--config.mesh.data=8",), marks=pytest.mark.slow),
        pytest.param(1, ("--config.grad_accumulation=4",), marks=pytest.mark.slow),
    ],
    ids=["fsdp=2,accumulated", "pmap=2", "pmap=8", "data=8", "accumulated"],
)
def test_many_devices_and_micro_batches_give_the_losses_of_one(alone, tmp_path, devices, flags):
    nothing_else = "--config.eval_steps=0", "--config.checkpoint_steps=0"
    assert differences(doors.losses(alone), run(tmp_path, 1, devices, *flags, *nothing_else)) < 1e-5


@pytest.mark.slow  # `together` is divided by data, too
def test_four_way_data_gives_the_losses_of_one_process(alone, tmp_path):
    assert differences(doors.losses(alone), run(tmp_path, 2, 2, "--config.mesh.data=4")) < 1e-5


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_what_two_processes_saved_one_goes_on_from(alone, together, tmp_path, devices):
    shutil.copytree(together, tmp_path / "run")
    for step in (8, 12):  # as if it had ended at step 4
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    mesh = ("--config.mesh.fsdp=2",) if devices == 4 else ()
    assert differences(doors.losses(alone), run(tmp_path / "run", 1, devices, *mesh)) < 1e-5


@pytest.mark.slow
def test_a_lost_process_ends_the_other_and_the_restart_goes_on_to_the_bit(together, tmp_path):
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=2")
    started = processes.start(command(tmp_path, *mesh), 2, 2)
    wait_for(started, lambda: len(doors.rows(tmp_path)) >= 5)
    started[1].send_signal(signal.SIGKILL)
    lost = time.monotonic()
    _, err = started[0].communicate(timeout=LOST_WITHIN)
    assert time.monotonic() - lost < LOST_WITHIN
    assert started[0].returncode not in (0, None)
    assert "is gone" in err and "same command" in err
    processes.stop(started)
    assert run(tmp_path, 2, 2, *mesh) == doors.losses(together)


@pytest.mark.slow
def test_sigterm_to_one_of_them_saves_and_ends_both(together, tmp_path):
    from sd_jax.training.preemption import EXIT_CODE

    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=2")
    started = processes.start(command(tmp_path, *mesh), 2, 2)
    wait_for(started, lambda: len(doors.rows(tmp_path)) >= 2)
    started[1].send_signal(signal.SIGTERM)
    assert [code for code, _, _ in processes.finish(started, timeout=90)] == [EXIT_CODE, EXIT_CODE]
    reached = max(row["step"] for row in doors.rows(tmp_path))
    assert (tmp_path / "checkpoints" / str(reached)).is_dir()
    assert run(tmp_path, 2, 2, *mesh) == doors.losses(together)


def wait_for(started, there, seconds=120):
    """Until `there()`; a process that ends before is a failure, and its last words are shown."""
    end = time.monotonic() + seconds
    while not there():
        dead = [process for process in started if process.poll() is not None]
        if dead or time.monotonic() > end:
            for process in started:
                process.kill()
            said = [process.communicate()[1][-3000:] for process in started]
            raise AssertionError("\n".join(said))
        time.sleep(0.02)
