"""On the bundled model, which was trained, and whose pictures are known."""

import jax
import numpy as np
import pytest

import sd_jax
from sd_jax.data.shapes import evaluation_scenes, render
from sd_jax.models.networks import Networks
from sd_jax.models.presets import TINY
from sd_jax.sampling.pipeline import Pipeline
from sd_jax.sampling.preview import LatentPreview


@pytest.fixture(scope="module")
def bundled():
    pipe = sd_jax.load()
    return pipe, LatentPreview(pipe)


@pytest.fixture(scope="module")
def drawn(bundled):
    """Pictures of shapes world, and their latents."""
    pixels = np.stack([render(scene, 64) for scene in evaluation_scenes("seen", 24, seed=3, two_objects=0.5)])
    return pixels, bundled[0].encode_image(pixels)


def explained(shown, pixels, factor=8):
    """R^2 of the colours of squares of factor x factor pixels: 0 for one colour everywhere, at the best."""
    small = lambda p: p.reshape(len(p), 8, factor, 8, factor, 3).mean((2, 4))  # noqa: E731
    shown, wanted = small(shown), small(pixels)
    return 1 - np.sum((shown - wanted) ** 2) / np.sum((wanted - wanted.mean((0, 1, 2))) ** 2)


def test_shows_layout_and_colours(bundled, drawn):
    """Measured: 0.59. A latent of this small model says little alone: fitted to these very pictures, latents come to
    0.47 without their neighbours, and to 0.75 with them."""
    pixels, latents = drawn
    shown = bundled[1](latents)
    assert shown.dtype == np.uint8 and shown.shape == pixels.shape
    share = explained(shown, pixels)
    print(f"R^2 {share:.2f}")
    assert share > 0.5
    assert explained(shown[::-1], pixels) < 0 and explained(shown[..., [1, 2, 0]], pixels) < 0.25


def test_other_projections_would_fail(bundled, drawn):
    pixels, latents = drawn
    other = LatentPreview.__new__(LatentPreview)
    other.factor, weights = bundled[1].factor, bundled[1].weights
    for seed in range(5):
        other.weights = np.random.default_rng(seed).permutation(weights.ravel()).reshape(weights.shape)
        assert explained(other(latents), pixels) < 0


def test_each_latent_is_a_square_of_one_colour(bundled, drawn):
    _, preview = bundled
    shown = preview(drawn[1][:2, :3, :5])
    assert shown.shape == (2, 24, 40, 3)
    np.testing.assert_array_equal(shown, shown[:, ::8, ::8].repeat(8, 1).repeat(8, 2))
    alone = preview(np.asarray(drawn[1])[1:2, :3, :5])
    np.testing.assert_array_equal(alone[0], shown[1])


def test_any_numbers_make_a_picture(bundled):
    wild = np.full((1, 2, 2, 8), np.nan, np.float32)
    wild[0, 0] = 1e30
    assert bundled[1](wild).shape == (1, 16, 16, 3)


def test_two_previews_of_a_model_are_the_same(bundled, drawn):
    again = LatentPreview(bundled[0])
    np.testing.assert_array_equal(again(drawn[1][:1]), bundled[1](drawn[1][:1]))


def test_serves_another_autoencoder():
    """Of a tiny random one, with another factor and other channels."""
    networks = Networks.of(TINY)
    shapes = jax.eval_shape(lambda key: networks.init("vae", key), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)
    preview = LatentPreview(Pipeline(TINY, {"vae": params}))
    assert preview.weights.shape == (9 * 4 + 1, 3)
    assert preview(np.zeros((1, 3, 2, 4), np.float32)).shape == (1, 12, 8, 3)
