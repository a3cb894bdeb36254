"""Records -> batches, in an order that a seed decides and a checkpoint resumes exactly.

The data are an endless stream: every epoch is one shuffle of all records, and the n-th global batch is places
[n * batch_size, (n + 1) * batch_size) of it, of which each process takes its own block. What is drawn for an example
(crop, flip, which caption) hangs on the seed, the record and its place in the stream, not on threads or time. A record
that cannot be read is left out, counted and named; the stream closes up behind it.
"""

import collections
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from logging import getLogger
from typing import Any

import jax
import numpy as np

from sd_jax.data import DataError
from sd_jax.data.sources import Config, Source
from sd_jax.data.transforms import draws, fit, time_ids
from sd_jax.media import BadImage

Batch = dict[str, np.ndarray]
Tokenize = Callable[[Sequence[str]], np.ndarray]  # captions -> int32 [batch, tokens]

_ENDLESS = 2**62
_JUDGED_AFTER = 100  # records; from then on a run in which most of them are bad ends

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
            good, bad = self._num_good, self._num_bad
        if new:
            logger.warning("left out %s", error)
        if good == 0 and bad >= self._num_records:
            raise DataError(f"not one of {self._num_records} pictures can be read, e.g. {error}: see data.path")
        if good + bad >= _JUDGED_AFTER and bad > good:
            raise DataError(
                f"{bad} of the first {good + bad} pictures could not be read, e.g. {error}: most of data.path is "
                "broken, mend it or name other data"
            )

    def __str__(self) -> str:
        return f"{len(self.names)} bad files left out" + "".join(f"\n  {n}: {why}" for n, why in self.names.items())


class Loader:
    """An endless iterator of this process' batches.

    A batch is {"pixels": uint8 [b, r, r, 3], "input_ids": int32 [b, tokens], "index": int64 [b]}; where latents are
    cached "moments" (float32 [b, h, w, 2c]) stands for pixels, without a tokenizer there are no ids, and a model that
    reads them has "time_ids" as well (float32 [b, numbers], see `transforms.time_ids`).
    """

    def __init__(
        self,
        source: Source,
        tokenize: Tokenize | None,
        config: Config,
        process_index: int,
        process_count: int,
        num_time_ids: int,
    ):
        import grain

        if config.batch_size % process_count:
            raise ValueError(f"batch_size={config.batch_size} does not divide into {process_count} processes")
        if not len(source):
            raise DataError(f"data.path={config.data.path!r} holds no records")
        self.bad_files = BadFiles(len(source))
        self._num_records, self._process_count = len(source), process_count
        prepare = _Preparation(source, tokenize, config, self.bad_files, num_time_ids)
        order = grain.MapDataset.range(len(source)).shuffle(seed=config.seed % 2**32).repeat()
        places = _Places(order, config.batch_size, process_index, process_count)
        share = config.batch_size // process_count
        workers = config.data.num_workers
        threads = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * max(share, workers) if workers else 0)
        examples = grain.MapDataset.source(places).map(prepare).to_iter_dataset(threads)  # drops what is None
        self._batches = iter(examples.batch(share, drop_remainder=True))

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        try:
            return next(self._batches)
        except DataError as error:
            raise DataError(str(error).split("\n")[0]) from error  # grain adds lines on how to debug grain

    def get_state(self) -> dict[str, int]:
        """Where the stream stands after the last batch; for a checkpoint."""
        position = int(self._batches.get_state()["next_index"])
        return {"position": position, "num_records": self._num_records, "process_count": self._process_count}

    def set_state(self, state: dict[str, int]) -> None:
        position = int(state["position"])
        if state["num_records"] != self._num_records:
            logger.warning(
                "the data had %d records when the run was saved and have %d now: it goes on in another order",
                state["num_records"],
                self._num_records,
            )
        if state["process_count"] != self._process_count:
            position = position * int(state["process_count"]) // self._process_count
        self._batches.set_state({"next_index": position})

    def close(self) -> None:
        """Stops the threads."""
        self._batches.close()


def make_loader(
    source: Source,
    tokenize: Tokenize | None,  # None = no ids (an autoencoder reads no captions)
    config: Config,
    process_index: int | None = None,  # None = as jax counts
    process_count: int | None = None,
    start_state: dict[str, int] | None = None,  # of `Loader.get_state`; None = from the beginning
    num_time_ids: int = 0,  # how many the model reads; of `ModelSpec`
) -> Loader:
    """Batches of `source` for training, endlessly. Raises DataError where there is nothing to train on."""
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    loader = Loader(source, tokenize, config, index, count, num_time_ids)
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
    """This process' share of the first `config.eval_batches` batches of `source`: in order, cropped in the middle.

    The same every time. Of a source smaller than a batch there is one smaller batch, of an empty one there is none. All
    processes get as many.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    share = config.batch_size // count
    if not len(source):
        return
    prepare = _Preparation(source, tokenize, config, BadFiles(len(source)), num_time_ids, random=False)
    places = [i for i in range(len(source)) if i % config.batch_size // share == index] or range(len(source))
    examples = (example for i in itertools.cycle(places) if (example := prepare((0, i))) is not None)
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
            yield {name: np.stack([example[name] for example in batch]) for name in batch[0]}


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


class _Places:
    """(place in the global stream, record) of this process' i-th example."""

    def __init__(self, order, batch_size: int, process_index: int, process_count: int):
        """`order` is grain's: order[place in the stream] is a record."""
        self._order, self._batch_size = order, batch_size
        self._share = batch_size // process_count
        self._offset = process_index * self._share

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, i: int) -> tuple[int, int]:
        batch, slot = divmod(i, self._share)
        position = batch * self._batch_size + self._offset + slot
        return position, int(self._order[position])


class _Preparation:
    """A place in the stream -> an example, or None where the record is bad."""

    def __init__(
        self,
        source: Source,
        tokenize: Tokenize | None,
        config: Config,
        bad_files: BadFiles,
        num_time_ids: int,
        random: bool = True,
    ):
        self._source, self._tokenize, self._bad_files, self._random = source, tokenize, bad_files, random
        self._num_time_ids = num_time_ids
        self._resolution, self._flip, self._seed = config.data.resolution, config.data.random_flip, config.seed

    def __call__(self, place: tuple[int, int]) -> dict[str, np.ndarray] | None:
        position, number = place
        try:
            record = self._source[number]
        except BadImage as error:
            self._bad_files.bad(error)
            return None
        self._bad_files.good()
        rng = draws(self._seed, record["index"], position) if self._random else None
        example = {"index": np.asarray(record["index"], np.int64)}
        if "moments" in record:
            example |= {name: record[name] for name in ("moments", "time_ids") if name in record}
        else:
            fitted = fit(record["pixels"], self._resolution, rng, self._flip)
            example["pixels"] = fitted.pixels
            if self._num_time_ids:
                size = self._source.full_size(number) or record["pixels"].shape[:2]
                example["time_ids"] = time_ids(size, fitted.crop, self._resolution, self._num_time_ids)
        if self._tokenize is not None:
            caption = record["caption"]
            if rng is not None and len(record.get("captions", ())) > 1:
                caption = record["captions"][rng.integers(len(record["captions"]))]
            example["input_ids"] = self._tokenize([caption])[0]
        return example
