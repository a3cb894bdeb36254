"""Trains what a config describes: python train.py --config=configs/NAME.py[:arg=value,...] --workdir=DIR.

The same command resumes. --config.key=value changes one key; --dry_run prints what would be trained and trains nothing.
"""

import time

STARTED = time.time()  # before the heavy imports: they are part of what a run takes

import pathlib  # noqa: E402
import sys  # noqa: E402

from absl import app, flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, e.g. configs/demo.py:autoencoder.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run writes, and resumes from. Made if it is not there.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the resolved config, parameters and bytes of state, then end.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    if CONFIG.value is None:
        raise app.UsageError("--config is missing, e.g. --config=configs/demo.py:autoencoder")
    if WORKDIR.value is None and not DRY_RUN.value:
        raise app.UsageError("--workdir is missing: where should the run write?")

    from sd_jax.training.loop import train

    workdir = None if WORKDIR.value is None else pathlib.Path(WORKDIR.value).absolute()
    try:
        train(CONFIG.value, workdir, dry_run=DRY_RUN.value, started=STARTED)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")  # one line; a traceback would hide it


if __name__ == "__main__":
    app.run(main)
