import numpy as np
import pytest

from sd_jax.config import training_defaults
from sd_jax.training import optimizers


def config(schedule="cosine", total=100, warmup=10, peak=1e-3):
    cfg = training_defaults("full")
    cfg.total_steps, cfg.optimizer.warmup_steps = total, warmup
    cfg.optimizer.schedule, cfg.optimizer.learning_rate = schedule, peak
    return cfg


@pytest.mark.parametrize("schedule", optimizers.SCHEDULES)
def test_warm_up_is_linear_and_starts_above_zero(schedule):
    rate = optimizers.learning_rate(config(schedule))
    np.testing.assert_allclose([float(rate(i)) for i in range(10)], 1e-4 * np.arange(1, 11), rtol=1e-5)


def test_after_the_warm_up():
    cosine, linear, constant = (optimizers.learning_rate(config(s)) for s in ("cosine", "linear", "constant"))
    half = 10 + 45
    np.testing.assert_allclose([cosine(half), linear(half), constant(half)], [5e-4, 5e-4, 1e-3], rtol=1e-5)
    np.testing.assert_allclose([cosine(100), linear(100), constant(100)], [0, 0, 1e-3], atol=1e-9)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="schedule='cosin'"):
        optimizers.learning_rate(config("cosin"))
    with pytest.raises(ValueError, match="warmup_steps=100"):
        optimizers.learning_rate(config(warmup=100))


def test_vectors_are_not_decayed():
    cfg = config(warmup=0)
    cfg.optimizer.weight_decay = 0.5
    params = {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    optimizer = optimizers.make_optimizer(cfg)
    zeros = {name: np.zeros_like(value) for name, value in params.items()}
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert np.all(np.asarray(updates["kernel"]) < 0)
    assert np.all(np.asarray(updates["bias"]) == 0)
