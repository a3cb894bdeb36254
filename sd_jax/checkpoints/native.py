"""Our own checkpoints: training states, written by Orbax in the background, whole or not at all.

    DIRECTORY/<step>/state   the arrays, a pytree with at least `params`; `ema` averages all or some of the same tree,
                             and `averages` holds more of them by their decay: {"0.999": ...}
    DIRECTORY/<step>/data    JSON: where the data stood, the same for every process
    DIRECTORY/<step>/meta    JSON: {"spec": ModelSpec.to_dict(), "step": ..., "tokenizer": a folder beside it or null};
                             of an adapter alone also "adapter_of": the model that it is for
    DIRECTORY/<step>/manifest.json   size and checksum of each of these files, see checkpoints/manifest.py

Orbax renames a step's folder once all of it is written, so a killed run leaves no half checkpoint that looks whole;
what a disk does to a whole one, the manifest tells. A damaged one is renamed to <step>.damaged, never removed.
This is the one file that knows Orbax (its v0 interface, until v1 settles).
"""

import dataclasses
import errno
import itertools
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sd_jax.checkpoints import manifest
from sd_jax.checkpoints.aside import remove_unfinished
from sd_jax.checkpoints.errors import CheckpointError, listing
from sd_jax.types import Params

_BIN = ".removed"

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run.

    Every process of a multi-process run makes one and calls its methods at the same steps.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int = 3,  # the newest that are kept
        best: str | None = None,  # a metric: the checkpoint at which it was lowest is kept besides; None = none is
    ):
        import orbax.checkpoint as ocp

        _quieten_orbax()
        self.directory = Path(directory).absolute()
        self.best = best
        self._ocp = ocp
        self._saving: int | None = None  # the step being written in the background
        self._values: dict[int, float] = {}  # of the metric `best`, by step
        options = ocp.CheckpointManagerOptions(
            create=True,
            preservation_policy=_Keep(keep, self._values),
            todelete_subdir=_BIN,  # moved there at once, then removed by us: a kill leaves no half-removed step
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_manifest),
        )
        try:
            self._remove_half_written("*")
            self._empty_bin()
            for step in self.all_steps():
                self._hear(step, _metrics_of(self.directory / str(step)))
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise OSError(error.errno, f"no checkpoints can be kept here: {error.strerror}", str(directory)) from error

    def save(
        self,
        step: int,
        state: Any,  # a pytree of arrays; random keys belong into it as numbers, not as typed keys
        data_state: Mapping[str, Any] | None = None,  # where the data stands, for all processes
        meta: Mapping[str, Any] | None = None,  # what a reader must know of the model (see above)
        metrics: Mapping[str, float | int] | None = None,
    ) -> bool:
        """Copies the state off the devices, then writes it in the background. False where `step` is already there.

        Raises OSError naming the directory where this save cannot begin, or the one before it failed.
        """
        self.wait()
        if step in self.all_steps():
            return False
        self._check_space(step, state)
        args = self._ocp.args
        items = args.Composite(
            state=args.StandardSave(state),
            data=args.JsonSave(dict(data_state or {})),
            meta=args.JsonSave({**(meta or {}), "step": step, "metrics": dict(metrics or {})}),
        )
        try:
            self._saving = step
            self._hear(step, metrics or {})
            return self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def check(self) -> None:
        """Raises OSError if a save in the background has failed. Does not wait."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Until nothing is being written. Raises OSError naming the directory if the save has failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._saving = None
        self._empty_bin()

    def restore(self, step: int | None = None, like: Any = None) -> tuple[Any, dict[str, Any] | None]:
        """-> the state, laid out as `like` (arrays or ShapeDtypeStructs with shardings), and where the data stood.

        step: None = the newest that is whole. Damaged ones that are newer are named in a warning and renamed to
        <step>.damaged, so that their steps can be written again; every process of a run goes back to the same step.
        Raises FileNotFoundError where there is none, CheckpointError where it is another tree, or all are damaged.
        """
        self.wait()
        step = self._newest_whole() if step is None else self._existing(step)
        folder = self.directory / str(step)
        _check_alike(_state_metadata(folder), like, folder)
        handler = self._ocp.StandardCheckpointHandler()
        try:
            with self._ocp.Checkpointer(handler) as checkpointer:
                state = checkpointer.restore(folder / "state", args=self._ocp.args.StandardRestore(like))
        except Exception as error:
            raise _damaged(folder, error) from error
        return state, _read_json(folder, "data") or None

    def meta(self, step: int | None = None) -> dict[str, Any]:
        return _read_json(self.directory / str(self._existing(step)), "meta")

    def all_steps(self) -> list[int]:
        """Those that were written, ascending; only `restore` looks whether they are still whole."""
        return _written(self.directory)

    def latest_step(self) -> int | None:
        return max(self.all_steps(), default=None)

    def any_step(self) -> bool:
        """Whether there is anything to go on from; the same in all processes, whatever each sees of a shared disk."""
        return bool(_of_first_process(len(self.all_steps())))

    def best_step(self) -> int | None:
        """The step at which the metric `best` was lowest, of those that are kept."""
        there = set(self.all_steps())
        return min((step for step in self._values if step in there), key=self._values.get, default=None)

    def close(self) -> None:
        """Waits for the last save. Raises OSError if it failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _existing(self, step: int | None) -> int:
        return _choose(self.directory, self.all_steps(), step)

    def _hear(self, step: int, metrics: Mapping[str, float | int]) -> None:
        if self.best in metrics:
            self._values[step] = _finite(metrics[self.best])

    def _write_manifest(self) -> None:
        """Called by Orbax, on the first process, once all of a step is written and before it is renamed."""
        for folder in self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
            manifest.write(folder)

    def _newest_whole(self) -> int:
        damaged: dict[int, str] = {}
        while True:
            steps = [step for step in self.all_steps() if step not in damaged]
            step = _of_first_process(max(steps, default=-1))
            if step < 0:
                break
            reason = manifest.damage(self.directory / str(step), jax.process_index(), jax.process_count())
            if not _in_any_process(reason is not None):
                self._set_aside(damaged, step)
                return step
            damaged[step] = reason or "another process says so"
        if not damaged:
            self._existing(None)  # which raises
        said = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
        raise CheckpointError(f"{self.directory}: every checkpoint is damaged, there is none to go on from ({said})")

    def _set_aside(self, damaged: Mapping[int, str], step: int) -> None:
        for bad, reason in damaged.items():
            self._values.pop(bad, None)
            if jax.process_index() == 0:
                aside = _free(self.directory / f"{bad}.damaged")
                (self.directory / str(bad)).rename(aside)
                logger.warning("the checkpoint of step %d is damaged (%s): going on from step %d", bad, reason, step)
                logger.warning("the damaged checkpoint is kept as %s: remove it when you like", aside)
        if damaged:
            _of_first_process(step)  # the others wait until it has renamed them
            self._manager.reload()

    def _remove_half_written(self, step: int | str | None) -> None:
        """What a failed save or a killed run left of `step` ("*" = of any)."""
        if jax.process_index() == 0:
            for folder in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                remove_unfinished(folder)

    def _empty_bin(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self.directory / _BIN, ignore_errors=True)

    def _check_space(self, step: int, state: Any) -> None:
        """Early, not after minutes of writing. The old checkpoints go only once the new one is whole."""
        needed = sum(getattr(leaf, "nbytes", 8) for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < needed and jax.process_count() == 1:  # else one process would raise and the others wait for it
            self._saving = step
            raise self._failed(OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free"))

    def _failed(self, error: Exception) -> OSError:
        """One error for whatever went wrong in Orbax's threads; what was half written is removed."""
        step, self._saving = self._saving, None
        self._remove_half_written(step)
        code = errno.ENOSPC if _is_full(error) else getattr(error, "errno", None) or errno.EIO
        reason = str(error).strip().split("\n")[0][:300]
        if _is_full(error):
            detail = getattr(error, "strerror", None) or f"{shutil.disk_usage(self.directory).free / 1e6:.0f} MB free"
            reason = f"the disk is full ({detail})"
        latest = self.latest_step()
        last = "there is none before it" if latest is None else f"the last good one is of step {latest}"
        return OSError(code, f"the checkpoint of step {step} was not written: {reason}; {last}", str(self.directory))


def read_params(
    directory: Path,
    step: int | None = None,  # None = the latest
    weights: str = "ema",  # "ema": averages where there are any; "raw": what was trained; "ema:0.999": another average
    dtype: np.dtype | None = None,  # of floats; None = as they are stored
    without: tuple[str, ...] = (),  # parts to leave out
) -> tuple[Params, dict[str, Any], int, str]:
    """-> the parameters alone as NumPy arrays, the meta, the step, and which weights they are ("raw": no average).

    Works while a run is writing to the same directory.
    Raises FileNotFoundError where there is no such step, CheckpointError where it is damaged or has no such average.
    """
    import orbax.checkpoint as ocp

    _quieten_orbax()
    step = _choose(directory, _steps(directory), step)
    folder = directory / str(step)
    meta, stored = _read_json(folder, "meta"), _state_metadata(folder)
    if "adapter_of" in meta:
        raise CheckpointError(
            f"{folder}: an adapter of {meta['adapter_of'] or 'another model'}, not a model: load that, and give "
            f"{directory.parent} as an adapter"
        )

    # Which tree each leaf is taken from: an average need not have them all
    average = _average(weights, stored, folder)
    places = {}
    for name in (path[1:] for path in stored if path[0] == "params" and path[1] not in without):
        averaged = (*average, *name)
        places[averaged if average and averaged in stored else ("params", *name)] = name
    if not places:
        raise CheckpointError(f"{folder}: no parameters are in it")

    params = {}
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            for group in _groups(list(places), stored):
                restored = checkpointer.restore(folder / "state", args=_only(group, stored, dtype))
                for path in group:
                    _put(params, places[path], _get(restored, path))
    except Exception as error:
        raise _damaged(folder, error) from error
    return params, meta, step, weights if any(path[0] != "params" for path in places) else "raw"


def _average(weights: str, stored: Mapping, folder: Path) -> tuple[str, ...]:
    """Where the average of that name is; () = nowhere, the trained weights are asked for."""
    _, another, decay = weights.partition(":")
    if not another:
        return ("ema",) if weights == "ema" else ()
    decays = sorted({path[1] for path in stored if path[0] == "averages"})
    if decay not in decays:
        there = ", ".join(["raw", "ema", *(f"ema:{decay}" for decay in decays)])
        raise CheckpointError(f"{folder}: no average weights={weights!r} is in it, only {there}")
    return ("averages", decay)


def _groups(paths: list, stored: Mapping) -> list[list]:
    """A quarter of a gigabyte at a time: Orbax holds twice what it restores at once."""
    groups, size = [[]], 0
    for path in paths:
        size += math.prod(stored[path].shape) * np.dtype(stored[path].dtype).itemsize
        if size > 2**28 and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(path)
    return groups


def _only(paths: list, stored: Mapping, dtype: np.dtype | None) -> Any:
    """Orbax' arguments for restoring these arrays alone, in NumPy."""
    import orbax.checkpoint as ocp

    item, restore_args = {}, {}
    for path in paths:
        leaf = stored[path]
        is_float = jax.dtypes.issubdtype(leaf.dtype, np.inexact)
        kept = dtype if dtype is not None and is_float else leaf.dtype
        _put(item, path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        _put(restore_args, path, ocp.RestoreArgs(restore_type=np.ndarray, dtype=kept))
    return ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)


# What is on the disk


def _written(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


def _steps(directory: Path) -> list[int]:
    """Those that can be read, as far as can be seen at a glance."""
    found = {step: directory / str(step) for step in _written(directory)}
    return [step for step, p in found.items() if (p / "state").is_dir() and (p / "meta" / "metadata").is_file()]


def _choose(directory: Path, steps: list[int], step: int | None) -> int:
    if not steps:
        raise FileNotFoundError(f"no finished checkpoint is in {directory}")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} is in {directory}, only {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def _read_json(folder: Path, item: str) -> dict[str, Any]:
    try:
        return json.loads((folder / item / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _metrics_of(folder: Path) -> dict[str, Any]:
    """Empty where it is damaged: that is for `restore` to tell."""
    try:
        return _read_json(folder, "meta")["metrics"]
    except (CheckpointError, KeyError):
        return {}


def _free(path: Path) -> Path:
    """`path`, or with a number where that is taken."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{i}") for i in itertools.count(2)))
    return next(name for name in names if not name.exists())


def _state_metadata(folder: Path) -> dict[tuple[str, ...], Any]:
    """Shape and dtype of every array of a step, by its path: ("params", "unet", "conv_in", "kernel")."""
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder / "state").item_metadata.tree
    except Exception as error:
        raise _damaged(folder, error) from error
    return _by_path(tree)


def _by_path(tree: Any) -> dict[tuple[str, ...], Any]:
    """Named alike whether a node is a dict, a tuple or a dataclass: Orbax does not tell them apart on the disk."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path): x for path, x in leaves
    }


def _check_alike(stored: Mapping, like: Any, folder: Path) -> None:
    wanted = _by_path(like)
    problems = [f"{'/'.join(path)} is missing" for path in wanted if path not in stored]
    problems += [f"{'/'.join(path)} is unexpected" for path in stored if path not in wanted]
    for path, leaf in wanted.items():
        if path in stored and (tuple(stored[path].shape), stored[path].dtype) != (tuple(leaf.shape), leaf.dtype):
            there, asked = (f"{tuple(x.shape)} of {np.dtype(x.dtype)}" for x in (stored[path], leaf))
            problems.append(f"{'/'.join(path)} is {there}, not {asked}")
    if problems:
        raise CheckpointError(
            f"{folder}: not the state of this config (has it changed? then choose another workdir): {listing(problems)}"
        )


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().split("\n")[0][:300]
    return CheckpointError(
        f"{folder}: cannot be read ({reason}); if it is damaged, remove it to go on from the checkpoint before it"
    )


def _finite(value: float | int) -> float:
    """A loss that is no number is never the best."""
    return float(value) if math.isfinite(value) else math.inf


def _is_full(error: Exception) -> bool:
    words = ("no space left", "resource_exhausted", "quota exceeded")
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(w in str(error).lower() for w in words)


def _put(tree: dict, path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _get(tree: dict, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


# Several processes


def _of_first_process(number: int) -> int:
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _in_any_process(is_so: bool) -> bool:
    if jax.process_count() == 1:
        return is_so
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array([is_so])).any())


# Which are kept


@dataclasses.dataclass(frozen=True)
class _Keep:
    """The newest and the best; Orbax's own policies forget over a restart which one was best."""

    newest: int
    values: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = min((step for step in steps if step in self.values), key=self.values.get, default=None)
        kept = {*sorted(steps)[-self.newest :], best}
        return [step in kept for step in steps]


# Silence


class _WithoutOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        source, folder = f"{os.sep}orbax{os.sep}", ".orbax-checkpoint-tmp"
        said = record.getMessage() if record.name == "asyncio" else ""
        return source not in record.pathname and source not in said and folder not in said


_WITHOUT_ORBAX = _WithoutOrbax()


def _quieten_orbax() -> None:
    """Orbax logs a page per save, and of a failed one a traceback per array, though the error is raised anyway."""
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).addFilter(_WITHOUT_ORBAX)  # adding the same filter again does nothing
    if not isinstance(sys.unraisablehook, _WithoutLateWrites):
        sys.unraisablehook = _WithoutLateWrites(sys.unraisablehook)


@dataclasses.dataclass(frozen=True)
class _WithoutLateWrites:
    """Passes on what cannot be raised, but for the writes that end after the first one of their save has failed."""

    before: Callable

    def __call__(self, unraisable: Any) -> None:
        if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
            self.before(unraisable)
