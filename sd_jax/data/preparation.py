"""Preparing data: shards in -> decode once -> score -> filter -> size -> shards out, and a report of it.

OUT holds 00000.tar, 00001.tar, ... (`shards.TarWriter`; none where nothing is kept), one for each shard that comes in,
each with a 00000_stats.json. That one is written last: a shard that has it is finished, and a run that is started again
skips it. Both are written aside and renamed, so nothing is ever half there. A record is called by its shard's number
and its place in it; its .json has all columns, theirs and ours.

Doubles are looked for when all shards are finished, in the hashes that the stats hold of what was kept
(`duplicates`: 24 bytes a record in memory). Shards that hold some are written again without them, and a
00000_duplicates.json says so; the stats stay as they are, so that this too can be done again at any moment, by any
process, with the same result. So do report.json and sheet.png come from the stats.
"""

import base64
import collections
import contextlib
import dataclasses
import functools
import heapq
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from logging import getLogger
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from sd_jax import media
from sd_jax.checkpoints.aside import aside
from sd_jax.data import DataError, duplicates, filters, shards, stages
from sd_jax.data.shards import Damaged, InShard, Record
from sd_jax.data.stages import Look, Scorer, Sizes

logger = getLogger(__name__)

SHOWN = 8  # of the best and of the worst of a shard; of all shards, SHEET
SHEET = 24
_SIDE = 96  # of the pictures in a sheet
_NAMED = 100  # bad pictures that a shard's stats, and the report, name
_HASHES = ("digest", "dhash", "phash")

# Bins; what lies outside is counted in the first and the last
_SCORES, _SHARES = np.linspace(0.0, 10.0, 41), np.linspace(0.0, 1.0, 41)
EDGES = {
    "aesthetic": _SCORES,
    "pwatermark": _SHARES,
    "punsafe": _SHARES,
    "similarity": np.linspace(-0.2, 0.6, 41),
    "height": 2.0 ** np.arange(4, 14.5, 0.5),
    "width": 2.0 ** np.arange(4, 14.5, 0.5),
    "sharpness": 2.0 ** np.arange(-4, 15),
    "blockiness": np.linspace(-2.0, 8.0, 41),
}
_ALIASES = {names[0]: names for row in filters.FILTERS.values() for names in row.columns}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the shards that come out hang on, beside those that come in and the scorer."""

    filters: dict[str, float | str] = dataclasses.field(default_factory=dict)  # of `filters.resolve`
    sizes: Sizes = Sizes()
    exact: bool = True  # whether exact doubles go
    distance: int | None = None  # of near doubles, which then go too (`duplicates`); None = they stay
    rank: str = "aesthetic"  # the column by which the sheet's best and worst are chosen
    image_key: str = "image"
    caption_key: str = "text"
    batch_size: int = 64  # records that are decoded, scored and judged together


def prepare(
    found: Sequence[InShard],  # of `shards.find`
    out: pathlib.Path,
    settings: Settings,
    scorer: Scorer | None = None,
    workers: int = 0,  # processes that decode; 0 = this one does
    shard_index: int = 0,  # this process prepares every `num_shards`-th shard, from this one on
    num_shards: int = 1,
) -> dict[str, Any] | None:
    """Prepares what is not finished; the report, where all shards are finished afterwards, else None.

    Raises DataError where `out` holds what was made otherwise, OSError where it cannot be written.
    """
    begin(found, out, settings, scorer, shard_index, num_shards)
    mine = range(shard_index, len(found), num_shards)
    with _looking(workers) as look:
        for number in tqdm(mine, desc="shards", unit="shard", leave=False):
            if not is_finished(found[number], number, out):
                prepare_shard(found[number], number, out, settings, scorer, look)
    return finish(found, out, settings)


def begin(
    found: Sequence[InShard],
    out: pathlib.Path,
    settings: Settings,
    scorer: Scorer | None,
    shard_index: int = 0,
    num_shards: int = 1,
) -> None:
    """Checks that `out` is empty or was made likewise, and removes what was left half written of this process' shards.

    Raises ValueError and DataError.
    """
    if not 0 <= shard_index < num_shards:
        raise ValueError(
            f"--shard_index={shard_index} --num_shards={num_shards}: give an index from 0 to {num_shards - 1}"
        )
    if settings.sizes.resolution:
        stages.size_of(64, 64, settings.sizes)
    duplicates.find(*np.zeros((3, 0), np.uint64), settings.distance)
    told = json.loads(_json({**dataclasses.asdict(settings), "scorer": scorer.name if scorer else ""}))
    path = out / "prepare.json"
    if path.exists():
        before = json.loads(path.read_text())
        changed = [
            f"{name} ({before.get(name)} then, {told[name]} now)" for name in told if before.get(name) != told[name]
        ]
        if changed:
            raise DataError(f"{out} was prepared with other settings: {', '.join(changed)}: choose another --out")
    elif out.exists() and any(out.glob("*_stats.json")):
        raise DataError(f"{path} is gone, and so what {out} was prepared with: choose another --out")
    else:
        _write(path, told)
    for left in out.glob(".*.partial-*"):
        number = left.name[1:].partition(".")[0].partition("_")[0]
        if number.isdigit() and int(number) % num_shards == shard_index:
            left.unlink(missing_ok=True)


def is_finished(shard: InShard, number: int, out: pathlib.Path) -> bool:
    """Whether a shard need not be prepared. Raises DataError where its number was another shard's."""
    stats = _stats(out, number)
    if stats is None:
        return False
    if stats["shard"] != shard.name:
        raise DataError(
            f"{_path(out, number, '_stats.json')} is of {stats['shard']}, not of {shard.name}: shards were added in "
            "between or removed; choose another --out"
        )
    return stats["fingerprint"] == shard.fingerprint()


