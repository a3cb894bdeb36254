"""Records -> batches, in an order that a seed decides and a checkpoint resumes exactly.

The data are an endless stream of global batches, each of pictures of one size (`order.py`); the n-th holds the places
[n * batch_size, (n + 1) * batch_size) of the stream, of which each process takes its own block. What is drawn for an
example (crop, flip, which caption) hangs on the seed, the record and its place in the stream, not on threads or hosts.
A record that cannot be read is counted and named, and another one of its size comes in its place, so no place moves.
"""

import collections
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from logging import getLogger
from typing import Any

import jax
import numpy as np

from sd_jax.data import DataError, captions
from sd_jax.data.buckets import Assignment, Size
from sd_jax.data.mixed import Mixed
from sd_jax.data.order import Order
from sd_jax.data.sources import Config, Source, assign_sizes
from sd_jax.data.transforms import draws, fit, time_ids
from sd_jax.media import BadImage

Batch = dict[str, np.ndarray]
Tokenize = Callable[[Sequence[str]], np.ndarray]  # captions -> int32 [batch, tokens]

_AHEAD = 2  # batches that are prepared while one is used
_JUDGED_AFTER = 100  # records; from then on a run in which most of them are bad ends
_TRIES = 100  # bad records of one size in a row, after which a run ends

logger = getLogger(__name__)


class BadFiles:
    """What could not be read: `names` maps each file to the reason. Safe to use from many threads."""

    def __init__(self, num_records: int):
        self.names: dict[str, str] = {}
        self._num_records = num_records
        self._num_good = self._num_bad = 0
        self._lock = threading.Lock()

    def good(self) -> None:
        with self._lock:
            self._num_good += 1

    def bad(self, error: BadImage) -> None:
        """Counts a bad record, tells of it once, and raises DataError where most records are bad or none is good."""
        with self._lock:
            new = error.name not in self.names
            self.names[error.name] = error.reason
            self._num_bad += 1
            good, bad, different = self._num_good, self._num_bad, len(self.names)
        if new:
            logger.warning("left out %s", error)
        if good == 0 and different >= self._num_records:
            raise DataError(f"not one of {self._num_records} pictures can be read, e.g. {error}: see data.path")
        if good + bad >= _JUDGED_AFTER and bad > good:
            raise DataError(
                f"{bad} of the first {good + bad} pictures could not be read, e.g. {error}: most of data.path is "
                "broken, mend it or name other data"
            )

    def __str__(self) -> str:
        return f"{len(self.names)} bad files left out" + "".join(f"\n  {n}: {why}" for n, why in self.names.items())


