import pytest

import sd_jax
from sd_jax.data.shapes import Scene, Thing, evaluation_scenes, render
from sd_jax.evals import job_effects

COUNT = 12


@pytest.fixture(scope="module")
def bundled():
    return sd_jax.load()


def test_masks_are_those_of_what_is_drawn():
    """But for pixels half covered, which drawing rounds; a shift by one pixel would change a twentieth and more."""
    for scene in evaluation_scenes("seen", 12):
        found = job_effects.covered(render(scene, job_effects.SIDE), scene.things[0].colour)
        truth = job_effects.thing_mask(scene, 0)
        assert (found != truth).sum() <= 0.01 * truth.sum()


def test_a_box_is_the_thing_and_a_margin():
    square = Scene((Thing("square", "red", "small", 0.5, 0.5),), "plain white")
    truth, box = job_effects.thing_mask(square, 0), job_effects.box_mask(square, 0, margin=3)
    side = int(truth.any(0).sum())
    assert truth.sum() == side**2 and box.sum() == (side + 6) ** 2 and not (truth & ~box).any()


def test_image_to_image_keeps_the_layout_and_changes_the_colour(bundled):
    """With all of the way to go, nothing of the layout is left: prompts do not tell it."""
    numbers = job_effects.recolour(bundled, COUNT, **job_effects.RECOLOUR).numbers
    assert numbers["iou"] >= 0.75 and numbers["iou_of_others"] <= 0.4, numbers
    assert min(numbers[name] for name in ("colour", "shape", "background")) >= 0.75, numbers
    lost = job_effects.recolour(bundled, COUNT, **{**job_effects.RECOLOUR, "strength": 1.0}).numbers
    assert lost["iou"] <= 0.4 and lost["colour"] >= 0.75, lost


def test_inpainting_changes_the_named_thing_alone(bundled):
    numbers = job_effects.repaint(bundled, COUNT, **job_effects.REPAINT).numbers
    assert numbers["pixels"] == 1.0, numbers
    assert min(numbers[name] for name in ("named", "other", "background")) >= 0.8, numbers
