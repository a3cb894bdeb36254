import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.models.families import SD15
from sd_jax.models.presets import TINY, VAEConfig
from sd_jax.models.vae import VAE, Posterior, to_image, to_pixels

CONFIG = TINY.vae


def encode(params, image, config=CONFIG, **types):
    return jax.jit(lambda p, x: VAE(config, **types).apply({"params": p}, x, method="encode"))(params, image)


def decode(params, z, config=CONFIG, **types):
    return jax.jit(lambda p, x: VAE(config, **types).apply({"params": p}, x, method="decode"))(params, z)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def params(initialise):
    return initialise(VAE(CONFIG), normal(1, 16, 16, 3))


def test_shapes_of_latents_and_image(params):
    image = normal(2, 16, 24, 3)
    posterior = encode(params, image)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 4, 6, 4)
    assert decode(params, posterior.mean).shape == image.shape


def test_sd15_has_its_84_million_parameters():
    shapes = jax.eval_shape(VAE(SD15.vae).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 83_653_863


def test_posterior_is_float32_whatever_the_computation_is(params):
    image = normal(1, 16, 16, 3)
    full = encode(params, image)
    half = encode(params, image, dtype=jnp.bfloat16)
    assert half.mean.dtype == jnp.float32
    assert np.linalg.norm(half.mean - full.mean) < 0.1 * np.linalg.norm(full.mean)
    assert decode(params, full.mean, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_remat_changes_neither_output_nor_gradient(initialise, assert_trees_close):
    config = dataclasses.replace(CONFIG, block_out_channels=(16,))
    image = normal(1, 4, 4, 3)
    params = initialise(VAE(config), image)

    def value_and_gradient(remat):
        loss = lambda p: jnp.square(VAE(config, remat=remat).apply({"params": p}, image)).mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    assert_trees_close(value_and_gradient("blocks"), value_and_gradient("none"))


def test_kl_is_zero_at_the_prior_and_that_of_the_closed_form_elsewhere():
    zero = jnp.zeros((2, 3, 3, 4))
    np.testing.assert_array_equal(Posterior(zero, zero).kl(), [0.0, 0.0])
    # KL(N(1, 4) || N(0, 1)) = (1 + 4 - 1 - ln 4) / 2 for each of the 36 numbers
    expected = 36 * (4 - np.log(4.0)) / 2
    np.testing.assert_allclose(Posterior(zero + 1, zero + np.log(4.0)).kl(), [expected] * 2, rtol=1e-6)


def test_samples_of_the_posterior_have_its_moments():
    posterior = Posterior(jnp.full((1, 64, 64, 4), 2.0), jnp.full((1, 64, 64, 4), np.log(0.25)))
    sample = posterior.sample(normal(1, 64, 64, 4))
    assert abs(float(sample.mean()) - 2.0) < 0.02 and abs(float(sample.std()) - 0.5) < 0.02


def test_log_variance_is_clipped_so_that_no_sample_overflows():
    posterior = Posterior.from_moments(jnp.full((1, 2, 2, 8), 1e4))
    assert np.isfinite(posterior.sample(jnp.ones((1, 2, 2, 4)))).all()
    np.testing.assert_array_equal(posterior.logvar, jnp.full((1, 2, 2, 4), 20.0))


def test_pixels_survive_the_trip_through_an_image():
    pixels = jnp.arange(256, dtype=jnp.uint8).repeat(3).reshape(1, 16, 16, 3)
    image = to_image(pixels)
    assert image.dtype == jnp.float32 and float(image.min()) == -1.0 and float(image.max()) == 1.0
    np.testing.assert_array_equal(to_pixels(image), pixels)
    beyond = to_pixels(2 * image)
    assert int(beyond[0, 3, 15, 0]) == 0 and int(beyond[0, 12, 0, 0]) == 255


def test_odd_sides_are_named():
    with pytest.raises(ValueError, match="a picture of 10x16 has a side not divisible by 4"):
        VAE(CONFIG).init(jax.random.key(0), jnp.zeros((1, 16, 10, 3)))


# Parity with diffusers


def reference(config: VAEConfig):
    import torch
    from diffusers import AutoencoderKL

    levels = len(config.block_out_channels)
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        sample_size=config.sample_size,
        scaling_factor=config.scaling_factor,
    )
    return model.eval()


def parity_errors(config, image, from_torch, relative_error, reference_dtype="float32"):
    """Errors of the mean, the log-variance and the decoded image."""
    import torch

    model = reference(config)
    dtype = getattr(torch, reference_dtype)
    to_torch = lambda x: torch.tensor(np.asarray(x).transpose(0, 3, 1, 2), dtype=dtype)  # noqa: E731
    to_numpy = lambda x: x.permute(0, 2, 3, 1).numpy()  # noqa: E731
    params = from_torch("vae", model, config)
    model = model.to(dtype)
    with torch.no_grad():
        expected = model.encode(to_torch(image)).latent_dist
        mean, logvar = to_numpy(expected.mean), to_numpy(expected.logvar)
        decoded = to_numpy(model.decode(expected.mean).sample)
    posterior, ours = encode(params, image, config), decode(params, jnp.asarray(mean, jnp.float32), config)
    return (
        relative_error(posterior.mean, mean),
        relative_error(posterior.logvar, logvar),
        relative_error(ours, decoded),
    )


@pytest.mark.parity
@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_equals_diffusers(size, from_torch, relative_error):
    assert max(parity_errors(CONFIG, normal(2, *size, 3), from_torch, relative_error)) < 1e-5


@pytest.mark.parity
@pytest.mark.slow
def test_equals_diffusers_at_full_size(from_torch, relative_error):
    """In float64, because at this size torch's own float32 is 1e-5 away from it (ours 3e-6)."""
    assert max(parity_errors(SD15.vae, normal(1, 128, 192, 3), from_torch, relative_error, "float64")) < 1e-5