# -- One shard -------------------------------------------------------------------------------------------------------

Lookup = Callable[[Iterable[list[Record]], Callable], Iterator[tuple[list[Record], list[Look]]]]


def prepare_shard(
    shard: InShard,
    number: int,
    out: pathlib.Path,
    settings: Settings,
    scorer: Scorer | None,
    look: Lookup,
) -> None:
    """Writes OUT/NUMBER.tar and OUT/NUMBER_stats.json. What cannot be read of it is named there and in the log."""
    tally = _Tally(shard, settings)
    _path(out, number, "_duplicates.json").unlink(missing_ok=True)
    stage = functools.partial(stages.look, preprocess=scorer.preprocess if scorer else None, sizes=settings.sizes)
    with aside(_path(out, number, ".tar"), overwrite=True) as work:
        with shards.TarWriter(work) as writer:
            for records, looks in look(_batches(shard, settings, tally), stage):
                _judge(records, looks, number, settings, scorer, writer, tally)
    if not tally.kept:
        _path(out, number, ".tar").unlink()
    _write(_path(out, number, "_stats.json"), tally.stats())


def _batches(shard: InShard, settings: Settings, tally: "_Tally") -> Iterator[list[Record]]:
    records, batch = shards.read(shard, settings.image_key, settings.caption_key), []
    try:
        for record in records:
            batch.append(record)
            if len(batch) == settings.batch_size:
                yield batch
                batch = []
    except Damaged as error:
        tally.damaged = str(error)
        logger.warning("damaged shard %s", error)
    if batch:
        yield batch


def _judge(
    records: list[Record],
    looks: list[Look],
    number: int,
    settings: Settings,
    scorer: Scorer | None,
    writer: shards.TarWriter,
    tally: "_Tally",
) -> None:
    """The stages after decoding, for one batch: what is kept goes to `writer`, all is counted in `tally`."""
    for record, seen in zip(records, looks, strict=True):
        if seen.bad is not None:
            tally.bad(record, seen.bad)
    good = [(record, seen) for record, seen in zip(records, looks, strict=True) if seen.bad is None]
    if not good:
        return
    records, looks = map(list, zip(*good, strict=True))
    columns = stages.table(records, looks)
    scores = stages.score(scorer, columns, looks)
    columns = {name: values for name, values in columns.items() if filters.find_column(scores, (name.lower(),)) is None}
    columns |= scores
    verdicts = filters.judge(columns, settings.filters, len(records))
    kept = filters.keep(verdicts, len(records))
    tally.batch(columns, verdicts, kept, records)
    for i in np.flatnonzero(kept):
        scored = {name: values[i] for name, values in scores.items()}
        row = stages.merged(stages.merged(records[i].columns, looks[i].columns), scored)
        key = f"{number:05d}{records[i].place:06d}"
        writer.add(key, looks[i].data or records[i].data, records[i].caption, stages.written(row, looks[i].data))
        tally.keep(key, row)


