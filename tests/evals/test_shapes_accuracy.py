import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sd_jax.data.shapes import Scene, Thing, evaluation_scenes, render
from sd_jax.evals.shapes_accuracy import _square_pictures, accuracy, read_scene, read_scenes, score


def _pictures(scenes, resolution):
    return np.stack([render(scene, resolution) for scene in scenes])


def _degraded(pixels, rng, quality):
    """Blurred by 0.6 pixels, with noise of 6 levels, through JPEG: about what a small autoencoder does, or worse."""
    noise = rng.normal(0.0, 6.0, pixels.shape)
    blurred = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.6)))
    file = io.BytesIO()
    Image.fromarray(np.clip(blurred + noise, 0, 255).astype(np.uint8)).save(
        file, "JPEG", quality=quality, subsampling=0
    )
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("resolution", [32, 48, 64, 96])
def test_fresh_renders_are_read_right(resolution):
    scenes = evaluation_scenes("seen", 200, two_objects=0.4) + evaluation_scenes("held_out", 100, two_objects=0.4)
    result = accuracy(_pictures(scenes, resolution), scenes)
    assert min(result.values()) >= 0.99, result


@pytest.mark.parametrize("resolution", [32, 64])
def test_degraded_renders_are_read_right(resolution):
    rng = np.random.default_rng(0)
    scenes = evaluation_scenes("seen", 300, two_objects=0.4)
    pixels = np.stack([_degraded(picture, rng, quality=85) for picture in _pictures(scenes, resolution)])
    result = accuracy(pixels, scenes)
    assert min(result.values()) >= 0.97, result


def test_centres_are_read_to_a_pixel():
    for scene in evaluation_scenes("seen", 30, two_objects=0.5):
        reading = read_scene(render(scene, 64))
        by_name = {(thing.colour, thing.shape): thing for thing in reading.things}
        for thing in scene.things:
            read = by_name[thing.colour, thing.shape]
            assert abs(read.x - thing.x) < 1 / 64 and abs(read.y - thing.y) < 1 / 64


def test_a_faint_colour_cast_and_darker_tones_do_not_mislead():
    scenes = evaluation_scenes("seen", 60)
    pixels = np.clip(_pictures(scenes, 32) * 0.93 + np.array([8.0, 0.0, -8.0]), 0, 255).astype(np.uint8)
    result = accuracy(pixels, scenes)
    assert min(value for value in result.values() if value is not None) >= 0.95, result


def test_the_judge_counts_what_is_wrong():
    red = Thing("circle", "red", "medium", 0.5, 0.5)
    above, below = Thing("circle", "red", "small", 0.5, 0.24), Thing("square", "blue", "medium", 0.5, 0.76)
    one, two = Scene((red,), "plain white"), Scene((above, below), "plain white", "above")
    swapped = Scene((below, above), "plain white", "below")
    assert score([one], [one]) == {
        "colour": 1.0, "shape": 1.0, "size": 1.0, "position": 1.0, "background": 1.0, "relation": None, "count": 1.0,
    }  # fmt: skip
    assert score([swapped], [two])["relation"] == 1.0 and score([swapped], [two])["colour"] is None
    assert score([Scene((below, above), "plain white", "above")], [two])["relation"] == 0.0
    assert score([one], [two])["relation"] == 0.0 and score([one], [two])["count"] == 0.0
    wrong = Scene((Thing("ring", "red", "small", 0.2, 0.5),), "plain grey")
    assert [score([wrong], [one])[name] for name in ("colour", "shape", "size", "position", "background")] == [
        1,
        0,
        0,
        0,
        0,
    ]
    empty = Scene((), "plain white")
    assert [score([empty], [one])[name] for name in ("colour", "shape", "size", "position", "background")] == [
        0,
        0,
        0,
        0,
        1,
    ]
    with pytest.raises(ValueError, match="1 readings for 2 scenes"):
        score([one], [one, two])


def test_any_picture_is_read():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    grey, white = (np.full((1, 32, 32, 3), level, np.uint8) for level in (140, 255))
    halves = np.zeros((1, 32, 32, 3), np.uint8)
    halves[:, :, :15, 0], halves[:, :, 15:, 2] = 255, 255
    readings = read_scenes(np.concatenate([noise, grey, halves, white]))
    assert len(readings) == 7
    assert readings[4] == Scene((), "plain grey") and readings[6] == Scene((), "plain white")
    assert accuracy(np.zeros((0, 32, 32, 3), np.uint8), [])["shape"] is None
    with pytest.raises(ValueError, match="uint8"):
        _square_pictures(np.zeros((2, 32, 48, 3), np.float32))
