import collections
import pickle
import zlib

import numpy as np
import pytest

from sd_jax.data.shapes import (
    COLOURS,
    HELD_OUT,
    INVERSE_RELATIONS,
    PLACES,
    RADII_OF_TWO,
    RELATIONS,
    SEEN,
    SHAPES,
    SIZES,
    Scene,
    ShapesWorld,
    Thing,
    draw_caption,
    evaluation_scenes,
    full_caption,
    render,
)
from sd_jax.data.shapes_drawing import BACKGROUNDS, REACH, background_levels, coverage


def _pairs(scenes):
    return {(thing.colour, thing.shape) for scene in scenes for thing in scene.things}


def test_an_example_depends_on_seed_split_and_index_alone():
    world = ShapesWorld(32, 100, seed=3, two_objects=0.5)
    backwards = {i: world[i] for i in reversed(range(20))}
    again = pickle.loads(pickle.dumps(ShapesWorld(32, 50, seed=3, two_objects=0.5)))
    for i in range(20):
        np.testing.assert_array_equal(again[i]["pixels"], backwards[i]["pixels"])
        assert again[i]["caption"] == backwards[i]["caption"] and again[i]["index"] == i
        np.testing.assert_array_equal(render(world.scene(i), 32), world[i]["pixels"])
    assert len(world) == 100
    for other in (ShapesWorld(32, 100, seed=4, two_objects=0.5), ShapesWorld(32, 100, 3, "seen", two_objects=0.5)):
        assert all(other.scene(i) != world.scene(i) for i in range(20))


def test_example_format():
    example = ShapesWorld(48, 5)[np.int64(2)]
    assert example["pixels"].shape == (48, 48, 3) and example["pixels"].dtype == np.uint8
    assert type(example["caption"]) is str and type(example["index"]) is int
    with pytest.raises(IndexError):
        ShapesWorld(48, 5)[5]


def test_held_out_pairs_never_meet_training():
    assert (
        len(SHAPES)
        == len(COLOURS)
        == len({shape for _, shape in HELD_OUT})
        == len({colour for colour, _ in HELD_OUT})
        == 8
    )
    for split, expected in (("train", set(SEEN)), ("seen", set(SEEN)), ("held_out", set(HELD_OUT))):
        world = ShapesWorld(32, 1500, split=split, two_objects=0.5)
        assert _pairs(map(world.scene, range(len(world)))) == expected
        assert _pairs(evaluation_scenes(split, 200, two_objects=0.5)) == expected
    assert set(SEEN).isdisjoint(HELD_OUT) and len(SEEN) + len(HELD_OUT) == 64


def test_everything_lies_inside_the_frame_and_nothing_touches():
    world = ShapesWorld(64, 600, two_objects=0.5)
    for scene in map(world.scene, range(len(world))):
        for thing in scene.things:
            reach = REACH * scene.radius(thing)
            assert reach < thing.x < 1 - reach and reach < thing.y < 1 - reach
        if len(scene.things) == 2:
            first, second = (_mask(thing, scene.radius(thing)) for thing in scene.things)
            assert not (first & second).any()
            dx, dy = (getattr(scene.things[0], axis) - getattr(scene.things[1], axis) for axis in "xy")
            across, down = RELATIONS[scene.relation]
            assert across * dx + down * dy > 2 * abs(across * dy + down * dx)  # the relation is the plain truth
            assert (scene.things[0].colour, scene.things[0].shape) != (scene.things[1].colour, scene.things[1].shape)


def _mask(thing, radius, resolution=64):
    mask = np.zeros((resolution, resolution), bool)
    alpha, rows, columns = coverage(thing.shape, thing.x, thing.y, radius, resolution)
    mask[rows, columns] = alpha > 0
    return mask


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_antialiased_centred_and_of_known_extent(shape):
    fine, rows, columns = coverage(shape, 0.5, 0.5, 0.3, 512)
    picture = np.zeros((512, 512), np.float32)
    picture[rows, columns] = fine
    for axis in (0, 1):
        inside = np.flatnonzero(picture.max(axis) > 0.5)
        low, high = 256 - inside[0], inside[-1] + 1 - 256
        assert abs(low - high) <= 9  # the box is centred, to 3% of its side
        assert 0.8 * 0.3 * 512 < max(low, high) <= REACH * 0.3 * 512 + 1
    # The analytic coverage at a low resolution is the box average of that at a high one.
    coarse, rows, columns = coverage(shape, 0.5, 0.5, 0.3, 64)
    low = np.zeros((64, 64), np.float32)
    low[rows, columns] = coarse
    error = np.abs(low - picture.reshape(64, 8, 64, 8).mean((1, 3)))
    assert error.max() < 0.35 and error.mean() < 0.004