class Loader:
    """An endless iterator of this process' batches; `sizes` are the (height, width) that its pictures come in.

    A batch is {"pixels": uint8 [b, h, w, 3], "input_ids": int32 [b, tokens], "index": int64 [b]}; where latents are
    cached "moments" (float32 [b, h/f, w/f, 2c]) stands for pixels, where text is cached "context" [b, tokens, width]
    and, if there is any, "pooled" [b, width] stand for ids, without a tokenizer there are none, and a model that reads
    them has "time_ids" as well (float32 [b, numbers], see `transforms.time_ids`). Where `config.data.rating_key` names
    a column, "rating" is what it says (float32 [b]). A source that is `Mixed` has "loss_weight" (float32 [b]). Where
    `config.diffusion.masked_loss` "mask" says how much of each pixel or moment counts (uint8 [b, h, w], 255 = wholly).
    Records with a hint have it beside pixels, "hint" (uint8 [b, h, w, 3]).
    """

    def __init__(
        self,
        source: Source,
        tokenize: Tokenize | None,
        config: Config,
        assignment: Assignment,
        process_index: int,
        process_count: int,
        num_time_ids: int,
    ):
        if config.batch_size % process_count:
            raise ValueError(f"batch_size={config.batch_size} does not divide into {process_count} processes")
        if len(assignment.of_record) != len(source):
            raise ValueError(f"an assignment of {len(assignment.of_record)} records for a source of {len(source)}")
        self.sizes = assignment.sizes
        self.bad_files = BadFiles(len(source))
        self._num_records, self._batch_size, self._seed = len(source), config.batch_size, config.seed
        share = config.batch_size // process_count
        self._slots = np.arange(process_index * share, (process_index + 1) * share)  # of each global batch, ours
        mixture = source.mixture if isinstance(source, Mixed) else None
        self._order = Order(assignment, config.batch_size, config.seed, mixture)
        self._prepare = _Preparation(source, tokenize, config, num_time_ids)
        self._workers = config.data.num_workers
        self._pool = ThreadPoolExecutor(self._workers, "loader") if self._workers else None
        self._ahead: collections.deque[list[Callable[[], Batch]]] = collections.deque()
        self._used = 0  # global batches

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        while len(self._ahead) < (1 + _AHEAD if self._workers else 1):
            self._ahead.append(self._start(self._used + len(self._ahead)))
        parts = [result() for result in self._ahead.popleft()]
        self._used += 1
        return parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    def _start(self, n: int) -> list[Callable[[], Batch]]:
        """Hands the n-th batch to the threads, in parts, whose results are to be called for."""
        number, records = self._order.batch(n)
        parts = np.array_split(self._slots, max(min(self._workers, len(self._slots)), 1))
        tasks = [functools.partial(self._part, number, records[slots], n * self._batch_size + slots) for slots in parts]
        return [self._pool.submit(task).result for task in tasks] if self._pool else tasks

    def _part(self, number: int, records: np.ndarray, places: np.ndarray) -> Batch:
        examples = [self._good_example(number, int(r), int(p)) for r, p in zip(records, places, strict=True)]
        return self._prepare.batch(examples)

    def _good_example(self, number: int, record: int, place: int) -> dict[str, Any]:
        """The example of a record at a place of the stream; if it is bad, that of another of its size."""
        for attempt in range(1, _TRIES + 1):
            try:
                example = self._prepare.example(record, self.sizes[number], place)
            except BadImage as error:
                self.bad_files.bad(error)
                last = error
            else:
                self.bad_files.good()
                return example
            members = self._order.like(number, record)
            record = int(members[np.random.default_rng((self._seed % 2**32, place, attempt)).integers(len(members))])
        height, width = self.sizes[number]
        raise DataError(f"{_TRIES} pictures of size {height}x{width} in a row could not be read, the last was {last}")

    def get_state(self) -> dict[str, int]:
        """Where the stream stands after the last batch, the same in every process; for a checkpoint."""
        return {"images": self._used * self._batch_size, "num_records": self._num_records}

    def set_state(self, state: dict[str, int]) -> None:
        if state["num_records"] != self._num_records:
            logger.warning(
                "the data had %d records when the run was saved and have %d now: it goes on in another order",
                state["num_records"],
                self._num_records,
            )
        self._used, beyond = divmod(int(state["images"]), self._batch_size)
        if beyond:
            logger.warning(
                "%d images, after which the run was saved, are no whole batches of %d: the last %d come again",
                state["images"],
                self._batch_size,
                beyond,
            )
        self._ahead.clear()

    def close(self) -> None:
        """Stops the threads."""
        self._ahead.clear()
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)


def make_loader(
    source: Source,
    tokenize: Tokenize | None,  # None = no ids (an autoencoder reads no captions)
    config: Config,
    assignment: Assignment | None = None,  # of `buckets.assign`; None = made here
    process_index: int | None = None,  # None = as jax counts
    process_count: int | None = None,
    start_state: dict[str, int] | None = None,  # of `Loader.get_state`; None = from the beginning
    num_time_ids: int = 0,  # how many the model reads; of `ModelSpec`
) -> Loader:
    """Batches of `source` for training, endlessly. Raises DataError where there is nothing to train on."""
    if not len(source):
        raise DataError(f"data.path={config.data.path!r} holds no records")
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    assignment = assign_sizes(source, config) if assignment is None else assignment
    loader = Loader(source, tokenize, config, assignment, index, count, num_time_ids)
    if start_state is not None:
        loader.set_state(start_state)
    return loader


