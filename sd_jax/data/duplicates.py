"""Doubles in a whole data set, found by hashes alone: 8 bytes a picture for each kind of hash, no picture in memory.

A record goes where an earlier one that stays is its double, so records that come later change nothing before them:

    exact   the same bytes in their files
    near    dhash and phash (`quality`) both differ in at most `distance` of 64 bits

Candidates for the latter share one of `distance` + 1 bands of phash (pigeonhole: that many differing bits leave one
band untouched). n different hashes cost about n^2 / 2^(64 / bands - 1) comparisons: seconds for a million at distance
3, an hour for 10^8.
"""

import numpy as np
from jaxtyping import Bool, UInt64

from sd_jax.data.quality import distances

MOST_DISTANCE = 7  # beyond, the bands are so short that nearly all pairs are candidates
_CHUNK = 2**20  # pairs that are compared at once


def find(
    digest: UInt64[np.ndarray, " n"],  # of the files' bytes
    dhash: UInt64[np.ndarray, " n"],
    phash: UInt64[np.ndarray, " n"],
    distance: int | None,  # of near doubles; None = exact ones only
) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """(which records are exact doubles of an earlier one, which are near ones besides). Raises ValueError."""
    if distance is not None and not 0 <= distance <= MOST_DISTANCE:
        raise ValueError(f"near duplicates at a distance of {distance} bits: give 0 to {MOST_DISTANCE}")
    exact = np.ones(len(digest), bool)
    exact[np.unique(digest, return_index=True)[1]] = False
    near = np.zeros(len(digest), bool)
    if distance is None:
        return exact, near
    # Those of equal hashes at once, however many they are: one of each stays
    left = np.flatnonzero(~exact)
    _, first = np.unique(np.stack([phash[left], dhash[left]], 1), axis=0, return_index=True)
    alone = left[np.sort(first)]
    near[left] = True
    near[alone] = False
    earlier, later = _pairs(dhash[alone], phash[alone], distance)
    # In the order of the later one, whose earlier ones are then all decided
    goes = np.zeros(len(alone), bool)
    for i, j in zip(earlier.tolist(), later.tolist(), strict=True):
        if not goes[i]:
            goes[j] = True
    near[alone[goes]] = True
    return exact, near


def _pairs(dhash: np.ndarray, phash: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """All i < j that are near each other, by j, then by i."""
    found = [np.zeros((0, 2), np.int64)]
    edges = np.linspace(0, 64, distance + 2).astype(np.int64)
    for low, high in zip(edges[:-1], edges[1:], strict=True) if distance else ():
        band = (phash >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        band = band[order]
        # Each with the one `step` places on, as long as any of them is of the same band
        for step in range(1, len(order)):
            same = np.flatnonzero(band[step:] == band[:-step])
            if not len(same):
                break
            for begin in range(0, len(same), _CHUNK):
                i, j = order[same[begin : begin + _CHUNK]], order[same[begin : begin + _CHUNK] + step]
                close = (distances(phash[i], phash[j]) <= distance) & (distances(dhash[i], dhash[j]) <= distance)
                found.append(np.stack([i[close], j[close]], 1))
    pairs = np.unique(np.concatenate(found)[:, ::-1], axis=0)
    return pairs[:, 1], pairs[:, 0]
