"""Every prediction type tells the same: round trips over every pair, targets against coefficients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion.predictions import PREDICTIONS, convert, from_x0, prediction, to_x0
from sd_jax.types import PREDICTION_TYPES

SIGMA = jnp.asarray([0.03, 0.5, 2.0, 14.6], jnp.float32)
SHAPE = (4, 3, 2, 4)


def _batch():
    x0, n = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    return tuple(jnp.asarray(a) for a in (x0, n, x0 + np.asarray(SIGMA)[:, None, None, None] * n))


def test_the_table_has_the_types_of_the_dictionary():
    assert tuple(PREDICTIONS) == PREDICTION_TYPES


@pytest.mark.parametrize(("source", "target"), [*itertools.product(PREDICTIONS, repeat=2)])
def test_round_trip(source, target):
    with jax.enable_x64(True):
        x0, n, x = (a.astype(jnp.float64) for a in _batch())
        there = convert(x0, x, SIGMA, source, target)
        back = convert(there, x, SIGMA, target, source)
        np.testing.assert_allclose(back, x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_target_stands_for_x0(name):
    x0, n, x = _batch()
    s = SIGMA[:, None, None, None]
    target = prediction(name).target(x0, n, s)
    np.testing.assert_allclose(to_x0(name, target, x, SIGMA), x0, atol=5e-6)
    np.testing.assert_allclose(from_x0(name, x0, x, SIGMA), target, atol=2e-5)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "sample"])
def test_variance_preserving_input_has_unit_variance(name):
    np.testing.assert_allclose(prediction(name).c_in(SIGMA) ** 2 * (1 + SIGMA**2), 1, rtol=1e-6)


def test_flow_is_a_straight_line():
    x0, n, x = _batch()
    t = (SIGMA / (1 + SIGMA))[:, None, None, None]
    x_flow = prediction("flow").c_in(SIGMA)[:, None, None, None] * x
    np.testing.assert_allclose(x_flow, (1 - t) * x0 + t * n, atol=1e-6)


def test_sigma_may_be_a_scalar():
    x0, n, x = _batch()
    one = to_x0("v_prediction", n, x, SIGMA[2])
    np.testing.assert_array_equal(one, to_x0("v_prediction", n, x, jnp.full(4, SIGMA[2])))


def test_unknown_type():
    with pytest.raises(ValueError, match="unknown prediction_type 'velocity': choose one of epsilon"):
        prediction("velocity")