def test_the_same_scene_at_any_resolution():
    for scene in evaluation_scenes("seen", 12, two_objects=0.5):
        large = render(scene, 256).reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(large - render(scene, 64)).mean() < 3.0
        assert render(scene, 47).shape == (47, 47, 3)


def test_positions_are_named_after_where_things_are():
    names = collections.Counter()
    world = ShapesWorld(32, 2000)
    for thing in (world.scene(i).things[0] for i in range(len(world))):
        across, down = PLACES[thing.position]
        assert (abs(thing.x - 0.5) < 0.03) == (across == 0) and (abs(thing.y - 0.5) < 0.03) == (down == 0)
        assert (thing.x - 0.5) * across >= 0 and (thing.y - 0.5) * down >= 0
        names[thing.position, thing.size] += 1
    assert len(names) == 9 * 3 and min(names.values()) > 40


def test_full_captions():
    one = Scene((Thing("circle", "red", "small", 0.23, 0.23),), "striped grey")
    assert full_caption(one) == "a small red circle in the top left on a striped grey background"
    two = Scene(
        (Thing("circle", "red", "small", 0.5, 0.24), Thing("square", "blue", "medium", 0.5, 0.76)),
        "plain white",
        "above",
    )
    assert full_caption(two) == "a small red circle above a medium blue square on a plain white background"


def test_captions_are_true_varied_and_of_few_words():
    words, captions = set(), set()
    worlds = [ShapesWorld(32, 3000, split=split, two_objects=0.4) for split in ("train", "held_out")]
    for world in worlds:
        for i in range(len(world)):
            scene, caption = world.scene(i), world.caption(i)
            captions.add(caption)
            words.update(caption.replace(",", "").split())
            assert len(caption.split()) <= 20
            _check_caption(caption, scene)
    assert len(words) <= 50 and len(captions) > 4000
    assert {"a red circle", "a red circle above a blue square"} <= captions | _captions_of_many()


def _captions_of_many():
    thing, other = Thing("circle", "red", "small", 0.5, 0.5), Thing("square", "blue", "small", 0.5, 0.76)
    scenes = [Scene((thing,), "plain white"), Scene((thing, other), "plain white", "above")]
    rng = np.random.default_rng(0)
    return {draw_caption(scene, rng) for scene in scenes for _ in range(500)}


def _check_caption(caption, scene):
    """Every attribute word of a caption belongs to its scene, and relations hold between the things that it names."""
    for names, true in (
        (COLOURS, {thing.colour for thing in scene.things}),
        (SHAPES, {thing.shape for thing in scene.things}),
        (SIZES, {thing.size for thing in scene.things}),
        (("plain", "gradient", "striped", "dotted", "white", "grey"), set(scene.background.split())),
    ):
        assert {name for name in names if name in caption.replace(",", "").split()} <= true, caption
    if len(scene.things) == 1:
        for place in PLACES:
            for phrase in (f"in the {place}", f"on the {place}", f"at the {place}"):
                if phrase in caption and not any(f"{phrase} {more}" in caption for more in ("left", "right")):
                    assert place == scene.things[0].position, caption
    for relation in RELATIONS:
        if f" {relation} " in caption:
            before = caption.split(f" {relation} ")[0]
            named = [(f"{t.colour} {t.shape}" in before) for t in scene.things]
            assert named.count(True) == 1
            assert (relation if named[0] else INVERSE_RELATIONS[relation]) == scene.relation, caption
    assert "a orange" not in caption and "an red" not in caption


def test_evaluation_scenes_are_balanced_and_repeatable():
    scenes = evaluation_scenes("seen", 560, seed=1, two_objects=0.25)
    assert scenes == evaluation_scenes("seen", 560, seed=1, two_objects=0.25)
    assert scenes != evaluation_scenes("seen", 560, seed=2, two_objects=0.25)
    ones = [scene for scene in scenes if len(scene.things) == 1]
    twos = [scene for scene in scenes if len(scene.things) == 2]
    assert len(ones) == 420 and len(twos) == 140
    for values, number in (
        ([(s.things[0].colour, s.things[0].shape) for s in ones], len(SEEN)),
        ([s.things[0].size for s in ones], len(SIZES)),
        ([s.things[0].position for s in ones], len(PLACES)),
        ([s.background for s in ones], len(BACKGROUNDS)),
        ([s.relation for s in twos], len(RELATIONS)),
        ([s.things[1].size for s in twos], len(RADII_OF_TWO)),
    ):
        counts = collections.Counter(values)
        assert len(counts) == number and max(counts.values()) - min(counts.values()) <= 1
    assert all(len({(t.colour, t.shape) for t in scene.things}) == 2 for scene in twos)
    assert len(evaluation_scenes("held_out", 3)) == 3 and evaluation_scenes("held_out", 0) == []


# -- Other aspects ---------------------------------------------------------------------------------------------------


