"""Lines of drawn shapes, whose outlines are known; canny equals scikit-image's."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from sd_jax.data.shapes import COLOURS, Scene, Thing, draw_scene, render
from sd_jax.data.shapes_drawing import DISTANCES
from sd_jax.preprocessors.colours import as_picture, luma
from sd_jax.preprocessors.edges import canny, line_art, scribble, soft_edge

SIDE = 96


def scene(shape, colour="blue", background="plain white"):
    return Scene((Thing(shape, colour, "large", 0.53, 0.47),), background)


def distances(shape):
    """Pixels from the true outline of `scene(shape)`; negative inside."""
    place = Thing(shape, "blue", "large", 0.53, 0.47)
    radius = scene(shape).radius(place) * SIDE
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    return DISTANCES[shape]((x - place.x * SIDE) / radius, (y - place.y * SIDE) / radius) * radius


def waves():
    """A picture that any program draws alike, with edges of all directions."""
    y, x = np.mgrid[:24, :32]
    wave = np.sin(x / 3 + y * y / 40) * np.cos(y / 4 - x * x / 70)
    return as_picture(np.round(127.5 * (1 + wave)).astype(np.uint8))


def step(height, side=40, colour=(1, 1, 1)):
    """Black at the left, `height` levels of `colour` at the right."""
    picture = np.zeros((side, side, 3), np.uint8)
    picture[:, side // 2 :] = np.multiply(height, colour)
    return picture


# -- Canny -----------------------------------------------------------------------------------------------------------

OF_WAVES = """
................................
..#.....#....#...#..#...#.....#.
..#.....#....#...#..#...#.....#.
..#.....#....#...#..#...#.....#.
..#.....#....#...#..##..#.#..##.
...######....##..#...#..#..#.##.
.##....##....#...#...#..#..#..#.
........#....#...#...####..#..#.
........#....#...#...#..###...#.
.......####.######..#...#.##..#.
..####.....##....##.#..#...##.#.
.##.............#..##.##..#..##.
................#..#...##.#..#..
.....#####.#######.#..#..####...
...###....#...#....##.#..#..##..
.##.......#...#...#..#####..#.#.
........########.##..#..####..#.
.....###.......###.###..#...##..
.####.......##..#...#.###.#..##.
.........########..##.#...###...
.......###....#..##.###..#..###.
.............##..#...#.###.#..#.
.#######.#####.##.####.#..#####.
................................
"""


def test_canny_is_what_scikit_image_says():
    """`feature.canny(waves, 1.0, 255 * 0.25, 255 * 0.9)` of scikit-image 0.26; the parity test has more."""
    wanted = np.array([list(row) for row in OF_WAVES.split()]) == "#"
    edges = canny(waves(), low_threshold=0.25, high_threshold=0.9)
    np.testing.assert_array_equal(edges, as_picture(np.where(wanted, np.uint8(255), np.uint8(0))))


@pytest.mark.parametrize("shape", DISTANCES)
def test_canny_draws_the_true_outline(shape):
    edges = canny(render(scene(shape), SIDE))[..., 0] == 255
    outline = distances(shape)
    assert np.abs(outline[edges]).max() < 2.0 and np.abs(outline[edges]).mean() < 0.55
    missed = ndimage.distance_transform_edt(~edges)[np.abs(outline) < 0.5]
    assert np.mean(missed > 1.5) < 0.02


def test_hysteresis_links_what_is_faint_to_what_is_strong():
    """An edge that fades from 255 levels to none: as far as `low` if it is anywhere above `high`, else not at all."""
    picture = np.zeros((200, 20, 3), np.uint8)
    picture[:, 10:] = np.linspace(255, 0, 200).astype(np.uint8)[:, None, None]
    # A sharp step of height h between two pixels, blurred: |g| = 4 h (Phi(3/2) - Phi(-1/2)) where sigma is 1
    steepness = 4.0 * (math.erf(1.5 / math.sqrt(2)) + math.erf(0.5 / math.sqrt(2))) / 2
    for low, high in ((0.5, 1.0), (1.0, 2.0)):
        rows = np.flatnonzero(canny(picture, low_threshold=low, high_threshold=high).any(axis=(1, 2)))
        assert rows[0] == 1 and rows[-1] == pytest.approx(199 * (1 - low / steepness), abs=2)
    assert not canny(picture, low_threshold=0.5, high_threshold=4.0).any()


def test_canny_in_colour_finds_edges_between_colours_of_one_grey():
    picture = np.zeros((20, 20, 3), np.uint8)
    picture[:, :10], picture[:, 10:] = (200, 0, 0), (0, 102, 0)
    assert np.ptp(luma(picture)) == 0
    assert not canny(picture).any()
    columns = np.flatnonzero(canny(picture, channels="colour")[1:-1, :, 0].all(axis=0))
    assert set(columns) <= {9, 10} and len(columns)
    grey = as_picture(luma(render(scene("star"), SIDE)))
    np.testing.assert_array_equal(canny(grey, channels="colour"), canny(grey))


def test_sigma_leaves_out_detail():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 60, (SIDE, SIDE, 1)).astype(np.uint8)
    picture = (render(scene("circle", "blue"), SIDE) // 2 + noise).astype(np.uint8)
    outline = np.abs(distances("circle")) < 3
    stray = [np.mean(canny(picture, sigma=sigma)[~outline] > 0) for sigma in (0.5, 4.0)]
    assert stray[0] > 0.1 and stray[1] < 0.01


@pytest.mark.parity
@pytest.mark.parametrize("sigma", [0.0, 0.6, 1.0, 2.5])
@pytest.mark.parametrize(("low", "high"), [(0.1, 0.2), (0.0, 0.0), (0.05, 0.6), (0.3, 0.3), (0.2, 0.5)])
def test_canny_equals_scikit_images(sigma, low, high):
    feature = pytest.importorskip("skimage.feature")
    rng = np.random.default_rng(0)
    sizes = (64, (96, 64), (33, 51), 128)
    pictures = [render(draw_scene(rng, two_objects=0.5), size) for size in sizes for _ in range(3)]
    noise = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    pictures += [noise, noise // 128 * 255, waves(), step(255), np.full((9, 9, 3), 77, np.uint8)]
    pictures += [noise[:height, :width] for height, width in ((1, 1), (2, 7), (3, 3), (5, 4))]
    found = 0
    for pixels in pictures:
        grey = luma(pixels)
        wanted = feature.canny(grey * (1.0 / 255.0), sigma, low, high)
        made = canny(pixels, sigma=sigma, low_threshold=low, high_threshold=high)
        np.testing.assert_array_equal(made, as_picture(np.where(wanted, np.uint8(255), np.uint8(0))))
        if (low, high) == (0.1, 0.2):  # what it takes by itself
            np.testing.assert_array_equal(feature.canny(grey, sigma), wanted)
        found += wanted.sum()
    assert found > 400


# -- Others ----------------------------------------------------------------------------------------------------------


def test_strokes_are_canny_in_colour_made_thick():
    picture = render(scene("heart", "orange", "plain grey"), SIDE)
    thin = canny(picture, sigma=2.0, low_threshold=0.1, high_threshold=0.3, channels="colour")
    np.testing.assert_array_equal(scribble(picture, radius=0), thin)
    for radius in (1, 4):
        away = ndimage.distance_transform_edt(thin[..., 0] == 0)
        np.testing.assert_array_equal(scribble(picture, radius=radius)[..., 0] == 255, away <= radius + 0.5)
    assert set(np.unique(scribble(picture))) == {0, 255}
    assert not scribble(np.full((8, 8, 3), 9, np.uint8)).any()


@pytest.mark.parametrize("shape", DISTANCES)
def test_soft_edges_fade_with_the_distance_from_the_outline(shape):
    strength = soft_edge(render(scene(shape), SIDE))[..., 0].astype(float)
    away = np.abs(distances(shape))
    at = [strength[(away >= near) & (away < near + 1)].mean() for near in range(0, 8, 2)]
    assert at[0] > 190 and all(nearer > 1.3 * farther for nearer, farther in zip(at, at[1:], strict=False))
    assert strength[away > 16].max(initial=0) < 8


def test_soft_edges_are_as_strong_as_the_step_is_high():
    """A low step beside a high one; and of colours that are one grey."""
    picture = np.zeros((40, 120, 3), np.uint8)
    picture[:, 40:] = 200
    picture[:, 80:] = 100
    strength = soft_edge(picture)[20, :, 0].astype(float)
    assert max(strength[39:41]) == 255 and max(strength[79:81]) == pytest.approx(255 / 2, rel=0.03)
    assert strength[[20, 60, 100]].max() < 3
    coloured = soft_edge(step(200, colour=(0, 1, 0)))
    np.testing.assert_array_equal(coloured, soft_edge(step(200)))
    # Levels of a step that is all there is, 5 of 255 over the 0.1 that a picture is divided by at least
    assert soft_edge(step(5)).max() == pytest.approx(10 * 5, rel=0.15) and not soft_edge(step(0)).any()


def test_line_art_is_the_drawing_turned_about():
    drawing = Image.new("L", (SIDE, SIDE), 255)
    pen = ImageDraw.Draw(drawing)
    pen.ellipse((20, 20, 70, 70), outline=0, width=2)
    pen.line((10, 80, 85, 80), fill=0, width=2)
    ink = np.asarray(drawing) == 0
    lines = line_art(as_picture(np.asarray(drawing)))[..., 0]
    assert np.median(lines[ink]) == pytest.approx(127, abs=1) and lines[ink].min() > 100 and lines[~ink].max() == 0
    # Ink half as dark, and on grainy paper, comes out as bright: it goes by the lines that are there
    grain = 7 * (np.indices(ink.shape).sum(axis=0) % 2)
    pale = line_art(as_picture((np.where(ink, 128, 255) - grain).astype(np.uint8)))[..., 0]
    assert np.median(pale[ink]) == pytest.approx(127, abs=5) and pale[~ink].max() < 12
    # It is what darkens every channel: red ink leaves red as bright as paper
    assert not line_art(np.where(ink[..., None], (255, 0, 0), 255).astype(np.uint8)).any()


def test_paper_is_no_line():
    rng = np.random.default_rng(0)
    rough = rng.integers(-12, 13, (SIDE, SIDE, 1)).repeat(3, axis=2)
    assert line_art((240 + rough).astype(np.uint8)).max() == pytest.approx(12 / 16 * 127, rel=0.15)
    assert line_art(np.full((8, 8, 3), COLOURS["red"], np.uint8)).max() == 0


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (canny, {"sigma": -1.0}, "sigma=-1.0: give a number from 0.0 to 100.0"),
        (canny, {"low_threshold": math.nan}, "low_threshold=nan: give a number from 0.0 to 100.0"),
        (canny, {"low_threshold": 0.3}, "high_threshold=0.2 is below low_threshold=0.3: give one that is as high"),
        (canny, {"channels": "rgb"}, "channels='rgb': give grey or colour"),
        (scribble, {"radius": -1}, "radius=-1: give a number from 0 to 64"),
        (soft_edge, {"sigma": 0.0}, "sigma=0.0: give a number from 0.3"),
        (soft_edge, {"scales": 0}, "scales=0: give a number from 1 to 8"),
        (line_art, {"threshold": 256.0}, "threshold=256.0: give a number from 0.0 to 255.0"),
    ],
)
def test_options_out_of_range_are_named(function, options, words):
    with pytest.raises(ValueError) as caught:
        function(step(200), **options)
    assert str(caught.value).startswith(words)
