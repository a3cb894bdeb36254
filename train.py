"""Trains what a config describes: python train.py --config=configs/NAME.py[:arg=value,...] --workdir=DIR.

The same command resumes; a run that was asked to stop (SIGTERM) has saved itself and ends with status 75. Flags:
    --config.key=value      changes one key
    --dry_run               prints what would be trained and trains nothing
    --precompute            fills the run's caches, of latents and text states, and trains nothing
    --plan=v5e:16x16        compiles the step for chips that are not there: memory, speed, cost (also cpu:8)
    --profile=100:5         writes a trace of five steps from step 100 on into workdir/profile
    --coordinator_address=HOST:PORT --num_processes=N --process_id=I: one of several, where no launcher tells it
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
PRECOMPUTE = flags.DEFINE_bool("precompute", False, "Fill the caches of config.data.cache_*, then end.")
PLAN = flags.DEFINE_string("plan", None, "Compile for this topology and print what it takes, e.g. v5e:4x4 or cpu:8.")
PRICE = flags.DEFINE_float("price", None, "Of --plan: dollars for an hour of one chip; without it the list price.")
PROFILE = flags.DEFINE_string("profile", None, "FIRST:COUNT, the steps to trace.")
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "Of several processes: HOST:PORT of the first.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of several processes: how many there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of several processes: which one this is, from 0.")
LOCAL_DEVICE_IDS = flags.DEFINE_list("local_device_ids", None, "Of several processes: the devices of this one.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    if CONFIG.value is None:
        raise app.UsageError("--config is missing, e.g. --config=configs/demo.py:autoencoder")
    if WORKDIR.value is None and not (DRY_RUN.value or PLAN.value):
        raise app.UsageError("--workdir is missing: where should the run write?")
    try:
        sys.exit(_run())
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")  # one line; a traceback would hide it


def _run() -> int:
    if PLAN.value is not None:
        from sd_jax.training import plan

        return plan.plan(CONFIG.value, PLAN.value, price=PRICE.value)
    from sd_jax import distributed

    distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, LOCAL_DEVICE_IDS.value)
    from sd_jax.training.loop import train
    from sd_jax.training.preemption import EXIT_CODE, Preempted

    workdir = None if WORKDIR.value is None else pathlib.Path(WORKDIR.value).absolute()
    try:
        train(CONFIG.value, workdir, DRY_RUN.value, STARTED, _steps(PROFILE.value), PRECOMPUTE.value)
    except Preempted:
        return EXIT_CODE
    except Exception as error:
        distributed.end_if_alone(error)
        raise
    return 0


def _steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, count = text.partition(":")
    if not (first.isdigit() and count.isdigit() and int(first) * int(count)):
        raise ValueError(f"--profile={text}: give FIRST:COUNT, e.g. 100:5")
    return int(first), int(count)


if __name__ == "__main__":
    app.run(main)
