"""One global schedule of batches, that every host works out for itself from a seed.

An epoch: the records of each size are shuffled and cut into global batches, and the batches of all sizes are shuffled.
What makes no whole batch, less than one batch over all sizes (`buckets.assign`; where records are there several times,
less than one of each size), is left out of this epoch, by chance of the shuffle. Fewer records than one batch are read
as an endless row of shuffles, which is cut into batches. Records that are mixed in (`mixed.py`) are such rows, one of
each size; they take the same places of every batch, evenly spread.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from sd_jax.data.buckets import Assignment


class Mixture(NamedTuple):
    first: int  # the records from this one on are mixed in,
    count: int  # so many of them in every global batch


class Order:
    """`batch(n)` hangs on the arguments and n alone, so any host may begin anywhere. Holds one epoch at a time."""

    def __init__(
        self,
        assignment: Assignment,  # for this batch_size, less what is mixed in
        batch_size: int,  # global
        seed: int,
        mixture: Mixture | None = None,  # None = nothing is mixed in
    ):
        first, self._mixed = mixture or Mixture(len(assignment.of_record), 0)
        self._first, self._own, self._seed = first, batch_size - self._mixed, seed % 2**32
        self.members = _by_size(assignment.of_record[:first], len(assignment.sizes))
        self._others = [first + them for them in _by_size(assignment.of_record[first:], len(assignment.sizes))]
        self._is_other = np.diff(np.arange(batch_size + 1) * self._mixed // batch_size) > 0  # places of a batch
        counts = np.array([len(records) for records in self.members])
        self._sizes = np.repeat(np.arange(len(counts)), counts // self._own)  # of an epoch, unshuffled
        if not len(self._sizes) and len(counts) > 1:
            raise ValueError(f"an assignment of {counts.sum()} records to {len(counts)} sizes makes no batch")
        if mixture and not all(map(len, self._others)):
            raise ValueError(f"of the {len(counts)} sizes not each has a record to be mixed in")
        self.batches_per_epoch = max(len(self._sizes), 1)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def batch(self, n: int) -> tuple[int, Int64[np.ndarray, " batch"]]:
        """(number of its size, the records) of the n-th global batch of the run."""
        if len(self.members) == 1 and len(self.members[0]) < self._own:
            (members,) = self.members
            return 0, self._with_others(self._row(members, n, 1, self._own), 0, n)[0]
        epoch, place = divmod(n, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = None  # before there is another
            self._epoch = (epoch, *self._shuffled(epoch))
        _, order, batches = self._epoch
        return int(self._sizes[order[place]]), batches[order[place]]

    def like(self, number: int, record: int) -> Int64[np.ndarray, " records"]:
        """The records that may stand for this one, in a batch of the size of this number."""
        return (self.members if record < self._first else self._others)[number]

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(which batch comes when [batches], the records of each, size by size [batches, batch_size])."""
        rng = np.random.default_rng((self._seed, epoch))
        batches = []
        for number, records in enumerate(self.members):
            whole = rng.permutation(records)[: len(records) // self._own * self._own].reshape(-1, self._own)
            batches.append(self._with_others(whole, number, epoch))
        return rng.permutation(self.batches_per_epoch), np.concatenate(batches)

    def _with_others(self, own: np.ndarray, number: int, epoch: int) -> np.ndarray:
        """An epoch's batches of one size, [batches, own] -> [batches, batch_size]."""
        if not self._mixed:
            return own
        batches = np.empty((len(own), len(self._is_other)), np.int64)
        batches[:, ~self._is_other] = own
        batches[:, self._is_other] = self._row(self._others[number], epoch, len(own), self._mixed, 1 + number)
        return batches

    def _row(self, records: np.ndarray, n: int, batches: int, size: int, *key: int) -> np.ndarray:
        """The n-th part, [batches, size], of an endless row of shuffles of `records`."""
        start, count = n * batches * size, batches * size
        first, last = start // len(records), (start + count - 1) // len(records)
        shuffled = (np.random.default_rng((self._seed, i, *key)).permutation(records) for i in range(first, last + 1))
        row = np.concatenate([records[:0], *shuffled])
        return row[start - first * len(records) :][:count].reshape(batches, size)


def _by_size(of_record: np.ndarray, num_sizes: int) -> list[Int64[np.ndarray, " records"]]:
    """The records of each size, in their order."""
    by_size = np.argsort(of_record, kind="stable")[np.count_nonzero(of_record < 0) :]
    counts = np.bincount(of_record[of_record >= 0], minlength=num_sizes)
    return np.split(by_size, np.cumsum(counts)[:-1])