def fixed_batches(
    source: Source,
    tokenize: Tokenize | None,
    config: Config,
    process_index: int | None = None,
    process_count: int | None = None,
    num_time_ids: int = 0,
) -> Iterator[Batch]:
    """This process' share of the first `config.eval_batches` batches of `source`: in order, squares from the middle,
    the first captions.

    The same every time. Of a source smaller than a batch there is one smaller batch, of an empty one there is none. All
    processes get as many.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    share = config.batch_size // count
    if not len(source):
        return
    prepare, bad_files = _Preparation(source, tokenize, config, num_time_ids), BadFiles(len(source))

    def read(places: Iterable[int]) -> Iterator[dict[str, Any]]:
        for i in places:
            try:
                example = prepare.example(i, (config.data.resolution,) * 2, None)
            except BadImage as error:
                bad_files.bad(error)
                continue
            bad_files.good()
            yield example

    places = [i for i in range(len(source)) if i % config.batch_size // share == index] or range(len(source))
    examples = read(itertools.cycle(places))
    seen: set[int] = set()
    for _ in range(min(config.eval_batches, max(1, len(source) // config.batch_size))):
        batch = []
        while len(batch) < share:
            example = next(examples)
            if count == 1 and int(example["index"]) in seen:  # all have been read
                break
            seen.add(int(example["index"]))
            batch.append(example)
        if batch:
            yield prepare.batch(batch)


def prefetch(batches: Iterable[Batch], put: Callable[[Batch], Any], size: int = 2) -> Iterator[tuple[Any, Any]]:
    """(`put(batch)`, the state of `batches` after it), `size` batches ahead of who reads them.

    `put` sends a batch to the devices and need not wait for it. The state that comes with a batch is the one to save
    once the batch has been used, however far ahead the loader is.
    """
    queue: collections.deque = collections.deque()
    source = iter(batches)
    while True:
        for batch in itertools.islice(source, max(size, 1) - len(queue)):
            queue.append((put(batch), source.get_state()))
        if not queue:
            return
        yield queue.popleft()


class _Preparation:
    """A record -> an example; examples -> a batch."""

    def __init__(self, source: Source, tokenize: Tokenize | None, config: Config, num_time_ids: int):
        if config.data.crop not in ("random", "centre"):
            raise ValueError(f"config.data.crop={config.data.crop!r}: choose random or centre")
        captions.check(config.data)
        self._source, self._tokenize, self._num_time_ids = source, tokenize, num_time_ids
        self._data, self._seed = config.data, config.seed
        self._random_crop, self._random_flip = config.data.crop == "random", config.data.random_flip
        self._masked = "diffusion" in config and config.diffusion.masked_loss

    def example(self, number: int, size: Size, place: int | None) -> dict[str, Any]:
        """The record at its place in the stream; at None with nothing random. Raises BadImage."""
        record = self._source[number]
        rng = None if place is None else draws(self._seed, record["index"], place)
        example = {"index": np.int64(record["index"])}
        # The caption is drawn first, so that it is the same one whether there is a crop to draw or not
        if "contexts" in record:
            k = int(rng.integers(len(record["contexts"]))) if rng is not None else 0
            example |= {name: record[name + "s"][k] for name in ("context", "pooled") if name + "s" in record}
        elif self._tokenize is not None:
            example["caption"] = captions.choose(record["fields"], self._data, rng)
        if "rating_key" in self._data:
            example["rating"] = self._rating(record)
        if "loss_weight" in record:
            example["loss_weight"] = record["loss_weight"]
        if "moments" in record:
            return example | {name: record[name] for name in ("moments", "time_ids", "mask") if name in record}
        flip = rng is not None and self._random_flip and bool(rng.random() < 0.5)
        beside = {name: record.get(name) for name in ("mask", "hint")}
        fitted = fit(record["pixels"], size, rng if self._random_crop else None, flip, **beside)
        example["pixels"] = fitted.pixels
        if fitted.hint is not None:
            example["hint"] = fitted.hint
        if self._masked:
            example["mask"] = np.full(size, 255, np.uint8) if fitted.mask is None else fitted.mask
        if self._num_time_ids:
            whole = self._source.full_size(number) or record["pixels"].shape[:2]
            example["time_ids"] = time_ids(whole, fitted.crop, size, self._num_time_ids)
        return example

    def _rating(self, record: dict[str, Any]) -> np.float32:
        said = "".join(record["fields"][0])
        try:
            return np.float32(said)
        except ValueError:
            what = f"{self._data.rating_key} is {said!r}, no number"
            raise BadImage(f"{self._data.path}, record {record['index']}", what) from None

    def batch(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """All of them stacked, with "input_ids" in place of "caption"."""
        arrays = {name: np.stack([e[name] for e in examples]) for name in examples[0] if name != "caption"}
        if "caption" in examples[0]:
            arrays["input_ids"] = self._tokenize([example["caption"] for example in examples])
        return arrays
