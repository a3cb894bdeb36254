import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.models.families import TAESD
from sd_jax.models.presets import TinyVAEConfig
from sd_jax.models.vae_tiny import TinyVAE
from tests.reference import diffusers

CONFIG = TinyVAEConfig(
    encoder_block_out_channels=(8, 8, 8),
    decoder_block_out_channels=(8, 8, 8),
    num_encoder_blocks=(1, 2, 1),
    num_decoder_blocks=(2, 1, 1),
)


def normal(*shape, scale=1.0, seed=0):
    return scale * jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@jax.jit
def encode(params, image):
    return TinyVAE(CONFIG).apply({"params": params}, image, method="encode")


@jax.jit
def decode(params, z):
    return TinyVAE(CONFIG).apply({"params": params}, z, method="decode")


@pytest.fixture(scope="module")
def params(initialise):
    return initialise(TinyVAE(CONFIG), normal(1, 8, 8, 3))


def test_the_posterior_is_a_point(params):
    posterior = encode(params, normal(2, 16, 24, 3))
    assert CONFIG.downscale == 4 and posterior.mean.shape == (2, 4, 6, 4)
    np.testing.assert_allclose(posterior.sample(normal(2, 4, 6, 4)), posterior.mean, atol=3e-6)


def test_dtypes_of_computation(params):
    image = normal(1, 8, 8, 3)
    half = TinyVAE(CONFIG, dtype=jnp.bfloat16)
    posterior = jax.eval_shape(lambda p: half.apply({"params": p}, image, method="encode"), params)
    assert posterior.mean.dtype == posterior.logvar.dtype == jnp.float32
    assert jax.eval_shape(lambda p: half.apply({"params": p}, image), params).dtype == jnp.bfloat16


def test_far_latents_are_clamped(params):
    """(Eq. 1): beyond about 3 times 3 the picture does not change any more."""
    z = jnp.sign(normal(1, 4, 6, 4))
    np.testing.assert_allclose(decode(params, 100 * z), decode(params, 1000 * z), atol=1e-6)
    assert np.abs(decode(params, 2 * z) - decode(params, 1000 * z)).max() > 1e-4


def test_remat_changes_neither_output_nor_gradient(initialise, assert_trees_close):
    config = TinyVAEConfig(
        encoder_block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        num_encoder_blocks=(1,),
        num_decoder_blocks=(1,),
    )
    image = normal(1, 4, 4, 3)
    params = initialise(TinyVAE(config), image)

    def value_and_gradient(remat):
        loss = lambda p: jnp.square(TinyVAE(config, remat=remat).apply({"params": p}, image)).mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    assert_trees_close(value_and_gradient("blocks"), value_and_gradient("none"))


def test_odd_sides_are_named(params):
    with pytest.raises(ValueError, match="a picture of 10x16 has a side not divisible by 4"):
        encode(params, jnp.zeros((1, 16, 10, 3)))


def test_taesd_has_its_two_and_a_half_million_parameters():
    shapes = jax.eval_shape(TinyVAE(TAESD).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    sizes = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in shapes.items()}
    assert sizes == {"encoder": 1_222_532, "decoder": 1_222_531}


@pytest.mark.parity
def test_equals_diffusers(from_torch, relative_error):
    library = diffusers()
    import torch

    torch.manual_seed(0)
    model = library.AutoencoderTiny(**dataclasses.asdict(CONFIG)).eval()
    for parameter in model.parameters():  # theirs are so small that no ReLU lets anything through
        parameter.data.normal_(0.0, 0.15)
    ours = from_torch("vae", model, CONFIG)
    to_torch = lambda x: torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))  # noqa: E731
    to_numpy = lambda x: x.permute(0, 2, 3, 1).numpy()  # noqa: E731
    image, z = normal(2, 16, 24, 3), normal(2, 4, 6, 4, scale=4.0)
    with torch.no_grad():
        latents, decoded = to_numpy(model.encode(to_torch(image)).latents), to_numpy(model.decode(to_torch(z)).sample)
    assert latents.std(axis=(1, 2)).min() > 0.1 and decoded.std(axis=(1, 2)).min() > 0.1
    assert relative_error(encode(ours, image).mean, latents) < 1e-5
    assert relative_error(decode(ours, z), decoded) < 1e-5
