"""Random masks: each picture's is its key's alone, each kind is what its name says, and the mix is kept."""

import jax
import numpy as np
import pytest

from sd_jax.diffusion.noise import image_keys
from sd_jax.diffusion.random_masks import Mix, check, random_masks

SIZE = (24, 40)
MIX = Mix(rectangles=1.0, strokes=2.0, whole=1.0, side=0.6, thickness=0.25)
draw = jax.jit(random_masks, static_argnums=(1, 2, 3))


def only(rectangles=0.0, strokes=0.0, whole=0.0, side=0.6, thickness=0.25):
    return np.asarray(draw(image_keys(0, 64), 3, SIZE, Mix(rectangles, strokes, whole, side, thickness)))[..., 0]


def test_a_mask_is_its_key_s_alone():
    masks = draw(image_keys(0, 64), 3, SIZE, MIX)
    assert masks.shape == (64, *SIZE, 1) and masks.dtype == np.float32 and set(np.unique(masks)) == {0, 1}
    np.testing.assert_array_equal(masks[40:], draw(image_keys(40, 24), 3, SIZE, MIX))
    assert len({mask.tobytes() for mask in np.asarray(masks)}) > 40
    assert (masks != draw(image_keys(0, 64), 4, SIZE, MIX)).any()


def test_whole_hides_all():
    assert (only(whole=1.0) == 1).all()


def test_rectangles_are_unions_of_one_to_four():
    """So no more than 4 runs begin in a row, and along a side of theirs nothing changes."""
    masks = only(rectangles=1.0)
    begins = masks[:, :, :1].sum(2) + (np.diff(masks, axis=2) == 1).sum(2)
    assert begins.max() in (2, 3, 4) and (masks.any((1, 2))).all()
    assert 0.15 < masks.mean() < 0.45
    assert (only(rectangles=1.0, side=0.1).sum((1, 2)) <= 4 * 3 * 5).all()  # each a tenth of a side


def test_strokes_are_round_and_as_thick_as_said():
    thin, thick = only(strokes=1.0), only(strokes=1.0, thickness=1.0)
    assert (thick >= thin).all() and thick.mean() > 1.5 * thin.mean()  # the same paths
    inner = thin.copy()
    for axis in (1, 2):  # what is left where 7 pixels in a row are hidden: strokes are 6 of 24 thick at most
        inner = np.minimum.reduce([np.roll(inner, shift, axis) for shift in range(-3, 4)])
    assert 0 < inner.mean() < 0.2 * thin.mean()  # where they cross


def test_kinds_come_as_often_as_said():
    masks = np.asarray(draw(image_keys(0, 512), 3, (8, 8), MIX))
    assert masks.min((1, 2, 3)).mean() == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"whole": -1.0}, "config.inpainting.whole=-1.0: give a number from 0"),
        ({"rectangles": 0.0, "strokes": 0.0, "whole": 0.0}, "config.inpainting: rectangles, strokes and whole are all"),
        ({"side": 1.5}, "config.inpainting.side=1.5: give a share of the picture, 0.1 to 1"),
        ({"thickness": 0.0}, "config.inpainting.thickness=0.0: give a share of the picture, 0.05 to 1"),
    ],
)
def test_what_cannot_be_is_named(change, said):
    check(MIX, "config.inpainting")
    with pytest.raises(ValueError, match=said):
        check(MIX._replace(**change), "config.inpainting")
