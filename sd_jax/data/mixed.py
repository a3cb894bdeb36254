"""What a run reads of several sources: its own pictures, each as often as it counts, and others mixed into every batch.

The others keep what the model knew before. They are its own pictures of a class (prior preservation, Ruiz et al. 2023,
"DreamBooth", arXiv 2208.12242, section 3.3), or a share of other data (replay). Of the B images of a batch K are
others, and

    L = 1/B (sum of the losses of the B - K own + weight * sum of the losses of the K others)                      (1)

which with half of each is half of DreamBooth's loss. Which places of a batch are theirs is always the same and spread
evenly, so every process and every device has its part of them. Each source is assigned to sizes and cached by itself,
without copies; they come together for the loader.
"""

from logging import getLogger

import numpy as np
from jaxtyping import Int64

from sd_jax.data import DataError, fingerprints
from sd_jax.data.buckets import Assignment
from sd_jax.data.order import Mixture
from sd_jax.data.sources import Config, Source, Subset, assign_sizes, open_source, repeats_of

_APART = 2**40  # added to the others' "index", of which random draws are made: more records than any source has

logger = getLogger(__name__)


def mixes(config: Config) -> bool:
    """Whether `config.prior` asks for others."""
    return "prior" in config and bool(config.prior.path or config.prior.prompt)


def count_of(config: Config) -> int:
    """How many of a global batch are others: `config.prior.share` of them, rounded, but at least one of each kind.

    Raises ValueError for a share or weight that cannot be, and a batch without room for both.
    """
    prior, batch_size = config.prior, config.batch_size
    if not 0 < prior.share < 1:
        raise ValueError(f"config.prior.share={prior.share}: give a share between 0 and 1 of every batch")
    if not 0 <= prior.weight < float("inf"):
        raise ValueError(f"config.prior.weight={prior.weight}: give a number from 0 on, 1 = as much as the others")
    if batch_size < 2:
        raise ValueError(f"config.batch_size={batch_size} has no room for the pictures of config.prior: set it to 2")
    return min(max(int(prior.share * batch_size + 0.5), 1), batch_size - 1)


def open_prior(config: Config, path: str) -> Source:
    """Opens the others, which lie at `path`, as `open_source` opens `config.data.path`.

    They count whole, without masks, and those without a caption have `config.prior.prompt`. Raises FileNotFoundError or
    DataError, each naming the key and the mend.
    """
    config = config.copy_and_resolve_references()
    config.data.path, config.diffusion.masked_loss = path, False
    try:
        return _Prompted(open_source(config), config.prior.prompt)
    except (FileNotFoundError, DataError) as error:
        raise type(error)(str(error).replace("data.path", "prior.path")) from error


