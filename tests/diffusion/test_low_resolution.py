import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion import low_resolution

RNG = np.random.default_rng(0)


def test_a_small_picture_is_the_mean_of_squares():
    image = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    small = low_resolution.make_small(image, 2)
    assert small.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(small[1, 1, 2, 0], image[1, 2:4, 4:6, 0].mean(), rtol=1e-6)
    np.testing.assert_allclose(np.mean(small), image.mean(), rtol=1e-6)


def test_noise_is_that_of_the_published_schedule():
    """Of low_res_scheduler/scheduler_config.json: scaled_linear from 0.0001 to 0.02, 1000 timesteps."""
    abar = np.cumprod(1 - np.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2)
    small, noise = RNG.standard_normal((2, 3, 5, 4, 3)).astype(np.float32)
    levels = np.array([0, 20, 349], np.int32)
    made = low_resolution.noised(jnp.asarray(small), jnp.asarray(noise), jnp.asarray(levels))
    kept, added = (np.sqrt(x)[:, None, None, None] for x in (abar[levels], 1 - abar[levels]))
    np.testing.assert_allclose(made, kept * small + added * noise, rtol=1e-6, atol=1e-5)


def test_it_is_enlarged_to_the_size_of_latents():
    small = jnp.asarray(RNG.standard_normal((2, 4, 3, 3)), jnp.float32)
    assert low_resolution.enlarged(small, (4, 3)) is small
    slope = jnp.broadcast_to(jnp.arange(8, dtype=jnp.float32)[None, :, None, None], (1, 8, 8, 3))
    large = low_resolution.enlarged(slope, (16, 32))
    assert large.shape == (1, 16, 32, 3)
    np.testing.assert_allclose(large[0, 6:10, 0, 0], [2.75, 3.25, 3.75, 4.25], atol=1e-5)  # centres of pixels keep


@pytest.mark.parametrize(("embeddings", "highest"), [(1000, 350), (351, 350), (350, 349), (20, 19)])
def test_highest_level(embeddings, highest):
    assert low_resolution.highest_level(embeddings) == highest