class _Tally:
    """What is counted of a shard while it is prepared."""

    def __init__(self, shard: InShard, settings: Settings):
        self.damaged: str | None = None
        self.kept = 0
        self._shard, self._rank = shard, settings.rank.lower()
        self._records = self._bad = 0
        self._named: list[tuple[str, str]] = []
        self._filters: dict[str, collections.Counter] = {name: collections.Counter() for name in settings.filters}
        self._histograms: dict[str, dict[str, np.ndarray]] = {}
        self._sizes: collections.Counter = collections.Counter()
        self._hashes: dict[str, list[str]] = {name: [] for name in ("key", *_HASHES)}
        self._ends: dict[str, list] = {"best": [], "worst": []}

    def bad(self, record: Record, reason: str) -> None:
        self._records += 1
        self._bad += 1
        if len(self._named) < _NAMED:
            self._named.append((record.name, reason))
        logger.info("left out %s: %s", record.name, reason)

    def batch(self, columns: dict[str, list], verdicts: dict, kept: np.ndarray, records: list[Record]) -> None:
        self._records += len(records)
        for name, counted in filters.counts(verdicts, len(records)).items():
            self._filters[name].update(counted)
        for name, edges in EDGES.items():
            if (column := filters.find_column(columns, _ALIASES[name])) is None:
                continue
            values, known = _finite(columns[column])
            bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
            counts = self._histograms.setdefault(name, {})
            for which, chosen in (("all", known), ("kept", known & kept)):
                counts[which] = counts.get(which, 0) + np.bincount(bins[chosen], minlength=len(edges) - 1)
        if (column := filters.find_column(columns, _ALIASES.get(self._rank, (self._rank,)))) is not None:
            values, known = _finite(columns[column])
            for i in np.flatnonzero(known):
                self._show(float(values[i]), records[i], bool(kept[i]))

    def _show(self, value: float, record: Record, kept: bool) -> None:
        for which, sign in (("best", 1.0), ("worst", -1.0)):
            heap, rank = self._ends[which], (sign * value, -record.place)
            if len(heap) < SHOWN or rank > heap[0][:2]:
                # The file is decoded once more, small, which happens to few
                shown = {"score": value, "name": record.name, "kept": kept, "jpeg": _thumbnail(record)}
                (heapq.heappush if len(heap) < SHOWN else heapq.heapreplace)(heap, (*rank, shown))

    def keep(self, key: str, row: dict[str, Any]) -> None:
        self.kept += 1
        if "bucket_height" in row:
            self._sizes[f"{row['bucket_height']}x{row['bucket_width']}"] += 1
        for name, value in (("key", key), *((name, row[name]) for name in _HASHES)):
            self._hashes[name].append(value)

    def stats(self) -> dict[str, Any]:
        return {
            "shard": self._shard.name,
            "fingerprint": self._shard.fingerprint(),
            "records": self._records,
            "bad": self._bad,
            "kept": self.kept,
            "damaged": self.damaged,
            "filters": {name: dict(counted) for name, counted in self._filters.items()},
            "sizes": dict(sorted(self._sizes.items())),
            "histograms": {
                name: {which: counts.tolist() for which, counts in both.items()}
                for name, both in self._histograms.items()
            },
            "bad_names": self._named,
            **{which: [shown for *_, shown in sorted(heap, reverse=True)] for which, heap in self._ends.items()},
            "hashes": {name: "".join(values) if name != "key" else values for name, values in self._hashes.items()},
        }


def _finite(values: list) -> tuple[np.ndarray, np.ndarray]:
    """(float64, 0 where there is no number; where there is one)."""
    numbers = np.array([v if isinstance(v, int | float) else np.nan for v in values], np.float64)
    known = np.isfinite(numbers)
    return np.where(known, numbers, 0.0), known


