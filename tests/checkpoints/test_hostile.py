"""The corpus of `hostile.py` through `read` and `scan`: nothing runs or hangs, memory is bounded, one line is said.

All files go through one process of their own, so that its memory can be measured and what runs in it leaves no harm.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sd_jax.checkpoints.pickle_machine import MOST_BYTES
from tests.checkpoints import hostile

ROOT = Path(__file__).resolve().parents[2]
MOST_SECONDS = 8  # of one processor; each takes under 3
MOST_MEMORY = 512  # MiB, as the docstrings say
TRAP = f"open({str(hostile.CANARIES / 'imported')!r}, 'w').close()\ndef run(*_): return 1\nclass Victim: pass\n"

READER = """
import json, pathlib, re, sys, time, traceback
from sd_jax.checkpoints import CheckpointError, files, scan

def peak():  # of this process, in MiB; getrusage would count what the parent had when it forked
    if sys.platform != "linux":
        return 0
    return int(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) >> 10

known, before = set(sys.modules), peak()
for name in sys.stdin.read().split():
    row, started = {"name": name, "scanned": None}, time.process_time()
    try:
        arrays = files.read(name)
        row |= {"error": "", "said": f"read {list(arrays)}"}
    except BaseException as error:
        row |= {"error": type(error).__name__, "said": str(error)}
    row["seconds"] = time.process_time() - started
    try:
        wanted, error = scan.scan(name) if pathlib.Path(name).stat().st_size < 500_000 else ([], None)
        row["scanned"] = [str(found) for found in wanted] + ([str(error)] if error else [])
    except BaseException as error:
        row["scanned"] = traceback.format_exc()
    row |= {"memory": peak() - before, "modules": sorted(set(sys.modules) - known)}
    print(json.dumps(row), flush=True)
"""


def run(folder, code, text=""):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, input=text, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    (folder / hostile.CANARIES).mkdir()
    (folder / f"{hostile.TRAP}.py").write_text(TRAP)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    for name, (write, _) in hostile.CASES.items():
        write(folder / name)
    done = run(folder, READER, "\n".join(hostile.CASES))
    assert done.returncode == 0, done.stderr[-2000:]
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", hostile.CASES)
def test_one_line_names_the_file_and_the_fault(results, name):
    row = results[name]
    assert row["error"] == "CheckpointError", row
    assert row["said"].startswith(f"{name}: ") and hostile.CASES[name][1] in row["said"]
    assert len(row["said"].splitlines()) == 1 and len(row["said"]) < 1000
    assert row["seconds"] < MOST_SECONDS
    assert type(row["scanned"]) is list, row["scanned"]


def test_nothing_was_run(folder, results):
    assert list((folder / hostile.CANARIES).iterdir()) == []
    gained = {module for row in results.values() for module in row["modules"]}
    assert gained <= {"encodings.cp437"}  # of the names of a zip's members


def test_canaries_would_have_sung(folder, tmp_path):
    """pickle itself, in a process of its own, runs what the corpus holds."""
    (tmp_path / hostile.CANARIES).mkdir()
    (tmp_path / f"{hostile.TRAP}.py").write_text(TRAP)
    bodies = [hostile.SYSTEM, hostile.call("builtins", "eval", hostile.CODE), hostile.imported(hostile.TRAP, "run")]
    for number, body in enumerate(bodies):
        (tmp_path / f"{number}.pkl").write_bytes(hostile.pickled(body))
    done = run(tmp_path, "import pickle\nfor i in range(3): pickle.load(open(f'{i}.pkl', 'rb'))")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / hostile.CANARIES).iterdir()} == {"command", "code", "imported"}


def test_memory_stays_under_the_stated_bound(results):
    assert len(hostile.CASES) >= 30 and MOST_BYTES == 32 << 20
    assert max(row["memory"] for row in results.values()) < MOST_MEMORY


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("os_system_zip.ckpt", "os.system"),
        ("os_system_legacy.ckpt", "os.system"),
        ("eval_legacy.ckpt", "builtins.eval"),
        ("nested_reducers_zip.ckpt", "importlib.import_module"),
        ("stack_global.ckpt", "posix.system"),
        ("inst.ckpt", "os.system"),
        ("last_pickle_of_legacy.ckpt", f"{hostile.TRAP}.run"),
        ("first_pickle.ckpt", "os.system"),
        ("plain_pickle_of_protocol_0.pt", "os.system"),
        ("extension.ckpt", "copyreg.extension 1"),
        ("persistent_call.ckpt", "os.system"),
        ("storage_of_a_hostile_type.ckpt", "os.system"),
    ],
)
def test_scan_sees_what_they_wanted(results, name, wanted):
    assert wanted in results[name]["scanned"]
