"""Ruin at known rates, with its truth."""

import numpy as np
import pytest

from sd_jax.data.sources import ShapesSource, Source
from sd_jax.data.spoil import RUINS, SpoiledSource

RATES = {"blur": 0.2, "watermark": 0.1, "jpeg": 0.1}


@pytest.fixture
def source(config):
    config.data.num_examples = 2000
    config.data.resolution = 32
    config.data.aspects = (0.7, 1.0)
    return ShapesSource(config)


def test_records_and_their_truth(source):
    spoiled = SpoiledSource(source, RATES, seed=3)
    assert isinstance(spoiled, Source) and len(spoiled) == 2000
    for index in range(40):
        plain, record = source[index], spoiled[index]
        assert record["fields"] == plain["fields"] and record["ruin"] == spoiled.ruin(index)
        assert record["pixels"].shape == plain["pixels"].shape and record["pixels"].dtype == np.uint8
        assert np.array_equal(record["pixels"], plain["pixels"]) == (record["ruin"] == "none")
        np.testing.assert_array_equal(record["pixels"], spoiled[index]["pixels"])
        assert record["rating"] == spoiled.rating(index)


def test_rates_ratings_and_seeds(source):
    spoiled, other = SpoiledSource(source, RATES, seed=3), SpoiledSource(source, RATES, seed=4)
    ruins = np.array([spoiled.ruin(i) for i in range(2000)])
    for name, rate in {**RATES, "none": 0.6}.items():
        assert (ruins == name).mean() == pytest.approx(rate, abs=3.5 * np.sqrt(rate * (1 - rate) / 2000))
    assert (ruins != [other.ruin(i) for i in range(2000)]).any()
    ratings = np.array([spoiled.rating(i) for i in range(500)])
    good = ruins[:500] == "none"
    assert ratings[good].mean() == pytest.approx(7.0, abs=0.2) and ratings[~good].mean() == pytest.approx(3.0, abs=0.2)
    assert {SpoiledSource(source, rates, s).fingerprint() for rates, s in ((RATES, 3), (RATES, 4), ({}, 3))} == {
        spoiled.fingerprint(),
        other.fingerprint(),
        SpoiledSource(source, {}, 3).fingerprint(),
    }
    assert len({spoiled.fingerprint(), other.fingerprint(), source.fingerprint()}) == 3


@pytest.mark.parametrize("name", RUINS)
@pytest.mark.parametrize("shape", [(64, 64), (17, 90), (8, 8)])
def test_every_ruin_of_any_picture(name, shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    before = pixels.copy()
    one, same, other = (RUINS[name](pixels, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    np.testing.assert_array_equal(pixels, before)
    assert one.shape == pixels.shape and (one != pixels).any() and (one != other).any()


def test_rates_that_cannot_be(source):
    with pytest.raises(ValueError, match="unknown ruin grain: choose from blur, watermark, jpeg"):
        SpoiledSource(source, {"grain": 0.1})
    with pytest.raises(ValueError, match="sum to at most 1"):
        SpoiledSource(source, {"blur": 0.7, "jpeg": 0.4})
