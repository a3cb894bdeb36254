"""The same seed gives the same numbers in any batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion.noise import example_keys, image_keys, normal, starting_noise, step_noise, uniform

SHAPE = (4, 4, 3)


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
def test_keys_are_those_of_jax(seed):
    key = jax.random.key(np.uint32(seed), impl="threefry2x32")
    np.testing.assert_array_equal(jax.random.key_data(image_keys(seed, 1)[0]), jax.random.key_data(key))


def test_every_bit_of_a_seed_counts():
    seeds = [0, 1, 2**32, 2**63, 2**64 - 1]
    first = [float(starting_noise(image_keys(seed, 1), (1,))[0, 0]) for seed in seeds]
    assert len(set(first)) == len(seeds)
    last, wrapped = image_keys(2**64 - 1, 2)
    np.testing.assert_array_equal(jax.random.key_data(wrapped), jax.random.key_data(image_keys(0, 1)[0]))
    np.testing.assert_array_equal(jax.random.key_data(last), jax.random.key_data(image_keys(-1, 1)[0]))


def test_image_i_of_a_batch_is_image_0_of_seed_plus_i():
    @jax.jit
    def draw(keys):
        return starting_noise(keys, SHAPE), step_noise(keys, 3, SHAPE), uniform(keys, 2)

    batch = draw(image_keys(10, 4))
    for i in range(4):
        alone = draw(image_keys(10 + i, 1))
        jax.tree.map(lambda many, one, i=i: np.testing.assert_array_equal(many[i], one[0]), batch, alone)


def test_draws_differ():
    keys = image_keys(0, 2)
    draws = [starting_noise(keys, SHAPE), *(step_noise(keys, step, SHAPE) for step in range(3))]
    flat = np.stack(draws).reshape(8, -1)
    assert np.all(np.abs(np.corrcoef(flat) - np.eye(8)) < 0.6)
    assert len({float(row[0]) for row in flat}) == 8


def test_training_keys_name_run_step_and_example():
    run, examples = jax.random.key(0), jnp.arange(8)
    keys = example_keys(run, 5, examples)
    np.testing.assert_array_equal(normal(keys, 1, SHAPE)[6:], normal(example_keys(run, 5, examples[6:]), 1, SHAPE))
    others = [example_keys(run, 6, examples), example_keys(jax.random.key(1), 5, examples)]
    assert len({float(uniform(k, 0)[0]) for k in [keys, *others]}) == 3


def test_normal_is_standard():
    numbers = starting_noise(image_keys(0, 8), (64, 64, 1))
    assert numbers.dtype == jnp.float32
    np.testing.assert_allclose([numbers.mean(), numbers.std()], [0, 1], atol=0.02)
