"""What a run's time goes into, how fast it trains, and how much of its time counted.

stages = Stages()
with stages("data"):
    batch = next(stream)
"""

import contextlib
import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

OTHER = "other"  # between the stages
# A step is what happens between two rows, without these: the rate and the goodput leave them out
PAUSES = ("initialise", "restore", "cache", "compile", "checkpoint", "evaluation", "samples")


class _Running(NamedTuple):
    name: str
    since: float  # as if it had run without a pause from then on


class Stages:
    """Named stretches of time; a stage within another one pauses that. One thread enters them, any may look."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._ended: dict[str, float] = {}
        self._running = _Running(OTHER, clock())  # replaced as a whole, so that another thread never sees a half
        self._counted_from = self._running.since  # of what runs, this much is in `_ended` already

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        outer, paused = self._running, self._switch(_Running(name, self._clock()))
        try:
            yield
        finally:
            now = self._clock()
            # Between stages time starts anew: nothing there lasts
            self._switch(_Running(outer.name, now if outer.name == OTHER else outer.since + now - paused))

    def _switch(self, to: _Running) -> float:
        now = self._clock()
        name = self._running.name
        self._ended[name] = self._ended.get(name, 0.0) + now - self._counted_from
        self._running, self._counted_from = to, now
        return now

    def current(self) -> tuple[str, float]:
        """The stage that runs and for how many seconds, pauses left out."""
        name, since = self._running
        return name, self._clock() - since

    @property
    def seconds(self) -> dict[str, float]:
        """Of every stage so far, the running one's included; their sum is the time since this was made."""
        name = self._running.name
        return {**self._ended, name: self._ended.get(name, 0.0) + self._clock() - self._counted_from}


class Throughput:
    """Images and arithmetic per second, and the summary of a run, kept over all the times that it was started.

    Goodput is the time of the steps that count, over all the time since the run was first started, by the clock on the
    wall. The time of a step includes its wait for data and for the device, but nothing of PAUSES. A step counts once:
    one that was done again, after a kill or a return to a checkpoint, is lost time, and so are starts, compilation,
    checkpoints, evaluation, samples and the hours in which nothing ran. The next start knows only what was written with
    a checkpoint, so a kill needs no handling. Where a run goes back behind what was written (to an older checkpoint),
    its steps are taken to have been equally long.
    """

    def __init__(
        self,
        stages: Stages,
        batch_size: int,  # global
        flops_per_image: float | None,  # of a training step, without what is computed again; None = unknown
        peak: float | None,  # FLOP/s of one device; None = unknown
        num_devices: int,
        path: pathlib.Path,  # of summary.json
        started: float,  # time.time() at which this process began
        first_step: int = 0,  # steps that count already
        clock: Callable[[], float] = time.time,
    ):
        self._stages, self._batch_size, self._peak, self._clock = stages, batch_size, peak, clock
        self._flops = None if flops_per_image is None else flops_per_image * batch_size / num_devices
        self._path, self._started, self._first_step = path, started, first_step
        self._before = _read(path)
        self._rows, self._in_steps, self._mean = 0, 0.0, 0.0
        self._last = stages.seconds
        self._rss_before = resident_bytes()
        _forget_peak()
        self.saved(first_step)  # a run that is killed before its first checkpoint began all the same

    def row(self) -> dict[str, float]:
        """For metrics.jsonl; call it once a step.

        images_per_second (a running mean without the first step and those beside a pause), tflops_per_device, mfu (the
        share of the chip's peak), and seconds_STAGE for every stage that this step was in.
        """
        now = self._stages.seconds
        passed = {name: now[name] - self._last.get(name, 0.0) for name in now}
        self._last = now
        step = max(sum(seconds for name, seconds in passed.items() if name not in PAUSES), 1e-9)
        self._rows, self._in_steps = self._rows + 1, self._in_steps + step
        if self._rows <= 2:
            self._mean = step
        elif not any(passed.get(name) for name in PAUSES):  # during which the device may have worked on unseen
            self._mean = 0.9 * self._mean + 0.1 * step
        row = {"images_per_second": _short(self._batch_size / self._mean)}
        if self._flops is not None:
            row["tflops_per_device"] = _short(self._flops / self._mean / 1e12)
            if self._peak is not None:
                row["mfu"] = _short(self._flops / self._mean / self._peak)
        return {**row, **{f"seconds_{name}": round(seconds, 4) for name, seconds in passed.items() if seconds > 0}}

    def saved(self, step: int) -> dict:
        """Writes summary.json: for a checkpoint of this step, whose rows have been made, and at the end. Returns it.

        step, seconds (that processes ran, as far as it was written), goodput, seconds_by_stage, and, of this process,
        rss_before_first_step and peak_rss in bytes.
        """
        before, here, now = self._before, self._stages.seconds, self._clock()
        began = before.get("started", self._started)
        earlier = before.get("seconds_in_steps", 0.0) * _share(self._first_step, before.get("step", 0))
        in_steps = earlier + self._in_steps * _share(step - self._first_step, self._rows)
        by_stage = before.get("seconds_by_stage", {})
        summary = {
            "step": step,
            "seconds": round(before.get("seconds", 0.0) + now - self._started, 1),
            "goodput": round(in_steps / max(now - began, 1e-9), 4),
            "seconds_by_stage": {
                name: round(by_stage.get(name, 0.0) + here.get(name, 0.0), 3) for name in {**by_stage, **here}
            },
            "started": began,
            "seconds_in_steps": round(in_steps, 3),
            "rss_before_first_step": self._rss_before,
            "peak_rss": peak_bytes(),
        }
        if jax.process_index() == 0:
            aside = self._path.with_suffix(".tmp")
            aside.write_text(json.dumps(summary) + "\n")
            aside.rename(self._path)
        return summary


def _read(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _share(part: int, whole: int) -> float:
    """Of `whole` steps so many count."""
    return min(max(part, 0) / whole, 1.0) if whole else 0.0


def _short(value: float) -> float:
    return float(f"{value:.5g}")


# Memory of this process, in bytes. Linux tells both; elsewhere the peak stands for both


def resident_bytes() -> int:
    """What it holds now."""
    try:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return peak_bytes()


def peak_bytes() -> int:
    """The most that it held: since the first step where the system can forget what was before, else since it began."""
    try:
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
