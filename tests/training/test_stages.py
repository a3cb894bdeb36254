import json
import threading

import numpy as np
import pytest

from sd_jax.training import stages as stages_module
from sd_jax.training.stages import Stages, Throughput


class Clock:
    """Both clocks of a run: they move when they are told to."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now

    def spend(self, stages, seconds, name=None):
        if name is None:
            self.now += seconds
            return
        with stages(name):
            self.now += seconds


# --- Stages ----------------------------------------------------------------------------------------------------------


def test_inner_stage_pauses_the_outer_one():
    clock = Clock()
    stages = Stages(clock)
    clock.now += 1
    with stages("data"):
        clock.now += 2
        with stages("checkpoint"):
            clock.now += 10
            assert stages.current() == ("checkpoint", 10)
        clock.now += 4
        assert stages.current() == ("data", 6)
    clock.now += 0.5
    assert stages.current() == ("other", 0.5)  # anew: nothing between stages lasts
    assert stages.seconds == {"other": 1.5, "data": 6, "checkpoint": 10}
    assert sum(stages.seconds.values()) == clock.now - 1000


def test_stage_that_runs_is_in_the_sums_and_one_that_fails_ends():
    clock = Clock()
    stages = Stages(clock)
    with pytest.raises(OSError), stages("data"), stages("data"):
        clock.now += 3
        assert stages.seconds["data"] == 3
        raise OSError
    clock.now += 1
    assert stages.current() == ("other", 1)
    assert stages.seconds == {"other": 1, "data": 3}


def test_another_thread_sees_what_runs():
    stages, inside, seen, done = Stages(), threading.Event(), [], threading.Event()

    def look():
        inside.wait(10)
        seen.append(stages.current())
        done.set()

    watcher = threading.Thread(target=look)
    watcher.start()
    with stages("device"):
        inside.set()
        assert done.wait(10)
    watcher.join()
    assert seen[0][0] == "device" and 0 <= seen[0][1] < 10


# --- Throughput ------------------------------------------------------------------------------------------------------


def _start(clock, path, first_step=0, **kwargs):
    """A process that spends two seconds before its first step."""
    began, stages = clock.now, Stages(clock)
    clock.spend(stages, 2.0, "initialise")
    told = {"batch_size": 8, "flops_per_image": 1e12, "peak": 200e12, "num_devices": 4, **kwargs}
    return stages, Throughput(stages, path=path, started=began, first_step=first_step, clock=clock, **told)


def _step(clock, stages, throughput, seconds=1.0):
    clock.spend(stages, 0.25 * seconds, "data")
    clock.spend(stages, 0.75 * seconds, "device")
    return throughput.row()


def test_rate_leaves_pauses_and_the_first_step_out(tmp_path):
    clock = Clock()
    stages, throughput = _start(clock, tmp_path / "summary.json")
    first = _step(clock, stages, throughput, 20.0)
    assert first["images_per_second"] == 8 / 20
    row = _step(clock, stages, throughput)
    assert row["images_per_second"] == 8
    assert row["tflops_per_device"] == 2  # 8 images x 1 TFLOP over 4 devices in a second
    assert row["mfu"] == 2 / 200
    assert row["seconds_data"] == 0.25 and row["seconds_device"] == 0.75 and "seconds_initialise" not in row
    clock.spend(stages, 100.0, "checkpoint")
    row = _step(clock, stages, throughput)
    assert row["images_per_second"] == 8 and row["seconds_checkpoint"] == 100
    for _ in range(50):
        row = _step(clock, stages, throughput, 2.0)
    assert row["images_per_second"] == pytest.approx(4, rel=0.01)  # it follows what is recent


@pytest.mark.parametrize(
    ("told", "missing"), [({"peak": None}, {"mfu"}), ({"flops_per_image": None}, {"mfu", "tflops_per_device"})]
)
def test_what_is_not_known_is_not_in_the_row(tmp_path, told, missing):
    clock = Clock()
    whole = _step(clock, *_start(clock, tmp_path / "a.json"))
    part = _step(clock, *_start(clock, tmp_path / "b.json", **told))
    assert set(whole) - set(part) == missing


def test_goodput_is_the_share_of_steps_that_count(tmp_path):
    path, clock = tmp_path / "summary.json", Clock()
    stages, throughput = _start(clock, path)
    for _ in range(10):
        _step(clock, stages, throughput)
    clock.spend(stages, 8.0, "evaluation")
    said = throughput.saved(10)
    assert said == json.loads(path.read_text())
    assert said["step"] == 10 and said["seconds"] == 20 and said["goodput"] == 0.5
    assert said["seconds_by_stage"] == {"initialise": 2, "data": 2.5, "device": 7.5, "evaluation": 8, "other": 0}


def test_steps_after_the_last_checkpoint_are_lost_with_the_process(tmp_path):
    path, clock = tmp_path / "summary.json", Clock()
    stages, throughput = _start(clock, path)
    for _ in range(10):
        _step(clock, stages, throughput)
    throughput.saved(10)
    for _ in range(6):
        _step(clock, stages, throughput)
    clock.now += 10  # killed, and started again
    stages, throughput = _start(clock, path, first_step=10)
    for _ in range(10):
        _step(clock, stages, throughput)
    said = throughput.saved(20)
    assert said["goodput"] == 20 / (2 + 16 + 10 + 2 + 10)
    assert said["seconds"] == 12 + 12  # what the first process did after its checkpoint is not known


def test_process_killed_before_its_first_checkpoint_has_begun_the_run(tmp_path):
    path, clock = tmp_path / "summary.json", Clock()
    _start(clock, path)
    clock.now += 88
    stages, throughput = _start(clock, path)
    for _ in range(8):
        _step(clock, stages, throughput)
    assert throughput.saved(8)["goodput"] == 8 / (2 + 88 + 2 + 8)


@pytest.mark.parametrize("where", ["restart", "same process"])
def test_steps_done_again_count_once(tmp_path, where):
    path, clock = tmp_path / "summary.json", Clock()
    stages, throughput = _start(clock, path)
    for _ in range(10):
        _step(clock, stages, throughput)
    throughput.saved(10)
    clock.spend(stages, 8.0, "restore")
    if where == "restart":  # the checkpoint of step 10 was damaged, and so it goes on from 5
        stages, throughput = _start(clock, path, first_step=5)
    for _ in range(5):
        _step(clock, stages, throughput)
    assert throughput.saved(10)["goodput"] == pytest.approx(10 / (clock.now - 1000), abs=1e-4)


def test_summary_cut_off_by_a_full_disk_starts_anew(tmp_path):
    path, clock = tmp_path / "summary.json", Clock()
    path.write_text('{"step": 10, "sec')
    stages, throughput = _start(clock, path, first_step=10)
    _step(clock, stages, throughput)
    assert throughput.saved(11)["goodput"] == pytest.approx(1 / 3, abs=1e-3)


@pytest.mark.skipif(not stages_module.pathlib.Path("/proc/self/statm").exists(), reason="only Linux tells")
def test_summary_tells_the_memory_of_the_steps(tmp_path):
    ballast = np.ones(2**27, np.uint8)  # of what came before: not of the steps
    del ballast
    clock = Clock()
    stages, throughput = _start(clock, tmp_path / "summary.json")
    before = throughput.saved(0)
    held = np.ones(2**26, np.uint8)
    after = throughput.saved(1)
    assert after["rss_before_first_step"] == before["rss_before_first_step"] > 2**26
    assert after["peak_rss"] - before["rss_before_first_step"] == pytest.approx(held.nbytes, rel=0.1)
