import math

import numpy as np
import pytest

from sd_jax.data import DataError
from sd_jax.data.buckets import Assignment, aspect_errors, assign, describe, make_sizes, one_size


@pytest.fixture
def bucketed(config):
    """NovelAI's sizes, and global batches of 64."""
    config.batch_size, config.data.resolution = 64, 512
    config.data.buckets.update(step=64, min_side=256, max_side=1024, max_area=512 * 768)
    return config


def photographs(count, seed=0):
    """Sizes as people have them: the cameras' and screens' aspects, upright and not, a third of them cut by hand."""
    rng = np.random.default_rng(seed)
    common = [3 / 2, 4 / 3, 16 / 9, 1.0, 5 / 4, 2.0, 3.0]
    aspects = rng.choice(common, count, p=[0.35, 0.3, 0.12, 0.12, 0.06, 0.04, 0.01])
    aspects *= np.where(rng.random(count) < 0.3, np.exp(rng.normal(0, 0.05, count)), 1.0)
    aspects = np.where(rng.random(count) < 0.35, 1 / aspects, aspects)
    areas = np.exp(rng.normal(math.log(1200 * 900), 0.8, count))
    return np.stack([np.sqrt(areas / aspects), np.sqrt(areas * aspects)], axis=1).astype(np.int64)


def counts_of(assignment):
    return np.bincount(assignment.of_record[assignment.of_record >= 0], minlength=len(assignment.sizes))


# -- Sizes -----------------------------------------------------------------------------------------------------------


def test_novelais_sizes(bucketed):
    tall = {(1024, 256), (1024, 320), (1024, 384), (960, 384), (896, 384), (832, 448), (768, 512), (704, 512)}
    tall |= {(640, 576)}
    sizes = make_sizes(bucketed.data)
    assert set(sizes) == tall | {size[::-1] for size in tall} | {(512, 512)} and len(sizes) == 19
    assert list(sizes) == sorted(sizes, key=lambda size: size[1] / size[0])


@pytest.mark.parametrize(("resolution", "step"), [(64, 8), (256, 32), (1024, 64), (512, 128)])
def test_sides_and_areas_by_default(config, resolution, step):
    config.data.resolution, config.data.buckets.step = resolution, step
    sizes = make_sizes(config.data)
    assert (resolution, resolution) in sizes and len(sizes) == len(set(sizes)) <= 4 * resolution / step + 1
    for height, width in sizes:
        assert height % step == width % step == 0 and (width, height) in sizes
        assert resolution / 2 <= min(height, width) and max(height, width) <= 2 * resolution
        assert height * width <= resolution**2 < (min(height, width) + step) * max(height, width)
    config.data.upscale = False
    smaller = make_sizes(config.data)
    assert smaller[: len(sizes)] == sizes and (resolution // 2, resolution // 2) in smaller
    assert len(set(smaller)) == len(smaller) <= 2 * len(sizes)  # two levels more, of shorter ranges


def test_without_buckets_there_is_one_size(config):
    for config.data.upscale in (True, False):
        assert make_sizes(config.data) == ((16, 16),)
    assert one_size(3, config.data).sizes == ((16, 16),) and one_size(3, config.data).of_record.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"step": 48}, "data.resolution=512 is no multiple of config.data.buckets.step=48"),
        ({"step": -8}, "buckets.step=-8"),
        ({"min_side": 576}, "min_side=576"),
        ({"max_side": 300}, "max_side=256"),
        ({"max_area": 1000}, "max_area=1000"),
    ],
)
def test_contradictions_are_named(bucketed, keys, said):
    bucketed.data.buckets.update(keys)
    with pytest.raises(ValueError, match=said):
        make_sizes(bucketed.data)


# -- Who goes where --------------------------------------------------------------------------------------------------


def test_photographs_lose_little(bucketed):
    """NovelAI had a mean aspect error of 3.3% on its own pictures."""
    bucketed.batch_size = 256
    sizes = photographs(30_000)
    assignment = assign(sizes, bucketed)
    cut, error = aspect_errors(assignment, sizes)
    assert 0.02 < cut <= error <= 0.035
    said = describe(assignment, sizes)
    assert f"{cut:.2%} of a picture is cut off" in said and "left out" not in said
    for (height, width), count in zip(assignment.sizes, counts_of(assignment), strict=True):
        assert count and f"{height}x{width} {count}" in said


def test_each_goes_to_the_nearest_aspect_where_batches_allow(bucketed):
    bucketed.batch_size = 1
    sizes = photographs(2000)
    assignment = assign(sizes, bucketed)
    ladder = np.log([width / height for height, width in make_sizes(bucketed.data)])
    aspects = np.log(sizes[:, 1] / sizes[:, 0])
    nearest = np.abs(aspects[:, None] - ladder).min(1)
    chosen = np.log([assignment.sizes[i][1] / assignment.sizes[i][0] for i in assignment.of_record])
    np.testing.assert_allclose(np.abs(aspects - chosen), nearest, atol=1e-12)
    assert aspect_errors(assignment, sizes)[1] == pytest.approx(nearest.mean())