def test_squares_are_what_they_were_when_there_were_only_squares():
    """Numbers of the code before there were aspects; of shapes that the square root is enough for."""
    things = Thing("circle", "red", "small", 0.23, 0.3), Thing("ring", "blue", "medium", 0.71, 0.68)
    sums = [880142211, 1836734630, 2444757517, 795508, 3741376351, 2257734901, 243380992, 3016038718]
    for background, seen in zip(BACKGROUNDS, sums, strict=True):
        scene = Scene(things, background, "left of")
        assert zlib.crc32(render(scene, 30).tobytes()) == zlib.crc32(render(scene, (30, 30)).tobytes()) == seen
    world = ShapesWorld(32, 100, seed=3, two_objects=0.5)
    assert world.scene(1).things == (Thing("star", "orange", "medium", 0.5072343743450827, 0.2759520316299266),)
    assert world[0]["caption"] == world.caption(0) == "there is a purple star below a cyan star"
    assert all(world.size(i) == (32, 32) for i in range(20))


def test_aspects_are_drawn_as_often_and_change_no_scene():
    square, other = (ShapesWorld(64, 900, seed=1, aspects=aspects) for aspects in ((1.0,), (1.0, 2.0, 0.5)))
    counts = collections.Counter(other.size(i) for i in range(900))
    assert set(counts) == {(64, 64), (45, 91), (91, 45)} and min(counts.values()) > 250
    for i in range(30):
        example = other[i]
        assert example["pixels"].shape == (*other.size(i), 3) and other.scene(i) == square.scene(i)
        assert example["caption"] == other.caption(i) == square[i]["caption"]
    again = ShapesWorld(64, 50, seed=1, aspects=(1.0, 2.0, 0.5))
    assert [again.size(i) for i in range(50)] == [other.size(i) for i in range(50)]
    assert [ShapesWorld(64, 50, seed=2, aspects=(1.0, 2.0)).size(i) for i in range(50)] != [
        ShapesWorld(64, 50, seed=1, aspects=(1.0, 2.0)).size(i) for i in range(50)
    ]


@pytest.mark.parametrize("size", [(40, 80), (80, 40), (48, 60)])
def test_things_stay_round_and_whole_and_spread_over_the_picture(size):
    size = np.array(size)
    short, long = size.min(), size.argmax()
    for scene in evaluation_scenes("seen", 54):
        (thing,) = scene.things
        pixels = render(Scene((thing,), "plain white"), tuple(size.tolist()))
        inside = np.argwhere(np.abs(pixels.astype(int) - pixels[0, 0]).max(2) > 90)  # covered by half or more
        (low, high), radius = (inside.min(0), inside.max(0)), scene.radius(thing) * short
        centre = np.array(size) * (thing.y, thing.x)
        assert (REACH * radius < centre).all() and (centre < size - REACH * radius).all()  # nothing is cut
        np.testing.assert_allclose((low + high) / 2 + 0.5, centre, atol=0.25 * radius + 1)
        extent = high - low + 1
        if thing.shape == "circle":
            np.testing.assert_allclose(extent, 2 * radius, atol=1.5)
        assert 1.4 * radius < extent.min() <= extent.max() < 2 * REACH * radius + 1.5
        # A square out of the middle loses part of what lies at an end of a picture twice as long
        at_the_end = abs((thing.y, thing.x)[long] - 0.5) > 0.1
        edge = (size.max() - short) / 2
        if size.max() == 2 * short and at_the_end:
            assert low[long] < edge or high[long] >= edge + short


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_backgrounds_fill_pictures_of_any_aspect(background):
    square, wide, tall = (background_levels(background, size) for size in (40, (40, 100), (100, 40)))
    assert wide.shape == (40, 100) and tall.shape == (100, 40)
    np.testing.assert_array_equal(wide[:, :40], square)  # as large as in the square of the shorter side
    if "gradient" in background:
        np.testing.assert_array_equal(wide[:, 60:], square)
        assert tall[0, 0] > square[0, 0] and tall[-1, 0] < square[-1, 0] and (np.diff(tall[:, 0]) < 0).all()
    else:
        np.testing.assert_array_equal(tall[:40], square)
        np.testing.assert_allclose(wide[:, 40:80], square, atol=0.01)  # and again
        np.testing.assert_allclose(tall[40:80], square, atol=0.01)


def test_mistaken_arguments_are_named():
    for aspects in ((), (0.0,), (1.0, 9.0)):
        with pytest.raises(ValueError, match="aspects="):
            ShapesWorld(32, 10, aspects=aspects)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        ShapesWorld(32, 10, split="test")
    with pytest.raises(ValueError, match="two_objects"):
        evaluation_scenes("seen", 10, two_objects=2.0)
    with pytest.raises(ValueError, match="plaid"):
        render(Scene((), "plaid grey"), 32)
