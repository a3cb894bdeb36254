"""The table of preprocessors, and `apply`."""

import numpy as np
import pytest

from sd_jax.data.shapes import draw_scene, render
from sd_jax.preprocessors import PREPROCESSORS, apply, content, edges

RNG = np.random.default_rng(0)
PIXELS = np.stack([render(draw_scene(RNG), (40, 56)) for _ in range(3)])
MASKS = RNG.random((3, 40, 56)) > 0.5


def options_of(name, masks):
    return {"mask": masks} if name == "inpaint" else {}


def test_what_there_is():
    assert set(PREPROCESSORS) == {
        *("canny", "soft_edge", "scribble", "line_art", "segment", "recolour", "grayscale", "tile", "blur", "shuffle"),
        "inpaint",
    }
    assert PREPROCESSORS["canny"].function is edges.canny
    assert PREPROCESSORS["canny"].options == {
        "sigma": 1.0,
        "low_threshold": 0.1,
        "high_threshold": 0.2,
        "channels": "grey",
    }
    assert PREPROCESSORS["inpaint"].options == {"mask": None}
    assert all(row.about.endswith(".") for row in PREPROCESSORS.values())


@pytest.mark.parametrize("name", PREPROCESSORS)
def test_a_batch_is_each_picture_alone(name):
    before = PIXELS.copy()
    made = apply(name, PIXELS, **options_of(name, MASKS))
    assert made.shape == PIXELS.shape and made.dtype == (np.float32 if name == "inpaint" else np.uint8)
    for pixels, mask, one in zip(PIXELS, MASKS, made, strict=True):
        np.testing.assert_array_equal(apply(name, pixels, **options_of(name, mask)), one)
    np.testing.assert_array_equal(PIXELS, before)
    assert not np.array_equal(made, PIXELS)
    assert apply(name, PIXELS[:0], **options_of(name, MASKS[0])).shape == (0, 40, 56, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 2), (7, 200)])
@pytest.mark.parametrize("name", PREPROCESSORS)
def test_any_size(name, size):
    pixels = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    assert apply(name, pixels, **options_of(name, np.ones(size, bool))).shape == (*size, 3)


def test_options_are_numbers_or_text():
    wanted = edges.canny(PIXELS[0], sigma=2.0, channels="colour")
    for sigma in (2, 2.0, "2", np.float32(2)):
        np.testing.assert_array_equal(apply("canny", PIXELS[0], sigma=sigma, channels="colour"), wanted)
    shuffled = content.shuffle(PIXELS[0], seed=7)
    for seed in (7, "7", 7.0, np.int64(7)):
        np.testing.assert_array_equal(apply("shuffle", PIXELS[0], seed=seed), shuffled)


def test_one_mask_for_all():
    made = apply("inpaint", PIXELS, mask=MASKS[0])
    np.testing.assert_array_equal(made[2], apply("inpaint", PIXELS[2], mask=MASKS[0]))


@pytest.mark.parametrize(
    ("name", "pixels", "options", "words"),
    [
        ("cany", PIXELS, {}, "unknown preprocessor 'cany': did you mean canny?"),
        ("Line Art", PIXELS, {}, "unknown preprocessor 'Line Art': did you mean line_art"),
        ("depth", PIXELS, {}, "unknown preprocessor 'depth': use one of canny, soft_edge, "),
        ("canny", PIXELS, {"low_treshold": 1}, "canny: unknown option 'low_treshold': did you mean low_threshold"),
        ("grayscale", PIXELS, {"gamma": 1}, "grayscale: unknown option 'gamma': it has none"),
        ("canny", PIXELS, {"sigma": "wide"}, "canny: sigma='wide': give a number"),
        ("canny", PIXELS, {"sigma": None}, "canny: sigma=None: give a number"),
        ("segment", PIXELS, {"colours": 2.5}, "segment: colours=2.5: give a whole number"),
        ("segment", PIXELS, {"colours": "2.5"}, "segment: colours='2.5': give a whole number"),
        ("blur", PIXELS, {"sigma": "-3"}, "sigma=-3.0: give a number from 0.0 to 1000.0"),
        ("inpaint", PIXELS, {}, "inpaint: mask is needed: give mask="),
        ("inpaint", PIXELS, {"mask": MASKS[:2]}, "inpaint: 2 masks for 3 pictures: give one for each"),
        ("blur", PIXELS / 255, {}, "blur: pixels are float64 [3, 40, 56, 3]: give uint8 [height, width, 3]"),
        ("blur", PIXELS[..., 0], {}, "blur: pixels are uint8 [3, 40, 56]: give uint8 [height, width, 3]"),
        ("blur", PIXELS[:, :0], {}, "blur: pixels are uint8 [3, 0, 56, 3]: give uint8 [height, width, 3]"),
    ],
)
def test_mistakes_are_named_with_their_mend(name, pixels, options, words):
    with pytest.raises(ValueError) as caught:
        apply(name, pixels, **options)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)