def test_the_share_that_is_cut_off():
    """3:2 in a square loses a third, the square in 3:2 too."""
    assignment = Assignment(((10, 10), (10, 15)), np.array([0, 1, -1]))
    cut, error = aspect_errors(assignment, np.array([[20, 30], [40, 40], [9, 9]]))
    assert cut == pytest.approx(1 / 3) and error == pytest.approx(math.log(1.5))


@pytest.mark.parametrize("upscale", [True, False])
@pytest.mark.parametrize("count", [1, 40, 64, 65, 150, 1000, 5000])
def test_less_than_one_batch_is_over(bucketed, count, upscale):
    bucketed.data.upscale = upscale
    for seed in range(3):
        sizes = photographs(count, seed)
        assignment = assign(sizes, bucketed)
        counts = counts_of(assignment)
        assert (counts % 64).sum() < 64
        assert counts.min() >= 64 or len(counts) == 1  # everyone gets a turn
        if upscale:
            assert (assignment.of_record >= 0).all()
        else:
            chosen = np.array(assignment.sizes)[assignment.of_record]
            kept = assignment.of_record >= 0
            assert (chosen[kept] <= sizes[kept]).all()  # none is enlarged


def test_a_pooled_batch_goes_where_its_median_is(config):
    config.batch_size, config.data.resolution = 8, 64
    config.data.buckets.step = 32
    assert make_sizes(config.data) == ((128, 32), (96, 32), (64, 64), (32, 96), (32, 128))
    sizes = np.array([[100, 100]] * 11 + [[100, 400]] * 5 + [[400, 100]] * 13)
    assignment = assign(sizes, config)
    # Over are 3 squares, 5 wide ones, and 5 tall ones: a batch and 5, in the order of their aspects
    assert assignment.sizes == ((128, 32), (64, 64))
    assert counts_of(assignment).tolist() == [8, 21]
    assert (assignment.of_record[11:16] == 1).all()
    # Alone they are no batch: the squares stay, the wide ones go to the nearest size that there is
    assignment = assign(sizes[:15], config)
    assert assignment.sizes == ((64, 64),)
    assignment = assign(sizes[:13], config)
    assert assignment.sizes == ((64, 64),) and counts_of(assignment).tolist() == [13]


def test_pictures_without_a_size_are_left_out_and_told(bucketed):
    sizes = photographs(300)
    sizes[[3, 7]] = 0
    assignment = assign(sizes, bucketed)
    assert np.flatnonzero(assignment.of_record < 0).tolist() == [3, 7]
    assert "left out 2 without a size" in describe(assignment, sizes) and "small" not in describe(assignment, sizes)
    with pytest.raises(DataError, match=r"data.path=.*: of 2 pictures none can be read"):
        assign(np.zeros((2, 2), np.int64), bucketed)


def test_small_pictures_go_to_smaller_sizes_where_nothing_is_enlarged(bucketed):
    bucketed.data.upscale, bucketed.batch_size = False, 1
    wanted = {
        (3000, 2000): (768, 512),
        (767, 512): (512, 384),  # 768x512 does not fit; the nearest of the next level
        (512, 512): (512, 512),
        (511, 600): (384, 512),  # 512x576 does not fit
        (256, 300): (256, 256),
        (255, 900): None,
        (256, 1024): (256, 1024),
    }
    assignment = assign(np.array(list(wanted)), bucketed)
    found = [None if number < 0 else assignment.sizes[number] for number in assignment.of_record]
    assert dict(zip(wanted, found, strict=True)) == wanted
    assert "1 too small" in describe(assignment, np.array(list(wanted)))
    with pytest.raises(DataError, match=r"none can be read and is large enough .*data.upscale"):
        assign(np.array([[255, 900]]), bucketed)
    bucketed.data.buckets.step = 0
    assignment = assign(np.array(list(wanted)), bucketed)
    assert assignment.sizes == ((512, 512),) and assignment.of_record.tolist() == [0, 0, 0, -1, -1, -1, -1]


def test_an_assignment_hangs_on_its_arguments_alone(bucketed):
    sizes = photographs(3000)
    first, again = assign(sizes, bucketed), assign(sizes.copy(), bucketed)
    assert first.sizes == again.sizes
    np.testing.assert_array_equal(first.of_record, again.of_record)


def test_a_million_pictures_take_seconds(bucketed):
    import time

    sizes = np.tile(photographs(20_000), (10, 1))
    started = time.process_time()
    assert counts_of(assign(sizes, bucketed)).sum() == 200_000
    assert time.process_time() - started < 5  # a fifth of them in about 0.2
