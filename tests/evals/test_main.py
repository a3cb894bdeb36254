"""The command `python -m sd_jax.evals`; what it judges is in test_judging.py."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def judge(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sd_jax.evals", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_the_whole_way(files, tmp_path):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "summary.json").write_text('{"seconds": 7.0}')
    flags = [f"--checkpoint={files}/model", f"--out={tmp_path}/out", f"--stages={tmp_path}/stage", "--card=apache-2.0"]
    flags += [
        "--one_object=2",
        "--two_objects=1",
        "--batch_size=3",
        "--steps=1",
        "--shown=2",
        "--guidance_scales=1,2.5",
    ]
    done = judge(*flags)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *("report.json", "samples.png", "sweep.json", "sweep.png", "README.md")
    }
    assert json.loads((out / "report.json").read_text()) == report
    assert set(report["accuracy"]) == {"seen", "held_out"} and report["pictures"] == {"one_object": 2, "two_objects": 1}
    assert report["recipe"]["guidance_scale"] == 2.5 and report["seconds"]["stage"] == 7.0
    sweep = json.loads((out / "sweep.json").read_text())
    assert [point["guidance_scale"] for point in sweep] == [1.0, 2.5]
    assert sweep[1]["shapes_seen"] == report["figures"]["shapes_seen"]
    assert "(sweep.png)" in (out / "README.md").read_text()


def test_what_is_missing_is_said_in_a_line(tmp_path):
    done = judge(f"--out={tmp_path}/out", "--metrics=fid")
    assert done.returncode == 1 and done.stderr.strip().count("\n") == 0
    assert done.stderr.startswith("error: --metrics=fid needs --inception=pt_inception-2015-12-05-6726825d.pth")
