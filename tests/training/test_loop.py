"""Whole runs: the files they leave, resuming, bad commands."""

import json

import pytest

from tests.training import doors

SHORT = ("--config.data.num_examples=200", "--config.data.num_workers=0", "--config.log_steps=5")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """20 steps of the tiny autoencoder in one go."""
    workdir = tmp_path_factory.mktemp("run")
    steps = ("--config.total_steps=20", "--config.checkpoint_steps=5", "--config.eval_steps=10")
    doors.run("train.py", *doors.TINY, f"--workdir={workdir}", *SHORT, *steps)
    return workdir


def test_a_run_leaves_its_files(uninterrupted):
    assert {"config.json", "log.txt", "metrics.jsonl", "summary.json", "tensorboard", "checkpoints", "samples"} <= {
        path.name for path in uninterrupted.iterdir()
    }
    rows = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert {"step", "loss", "learning_rate", "images_per_second", "grad_norm"} <= set(rows[0])
    assert [row["step"] for row in rows if "held_out_loss" in row] == [10, 20]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert json.loads((uninterrupted / "config.json").read_text())["total_steps"] == 20


def test_resuming_a_finished_run_changes_nothing(uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    flags = ("--config.total_steps=20", "--config.checkpoint_steps=5", "--config.eval_steps=10")
    done = doors.run("train.py", *doors.TINY, f"--workdir={uninterrupted}", *SHORT, *flags)
    assert "nothing left to train" in done.stderr + done.stdout
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_dry_run_tells_and_trains_nothing(tmp_path):
    done = doors.run("train.py", *doors.TINY, f"--workdir={tmp_path / 'none'}", "--dry_run")
    assert '"method": "autoencoder"' in done.stdout
    assert "vae: " in done.stdout and "parameters, trained" in done.stdout and "bytes" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("dry run: autoencoder for 2 steps")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.total_stepps=3"], "total_stepps"),
        (["--config.data.path=no/such/folder"], "no/such/folder"),
        (["--config.init=no/such/file.safetensors"], "no/such/file.safetensors"),
        (["--config.method=dreamboot"], "dreamboot"),
        (["--config.mesh.data=3"], "config.mesh"),
        (["--config.parallelism=threads"], "parallelism"),
        (["--config.batch_size=7", "--config.grad_accumulation=2"], "batch_size=7"),
    ],
)
def test_a_mistake_gives_one_clear_error(tmp_path, flags, words):
    done = doors.run("train.py", *doors.TINY, f"--workdir={tmp_path}", *SHORT, *flags, check=False)
    assert done.returncode != 0
    assert words in done.stderr.strip().splitlines()[-1] or words in done.stderr
    if "total_stepps" not in words:
        assert "Traceback" not in done.stderr


def test_a_checkpoint_of_another_architecture_is_refused(uninterrupted, tmp_path):
    flags = [f"--config.init={uninterrupted}", "--config.model.vae.latent_channels=8"]
    done = doors.run("train.py", *doors.TINY, f"--workdir={tmp_path}", *SHORT, *flags, check=False)
    assert done.returncode != 0 and "latent_channels" in done.stderr and "Traceback" not in done.stderr
