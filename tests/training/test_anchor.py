import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sd_jax.config import training_defaults
from sd_jax.training import optimizers
from sd_jax.training.anchor import pull_to_start


def test_under_a_constant_push_the_weights_follow_the_closed_form():
    """theta_{t+1} - theta_0 = (1 - a) (theta_t - theta_0) + u  =>  theta_t = theta_0 + u (1 - (1 - a)^t) / a."""
    anchor = pull_to_start(optax.constant_schedule(0.1), 0.5)
    start = {"unet": {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.0]])}}
    push = {"unet": {"kernel": jnp.array([[0.01, 0.02], [-0.03, 0.0]])}}
    params, state, a = start, anchor.init(start), 0.1 * 0.5
    for t in range(1, 40):
        updates, state = anchor.update(push, state, params)
        params = optax.apply_updates(params, updates)
        there = start["unet"]["kernel"] + push["unet"]["kernel"] * (1 - (1 - a) ** t) / a
        np.testing.assert_allclose(params["unet"]["kernel"], there, rtol=1e-5)
    np.testing.assert_array_equal(state.start["unet"]["kernel"], start["unet"]["kernel"])


def make_config(**keys):
    config = training_defaults("full")
    config.total_steps, config.optimizer.warmup_steps = 20, 4
    config.optimizer.learning_rate, config.optimizer.weight_decay = 0.1, 0.0
    config.optimizer.update(keys)
    return config


def moved(config, params, gradients):
    optimizer = optimizers.make_optimizer(config)
    state, steps = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        steps.append(params)
    return steps


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_in_a_run_it_follows_the_learning_rate_and_no_moment_sees_it(name):
    rng = np.random.default_rng(0)
    params = {"unet": {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}}
    gradients = [{"unet": {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}} for _ in range(8)]
    rate = optimizers.learning_rate(make_config())
    free = moved(make_config(name=name), params, gradients)
    held = moved(make_config(name=name, l2_sp=0.7), params, gradients)
    start = before = there = params["unet"]["kernel"]
    for t, (alone, pulled) in enumerate(zip(free, held, strict=True)):
        there = there + (alone["unet"]["kernel"] - before) - rate(t) * 0.7 * (there - start)
        before = alone["unet"]["kernel"]
        np.testing.assert_allclose(pulled["unet"]["kernel"], there, atol=1e-6)


def test_the_start_is_kept_apart_from_the_weights():
    """A step donates its parameters and its state; the same buffer in both would be an error."""
    optimizer = optimizers.make_optimizer(make_config(l2_sp=0.1))
    make = jax.jit(lambda x: (p := {"unet": {"kernel": x * 2}}, optimizer.init(p)))
    params, state = make(jnp.ones((3, 3)))
    step = jax.jit(lambda p, s: optimizer.update(p, s, p), donate_argnums=(0, 1))
    updates, state = step(params, state)
    np.testing.assert_array_equal(optax.tree.get(state, "start")["unet"]["kernel"], np.full((3, 3), 2.0))
    assert np.isfinite(updates["unet"]["kernel"]).all()
