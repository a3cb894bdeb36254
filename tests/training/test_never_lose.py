"""Whole runs that are killed, stopped and damaged: every one of them ends with the losses of an uninterrupted run."""

import random
import shutil
import signal
import subprocess
import time

import pytest

from sd_jax.training.preemption import EXIT_CODE
from tests.training import doors

FLAGS = (
    *doors.TINY,
    "--config.data.num_examples=200",
    "--config.data.num_workers=0",
    "--config.total_steps=20",
    "--config.checkpoint_steps=5",
    "--config.eval_steps=0",
    "--config.sample_steps=0",
    "--config.ema_decays=(0.99, 0.9)",
)
KILL, TERM = signal.SIGKILL, signal.SIGTERM


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    doors.run("train.py", *FLAGS, f"--workdir={workdir}")
    return workdir


def in_a_step(workdir, rows_before, rng):
    if len(doors.rows(workdir)) <= rows_before:
        return False
    time.sleep(rng.uniform(0, 0.3))
    return True


def while_writing(workdir, rows_before, rng):
    """A checkpoint is there in part, or has just become whole."""
    if not list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")):
        return False
    time.sleep(rng.uniform(0, 0.05))
    return True


def before_the_first_step(workdir, rows_before, rng):
    """While it compiles, or reads what it goes on from."""
    return (workdir / "log.txt").exists() and len(doors.rows(workdir)) <= rows_before


def struck(workdir, number, moment, rng):
    """Starts or resumes the run and sends it the signal at that moment. -> how it ended; 0: before the moment came."""
    (workdir / "log.txt").unlink(missing_ok=True)
    rows_before = len(doors.rows(workdir))
    process = subprocess.Popen(
        doors.command("train.py", *FLAGS, f"--workdir={workdir}"),
        env=doors.environment(),
        cwd=doors.ROOT,
        stderr=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None and not moment(workdir, rows_before, rng):
            time.sleep(0.001)
        process.send_signal(number)
        return process.wait(timeout=300)
    finally:
        process.kill()


@pytest.mark.parametrize(
    "strikes",
    [
        pytest.param([(KILL, while_writing), (TERM, in_a_step)], id="kill-term"),
        pytest.param([(KILL, in_a_step), (KILL, while_writing)] * 10, id="20 kills", marks=pytest.mark.slow),
        pytest.param(
            [(TERM, before_the_first_step), (TERM, in_a_step), (TERM, while_writing), (TERM, in_a_step)]
            + [(TERM, while_writing)],
            id="5 terms",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_struck_and_resumed_equals_uninterrupted_to_the_bit(uninterrupted, tmp_path, strikes):
    rng, workdir, left = random.Random(len(strikes)), tmp_path / "0", list(strikes)
    while left:
        number, moment = left[0]
        ended = struck(workdir, number, moment, rng)
        if ended == 0:  # it was done first: once more, from the start
            assert doors.losses(workdir) == doors.losses(uninterrupted)
            workdir = workdir.with_name(str(int(workdir.name) + 1))
            continue
        assert ended == (-KILL if number == KILL else EXIT_CODE)
        if number == TERM:
            assert_nothing_is_lost(workdir)
        left.pop(0)
    doors.run("train.py", *FLAGS, f"--workdir={workdir}")
    assert doors.losses(workdir) == doors.losses(uninterrupted)
    assert_same_files(workdir / "checkpoints" / "20", uninterrupted / "checkpoints" / "20")


def assert_nothing_is_lost(workdir):
    """The checkpoint is of the last step, or it had none."""
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    rows = doors.rows(workdir)
    assert max(steps, default=0) == (rows[-1]["step"] if rows else 0)


def assert_same_files(one, other):
    from sd_jax.checkpoints.native import read_params
    from tests.checkpoints.tiny import assert_same

    for weights in ("raw", "ema", "ema:0.9"):
        ours, theirs = (read_params(step.parent, int(step.name), weights) for step in (one, other))
        assert ours[3] == weights
        assert_same(ours[0], theirs[0])


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(uninterrupted, tmp_path):
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    newest = workdir / "checkpoints" / "20"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    doors.run("train.py", *FLAGS, f"--workdir={workdir}")
    assert doors.losses(workdir) == doors.losses(uninterrupted)
    assert_same_files(newest, uninterrupted / "checkpoints" / "20")
    log = (workdir / "log.txt").read_text()
    assert "the checkpoint of step 20 is damaged" in log and "going on from step 15" in log
    assert "resumed at step 15 of 20" in log and newest.with_name("20.damaged").is_dir()
