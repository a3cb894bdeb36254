"""`preparation.prepare` on a Ray cluster (`pip install ray[data]`): an actor takes a shard at a time, whole.

Nothing but the numbers of shards goes through Ray: what is finished is told by the files, as everywhere, so `out` and
the data must be seen by all machines. Ray Data: docs.ray.io/en/latest/data, `Dataset.map_batches` with a class.
"""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from sd_jax.data import preparation
from sd_jax.data.preparation import Settings
from sd_jax.data.shards import InShard
from sd_jax.data.stages import Scorer

# Neither statistics sent away, nor accelerators hidden from actors that ask for none
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def prepare(
    found: Sequence[InShard],
    out: pathlib.Path,
    settings: Settings,
    make_scorer: Callable[[], Scorer] | None = None,  # called once in each actor, and here for its name
    workers: int = 1,  # actors; 0 counts as 1
    shard_index: int = 0,
    num_shards: int = 1,
) -> dict[str, Any] | None:
    """As `preparation.prepare`. Raises ImportError where Ray is not installed."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("--executor=ray needs Ray Data: pip install 'ray[data]'") from error

    out = out.absolute()
    preparation.begin(found, out, settings, make_scorer() if make_scorer else None, shard_index, num_shards)
    mine = range(shard_index, len(found), num_shards)
    todo = [number for number in mine if not preparation.is_finished(found[number], number, out)]
    if todo:
        if not ray.is_initialized():
            ray.init(include_dashboard=False)
        ray.data.from_items([{"number": number} for number in todo]).map_batches(
            _Actor,
            fn_constructor_args=(list(found), out, settings, make_scorer),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=max(min(workers, len(todo)), 1)),
        ).materialize()
    return preparation.finish(found, out, settings)


class _Actor:
    """Loads the model once, prepares many shards."""

    def __init__(self, found: list[InShard], out: pathlib.Path, settings: Settings, make_scorer: Callable | None):
        self._found, self._out, self._settings = found, out, settings
        self._scorer = make_scorer() if make_scorer else None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for number in map(int, batch["number"]):
            preparation.prepare_shard(
                self._found[number], number, self._out, self._settings, self._scorer, preparation.look_here
            )
        return batch
