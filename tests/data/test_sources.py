import numpy as np
import pytest

from sd_jax.data import DataError, sources
from sd_jax.data.sources import Source, assign_sizes, open_source, split_held_out


class Numbers:
    """A source of `count` records without pictures."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"pixels": np.zeros((4, 4, 3), np.uint8), "fields": self.fields(index), "index": index}

    def fields(self, index):
        return ((f"{index}",), ())

    def sizes(self):
        return np.stack([np.arange(self.count), np.full(self.count, 4)], axis=1)

    def full_size(self, index):
        return 4 + index, 4

    def fingerprint(self):
        return f"numbers {self.count}"


def positions(subset):
    return {subset[i]["index"] for i in range(len(subset))}


def test_shapes_world(config):
    config.data.num_examples, config.data.resolution, config.data.two_objects = 7, 24, 1.0
    source = open_source(config)
    assert isinstance(source, Source) and len(source) == 7
    record = source[3]
    assert record["pixels"].shape == (24, 24, 3) and record["index"] == 3
    assert source.fields(3) == record["fields"] and source.sizes().tolist() == [[24, 24]] * 7
    assert len(source.world.scene(0).things) == 2
    first = source.fingerprint()
    for key, value in (("num_examples", 8), ("resolution", 25), ("two_objects", 0.5), ("aspects", (1.0, 2.0))):
        config.data[key] = value
        assert open_source(config).fingerprint() != first
    config.data.num_examples, config.seed = 30, -1  # any whole number is a seed
    source = open_source(config)
    assert [tuple(size) for size in source.sizes()] == [source[i]["pixels"].shape[:2] for i in range(30)]
    assert set(map(tuple, source.sizes())) == {(25, 25), (18, 35)}
    config.data.num_examples = 0
    with pytest.raises(DataError, match="data.num_examples=0"):
        open_source(config)


def test_sizes_are_asked_for_only_where_they_matter(config, caplog):
    class Unmeasured(Numbers):
        def sizes(self):
            pytest.fail("reads the headers of a run of one size")

    assignment = assign_sizes(Unmeasured(9), config)
    assert assignment.sizes == ((16, 16),) and assignment.of_record.tolist() == [0] * 9
    caplog.set_level("INFO", "sd_jax")
    config.data.upscale, config.data.resolution = False, 4
    assert assign_sizes(Numbers(9), config).of_record.tolist() == [-1] * 4 + [0] * 5
    assert "1 sizes: 4x4 5" in caplog.text and "left out 1 without a size and 3 too small" in caplog.text
    config.data.buckets.step, config.data.upscale = 2, True
    assert (2, 8) in assign_sizes(Numbers(100), config).sizes or len(assign_sizes(Numbers(100), config).sizes) > 1


def test_large_jpegs_cover_every_size(config, photos):
    from PIL import Image

    Image.fromarray(np.zeros((900, 1700, 3), np.uint8)).save(photos / "00.jpg")
    config.data.path = str(photos)
    assert open_source(config)[0]["pixels"].shape == (113, 213, 3)  # at an eighth
    config.data.buckets.update(step=8, max_side=200, max_area=1600)
    assert open_source(config)[0]["pixels"].shape == (225, 425, 3)  # at a quarter: both sides are at least 200


def test_captions_of_a_large_source_are_sampled_evenly():
    assert list(sources.captions(Numbers(5))) == list("01234")
    assert list(sources.captions(Numbers(1001), most=5)) == ["0", "250", "500", "750", "1000"]
    assert list(sources.captions(Numbers(0))) == []


@pytest.mark.parametrize(("held_out", "least", "most"), [(0.1, 70, 130), (0.5, 440, 560), (25, 25, 25), (1.0, 1, 1)])
def test_held_out_records(held_out, least, most):
    train, held = split_held_out(Numbers(1000), held_out, seed=0)
    assert least <= len(held) <= most
    assert positions(train) | positions(held) == set(range(1000)) and not positions(train) & positions(held)
    assert train.fields(0) == ((str(train[0]["index"]),), ()) and train.full_size(0) == (4 + train[0]["index"], 4)
    assert train.sizes()[:, 0].tolist() == [train[i]["index"] for i in range(len(train))]


def test_who_is_held_out_hangs_on_seed_and_index():
    of = lambda count, seed: positions(split_held_out(Numbers(count), 0.1, seed)[1])  # noqa: E731
    assert of(1000, 0) == of(1000, 0) != of(1000, 1)
    assert of(1000, 0) == {i for i in of(2000, 0) if i < 1000}  # more data move nobody across
    overlap = len(of(1000, 0) & of(1000, 1))
    assert overlap < 30  # neighbouring seeds are independent


def test_small_and_empty_shares():
    train, held = split_held_out(Numbers(3), 0.05, seed=0)
    assert (len(train), len(held)) == (2, 1)
    train, held = split_held_out(Numbers(3), 0.0, seed=0)
    assert (len(train), len(held)) == (3, 0)
    for seed in range(5):
        train, held = split_held_out(Numbers(1), 0.5, seed)
        assert (len(train), len(held)) == (1, 0)


@pytest.mark.parametrize("held_out", [-0.1, 1.5, 3, 4])
def test_impossible_shares(held_out):
    with pytest.raises(DataError, match="data.held_out="):
        split_held_out(Numbers(3), held_out, seed=0)


def test_fingerprints_of_subsets():
    train, held = split_held_out(Numbers(100), 0.1, seed=0)
    again, _ = split_held_out(Numbers(100), 0.1, seed=0)
    other, _ = split_held_out(Numbers(100), 0.1, seed=1)
    assert train.fingerprint() == again.fingerprint()
    assert len({train.fingerprint(), held.fingerprint(), other.fingerprint()}) == 3
