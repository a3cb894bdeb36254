"""A stage that hangs is named, once and then at each doubling."""

import re
import threading
import time

import jax
import pytest

from sd_jax.training.stages import Stages
from sd_jax.training.watchdog import Watchdog


class FakeStages(Stages):
    def __init__(self):
        self.name, self.time = "data", 0.0

    def current(self):
        return self.name, self.time


@pytest.fixture
def stages():
    return FakeStages()


def named(watchdog, stages, said, times):
    """The times, of these, at which the stage was named."""
    found = []
    for seconds in times:
        before = len(said)
        stages.time = float(seconds)
        watchdog.look()
        found += [seconds] * (len(said) - before)
    return found


def test_once_and_at_each_doubling(tmp_path, stages):
    said = []
    watchdog = Watchdog(stages, 600, tmp_path, said.append)
    assert named(watchdog, stages, said, range(0, 5000, 10)) == [600, 1200, 2400, 4800]
    assert said[0].startswith("stage 'data' has been running for 600 s: it waits for the loader")
    assert said[0].endswith(f"what every thread was doing is in {tmp_path / 'stacks.txt'}")
    assert named(watchdog, stages, said, [5, 610, 620]) == [610]  # the same stage anew
    stages.name = "device"
    assert named(watchdog, stages, said, [599, 601, 602]) == [601] and "'device'" in said[-1]
    stages.name = "compile"  # which may take longer
    assert named(watchdog, stages, said, [3599, 3600, 7200]) == [3600, 7200]
    stages.name = "a stage without a hint"
    assert named(watchdog, stages, said, [700]) == [700]


def test_the_stacks_of_all_threads(tmp_path, stages):
    stop = threading.Event()
    other = threading.Thread(target=lambda: stop.wait(30), daemon=True)
    other.start()
    stages.time = 20.0
    Watchdog(stages, 10, tmp_path, print).look()
    stop.set()
    text = (tmp_path / "stacks.txt").read_text()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d stage 'data' has been running for 20 s", text)
    assert "test_the_stacks_of_all_threads" in text and "in wait" in text and text.count("hread 0x") >= 2


def test_the_thread_looks_and_ends(tmp_path, stages):
    said = []
    stages.time = 0.3
    with Watchdog(stages, 0.05, tmp_path / "no such folder", said.append):
        deadline = time.monotonic() + 20
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        assert any(thread.name == "watchdog" for thread in threading.enumerate())
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())
    assert len(said) == 1 and "stacks" not in said[0]  # which could not be written


def test_nothing_is_watched(tmp_path, stages):
    stages.time = 1e9
    with Watchdog(stages, 0, tmp_path, print):
        assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_another_process_speaks_for_itself(tmp_path, stages, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    stages.time, said = 700.0, []
    Watchdog(stages, 600, tmp_path, said.append).look()
    assert not said and capsys.readouterr().err.startswith("process 3: stage 'data' has been running for 700 s")
    assert (tmp_path / "stacks-3.txt").exists()
