"""The held-out loss: fixed draws, joined over batches, by parts of the schedule, and blind to how training noises."""

import jax
import numpy as np
import pytest

from sd_jax import sharding
from sd_jax.training.evaluate import EVAL_STEP, make_evaluator
from sd_jax.training.methods import METHODS
from sd_jax.types import NoiseScheduleConfig
from tests.training import restated

SEED = 11
V = NoiseScheduleConfig(prediction_type="v_prediction")
BATCHES = [restated.batch_of(8, seed=1), restated.batch_of(5, seed=2)]


def evaluator(batches=BATCHES, **diffusion):
    context = restated.context_of(V, **{"min_snr_gamma": 5.0, "eval_bins": 4, **diffusion})
    return make_evaluator(METHODS["full"], context, SEED, batches)


@pytest.fixture(scope="module")
def measured():
    return evaluator()(restated.PARAMS)


def by_hand(network=0.4):
    """(error, weight, timestep) of all 13 images."""
    context = restated.context_of(V, min_snr_gamma=5.0, caption_dropout=0.0)
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), b), EVAL_STEP) for b in (0, 1)]
    each = [
        restated.errors(key, batch, context, len(batch["slot"]), network)
        for key, batch in zip(keys, BATCHES, strict=True)
    ]
    return [np.concatenate(values) for values in zip(*each, strict=True)]


def test_numbers_are_means_over_all_images(measured):
    error, weight, timestep = by_hand()
    want = {"held_out_loss": np.mean(error * weight)}
    for first in (0, 250, 500, 750):
        inside = (timestep >= first) & (timestep < first + 250)
        assert inside.sum() >= 3  # each of 13 drew its own part
        want[f"held_out_loss_t{first:04d}_{first + 249:04d}"] = np.mean(error[inside])
    assert list(measured) == list(want)
    np.testing.assert_allclose(list(measured.values()), list(want.values()), rtol=1e-6)


def test_only_what_was_learnt_changes_it(measured):
    evaluate = evaluator()
    assert evaluate(restated.PARAMS) == measured == evaluate(dict(restated.PARAMS))
    error, weight, _ = by_hand(network=0.9)
    other = evaluate({"unet": np.float32(0.9)})
    np.testing.assert_allclose(other["held_out_loss"], np.mean(error * weight), rtol=1e-6)
    assert all(other[name] != measured[name] for name in measured)


@pytest.mark.parametrize(
    "diffusion",
    [
        {"timesteps": "logit_normal", "timestep_mean": 1.0, "timestep_scale": 0.5, "noise_offset": 0.3},
        {"caption_dropout": 1.0, "pyramid_discount": 0.5, "input_perturbation": 0.5},
    ],
)
def test_how_training_draws_does_not_matter(measured, diffusion):
    assert evaluator(**diffusion)(restated.PARAMS) == measured


def test_bins_are_as_many_as_asked_and_end_where_the_schedule_does():
    names = list(evaluator(eval_bins=3)(restated.PARAMS))
    assert names == ["held_out_loss", *(f"held_out_loss_t{part}" for part in ("0000_0332", "0333_0665", "0666_0999"))]
    assert list(evaluator(eval_bins=0)(restated.PARAMS)) == ["held_out_loss"]


def test_a_bin_without_an_image_is_left_out():
    one = evaluator([restated.batch_of(1)])(restated.PARAMS)
    assert len(one) == 2 and all(np.isfinite(value) for value in one.values())


def test_batches_are_placed_and_the_function_mapped(measured):
    """On a mesh of the one device that there is here, with the parameters there too."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1})
    placed = []

    def place(batch):
        placed.append(len(batch["slot"]))
        return jax.device_put(batch, sharding.batch_sharding(mesh))

    context = restated.context_of(V, min_snr_gamma=5.0, eval_bins=4)
    evaluate = make_evaluator(METHODS["full"], context, SEED, BATCHES, place)
    there = evaluate(jax.device_put(restated.PARAMS, sharding.replicated(mesh)))
    assert placed == [8, 5]
    np.testing.assert_allclose(list(there.values()), list(measured.values()), rtol=1e-6)
