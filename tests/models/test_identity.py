"""A model without an autoencoder: pixels stand for latents."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError
from sd_jax.checkpoints.save import save_checkpoint
from sd_jax.models.networks import Networks
from sd_jax.models.presets import TINY, IdentityConfig, ModelSpec
from sd_jax.sampling.pipeline import Pipeline

SPEC = dataclasses.replace(
    TINY, vae=IdentityConfig(16), unet=dataclasses.replace(TINY.unet, in_channels=3, out_channels=3, sample_size=16)
)


def test_pixels_are_their_own_latents():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3)).astype(np.uint8)
    pipe = Pipeline(SPEC, {})
    latents = pipe.encode_image(pixels)
    np.testing.assert_allclose(latents, pixels / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(pipe.decode_latents(latents), latents)
    posterior = Networks.of(SPEC).vae.apply({}, latents, method="encode")
    assert np.abs(posterior.sample(jnp.ones_like(latents)) - latents).max() < 1e-6


def test_it_is_no_part():
    assert SPEC.parts == ("unet", "text_encoder")
    assert ModelSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC


def test_no_foreign_file_has_a_place_for_it(tmp_path):
    with pytest.raises(CheckpointError, match="format='native'"):
        save_checkpoint(tmp_path / "model.safetensors", SPEC, {"unet": {}}, None, "single_file")
