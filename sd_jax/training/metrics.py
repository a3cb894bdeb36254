"""What a run writes down: metrics.jsonl (a row per step), TensorBoard events, log.txt, a progress bar."""

import json
import logging
import math
import pathlib
import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm


class Journal:
    """The records of one workdir. It hears what the package logs from when it is made, and writes once it is open.

    Of several processes the first one's alone writes; warnings of the others go to their stderr.
    """

    def __init__(self):
        self._workdir: pathlib.Path | None = None  # once it is open, in the first process
        self._rows = self._log = self._events = self._bar = None
        self._heard: list[str] | None = []  # before it was open; None = it is not to be written
        self._handler = _ToJournal(self)
        logging.getLogger("sd_jax").addHandler(self._handler)

    def open(self, workdir: pathlib.Path, total_steps: int) -> None:
        """Call `rewind` before the first `step`."""
        if jax.process_index() != 0:
            self.close()
            return
        workdir.mkdir(parents=True, exist_ok=True)
        self._workdir = workdir
        # Line by line: what has been reported outlives a kill
        self._log = (workdir / "log.txt").open("a", buffering=1)
        self._bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True, smoothing=0.05)
        heard, self._heard = self._heard, None
        for text in heard:
            self.log(text)

    def rewind(self, step: int) -> None:
        """The next step is the one after `step`: what was written of later ones is dropped, it will be made again."""
        if self._workdir is None:
            return
        from tensorboardX import SummaryWriter

        for part in filter(None, (self._rows, self._events)):
            part.close()
        rows = self._workdir / "metrics.jsonl"
        if rows.exists():
            _keep_rows_up_to(rows, step)
        self._rows = rows.open("a", buffering=1)
        self._events = SummaryWriter(str(self._workdir / "tensorboard"), purge_step=step + 1, flush_secs=30)
        self._bar.reset()
        self._bar.initial = self._bar.n = step
        self._bar.refresh()

    def step(self, row: dict[str, Any]) -> None:
        """Records an optimiser step: numbers by their names, "step" and "loss" among them."""
        if self._workdir is None:
            return
        self._rows.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step" and math.isfinite(value):  # TensorBoard warns of each that is not
                self._events.add_scalar(name, value, row["step"])
        self._bar.update(1)
        rate = f", {row['images_per_second']:.1f} images/s" if "images_per_second" in row else ""
        self._bar.set_postfix_str(f"loss {row['loss']:.4f}{rate}", refresh=False)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        if self._workdir is not None:
            self._events.add_image(name, pixels, step, dataformats="HWC")

    def log(self, text: str) -> None:
        """A line in log.txt and above the progress bar."""
        if self._workdir is not None:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._bar.write(text)
        elif self._heard is not None:
            self._heard.append(text)

    def close(self) -> None:
        logging.getLogger("sd_jax").removeHandler(self._handler)
        for part in filter(None, (self._bar, self._rows, self._log, self._events)):
            part.close()
        self._workdir = self._heard = None


class _ToJournal(logging.Handler):
    """Hands the package's log records to a journal."""

    def __init__(self, journal: Journal):
        super().__init__(logging.INFO)
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        self._journal.log(record.getMessage())


def read_rows(workdir: pathlib.Path) -> list[dict]:
    """The rows of a workdir's metrics.jsonl; a last line cut off by a crash is left out."""
    rows = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _keep_rows_up_to(path: pathlib.Path, step: int) -> None:
    kept = [row for row in read_rows(path.parent) if row["step"] <= step]
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
    aside.rename(path)
