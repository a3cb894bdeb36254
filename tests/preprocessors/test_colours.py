"""Greys against other programs, and blocks of colour against the scenes they were drawn from."""

import numpy as np
import pytest
from PIL import Image

from sd_jax.data.shapes import COLOURS, Scene, Thing, render
from sd_jax.data.shapes_drawing import DISTANCES, coverage
from sd_jax.preprocessors.colours import grayscale, recolour, segment

SIDE = 96


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def test_grayscale_is_pillows(noise):
    np.testing.assert_array_equal(grayscale(noise), np.array(Image.fromarray(noise).convert("L").convert("RGB")))


def test_luminance_of_known_colours():
    """L* of sRGB's primaries: 53.24, 87.73, 32.30 (Lindbloom); of a grey of 10, which is on the straight part: 2.74."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255), (119, 119, 119), (10, 10, 10)]
    wanted = np.round(np.array([53.24, 87.73, 32.30, 0, 100, 50.03, 2.74]) * 2.55)
    made = recolour(np.array([colours], np.uint8))
    np.testing.assert_array_equal(made[0], wanted[:, None].repeat(3, axis=1))


@pytest.mark.parity
def test_luminance_is_scikit_images(noise):
    color = pytest.importorskip("skimage.color")
    assert np.abs(recolour(noise)[..., 0] - color.rgb2lab(noise)[..., 0] * 2.55).max() < 0.55


def test_intensity_is_the_largest_channel_and_gamma_darkens(noise):
    largest = noise.max(axis=2, keepdims=True).repeat(3, axis=2)
    np.testing.assert_array_equal(recolour(noise, kind="intensity"), largest)
    squared = np.round(np.square(largest / 255.0) * 255)
    np.testing.assert_array_equal(recolour(noise, kind="intensity", gamma=2.0), squared)


# -- Segment ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", DISTANCES)
def test_segments_are_the_things_in_their_colours(shape):
    thing, other = Thing(shape, "orange", "medium", 0.28, 0.4), Thing("circle", "blue", "medium", 0.72, 0.55)
    scene = Scene((thing, other), "plain grey")
    blocks = segment(render(scene, SIDE), colours=4, radius=1)
    found = {tuple(int(c) for c in colour) for colour in np.unique(blocks.reshape(-1, 3), axis=0)}
    wanted = {COLOURS["orange"], COLOURS["blue"], (150, 150, 150)}
    assert wanted <= found and len(found) <= 4
    for drawn in (thing, other):
        truth = np.zeros((SIDE, SIDE), bool)
        alpha, rows, columns = coverage(drawn.shape, drawn.x, drawn.y, scene.radius(drawn), SIDE)
        truth[rows, columns] = alpha > 0.5
        block = (blocks == COLOURS[drawn.colour]).all(axis=2)
        assert (truth & block).sum() / (truth | block).sum() > 0.9


def test_specks_are_lost_in_what_lies_around_them():
    picture = np.full((40, 40, 3), (200, 180, 20), np.uint8)
    picture[:, 20:] = (10, 90, 60)
    specked = picture.copy()
    specked[5::9, 4::9] = (255, 0, 255)
    np.testing.assert_array_equal(segment(specked, radius=2), picture)
    np.testing.assert_array_equal(segment(specked, radius=0), specked)
    # Of two colours, those that there is most of, though the specks' is the farthest
    ground = (specked == picture).all(axis=2)
    np.testing.assert_array_equal(segment(specked, radius=0, colours=2)[ground], picture[ground])


def test_blocks_are_flat_where_the_picture_is_grainy():
    rng = np.random.default_rng(0)
    sides = np.full((80, 80, 3), 110.0)
    sides[:, 40:] = 145
    grainy = np.clip(sides + rng.normal(0, 25, (80, 80, 1)), 0, 255).astype(np.uint8)
    blocks = segment(grainy, colours=2)
    darker = blocks[..., 0] == blocks[..., 0].min()
    assert (darker == (sides[..., 0] == 110)).mean() > 0.98


def test_as_many_colours_as_asked_for_and_no_chance(noise):
    counts = {}
    for count in (1, 3, 64):
        blocks = segment(noise, colours=count, radius=0)
        counts[count] = len(np.unique(blocks.reshape(-1, 3), axis=0))
        np.testing.assert_array_equal(segment(noise.copy(), colours=count, radius=0), blocks)
    assert counts == {1: 1, 3: 3, 64: 64}
    np.testing.assert_array_equal(segment(noise, colours=1)[0, 0], np.round(np.median(noise, axis=(0, 1))))


def test_more_colours_are_nearer_to_the_picture(noise):
    errors = [np.square(segment(noise, colours=n, radius=0) - noise.astype(float)).mean() for n in (2, 8, 32)]
    # The error of n cells of a cube of side 255 is about its variance, 255^2 / 12, over n^(2/3)
    for error, count in zip(errors, (2, 8, 32), strict=True):
        assert error < 1.25 * 255**2 / 12 / count ** (2 / 3)


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (recolour, {"kind": "lightness"}, "kind='lightness': give luminance or intensity"),
        (recolour, {"gamma": 0.0}, "gamma=0.0: give a number from 0.01 to 100.0"),
        (segment, {"colours": 65}, "colours=65: give a number from 1 to 64"),
        (segment, {"radius": -1}, "radius=-1: give a number from 0 to 64"),
    ],
)
def test_options_out_of_range_are_named(function, options, words, noise):
    with pytest.raises(ValueError) as caught:
        function(noise, **options)
    assert str(caught.value) == words