def _thumbnail(record: Record) -> str:
    """A square JPEG, in base64."""
    image = Image.fromarray(media.decode_image(record.data, record.name, at_least=_SIDE))
    image.thumbnail((_SIDE, _SIDE))
    square = Image.new("RGB", (_SIDE, _SIDE), (255, 255, 255))
    square.paste(image, ((_SIDE - image.width) // 2, (_SIDE - image.height) // 2))
    out = io.BytesIO()
    square.save(out, "JPEG", quality=85)
    return base64.b64encode(out.getvalue()).decode()


# -- The built-in executor -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _looking(workers: int) -> Iterator[Lookup]:
    """Yields what calls a stage on batches, in their order: here, or in `workers` processes, which start afresh (a fork
    of a process with an accelerator hangs) and import no JAX."""
    if not workers:
        yield look_here
        return
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, fresh, initializer=_stay_with_parent) as pool:
        yield functools.partial(_look_in_processes, pool, 2 * workers)


def _look_in_processes(
    pool: ProcessPoolExecutor,
    most: int,  # batches under way, so that memory stays flat
    batches: Iterable[list[Record]],
    stage: Callable,
) -> Iterator[tuple[list[Record], list[Look]]]:
    ahead: collections.deque = collections.deque()
    batches = iter(batches)
    while True:
        for batch in itertools.islice(batches, most - len(ahead)):
            ahead.append((batch, pool.submit(stage, batch)))
        if not ahead:
            return
        batch, future = ahead.popleft()
        yield batch, future.result()


def _stay_with_parent() -> None:
    """Else a worker waits for ever for one that was killed, and says much of a Ctrl-C that was meant for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with(parent):
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def look_here(batches: Iterable[list[Record]], stage: Callable) -> Iterator[tuple[list[Record], list[Look]]]:
    return ((batch, stage(batch)) for batch in batches)


# -- All shards ------------------------------------------------------------------------------------------------------


def finish(found: Sequence[InShard], out: pathlib.Path, settings: Settings) -> dict[str, Any] | None:
    """Takes the doubles out, and writes report.json and sheet.png; None where shards are still missing."""
    if not all(is_finished(shard, number, out) for number, shard in enumerate(found)):
        return None
    exact, near = _drop_duplicates(len(found), out, settings)
    total = {"shards": len(found), "records": 0, "bad": 0, "kept": 0}
    counted: dict[str, collections.Counter] = {name: collections.Counter() for name in settings.filters}
    histograms: dict[str, dict[str, np.ndarray]] = {}
    sizes: collections.Counter = collections.Counter()
    damaged, bad, best, worst = [], [], [], []
    for number in range(len(found)):
        stats = _stats(out, number)
        for name in ("records", "bad", "kept"):
            total[name] += stats[name]
        for name, counts in stats["filters"].items():
            counted[name].update(counts)
        for name, both in stats["histograms"].items():
            for which, counts in both.items():
                merged = histograms.setdefault(name, {})
                merged[which] = merged.get(which, 0) + np.array(counts, np.int64)
        sizes.update(stats["sizes"])
        damaged += [stats["damaged"]] if stats["damaged"] else []
        bad = (bad + stats["bad_names"])[:_NAMED]
        best = sorted(best + stats["best"], key=lambda shown: -shown["score"])[:SHEET]
        worst = sorted(worst + stats["worst"], key=lambda shown: shown["score"])[:SHEET]
    report = {
        **total,
        "kept": total["kept"] - exact - near,
        "duplicates": {"exact": exact, "near": near},
        "filters": {name: dict(counts) for name, counts in counted.items()},
        "filters_keep": filters.describe(settings.filters),
        "sizes_before_duplicates": dict(sorted(sizes.items())),
        "histograms": {
            name: {"edges": EDGES[name].tolist(), **{which: counts.tolist() for which, counts in both.items()}}
            for name, both in histograms.items()
        },
        "damaged": damaged,
        "bad_names": dict(bad),
    }
    if best:
        _write_sheet(out / "sheet.png", best, worst)
    _write(out / "report.json", report)
    return report


def _drop_duplicates(count: int, out: pathlib.Path, settings: Settings) -> tuple[int, int]:
    """Writes shards again that hold doubles; (how many exact, how many near ones there were)."""
    if not settings.exact and settings.distance is None:
        return 0, 0
    arrays, lengths = {name: [] for name in _HASHES}, []
    for number in range(count):
        hashes = _stats(out, number)["hashes"]
        lengths.append(len(hashes["key"]))
        for name in _HASHES:
            arrays[name].append(np.frombuffer(bytes.fromhex(hashes[name]), ">u8").astype(np.uint64))
    digest, dhash, phash = (np.concatenate([*arrays[name], np.zeros(0, np.uint64)]) for name in _HASHES)
    if not settings.exact:
        digest = np.arange(len(digest), dtype=np.uint64)
    exact, near = duplicates.find(digest, dhash, phash, settings.distance)
    bounds = np.cumsum([0, *lengths])
    for number in range(count):
        goes = np.flatnonzero((exact | near)[bounds[number] : bounds[number + 1]])
        if not len(goes):
            continue
        keys = _stats(out, number)["hashes"]["key"]
        dropped, path = [keys[i] for i in goes], _path(out, number, "_duplicates.json")
        if path.exists() and json.loads(path.read_text()) == dropped:
            continue
        tar = _path(out, number, ".tar")
        if len(dropped) == len(keys):
            tar.unlink(missing_ok=True)
        else:
            with aside(tar, overwrite=True) as work:
                shards.rewrite(tar, work, dropped)
        _write(path, dropped)
    return int(exact.sum()), int(near.sum())


def _write_sheet(path: pathlib.Path, best: list[dict], worst: list[dict]) -> None:
    """The best from the best down, then the worst from the worst up."""
    shown = best + worst
    pixels = np.stack([media.decode_image(base64.b64decode(picture["jpeg"])) for picture in shown])
    captions = [f"{picture['score']:.3g} {'kept' if picture['kept'] else 'dropped'}" for picture in shown]
    media.write_png(path, media.contact_sheet(pixels, captions, columns=8), {})


# -- Files -----------------------------------------------------------------------------------------------------------


def _path(out: pathlib.Path, number: int, ending: str) -> pathlib.Path:
    return out / f"{number:05d}{ending}"


def _stats(out: pathlib.Path, number: int) -> dict[str, Any] | None:
    try:
        return json.loads(_path(out, number, "_stats.json").read_text())
    except FileNotFoundError:
        return None


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def _write(path: pathlib.Path, value: Any) -> None:
    with aside(path, overwrite=True) as work:
        work.write_text(_json(value) + "\n")
