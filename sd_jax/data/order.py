"""One global schedule of batches, that every host works out for itself from a seed.

An epoch: the records of each size are shuffled and cut into global batches, and the batches of all sizes are shuffled.
What makes no whole batch, less than one batch over all sizes (`buckets.assign`), is left out of this epoch, by chance
of the shuffle. Fewer records than one batch are read as an endless row of shuffles, which is cut into batches.
"""

import numpy as np
from jaxtyping import Int64

from sd_jax.data.buckets import Assignment


class Order:
    """`batch(n)` hangs on the arguments and n alone, so any host may begin anywhere. Holds one epoch at a time."""

    def __init__(
        self,
        assignment: Assignment,  # for this batch_size
        batch_size: int,  # global
        seed: int,
    ):
        of_record = assignment.of_record
        by_size = np.argsort(of_record, kind="stable")[np.count_nonzero(of_record < 0) :]
        counts = np.bincount(of_record[of_record >= 0], minlength=len(assignment.sizes))
        self.members: list[Int64[np.ndarray, " records"]] = np.split(by_size, np.cumsum(counts)[:-1])
        self._batch_size, self._seed = batch_size, seed % 2**32
        self._sizes = np.repeat(np.arange(len(counts)), counts // batch_size)  # of an epoch, unshuffled
        if not len(self._sizes) and len(counts) > 1:
            raise ValueError(f"an assignment of {len(by_size)} records to {len(counts)} sizes makes no batch")
        self.batches_per_epoch = max(len(self._sizes), 1)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def batch(self, n: int) -> tuple[int, Int64[np.ndarray, " batch"]]:
        """(number of its size, the records) of the n-th global batch of the run."""
        if len(self.members) == 1 and len(self.members[0]) < self._batch_size:
            return 0, self._of_few(n)
        epoch, place = divmod(n, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = None  # before there is another
            self._epoch = (epoch, *self._shuffled(epoch))
        _, order, batches = self._epoch
        return int(self._sizes[order[place]]), batches[order[place]]

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(which batch comes when [batches], the records of each, size by size [batches, batch_size])."""
        rng = np.random.default_rng((self._seed, epoch))
        batches = [
            rng.permutation(records)[: len(records) // self._batch_size * self._batch_size] for records in self.members
        ]
        return rng.permutation(self.batches_per_epoch), np.concatenate(batches).reshape(-1, self._batch_size)

    def _of_few(self, n: int) -> np.ndarray:
        """The n-th batch where one batch takes several passes through the records."""
        (records,) = self.members
        start = n * self._batch_size
        first, last = start // len(records), (start + self._batch_size - 1) // len(records)
        passes = [np.random.default_rng((self._seed, i)).permutation(records) for i in range(first, last + 1)]
        return np.concatenate(passes)[start - first * len(records) :][: self._batch_size]
