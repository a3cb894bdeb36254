"""The adversarial autoencoder: whose gradient goes where, how the two losses are balanced, and when they begin."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.config import training_defaults
from sd_jax.diffusion import noise
from sd_jax.models import discriminator
from sd_jax.models.networks import Networks
from sd_jax.models.presets import TINY_SHAPES, DiscriminatorConfig, FeaturesConfig, TinyVAEConfig, VAEConfig
from sd_jax.models.vae import to_image
from sd_jax.training.autoencoder import AUTOENCODER
from sd_jax.training.context import POSTERIOR, Context

SPEC = dataclasses.replace(
    TINY_SHAPES,
    vae=VAEConfig(block_out_channels=(4,), layers_per_block=1, norm_num_groups=2),
    perceptual=FeaturesConfig(widths=(4, 8), depths=(1, 1)),
    discriminator=DiscriminatorConfig(width=4, layers=2),
)
WEIGHTS = {"perceptual_weight": 0.7, "discriminator_weight": 0.5, "discriminator_start": 10}


def context_of(**changes) -> Context:
    config = training_defaults("autoencoder")
    config.autoencoder.update({**WEIGHTS, **changes})
    return Context(Networks.of(SPEC), config, None)


@pytest.fixture(scope="module")
def params():
    networks, rng = Networks.of(SPEC), np.random.default_rng(0)
    init = jax.jit(lambda key: {part: networks.init(part, key) for part in ("vae", "perceptual", "discriminator")})
    trees = init(jax.random.key(0))
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32), trees)


@pytest.fixture(scope="module")
def batch():
    pixels = np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    return {"pixels": jnp.asarray(pixels), "slot": jnp.arange(4, dtype=jnp.int32)}


@pytest.fixture(scope="module")
def keys():
    return noise.example_keys(jax.random.key(0), jnp.zeros((), jnp.int32), jnp.arange(4, dtype=jnp.int32))


@pytest.fixture(scope="module")
def found(params, batch, keys):
    """((loss, measures), gradients) before and after the discriminator starts."""
    context = context_of()
    of = jax.jit(
        lambda p, step: jax.value_and_grad(AUTOENCODER.loss, 1, True)(context, p, {**batch, "step": step}, keys)
    )
    return {step: of(params, jnp.int32(step)) for step in (9, 10)}


@pytest.fixture(scope="module")
def by_hand(params, batch, keys):
    """Gradients by themselves: of the generator's loss in the autoencoder, of the discriminator's in itself."""
    networks, image = Networks.of(SPEC), to_image(batch["pixels"])

    def again(vae):
        posterior = networks.vae.apply({"params": vae}, image, method="encode")
        z = posterior.sample(noise.normal(keys, POSTERIOR, posterior.mean.shape[1:]))
        return networks.vae.apply({"params": vae}, z, method="decode")

    def judged(own, picture):
        return networks.discriminator.apply({"params": own}, picture)

    @jax.jit
    def both(vae, own):
        x, pull = jax.vjp(again, vae)
        of_generator = pull(jax.grad(lambda x: -judged(own, x).mean())(x))[0]
        return of_generator, jax.grad(lambda own: discriminator.hinge(judged(own, image), judged(own, x)))(own)

    return both(params["vae"], params["discriminator"])


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5), a, b)


def test_before_its_start_the_discriminator_counts_nothing(found):
    (loss, measures), grads = found[9]
    weights = {"l1": 1.0, "l2": 1.0, "perceptual": 0.7, "kl": 1e-6}
    np.testing.assert_allclose(loss, sum(weight * measures[name] for name, weight in weights.items()), rtol=1e-5)
    assert float(measures["discriminator_weight"]) == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads["discriminator"]))


def test_each_network_gets_its_own_gradient_and_the_generators_is_balanced(found, by_hand):
    """KL has no gradient in the decoder: at its last kernel, what there is before the start is that of `rec`."""
    (_, measures), grads = found[10]
    of_rec, (of_generator, of_discriminator) = found[9][1]["vae"], by_hand
    last = lambda tree: np.linalg.norm(tree["decoder"]["conv_out"]["kernel"])  # noqa: E731
    weight = 0.5 * min(last(of_rec) / (last(of_generator) + 1e-4), 1e4)
    np.testing.assert_allclose(measures["discriminator_weight"], weight, rtol=1e-3)
    assert weight != pytest.approx(0.5, rel=0.01)
    assert_close(grads["vae"], jax.tree.map(lambda r, g: r + weight * g, of_rec, of_generator))
    assert_close(grads["discriminator"], of_discriminator)


def test_a_weight_that_does_not_adapt_and_a_penalty(params, batch, keys):
    of = jax.jit(
        lambda p, r1: AUTOENCODER.loss(context_of(adaptive_weight=False, r1_weight=r1), p, batch, keys),
        static_argnums=1,
    )
    (without, measures), (with_r1, measured) = of(params, 0.0), of(params, 0.1)
    assert float(measures["discriminator_weight"]) == 0.5
    image, networks = to_image(batch["pixels"]), Networks.of(SPEC)
    np.testing.assert_allclose(
        measured["r1"], discriminator.r1(networks.discriminator, params["discriminator"], image), rtol=1e-4
    )
    np.testing.assert_allclose(with_r1 - without, 0.1 * measured["r1"], rtol=1e-2)


def test_parts_follow_the_weights():
    config = training_defaults("autoencoder")
    assert AUTOENCODER.trainable(config, SPEC) == ("vae",) and AUTOENCODER.frozen(config, SPEC) == ()
    config.autoencoder.update(WEIGHTS)
    assert AUTOENCODER.trainable(config, SPEC) == ("vae", "discriminator")
    assert AUTOENCODER.frozen(config, SPEC) == ("perceptual",)


@pytest.mark.parametrize(
    ("spec", "weights", "message"),
    [
        ({"perceptual": None}, {}, "config.init_perceptual"),
        ({"discriminator": None}, {}, "config.model.discriminator"),
        ({"vae": TinyVAEConfig()}, {}, "config.autoencoder.adaptive_weight"),
        ({}, {"l1_weight": -1.0}, "config.autoencoder.l1_weight=-1"),
    ],
)
def test_refused(spec, weights, message):
    config = context_of(**weights).config
    with pytest.raises(ValueError, match=message):
        AUTOENCODER.check(config, dataclasses.replace(SPEC, **spec))


def test_what_is_measured_of_held_out_pictures(params, batch, keys):
    sums = jax.jit(lambda p: AUTOENCODER.held_out(context_of(), p, batch, keys))(params)
    assert sums.keys() == {"loss", "psnr"} and all(float(count) == 4 for _, count in sums.values())
    networks, image = Networks.of(SPEC), to_image(batch["pixels"])
    z = networks.vae.apply({"params": params["vae"]}, image, method="encode").mean
    again = np.clip(networks.vae.apply({"params": params["vae"]}, z, method="decode"), -1, 1)
    mse = np.square(again - np.asarray(image)).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(sums["psnr"][0], (10 * np.log10(4 / mse)).sum(), rtol=1e-4)
