"""Improved precision and recall (Kynkaanniemi et al. 2019): which part of each set lies within the other's manifold.

The manifold of a set is the union of balls around its samples, each as wide as the distance to the k-th nearest other
sample of the same set. Precision is the share of generated samples within that of the real ones, recall the converse.
"""

from typing import NamedTuple

import numpy as np

from sd_jax.evals.fid import Features

_NUMBERS = 2**25  # distances that are held at once: 256 MiB


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


def precision_recall(
    features: Features,  # of the generated pictures
    reference: Features,  # of the real ones
    k: int = 3,
) -> PrecisionRecall:
    """Euclidean distances in float64, a block at a time. Raises ValueError for sets of at most k samples."""
    features, reference = (np.asarray(a, np.float64) for a in (features, reference))
    if min(len(features), len(reference)) <= k:
        raise ValueError(f"sets of {len(features)} and {len(reference)} samples: each needs more than k={k}")
    precision = _within(features, reference, _squared_radii(reference, k)).mean()
    recall = _within(reference, features, _squared_radii(features, k)).mean()
    return PrecisionRecall(float(precision), float(recall))


def _squared_radii(samples: np.ndarray, k: int) -> np.ndarray:
    """[samples]: squared distance to the k-th nearest other one. (The nearest of all is the sample itself.)"""
    radii = [np.partition(block, k, axis=1)[:, k] for block in _squared_distances(samples, samples)]
    return np.concatenate(radii)


def _within(samples: np.ndarray, centres: np.ndarray, squared_radii: np.ndarray) -> np.ndarray:
    """bool [samples]: whether each lies in a ball, its edge included."""
    return np.concatenate([(d <= squared_radii[None]).any(axis=1) for d in _squared_distances(samples, centres)])


def _squared_distances(a: np.ndarray, b: np.ndarray):
    """Yields [rows, len(b)] of |a_i|^2 + |b_j|^2 - 2 a_i.b_j, for blocks of rows of a.

    What is below the rounding of that difference is 0: copies of one picture have no distance.
    """
    of_b = np.square(b).sum(axis=1)
    rows = max(1, _NUMBERS // len(b))
    for at in range(0, len(a), rows):
        block = a[at : at + rows]
        sums = np.square(block).sum(axis=1)[:, None] + of_b[None]
        squared = sums - 2.0 * (block @ b.T)
        yield np.where(squared > 1e-13 * sums, squared, 0.0)
