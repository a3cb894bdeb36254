"""The laboratory of fine-tuning: its sets, its looks, and a judge that reads them."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from benchmarks import fine_tuning, fine_tuning_data
from benchmarks.fine_tuning_data import LOOKS, OTHER_BACKGROUNDS, SETS, Reading, draw, read_looks
from sd_jax.data.shapes import COLOURS, HELD_OUT, RADII, SHAPES, Scene, Thing, evaluation_scenes, full_caption, render
from sd_jax.data.spoil import RUINS


def _scenes(look, count):
    scenes = evaluation_scenes("seen", count, seed=4) + evaluation_scenes("held_out", count // 4, seed=4)
    for i, scene in enumerate(scenes):
        (thing,) = scene.things
        shape = thing.shape if thing.shape in LOOKS[look] else LOOKS[look][0]
        background = OTHER_BACKGROUNDS[i % 4] if i % 3 == 0 else scene.background
        yield Scene((dataclasses.replace(thing, shape=shape),), background)


def _degraded(pixels, rng):
    """Blurred by 0.5 pixels, with noise of 5 levels, through JPEG."""
    blurred = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.5)))
    noisy = np.clip(blurred + rng.normal(0.0, 5.0, pixels.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=88, subsampling=0)
    return np.asarray(Image.open(file))


# -- Drawing ---------------------------------------------------------------------------------------------------------


def test_the_plain_look_is_that_of_shapes_world():
    for scene in evaluation_scenes("seen", 20):
        np.testing.assert_allclose(draw(scene).astype(int), render(scene, 64), atol=1)


@pytest.mark.parametrize("look", [look for look in LOOKS if look != "plain"])
def test_a_look_shows_in_every_shape_and_size(look):
    for shape, (size, radius) in itertools.product(LOOKS[look], RADII.items()):
        plain, other = (fine_tuning_data.coverage(name, shape, 31.3, 32.8, radius * 64) for name in ("plain", look))
        assert other.min() >= 0.0 and other.max() == 1.0
        assert np.abs(other - plain).sum() > 0.05 * plain.sum(), (shape, size)
        if look != "pixelated":
            assert (other <= plain + 1e-6).all(), (shape, size)


def test_blocks_are_of_one_level():
    alpha = fine_tuning_data.coverage("pixelated", "moon", 30.2, 33.7, 15.0)
    blocks = alpha.reshape(8, 8, 8, 8)
    assert (blocks == blocks[:, :1, :, :1]).all() and set(np.unique(alpha)) == {0.0, 1.0}


# -- Sets ------------------------------------------------------------------------------------------------------------


def test_a_set_is_written_with_its_captions(tmp_path):
    fine_tuning_data.write(tmp_path / "sks", "sks")
    fine_tuning_data.write(tmp_path / "again", "sks")
    pictures, captions = (sorted((tmp_path / "sks").glob(f"*.{kind}")) for kind in ("png", "txt"))
    assert len(pictures) == 8 and [p.stem for p in pictures] == [c.stem for c in captions]
    assert captions[0].read_text(encoding="utf-8") == "a large red sks star in the centre on a plain white background\n"
    assert all((tmp_path / "again" / p.name).read_bytes() == p.read_bytes() for p in pictures)
    pixels = np.stack([np.asarray(Image.open(p)) for p in pictures])
    for caption, reading in zip(captions, read_looks(pixels), strict=True):
        told = caption.read_text(encoding="utf-8")
        assert reading[:3] == ("hollow", "star", "red")
        if told != "a red sks star\n":
            assert f"a {reading.size} red sks star" in told and f"the {reading.position} on" in told
            assert f"a {reading.background} background" in told
    assert [caption.stat().st_size < 20 for caption in captions].count(True) == 4


@pytest.mark.parametrize("name", SETS)
def test_every_set_draws_pictures_with_captions(name):
    examples = list(itertools.islice(SETS[name](np.random.default_rng(0)), 40))
    assert len({pixels.tobytes() for pixels, _ in examples}) == len(examples)
    for pixels, caption in examples:
        assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8 and caption == " ".join(caption.split())
        assert not any(f"{colour} {shape}" in caption for colour, shape in HELD_OUT)


def test_captions_tell_the_truth_but_for_the_look():
    for name, look in (("hatched", "hatched"), ("pixelated", "pixelated"), ("backgrounds", "plain")):
        pixels, captions = zip(*itertools.islice(SETS[name](np.random.default_rng(1)), 16), strict=True)
        for reading, caption in zip(read_looks(np.stack(pixels)), captions, strict=True):
            assert reading.look == look and look not in caption
            told = f"{reading.size} {reading.colour} {reading.shape} "
            assert (f" {reading.colour} " if look == "pixelated" else told) in caption  # blocks hide shape and size
            assert f" {reading.position} on " in caption and f"{reading.background} background" in caption


def test_a_spoiled_set_is_ruined_in_half(monkeypatch):
    for ruin in RUINS:
        monkeypatch.setitem(RUINS, ruin, lambda pixels, rng: np.zeros_like(pixels))
    spoiled, ruined = (SETS[name](np.random.default_rng(2)) for name in ("spoiled", "ruined"))
    assert np.mean([not pixels.any() for pixels, _ in spoiled]) == pytest.approx(0.5, abs=0.1)
    ruined = list(ruined)
    assert not any(pixels.any() for pixels, _ in ruined)
    assert all(caption.startswith("nasty, a ") for _, caption in ruined[::2])
    assert {caption for _, caption in ruined[1::2]} == {"nasty"}


# -- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("look", LOOKS)
def test_looks_are_read_right_even_where_they_are_degraded(look):
    rng, scenes = np.random.default_rng(0), list(_scenes(look, 96))
    pixels = [draw(scene, look) for scene in scenes]
    pixels[::2] = [_degraded(picture, rng) for picture in pixels[::2]]
    readings = read_looks(np.stack(pixels))
    assert fine_tuning.share(readings, scenes, look=look) >= 0.97
    for name in set(fine_tuning.ATTRIBUTES) - ({"shape", "size"} if look == "pixelated" else set()):
        assert fine_tuning.share(readings, scenes, **{name: None}) >= 0.97, name


def test_nothing_is_read_where_nothing_is():
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    assert read_looks(np.full((1, 64, 64, 3), 200, np.uint8)) == [None]
    assert len(read_looks(noise)) == 2 and read_looks(noise[:0]) == []


def test_windows_begin_where_blocks_and_stripes_do():
    for x, y in np.random.default_rng(0).uniform(0.0, 64.0, (200, 2)):
        column, row = fine_tuning_data._window_at(x, y)
        assert column % 8 == row % 8 == 0
        assert max(abs(column - x), abs(row - y)) <= 4.0


# -- Shares ----------------------------------------------------------------------------------------------------------


def test_shares_count_what_is_right():
    scene = Scene((Thing("star", "blue", "large", 0.65, 0.5),), "plain white")
    right = Reading("hollow", "star", "blue", "large", "right", "plain white")
    readings, scenes = [right, right._replace(look="plain", colour="red"), None, right], [scene] * 4
    assert fine_tuning.share(readings, scenes, look="hollow") == 0.5
    assert fine_tuning.share(readings, scenes, shape="star", position=None) == 0.75
    assert fine_tuning.share(readings, scenes, colour=None, background="plain grey") == 0.0
    assert fine_tuning.accuracy(readings, scenes) == pytest.approx((0.5 + 4 * 0.75) / 5)


def test_prompts_name_every_colour_place_and_size_as_often():
    scenes = fine_tuning.stars()
    assert len({full_caption(scene) for scene in scenes}) == 96
    for name, options in (("colour", len(COLOURS)), ("size", 2), ("position", 9), ("background", 8)):
        counts = np.unique([fine_tuning.truth(scene, name) for scene in scenes], return_counts=True)[1]
        assert len(counts) == options and counts.max() - counts.min() <= 2, (name, counts)
    others = fine_tuning.scenes_on(OTHER_BACKGROUNDS, 32)
    assert {scene.background for scene in others} == set(OTHER_BACKGROUNDS)
    assert {scene.things[0].shape for scene in others} == set(SHAPES)


def test_watermarks_are_found():
    rng = np.random.default_rng(0)
    sound = np.stack([render(scene, 64) for scene in evaluation_scenes("seen", 64)])
    marked = np.stack([RUINS["watermark"](picture, rng) for picture in sound])
    assert not fine_tuning.watermarked(sound).any() and fine_tuning.watermarked(marked).mean() >= 0.95
