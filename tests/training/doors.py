"""Runs train.py and sample.py as a user does, in processes of their own."""

import os
import pathlib
import subprocess
import sys

from tests.environment import with_devices

ROOT = pathlib.Path(__file__).parents[2]
# The tiny autoencoder of shapes world, but of two levels and by AdamW, which compile in half of the time
TINY = (
    *("--config=configs/demo.py:runlocal", "--config.model.vae.block_out_channels=(8, 16)"),
    *("--config.optimizer.name=adamw", "--config.optimizer.learning_rate=1e-3"),
)


def command(door: str, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / door), *flags]


def environment(devices: int = 1) -> dict[str, str]:
    return {**os.environ, "XLA_FLAGS": with_devices(devices), "PYTHONPATH": str(ROOT)}


def run(door: str, *flags: str, devices: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(door, *flags), env=environment(devices), cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    if check and done.returncode:
        raise AssertionError(f"{door} {' '.join(flags)} failed:\n{done.stderr[-3000:]}")
    return done


def rows(workdir: pathlib.Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; none where it has not begun."""
    from sd_jax.training.metrics import read_rows

    return read_rows(workdir) if (workdir / "metrics.jsonl").exists() else []


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """{step: loss} of a run; fails where a step was written twice."""
    found = rows(workdir)
    assert len({row["step"] for row in found}) == len(found)
    return {row["step"]: row["loss"] for row in found}
