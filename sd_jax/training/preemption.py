"""A run that is asked to end saves first: SIGTERM (a scheduler takes the machine) and SIGINT (Ctrl-C).

One process hears a signal in Python and tells of it after its next step, whatever it was doing: compiling, writing a
checkpoint, not yet at its first step. Of several processes the signal may reach one alone, and all must save the same
step: JAX hears SIGTERM itself (its preemption service), tells the others, and names a step that none has passed yet.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, and the same command goes on


class Preempted(Exception):
    """The run was asked to end, and has saved itself."""


class Preemption:
    """`with Preemption() as preemption:` around the training loop, once `distributed.initialize` is done.

    A second Ctrl-C ends the run at once (KeyboardInterrupt); a second SIGTERM says nothing new: schedulers repeat it.
    Outside the main thread, which alone hears signals, nothing is heard of one process.
    """

    def __init__(self):
        self._asked = False
        self._before: dict[int, Any] = {}
        self._told = False  # the first step is behind

    def __enter__(self) -> "Preemption":
        self._several = jax.process_count() > 1
        if threading.current_thread() is threading.main_thread():
            # A handler of Python's would take SIGTERM away from JAX's own
            for number in (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def reached(self, step: int) -> bool:
        """Ask after every step: whether to save now and end. The same in all processes at the same step."""
        if not self._several:
            return self._asked
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        # JAX counts from 0: what it hears before it is first asked ends a run at "1", which a resumed run never gets to
        early = not self._told and reached_preemption_sync_point(1)
        self._told = True
        return reached_preemption_sync_point(step) or early

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked:
            signal.default_int_handler(number, frame)
        self._asked = True
        name = signal.Signals(number).name
        again = "; Ctrl-C once more ends at once" if number == signal.SIGINT else ""
        # Not by the log, in whose midst the signal may have come
        os.write(2, f"\n{name}: the run saves after this step and ends{again}\n".encode())
        if self._several:
            signal.raise_signal(signal.SIGTERM)  # which JAX tells the others
