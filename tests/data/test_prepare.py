"""The command `python -m sd_jax.data.prepare`."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + 10 * i, 40, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"picture {i}")
    return root


def prepare(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sd_jax.data.prepare", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_whole_way(pictures, tmp_path):
    out = tmp_path / "out"
    # With processes, which start this module again
    common = (
        f"--data={pictures}",
        f"--out={out}",
        "--shard_size=4",
        "--workers=1",
        "--filters=resolution=32,blockiness",
    )
    done = prepare(*common, "--resolution=64", "--bucket_step=16", "--rank=sharpness")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["records"] == 6 and report["filters"]["resolution"]["dropped"] == 2
    assert report["kept"] == report["filters"]["blockiness"]["kept"] - report["filters"]["resolution"]["dropped_first"]
    assert {"00000.tar", "00001.tar", "report.json", "sheet.png"} <= {path.name for path in out.iterdir()}
    again = prepare(*common)
    assert again.returncode == 1 and again.stderr.startswith("error: ") and "other settings: sizes" in again.stderr


def test_what_is_wrong_is_said_in_a_line(tmp_path):
    done = prepare(f"--data={tmp_path}/none", f"--out={tmp_path}/out", "--filters=beauty")
    assert done.returncode == 1 and done.stderr.strip().count("\n") == 0 and "unknown filter beauty" in done.stderr
