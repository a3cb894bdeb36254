"""Measures against hand-made truths, and against ruin whose truth is known."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import fft, stats

from sd_jax.data import quality, spoil
from sd_jax.data.shapes import ShapesWorld


def auc(high: list[float], low: list[float]) -> float:
    """How often one of `high` is above one of `low`."""
    ranks = stats.rankdata([*high, *low])[: len(high)]
    return (ranks.sum() - len(high) * (len(high) + 1) / 2) / (len(high) * len(low))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def reencoded(pixels: np.ndarray, quality: int) -> np.ndarray:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality)
    return np.array(Image.open(out))


def photo(seed: int = 0, height: int = 96, width: int = 128) -> np.ndarray:
    """Soft, and of many tones."""
    small = Image.fromarray(noise(height // 16, width // 16, seed))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


def test_sharpness_by_hand():
    grey = np.zeros((5, 5), np.uint8)
    grey[2, 2] = 10
    expected = np.array([[0, 10, 0], [10, -40, 10], [0, 10, 0]], np.float64).var()
    assert quality.sharpness(grey) == pytest.approx(expected)
    assert quality.sharpness(np.zeros((2, 9), np.uint8)) == 0
    ramp = np.tile(np.arange(20, dtype=np.uint8), (20, 1))
    assert quality.sharpness(ramp) == 0


def test_blockiness_by_hand():
    blocks = 4 * np.add.outer(np.arange(32) // 8, np.arange(32) // 8).astype(np.uint8)
    assert quality.blockiness(blocks) == pytest.approx(4.0)  # a step of 4 at every border, none elsewhere
    assert quality.blockiness(blocks[3:, 3:].copy()) < 1  # another grid
    bars = np.tile(blocks[:1], (32, 1))
    assert quality.blockiness(bars) == 0
    assert quality.blockiness(blocks[:15]) == 0
    plain, ruined = (quality.blockiness(quality.luma(p)) for p in (photo(), reencoded(photo(), 5)))
    assert ruined > 2 > 0.3 > abs(plain)


@pytest.mark.parametrize("side", [64, 96])
def test_measures_find_known_ruin(side):
    world = ShapesWorld(side, 120, two_objects=0.3)
    good = [world[i]["pixels"] for i in range(len(world))]
    ruined = {n: [f(p, np.random.default_rng(i)) for i, p in enumerate(good)] for n, f in spoil.RUINS.items()}
    measure = lambda f, pictures: [f(quality.luma(p)) for p in pictures]  # noqa: E731
    sharp, blocky = quality.sharpness, quality.blockiness
    assert auc(measure(sharp, good), measure(sharp, ruined["blur"])) > 0.94
    assert auc(measure(blocky, ruined["jpeg"]), measure(blocky, good)) > 0.97


def test_phash_is_that_of_the_cosine_transform():
    grey = quality.luma(photo())
    small = np.asarray(Image.fromarray(grey).resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    low = fft.dct(fft.dct(small, axis=0), axis=1)[:8, :8]
    bits = "".join("01"[int(bit)] for bit in (low > np.median(low)).ravel())
    assert quality.phash(grey) == int(bits, 2)


def test_dhash_by_hand():
    small = np.random.default_rng(1).integers(0, 256, (8, 9), np.uint8)
    bits = "".join("01"[int(b > a)] for row in small for a, b in zip(row[:-1], row[1:], strict=True))
    assert quality.dhash(small) == int(bits, 2)


@pytest.mark.parametrize("name", ["dhash", "phash"])
def test_hashes_stay_near_for_doubles_and_far_for_others(name):
    hashed = lambda pixels: np.array([getattr(quality, name)(quality.luma(pixels))], np.uint64)  # noqa: E731
    for seed in range(5):
        whole = photo(seed)
        for double in (
            reencoded(whole, 60),
            np.array(Image.fromarray(whole).resize((80, 60), Image.Resampling.LANCZOS)),
        ):
            assert quality.distances(hashed(whole), hashed(double))[0] <= 4
        assert quality.distances(hashed(whole), hashed(photo(seed + 100)))[0] >= 12


def test_all_measures_of_any_picture():
    for pixels in (noise(1, 1), noise(3, 200), np.zeros((64, 48, 3), np.uint8)):
        found = quality.measures(pixels)
        assert (found["height"], found["width"]) == pixels.shape[:2]
        assert all(np.isfinite(found[name]) for name in ("sharpness", "blockiness"))
        assert all(len(found[name]) == 16 and int(found[name], 16) >= 0 for name in ("dhash", "phash"))
