"""Names the stage that hangs: a run that waits forever looks from outside like one that works."""

import faulthandler
import pathlib
import sys
import threading
import time
from collections.abc import Callable

import jax

from sd_jax.training.stages import Stages

# Stages that may take so many times as long as the others
PATIENCE = {"cache": 6, "compile": 6, "initialise": 6}
# What each waits for, and where to look
HINTS = {
    "initialise": "it makes the first weights, which XLA compiles",
    "restore": "it reads the checkpoint: is the disk or bucket below the workdir slow or gone?",
    "cache": "it computes what is cached of the data: a larger data.num_workers may help",
    "compile": "XLA compiles the step, once for each size of pictures; compiled programs are kept for the next start",
    "data": "it waits for the loader: is data.path slow or gone? A larger data.num_workers may help",
    "dispatch": "it hands a step to the devices, which are busy with those before",
    "device": "it waits for the devices: where there are several processes, another one may hang or have ended",
    "checkpoint": "it writes the checkpoint: is the disk or bucket below the workdir slow, full or gone?",
    "evaluation": "it computes the held-out loss: fewer config.eval_batches take less",
    "samples": "it draws pictures: fewer config.samples.steps take less",
}


class Watchdog:
    """`with Watchdog(stages, config.watchdog_seconds, workdir, log):` around a run; 0 seconds = nothing is watched.

    A stage that takes longer is named in the log, with all threads' stacks in workdir/stacks.txt, and again each time
    that the time has doubled. (Further processes have their own file, stacks-1.txt, and say it on their stderr.)
    It ends nothing: what looks like a hang may be a slow disk.
    """

    def __init__(
        self,
        stages: Stages,
        seconds: float | int,
        workdir: pathlib.Path | None,  # None = the stacks are not written
        log: Callable[[str], None],  # the first process' own
    ):
        self._stages, self._seconds, self._workdir, self._log = stages, seconds, workdir, log
        self._name, self._last, self._due = "", 0.0, 0.0  # the stage last seen, for how long, when it is to be named
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def look(self) -> None:
        """What the thread does every few seconds."""
        name, seconds = self._stages.current()
        if name != self._name or seconds < self._last:  # another stage, or the same one anew
            self._name, self._due = name, self._seconds * PATIENCE.get(name, 1)
        self._last = seconds
        if seconds < self._due:
            return
        while self._due <= seconds:
            self._due *= 2
        text = f"stage {name!r} has been running for {seconds:.0f} s"
        if name in HINTS:
            text += f": {HINTS[name]}"
        self._say(text)

    def _watch(self) -> None:
        while not self._ended.wait(min(self._seconds / 10, 10.0)):
            self.look()

    def _say(self, text: str) -> None:
        process = jax.process_index()
        if self._workdir is not None:
            stacks = self._workdir / ("stacks.txt" if process == 0 else f"stacks-{process}.txt")
            try:
                with stacks.open("a") as file:
                    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
                    file.flush()
                    faulthandler.dump_traceback(file)
                    file.write("\n")
                text += f"; what every thread was doing is in {stacks}"
            except OSError:  # a disk that fails is no reason to fall silent
                pass
        if process == 0:
            self._log(text)
        else:
            print(f"process {process}: {text}", file=sys.stderr, flush=True)