def assign(train: Source, prior: Source | None, config: Config) -> dict[str, Assignment]:
    """{"train": the size of each own picture, "prior": of each of the others, where there are any}.

    Own ones go where `assign_sizes` puts them; those that count r times fill a batch r times sooner. The others go to
    the same sizes: by aspect, the tallest first, they are dealt to them, to each as many as its share of the batches.
    So all are read alike, and what is cut off is the least; the small are made larger, whatever `config.data.upscale`
    says. Raises DataError where there are fewer than sizes.
    """
    filling = config.copy_and_resolve_references()
    own = config.batch_size - (0 if prior is None else count_of(config))
    filling.batch_size = -(-own // int(repeats_of(train).min()))
    assignments = {"train": assign_sizes(train, filling)}
    return assignments if prior is None else {**assignments, "prior": _deal(prior, train, assignments["train"])}


def stream(
    sources: dict[str, Source],  # "train" and perhaps "prior", as they were opened
    cached: dict[str, Source],  # the same, with what is cached
    assignments: dict[str, Assignment],  # of `assign`
    config: Config,
) -> tuple[Source, Assignment]:
    """What the loader reads: a source whose length counts repeats, `Mixed` where there are others, and its sizes."""
    parts = {name: _repeated(cached[name], assignments[name], repeats_of(sources[name])) for name in assignments}
    own, of_own = parts["train"]
    if "prior" not in parts:
        return own, of_own
    others, of_others = parts["prior"]
    count = count_of(config)
    said = (count, config.batch_size, len(own), len(others), config.prior.weight)
    logger.info("%d of the %d images of a batch are others: %d of its own, %d others, their loss times %g", *said)
    mixed = Mixed(own, others, count, config.prior.weight)
    return mixed, Assignment(of_own.sizes, np.concatenate([of_own.of_record, of_others.of_record]))


class Mixed:
    """The records of one source, then the others, each with a "loss_weight", float32: 1, and `weight` of the others.

    The others' "index" is beyond every one of the first.
    """

    def __init__(self, own: Source, others: Source, count: int, weight: float):
        self._own, self._others = own, others
        self._weights = np.float32(1), np.float32(weight)
        self.mixture = Mixture(len(own), count)

    def __len__(self) -> int:
        return len(self._own) + len(self._others)

    def __getitem__(self, index: int) -> dict:
        source, place = self._at(index)
        record, other = source[place], source is self._others
        return {**record, "index": record["index"] + _APART * other, "loss_weight": self._weights[other]}

    def fields(self, index: int) -> tuple[tuple[str, ...], ...]:
        source, place = self._at(index)
        return source.fields(place)

    def sizes(self) -> Int64[np.ndarray, "records 2"]:
        return np.concatenate([self._own.sizes(), self._others.sizes()])

    def full_size(self, index: int) -> tuple[int, int] | None:
        source, place = self._at(index)
        return source.full_size(place)

    def fingerprint(self) -> str:
        return fingerprints.digest(self._own.fingerprint(), self._others.fingerprint())

    def _at(self, index: int) -> tuple[Source, int]:
        first = len(self._own)
        return (self._own, int(index)) if index < first else (self._others, int(index) - first)


class _Prompted(Subset):
    """A whole source, of which records without a caption have `prompt`."""

    def __init__(self, source: Source, prompt: str):
        super().__init__(source, np.arange(len(source)))
        self._prompt = prompt

    def __getitem__(self, index: int) -> dict:
        return {**super().__getitem__(index), "fields": self.fields(index)}

    def fields(self, index: int) -> tuple[tuple[str, ...], ...]:
        fields = super().fields(index)
        return fields if any(fields) else tuple((self._prompt,) for _ in fields) or ((self._prompt,),)


def _repeated(
    source: Source, assignment: Assignment, repeats: Int64[np.ndarray, " records"]
) -> tuple[Source, Assignment]:
    if (repeats == 1).all():
        return source, assignment
    positions = np.repeat(np.arange(len(source)), repeats)
    return Subset(source, positions), assignment._replace(of_record=assignment.of_record[positions])


def _deal(prior: Source, train: Source, own: Assignment) -> Assignment:
    sizes = own.sizes
    if len(sizes) == 1:
        return Assignment(sizes, np.zeros(len(prior), np.int64))
    shapes = prior.sizes()
    readable = np.flatnonzero((shapes > 0).all(1))
    by_aspect = readable[np.argsort(shapes[readable, 1] / shapes[readable, 0], kind="stable")]
    copies = repeats_of(train) * (own.of_record >= 0)
    shares = np.bincount(np.maximum(own.of_record, 0), copies, len(sizes)).cumsum() / copies.sum()
    spare = len(readable) - len(sizes)  # each size has one at least
    if spare < 0:
        raise DataError(
            f"config.prior: {len(readable)} of {len(prior)} pictures can be read, and batches come in {len(sizes)} "
            "sizes: give at least as many, or set config.data.buckets.step=0"
        )
    ends = np.arange(1, len(sizes) + 1) + np.round(spare * shares).astype(np.int64)
    of_record = np.full(len(prior), -1, np.int64)
    of_record[by_aspect] = np.repeat(np.arange(len(sizes)), np.diff(ends, prepend=0))
    return Assignment(sizes, of_record)
