"""Doubles: the bands find what comparing all with all finds."""

import numpy as np
import pytest

from sd_jax.data import duplicates


def by_all_pairs(digest, dhash, phash, distance):
    exact, near = np.zeros(len(digest), bool), np.zeros(len(digest), bool)
    for j in range(len(digest)):
        if digest[j] in digest[:j]:
            exact[j] = True
            continue
        for i in range(j):
            if distance is None or exact[i] or near[i]:
                continue
            if max(int(h[i] ^ h[j]).bit_count() for h in (dhash, phash)) <= distance:
                near[j] = True
    return exact, near


@pytest.mark.parametrize("distance", [None, 0, 1, 3, 7])
def test_equals_all_pairs(distance):
    rng = np.random.default_rng(0)
    number = lambda n: rng.integers(0, 2**64, n, np.uint64)  # noqa: E731
    base = np.stack([number(12), number(12)])
    hashes = base[:, rng.integers(0, 12, 300)]
    for _ in range(6):  # flip up to six bits of each
        flips = np.uint64(1) << rng.integers(0, 64, hashes.shape, np.uint64)
        hashes = np.where(rng.random(hashes.shape) < 0.2, hashes ^ flips, hashes)
    digest = rng.integers(0, 250, 300).astype(np.uint64)
    found = duplicates.find(digest, *hashes, distance)
    expected = by_all_pairs(digest, *hashes, distance)
    np.testing.assert_array_equal(found, expected)
    assert expected[0].any() and (distance is None or expected[1].any() and not (expected[0] | expected[1]).all())


def test_later_records_change_nothing_before_them():
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**64, (2, 5), np.uint64)[:, rng.integers(0, 5, 60)]
    hashes ^= np.uint64(1) << rng.integers(0, 64, hashes.shape, np.uint64)
    digest = np.arange(60, dtype=np.uint64)
    whole = duplicates.find(digest, *hashes, 2)
    for n in (1, 20, 40):
        np.testing.assert_array_equal(duplicates.find(digest[:n], *hashes[:, :n], 2), [part[:n] for part in whole])


def test_limits():
    none = np.zeros(0, np.uint64)
    assert [part.size for part in duplicates.find(none, none, none, 3)] == [0, 0]
    with pytest.raises(ValueError, match="distance of 8 bits: give 0 to 7"):
        duplicates.find(none, none, none, 8)
