"""The PatchGAN against torch's modules, and its losses against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.models import discriminator
from sd_jax.models.discriminator import Discriminator
from sd_jax.models.presets import DiscriminatorConfig

TINY = Discriminator(DiscriminatorConfig(width=4, layers=2))


@pytest.fixture(scope="module")
def params():
    tree = TINY.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), tree)


def test_hinge_is_its_formula():
    rng = np.random.default_rng(1)
    real, fake = (rng.normal(0, 2, (3, 4, 4)).astype(np.float32) for _ in range(2))
    expected = 0.5 * np.maximum(0, 1 - real).mean() + 0.5 * np.maximum(0, 1 + fake).mean()
    np.testing.assert_allclose(discriminator.hinge(jnp.asarray(real), jnp.asarray(fake)), expected, rtol=1e-6)


def test_r1_is_the_squared_gradient_at_real_pictures(params):
    image = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)
    found = float(discriminator.r1(TINY, params, image))
    # Pictures share the norms' statistics, so a picture's gradient is that of all the scores
    gradient = jax.grad(lambda x: TINY.apply({"params": params}, x).mean(axis=(1, 2)).sum())(image)
    np.testing.assert_allclose(found, 0.5 * np.square(gradient).sum() / 2, rtol=1e-5)


@pytest.mark.parametrize(("layers", "patches"), [(3, 6), (2, 14)])
def test_it_sees_patches(layers, patches):
    config = DiscriminatorConfig(width=4, layers=layers)
    scores, _ = jax.eval_shape(Discriminator(config).init_with_output, jax.random.key(0), jnp.zeros((2, 64, 64, 3)))
    assert scores.shape == (2, patches, patches)


@pytest.mark.parity
def test_equals_torchs_modules_while_they_train(params):
    """As taming-transformers' NLayerDiscriminator lists them; its batch norms in training mode."""
    import torch
    from torch import nn

    conv = lambda a, b, s, bias=True: nn.Conv2d(a, b, 4, s, 1, bias=bias)  # noqa: E731
    layers = [conv(3, 4, 2), nn.LeakyReLU(0.2)]
    for inner, outer, stride in ((4, 8, 2), (8, 16, 1)):
        layers += [conv(inner, outer, stride, False), nn.BatchNorm2d(outer), nn.LeakyReLU(0.2)]
    main = nn.Sequential(*layers, conv(16, 1, 1))
    state = {}
    for name, leaves in params.items():
        number = name.removeprefix("main_")
        for leaf, value in leaves.items():
            array = np.asarray(value).transpose(3, 2, 0, 1) if leaf == "kernel" else np.asarray(value)
            state[f"{number}.{'weight' if leaf in ('kernel', 'scale') else leaf}"] = torch.tensor(array)
    missing, unexpected = main.load_state_dict(state, strict=False)
    assert not unexpected and all("running" in name or "num_batches" in name for name in missing)
    image = np.random.default_rng(4).uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = main.train()(torch.tensor(image.transpose(0, 3, 1, 2))).numpy()[:, 0]
    np.testing.assert_allclose(TINY.apply({"params": params}, jnp.asarray(image)), expected, rtol=1e-4, atol=1e-5)
