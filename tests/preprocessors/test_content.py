"""What is taken away of a picture, and what is left."""

import math

import numpy as np
import pytest

from sd_jax.data.shapes import draw_scene, render
from sd_jax.preprocessors.content import blur, inpaint, shuffle, tile


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


FLAT = np.full((20, 30, 3), (10, 200, 77), np.uint8)


def test_a_point_is_blurred_to_a_gaussian():
    point = np.zeros((41, 41, 3), np.uint8)
    point[20, 20] = 255
    y, x = np.mgrid[-20:21, -20:21]
    wanted = 255 * np.exp(-(x**2 + y**2) / (2 * 1.5**2)) / (2 * math.pi * 1.5**2)
    assert np.abs(blur(point, sigma=1.5)[..., 0] - wanted).max() < 0.6


def test_blur_of_nothing(noise):
    np.testing.assert_array_equal(blur(noise, sigma=0.0), noise)
    np.testing.assert_array_equal(blur(FLAT), FLAT)


def test_tile_keeps_the_means_and_not_the_detail(noise):
    made = tile(noise)
    cells = noise.reshape(12, 4, 16, 4, 3).mean((1, 3))
    kept = made.reshape(12, 4, 16, 4, 3)
    assert np.corrcoef(kept.mean((1, 3)).ravel(), cells.ravel())[0, 1] > 0.97
    assert kept.std((1, 3)).mean() < 0.25 * noise.reshape(12, 4, 16, 4, 3).std((1, 3)).mean()
    np.testing.assert_array_equal(tile(noise, factor=1.0), noise)
    np.testing.assert_array_equal(tile(FLAT, factor=7.0), FLAT)
    assert (np.ptp(tile(noise, factor=1000.0), axis=(0, 1)) == 0).all()  # one pixel is left


# -- Shuffle ---------------------------------------------------------------------------------------------------------


def test_shuffles_are_decided_by_seed_and_size(noise):
    np.testing.assert_array_equal(shuffle(noise, seed=5), shuffle(noise.copy(), seed=5))
    assert (shuffle(noise, seed=5) != shuffle(noise, seed=6)).mean() > 0.9
    np.testing.assert_array_equal(shuffle(noise[..., ::-1], seed=5), shuffle(noise, seed=5)[..., ::-1])
    np.testing.assert_array_equal(shuffle(FLAT), FLAT)


def test_places_reach_over_the_whole_picture():
    """Of a picture whose levels are its coordinates, a shuffle shows where each pixel was fetched from."""
    y, x = np.mgrid[:128, :256]
    fetched = shuffle(np.stack([2 * y, x, x], axis=2).astype(np.uint8), seed=1).astype(float)
    down, across = fetched[..., 0] / 2, fetched[..., 1]
    assert down.min() == 0 and down.max() == 127 and across.min() == 0 and across.max() == 255
    for place, own in ((down, y), (across, x)):
        assert np.abs(place - own).mean() > 0.15 * place.max()  # far from where they were
        assert max(np.abs(np.diff(place, axis=axis)).max() for axis in (0, 1)) < 0.1 * place.max()  # no tears


def test_a_larger_copy_is_shuffled_alike():
    """Cells are fractions of the picture's side."""
    y, x = np.mgrid[:64, :128]
    small = np.stack([4 * y, 2 * x, x], axis=2).astype(np.uint8)
    large = small.repeat(2, axis=0).repeat(2, axis=1)
    assert np.abs(shuffle(large)[::2, ::2].astype(float) - shuffle(small)).mean() < 3


def test_colours_stay_and_small_cells_tear_more():
    rng = np.random.default_rng(0)
    pictures = [render(draw_scene(rng, two_objects=0.5), 128) for _ in range(20)]
    for pixels in pictures:
        made = shuffle(pixels)
        for channel in range(3):  # between two neighbours, no colour is new
            assert pixels[..., channel].min() <= made[..., channel].min()
            assert made[..., channel].max() <= pixels[..., channel].max()
    histograms = [
        np.histogram(np.stack([make(p) for p in pictures]), 8, (0, 256))[0] / (20 * 128 * 128 * 3)
        for make in (np.asarray, shuffle)
    ]
    assert np.abs(histograms[0] - histograms[1]).sum() / 2 < 0.1
    steps = [
        np.mean([np.abs(np.diff(shuffle(p, cell=c).astype(float), axis=0)).mean() for p in pictures])
        for c in (0.5, 0.1)
    ]
    assert steps[1] > 2 * steps[0]


# -- Inpaint ---------------------------------------------------------------------------------------------------------


def test_the_hint_of_inpainting(noise):
    """`make_inpaint_condition` of diffusers' documentation: image / 255, and -1 where the mask is above one half."""
    mask = np.zeros((48, 64), np.uint8)
    mask[10:20, 5:50], mask[0, 0], mask[0, 1] = 255, 127, 128
    wanted = noise.astype(np.float32) / 255.0
    wanted[mask.astype(np.float32) / 255.0 > 0.5] = -1.0
    hint = inpaint(noise, mask=mask)
    assert hint.dtype == np.float32 and (hint == -1).sum() == 3 * 451
    np.testing.assert_array_equal(hint, wanted)
    for same in (mask > 127, (mask > 127).astype(np.uint8), mask.astype(np.float32) / 255):
        np.testing.assert_array_equal(inpaint(noise, mask=same), wanted)
    assert (inpaint(noise, mask=np.zeros((48, 64), np.uint8)) >= 0).all()


@pytest.mark.parametrize("shape", [(64, 48), (48, 64, 1), ()])
def test_a_mask_of_another_size(noise, shape):
    with pytest.raises(ValueError, match=r"the picture \[48, 64\] \(height, width\): make them of one size"):
        inpaint(noise, mask=np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (blur, {"sigma": -1.0}, "sigma=-1.0: give a number from 0.0 to 1000.0"),
        (tile, {"factor": 0.5}, "factor=0.5: give a number from 1.0 to 1024.0"),
        (shuffle, {"seed": -1}, "seed=-1: give a number from 0 to 9223372036854775807"),
        (shuffle, {"cell": 0.0}, "cell=0.0: give a number from 0.02 to 4.0"),
    ],
)
def test_options_out_of_range_are_named(function, options, words, noise):
    with pytest.raises(ValueError) as caught:
        function(noise, **options)
    assert str(caught.value) == words
