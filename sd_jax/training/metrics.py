"""What a run writes down: metrics.jsonl (a row per step), TensorBoard events, log.txt, a progress bar."""

import json
import logging
import pathlib
import time

import numpy as np
from tqdm import tqdm


class Journal:
    """The records of one workdir. It hears what the package logs from when it is made, and writes once it is open."""

    def __init__(self):
        self._parts: list = []  # what is to be closed
        self._heard: list[str] = []  # before it was open
        self._handler = _ToJournal(self)
        logging.getLogger("sd_jax").addHandler(self._handler)

    def open(self, workdir: pathlib.Path, first_step: int, total_steps: int, batch_size: int) -> None:
        """Rows beyond `first_step` are dropped: they will be made again."""
        from tensorboardX import SummaryWriter

        workdir.mkdir(parents=True, exist_ok=True)
        rows = workdir / "metrics.jsonl"
        if rows.exists():
            _keep_rows_up_to(rows, first_step)
        self._rows = rows.open("a", buffering=1)  # line by line: a killed run keeps what it wrote
        self._log = (workdir / "log.txt").open("a", buffering=1)
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1, flush_secs=30)
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.05)
        self._parts = [self._bar, self._rows, self._log, self._events]
        self._batch_size, self._opened = batch_size, time.monotonic()
        self._last = self._seconds = None  # when the last step ended; the running mean of what one takes
        for text in self._heard:
            self.log(text)

    def step(self, step: int, metrics: dict[str, float]) -> dict:
        """Records an optimiser step; call it once a step. Returns the row, with `images_per_second`, a running mean."""
        now = time.monotonic()
        if self._last is not None:
            seconds = now - self._last
            self._seconds = seconds if self._seconds is None else 0.9 * self._seconds + 0.1 * seconds
        self._last = now
        rate = self._batch_size / max(self._seconds or now - self._opened, 1e-9)
        row = {"step": step, **metrics, "images_per_second": round(rate, 2)}
        self._rows.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step":
                self._events.add_scalar(name, value, step)
        self._bar.update(1)
        self._bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {rate:.1f} images/s", refresh=False)
        return row

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._events.add_image(name, pixels, step, dataformats="HWC")

    def log(self, text: str) -> None:
        """A line in log.txt and above the progress bar."""
        if not self._parts:
            self._heard.append(text)
            return
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._bar.write(text)

    def pause(self) -> None:
        """Leaves what happens between the last step and the next out of the rate."""
        self._last = None

    def close(self) -> None:
        logging.getLogger("sd_jax").removeHandler(self._handler)
        for part in self._parts:
            part.close()
        self._parts = []


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
