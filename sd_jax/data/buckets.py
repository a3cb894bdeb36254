"""Which size each picture is trained at: several aspect ratios of about one area.

The sizes are NovelAI's (2022, github.com/NovelAI/novelai-aspect-ratio-bucketing): for each width from `min_side` to
`max_side`, in steps, the greatest height with height * width <= `max_area`; the same with height and width exchanged;
and the square of `resolution`. Where nothing may be enlarged (`config.data.upscale=False`) there are levels of smaller
areas below, each at most half of the one above, down to the square of `min_side`.

A picture is made to cover its size and cut, never squashed; the share of it that is cut off is

    1 - exp(-|log(picture's aspect) - log(size's aspect)|),    aspect = width / height                   (1)

so each goes to the size of the nearest log aspect; where nothing may be enlarged, to that of the highest level on which
the nearest fits into it. Who goes where is decided once for a whole run, from the sizes of all pictures.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from ml_collections import ConfigDict, FrozenConfigDict

from sd_jax.data import DataError

Size = tuple[int, int]  # height, width
Config = ConfigDict | FrozenConfigDict


class Assignment(NamedTuple):
    """The sizes in use, and for each record which of them it is trained at."""

    sizes: tuple[Size, ...]  # by aspect, the tallest first
    of_record: Int64[np.ndarray, " records"]  # -1 = left out


def make_sizes(data: Config) -> tuple[Size, ...]:
    """All sizes that `config.data` allows: (height, width), level by level, on each by aspect.

    Raises ValueError where the keys of `config.data.buckets` contradict each other.
    """
    return tuple(dict.fromkeys(size for level in _levels(data) for size in level))


def one_size(num_records: int, data: Config) -> Assignment:
    """Every record at the square of `config.data.resolution`."""
    return Assignment(((data.resolution, data.resolution),), np.zeros(num_records, np.int64))


def assign(source_sizes: Int64[np.ndarray, "records 2"], config: Config) -> Assignment:
    """(height, width) of every picture -> the size that it is trained at; (0, 0) says that it could not be read.

    Each goes to its nearest size, as above. Of every size the pictures beyond a whole number of global batches, those
    that fit it worst, are put in the order of their aspects and cut into batches, each of which goes to the size that
    is nearest to its median; one of them has the rest that makes no batch. Where all these are less than a batch, each
    stays where it is, or goes to the nearest size that has a batch. So less than one global batch is over in all.
    Pictures without a size are left out (-1), and where nothing may be enlarged those that are smaller than all sizes.
    Raises DataError where that leaves none.
    """
    ladder = _Ladder(config.data)
    shapes = np.maximum(source_sizes, 1)
    aspects = np.log(shapes[:, 1]) - np.log(shapes[:, 0])
    of_record = np.where((source_sizes > 0).all(1), ladder.nearest(aspects, shapes), -1)
    if not (of_record >= 0).any():
        raise DataError(
            f"data.path={str(config.data.path)!r}: of {len(of_record)} pictures none can be read and is large enough "
            "to train on: see data.upscale and data.buckets"
        )
    _fill_batches(of_record, aspects, shapes, ladder, config.batch_size)
    used = np.unique(of_record[of_record >= 0])
    used = used[np.argsort(ladder.aspects[used], kind="stable")]
    numbers = np.full(len(ladder.sizes) + 1, -1, np.int64)  # the last one is that of -1
    numbers[used] = np.arange(len(used))
    return Assignment(tuple(ladder.sizes[number] for number in used), numbers[of_record])


def _fill_batches(
    of_record: np.ndarray, aspects: np.ndarray, shapes: np.ndarray, ladder: "_Ladder", batch: int
) -> None:
    """Moves those beyond whole batches, in place."""
    kept = np.flatnonzero(of_record >= 0)
    error = np.abs(aspects[kept] - ladder.aspects[of_record[kept]])
    kept = kept[np.lexsort((error, of_record[kept]))]  # size by size, who fits best first
    counts = np.bincount(of_record[kept], minlength=len(ladder.sizes))
    rank = np.arange(len(kept)) - np.repeat(np.cumsum(counts) - counts, counts)
    over = kept[rank >= np.repeat(counts // batch * batch, counts)]
    if len(over) < batch <= len(kept):
        # No batch can be made of them: only those whose size has none must go
        full = np.flatnonzero(counts >= batch)
        lost = over[counts[of_record[over]] < batch]
        error = np.abs(aspects[lost, None] - ladder.aspects[full])
        error[~ladder.fits(full, shapes[lost, None])] = np.inf
        of_record[lost] = np.where(error.min(1) < np.inf, full[error.argmin(1)], -1)
        return
    # Batches of neighbours; the rest of less than a batch joins the one in the middle, where all aspects are near
    over = over[np.lexsort((aspects[over], ladder.levels[of_record[over]]))]
    lengths = np.full(max(len(over) // batch, 1), batch)
    lengths[len(lengths) // 2] += len(over) - lengths.sum()
    groups = np.split(over, np.cumsum(lengths)[:-1])
    medians = np.array([np.median(aspects[group]) for group in groups])
    smallest = np.array([shapes[group].min(0) for group in groups])
    of_record[over] = np.repeat(ladder.nearest(medians, smallest), lengths)


def describe(assignment: Assignment, source_sizes: Int64[np.ndarray, "records 2"]) -> str:
    """For the log: the sizes in use and how many pictures each has, what is cut off (Eq. 1), how many are left out."""
    of_record = assignment.of_record
    counts = np.bincount(of_record[of_record >= 0], minlength=len(assignment.sizes))
    cut, error = aspect_errors(assignment, source_sizes)
    unreadable = int((source_sizes <= 0).any(1).sum())
    small = int((of_record < 0).sum()) - unreadable
    left_out = [f"{n} {why}" for n, why in ((unreadable, "without a size"), (small, "too small")) if n]
    return (
        f"{len(counts)} sizes: "
        + ", ".join(f"{h}x{w} {n}" for (h, w), n in zip(assignment.sizes, counts, strict=True))
        + f" (height x width, pictures); on average {cut:.2%} of a picture is cut off (|log aspect ratio| {error:.4f})"
        + (f"; left out {' and '.join(left_out)}" if left_out else "")
    )


def aspect_errors(assignment: Assignment, source_sizes: Int64[np.ndarray, "records 2"]) -> tuple[float, float]:
    """Means over the pictures that are trained on: (the share that is cut off, the distance of the log aspects)."""
    kept = assignment.of_record >= 0
    heights, widths = np.asarray(assignment.sizes)[assignment.of_record[kept]].T
    error = np.abs(np.log(widths / heights) - np.log(source_sizes[kept, 1] / source_sizes[kept, 0]))
    return float(np.mean(-np.expm1(-error))), float(error.mean())


# -- The ladder ------------------------------------------------------------------------------------------------------


class _Ladder:
    """All sizes, level by level, with their log aspects."""

    def __init__(self, data: Config):
        levels = _levels(data)
        first = {size: i for i, level in reversed(list(enumerate(levels))) for size in level}  # level of each size
        self.sizes = make_sizes(data)
        self.shapes = np.asarray(self.sizes, np.int64)
        self.levels = np.array([first[size] for size in self.sizes])
        self._levels = [np.array([self.sizes.index(size) for size in level]) for level in levels]
        self.aspects = np.log(self.shapes[:, 1]) - np.log(self.shapes[:, 0])
        self._upscale = bool(data.upscale)

    def fits(self, numbers: np.ndarray, shapes: np.ndarray) -> np.ndarray:
        """Whether pictures of these shapes need not be enlarged to cover the sizes of these numbers."""
        return (self.shapes[numbers] <= shapes).all(-1) | self._upscale

    def nearest(self, aspects: np.ndarray, shapes: np.ndarray) -> np.ndarray:
        """The number of the size for each picture; -1 where all are too large."""
        chosen = np.full(len(aspects), -1, np.int64)
        for level in reversed(self._levels):  # from the smallest: a larger one that fits comes instead
            between = (self.aspects[level][1:] + self.aspects[level][:-1]) / 2
            number = level[np.searchsorted(between, aspects)]
            chosen = np.where(self.fits(number, shapes), number, chosen)
        return chosen


def _levels(data: Config) -> list[list[Size]]:
    """The sizes of each area, the largest area first; on each by aspect."""
    side, step = data.resolution, data.buckets.step
    if step < 0 or side < 1:
        raise ValueError(f"config.data.resolution={side}, buckets.step={step}: give pixels, and 0 for no buckets")
    if step == 0:
        return [[(side, side)]]
    low = -(-(data.buckets.min_side or side // 2) // step) * step  # up to a multiple
    high = (data.buckets.max_side or 2 * side) // step * step
    area = data.buckets.max_area or side * side
    if side % step:
        raise ValueError(f"config.data.resolution={side} is no multiple of config.data.buckets.step={step}")
    if not low <= side <= high or area < side * side:
        raise ValueError(
            f"config.data.buckets: a square of data.resolution={side} is outside of min_side={low}, max_side={high}, "
            f"max_area={area}"
        )
    levels = [_level(low, high, step, area, side)]
    if not data.upscale and side > low:
        count = math.ceil(math.log2(area / low**2))
        for i in range(1, count + 1):
            smaller = round(area * (low * low / area) ** (i / count))
            levels.append(_level(low, high, step, smaller, math.isqrt(smaller) // step * step))
    return levels


def _level(low: int, high: int, step: int, area: int, side: int) -> list[Size]:
    sides = range(low, high + 1, step)
    tall = [(min(high, area // width // step * step), width) for width in sides]
    tall = [(height, width) for height, width in tall if height >= low]
    sizes = sorted({*tall, *((width, height) for height, width in tall), (side, side)}, key=math.prod)
    best = {width / height: (height, width) for height, width in sizes}  # of one aspect the largest
    return [best[aspect] for aspect in sorted(best)]
