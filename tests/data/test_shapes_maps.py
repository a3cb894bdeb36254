"""Maps of scenes show where things are."""

import numpy as np
import pytest

from sd_jax.config import training_defaults
from sd_jax.data import DataError
from sd_jax.data.shapes import SHAPES, Scene, ShapesWorld, Thing, render
from sd_jax.data.shapes_maps import MAPS, SEGMENTS, draw_map, masks_of
from sd_jax.data.sources import open_source
from sd_jax.evals import shapes_accuracy

WORLD = ShapesWorld(64, 40, two_objects=0.5)
SCENES = [WORLD.scene(i) for i in range(40)]


@pytest.mark.parametrize("scene", SCENES[:20])
def test_all_maps_are_of_the_same_places(scene):
    whole = np.any(masks_of(scene, 64), axis=0)
    seen = shapes_accuracy.read_masks(render(scene, 64)[None])[0]
    assert (whole & seen).sum() > 0.9 * (whole | seen).sum()
    for kind in ("segment", "depth"):
        np.testing.assert_array_equal(draw_map(kind, scene, 64).max(-1) > 0, whole)
    outline = draw_map("outline", scene, 64).max(-1)
    assert set(np.unique(outline)) == {0, 255} and not outline[~whole].any()
    assert 0 < (outline > 0).sum() < 0.6 * whole.sum()


def test_segments_are_of_shapes_and_not_of_colours():
    assert len(set(SEGMENTS.values())) == len(SHAPES)
    for shape in SHAPES:
        maps = [
            draw_map("segment", Scene((Thing(shape, colour, "large", 0.5, 0.5),), "plain white"), (48, 64))
            for colour in ("red", "blue")
        ]
        np.testing.assert_array_equal(*maps)
        assert {tuple(c) for c in maps[0].reshape(-1, 3).tolist()} == {(0, 0, 0), SEGMENTS[shape]}


def test_depth_is_highest_inside():
    depth = draw_map("depth", Scene((Thing("circle", "red", "large", 0.5, 0.5),), "plain white"), 64)[..., 0]
    row = depth[32][depth[32] > 0].astype(int)
    middle = len(row) // 2
    assert depth.argmax() // 64 in (31, 32) and (np.diff(row[:middle]) > 0).all() and (np.diff(row[middle:]) <= 0).all()


def test_what_is_in_front_hides_what_is_behind():
    behind, front = Thing("square", "red", "medium", 0.5, 0.5), Thing("circle", "blue", "small", 0.5, 0.5)
    scene = Scene((behind, front), "plain white", "above")
    inside = masks_of(scene, 64)[1]
    for kind in MAPS:
        alone = draw_map(kind, Scene((front, front), "plain white", "above"), 64)
        np.testing.assert_array_equal(draw_map(kind, scene, 64)[inside], alone[inside])


def test_shapes_world_has_hints_for_methods_that_steer():
    config = training_defaults("controlnet").unlock()
    config.data.num_examples, config.data.resolution, config.control.hint_key = 5, 32, "depth"
    source = open_source(config)
    for i in range(5):
        np.testing.assert_array_equal(source[i]["hint"], draw_map("depth", source.world.scene(i), 32))
    prints = {source.fingerprint(), open_source(training_defaults("full")).fingerprint()}
    config.control.hint_key = "outline"
    assert len(prints | {open_source(config).fingerprint()}) == 3
    config.control.hint_key = "conditioning_image"
    with pytest.raises(DataError, match=r"config\.control\.hint_key='conditioning_image': shapes world has outline, "):
        open_source(config)
    with pytest.raises(ValueError, match="no map 'normal'"):
        draw_map("normal", SCENES[0], 64)
