"""Our own checkpoints: training states, written by Orbax in the background, whole or not at all.

    DIRECTORY/<step>/state   the arrays, a pytree with at least `params`; `ema` averages all or some of the same tree
    DIRECTORY/<step>/data    where the data stood, one entry per process
    DIRECTORY/<step>/meta    JSON: {"spec": ModelSpec.to_dict(), "step": ..., "tokenizer": a folder beside it or null}

Orbax renames a step's folder once all of it is written, so a killed run leaves no half checkpoint that looks whole.
This is the one file that knows Orbax (its v0 interface, until v1 settles).
"""

import base64
import dataclasses
import errno
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sd_jax.checkpoints.aside import remove_unfinished
from sd_jax.checkpoints.errors import CheckpointError, listing
from sd_jax.types import Params

_BIN = ".removed"


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
        policies = ocp.checkpoint_managers.preservation_policy
        keepers = [policies.LatestN(keep)]
        if best is not None:
            keepers.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[best],
                    reverse=True,  # the last of a descending order
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            create=True,
            preservation_policy=policies.AnyPreservationPolicy(keepers),
            todelete_subdir=_BIN,  # moved there at once, then removed by us: a kill leaves no half-removed step
        )
        try:
            self._remove_half_written("*")
            self._empty_bin()
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise OSError(error.errno, f"no checkpoints can be kept here: {error.strerror}", str(directory)) from error

    def save(
        self,
        step: int,
        state: Any,  # a pytree of arrays; random keys belong into it as numbers, not as typed keys
        data_state: Any = None,  # where the data stands, of this process: JSON or bytes
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
            data=args.JsonSave({"processes": _of_all_processes(_encode(data_state))}),
            meta=args.JsonSave({**(meta or {}), "step": step, "metrics": dict(metrics or {})}),
        )
        value = (metrics or {}).get(self.best) if self.best else None
        kept = None if value is None else {self.best: _finite(value)}
        try:
            self._saving = step
            return self._manager.save(step, args=items, metrics=kept, force=True)
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

    def restore(self, step: int | None = None, like: Any = None) -> tuple[Any, Any]:
        """-> the state, laid out as `like` (arrays or ShapeDtypeStructs with shardings), and this process' data state.

        step: None = the latest. Raises FileNotFoundError where there is none, CheckpointError where it is another tree.
        """
        step = self._existing(step)
        _check_alike(_state_metadata(self.directory / str(step)), like, self.directory / str(step))
        args = self._ocp.args
        items = args.Composite(state=args.StandardRestore(like), data=args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:
            raise _damaged(self.directory / str(step), error) from error
        return restored["state"], _of_this_process(restored["data"]["processes"], self.directory / str(step))

    def meta(self, step: int | None = None) -> dict[str, Any]:
        return _read_meta(self.directory / str(self._existing(step)))

    def all_steps(self) -> list[int]:
        """Those that are whole, ascending."""
        return _steps(self.directory)

    def latest_step(self) -> int | None:
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step at which the metric `best` was lowest, of those that are kept."""
        said = {step: self.meta(step)["metrics"] for step in self.all_steps()}
        values = {step: _finite(metrics[self.best]) for step, metrics in said.items() if self.best in metrics}
        return min(values, key=values.get, default=None)

    def close(self) -> None:
        """Waits for the last save. Raises OSError if it failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _existing(self, step: int | None) -> int:
        return _choose(self.directory, step)

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
    weights: str = "ema",  # "ema": averages where there are any; "raw": what was trained
    dtype: np.dtype | None = None,  # of floats; None = as they are stored
    without: tuple[str, ...] = (),  # parts to leave out
) -> tuple[Params, dict[str, Any], int, str]:
    """-> the parameters alone as NumPy arrays, the meta, the step, and which weights they are ("ema" or "raw").

    Works while a run is writing to the same directory.
    Raises FileNotFoundError where there is no such step, CheckpointError where it is damaged.
    """
    import orbax.checkpoint as ocp

    _quieten_orbax()
    step = _choose(directory, step)
    folder = directory / str(step)
    meta, stored = _read_meta(folder), _state_metadata(folder)

    # Which of the two trees each leaf is taken from
    places = []
    for path in (path for path in stored if path[0] == "params" and path[1] not in without):
        averaged = ("ema", *path[1:])
        places.append(averaged if weights == "ema" and averaged in stored else path)
    if not places:
        raise CheckpointError(f"{folder}: no parameters are in it")

    params = {}
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            for group in _groups(places, stored):
                restored = checkpointer.restore(folder / "state", args=_only(group, stored, dtype))
                for path in group:
                    _put(params, path[1:], _get(restored, path))
    except Exception as error:
        raise _damaged(folder, error) from error
    return params, meta, step, "ema" if any(path[0] == "ema" for path in places) else "raw"


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


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if path.name.isdigit()]
    return sorted(int(p.name) for p in found if (p / "state").is_dir() and (p / "meta" / "metadata").is_file())


def _choose(directory: Path, step: int | None) -> int:
    steps = _steps(directory)
    if not steps:
        raise FileNotFoundError(f"no finished checkpoint is in {directory}")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} is in {directory}, only {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "meta" / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


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


# Where the data stood


def _encode(state: Any) -> Any:
    return {"base64": base64.b64encode(state).decode()} if isinstance(state, bytes) else {"json": state}


def _of_all_processes(entry: Any) -> list:
    """Every process' entry, in each process: Orbax writes JSON on the first one only."""
    if jax.process_count() == 1:
        return [entry]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(entry).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([text.size], np.int32)).reshape(-1)
    texts = multihost_utils.process_allgather(np.pad(text, (0, int(lengths.max()) - text.size)))
    return [json.loads(bytes(t[:n])) for t, n in zip(texts.reshape(len(lengths), -1), lengths, strict=True)]


def _of_this_process(entries: list, folder: Path) -> Any:
    if len(entries) == jax.process_count():
        entry = entries[jax.process_index()]
    elif all(entry == entries[0] for entry in entries):
        entry = entries[0]
    else:
        raise CheckpointError(
            f"{folder}: written by {len(entries)} processes whose data stood at different places; "
            f"{jax.process_count()} cannot go on from there"
        )
    return base64.b64decode(entry["base64"]) if "base64" in entry else entry["json"]


# Silence


class _WithoutOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        source = f"{os.sep}orbax{os.sep}"
        return source not in record.pathname and (record.name != "asyncio" or source not in record.getMessage())


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
