"""The method that enlarges: its loss against numpy, its draws, what it refuses, and a whole run in pixels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import sd_jax
from configs import pixels
from sd_jax import media
from sd_jax.config import training_defaults
from sd_jax.diffusion import noise
from sd_jax.models.presets import TINY_SHAPES, IdentityConfig
from sd_jax.sampling import denoising
from sd_jax.training.loop import train
from sd_jax.training.methods import METHODS
from sd_jax.training.metrics import read_rows
from tests.checkpoints.tiny import X2_UPSCALER
from tests.training import restated

METHOD = METHODS["super_resolution"]
STEP_KEY = jax.random.fold_in(jax.random.key(0), 3)
RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (8, 8, 3), np.uint8)


class OneLine(restated.OneLine):
    """Which sees six channels, of which the last three are the small picture, and the level."""

    def apply(self, variables, x, timesteps, told):
        small, level = x[..., -3:], told.class_labels.astype(jnp.float32)
        added = jnp.mean(small * jnp.arange(1, 4, dtype=jnp.float32)[None, None, None], -1, keepdims=True)
        return super().apply(variables, x[..., :-3], timesteps, told) + added + 0.01 * level[:, None, None, None]


def context_of(**diffusion):
    """Latents of 6x10 of pictures of 24x40, enlarged fourfold."""
    context = restated.context_of(**diffusion)
    config = training_defaults("super_resolution")
    for name in ("batch_size", "data", "diffusion"):
        config[name] = context.config[name]
    return context._replace(config=config, networks=context.networks._replace(unet=OneLine()))


BATCH = {**restated.batch_of(), "pixels": RNG.integers(0, 256, (8, 24, 40, 3)).astype(np.uint8)}


def loss_of(context, batch):
    keys = noise.example_keys(jax.random.key(0), 3, jnp.asarray(batch["slot"]))
    return METHOD.loss(context, restated.PARAMS, jax.tree.map(jnp.asarray, batch), keys)[0]


@pytest.mark.parametrize("diffusion", [{}, {"min_snr_gamma": 5.0, "caption_dropout": 0.5, "noise_offset": 0.1}])
def test_loss_is_the_formula(diffusion):
    context, slot = context_of(**diffusion), BATCH["slot"]
    image = BATCH["pixels"] / 127.5 - 1
    small = image.reshape(8, 6, 4, 10, 4, 3).mean((2, 4))
    level = (350 * restated.draws(STEP_KEY, slot, restated.LEVEL, (), jax.random.uniform)).astype(int)
    assert level.min() >= 0 and level.max() < 350 and len(set(level)) == 8
    abar = np.cumprod(1 - np.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2)[level][:, None, None, None]
    n = restated.draws(STEP_KEY, slot, restated.SMALL_PICTURE, (6, 10, 3))
    seen = np.sqrt(abar) * small + np.sqrt(1 - abar) * n
    beside = np.mean(seen * [1, 2, 3], -1, keepdims=True) + 0.01 * level[:, None, None, None]
    error, weight, _ = restated.errors(STEP_KEY, BATCH, context, beside=beside)
    np.testing.assert_allclose(loss_of(context, BATCH), np.mean(error * weight), rtol=1e-6)


def test_a_part_of_the_batch_draws_what_the_whole_does():
    context = context_of()
    halves = [float(loss_of(context, {name: value[i::2] for name, value in BATCH.items()})) for i in range(2)]
    np.testing.assert_allclose(np.mean(halves), loss_of(context, BATCH), rtol=1e-6)
    assert halves[0] != halves[1]


def test_held_out_is_the_task_of_sampling():
    """The small picture is noised there, too; at no other level for what only training does."""
    keys = noise.example_keys(jax.random.key(0), 3, jnp.asarray(BATCH["slot"]))
    held = [
        METHOD.held_out(context, restated.PARAMS, jax.tree.map(jnp.asarray, BATCH), keys)
        for context in (context_of(), context_of(noise_offset=0.3, caption_dropout=1.0))
    ]
    assert float(held[0]["loss"][1]) == 8 and held[0]["loss"] == held[1]["loss"]
    np.testing.assert_allclose(held[0]["loss"][0] / 8, loss_of(context_of(caption_dropout=0.0), BATCH), rtol=1e-6)


# --- What cannot be --------------------------------------------------------------------------------------------------

UNET = dataclasses.replace(TINY_SHAPES.unet, block_out_channels=(16,), attention_blocks=(True,))
PIXELS = dataclasses.replace(
    TINY_SHAPES,
    vae=IdentityConfig(16),
    unet=dataclasses.replace(UNET, sample_size=16, in_channels=6, out_channels=3, num_class_embeds=40),
)
LATENTS = dataclasses.replace(TINY_SHAPES, unet=dataclasses.replace(UNET, in_channels=7, num_class_embeds=40))


def config_of(spec, **changes):
    config = training_defaults("super_resolution")
    config.super_resolution.max_noise_level = 40
    config.model = ConfigDict(spec.to_dict())
    config.update_from_flattened_dict(changes)
    return config


REFUSED = [
    (TINY_SHAPES, {}, "config.model.unet.in_channels=4: .* needs 7, the latents' 4 and the small picture's 3"),
    (
        dataclasses.replace(LATENTS, unet=dataclasses.replace(LATENTS.unet, num_class_embeds=None)),
        {},
        "config.model.unet.num_class_embeds=None: give at least config.super_resolution.max_noise_level=40",
    ),
    (PIXELS, {"super_resolution.max_noise_level": 41}, "num_class_embeds=40: give at least .*max_noise_level=41"),
    (PIXELS, {"super_resolution.max_noise_level": 0}, "max_noise_level=0: give 1 to 350"),
    (PIXELS, {"super_resolution.max_noise_level": 400}, "max_noise_level=400: give 1 to 350"),
    (PIXELS, {"super_resolution.factor": 1}, "config.super_resolution.factor=1: give 2 or more"),
    (LATENTS, {"super_resolution.factor": 2}, "factor=2: latents of this autoencoder are 4 times smaller"),
    (PIXELS, {"data.resolution": 30}, "config.data.resolution=30: give a multiple of config.super_resolution.factor=4"),
    (PIXELS, {"data.buckets.step": 6}, "config.data.buckets.step=6: give a multiple of"),
    (LATENTS, {"data.cache_latents": True}, "config.data.cache_latents: .* makes the small picture of the pixels"),
    (PIXELS, {"diffusion.caption_dropout": 2.0}, "config.diffusion.caption_dropout=2"),
]


@pytest.mark.parametrize(("spec", "changes", "said"), REFUSED)
def test_what_cannot_be_is_named(spec, changes, said):
    METHOD.check(config_of(PIXELS), PIXELS)
    with pytest.raises(ValueError, match=said) as refused:
        METHOD.check(config_of(spec, **changes), spec)
    assert "\n" not in str(refused.value)


def test_other_methods_do_not_train_an_upscaler(tmp_path):
    config = training_defaults("full")
    config.model, config.init = ConfigDict(PIXELS.to_dict()), ""
    with pytest.raises(ValueError, match="latents of 3 channels, and this U-Net reads 6 .for inpainting, depth or ups"):
        train(config, tmp_path)


def test_the_latent_upscaler_is_not_trained(tmp_path):
    with pytest.raises(ValueError, match="'super_resolution': the x2 latent upscaler is not trained here, choose"):
        train(config_of(X2_UPSCALER), tmp_path)


# --- A run -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_in_pixels_makes_an_upscaler(tmp_path, monkeypatch):
    """Pictures are walked on the spot: what the walk is given, the tests of the job say."""
    walks = []

    def stand(params, run, carry, first, last, **static):
        walks.append(run)
        return carry

    monkeypatch.setattr(denoising, "_walk", stand)
    config = pixels.get_config("super_resolution,runlocal")
    config.model, config.super_resolution.max_noise_level = ConfigDict(PIXELS.to_dict()), 40
    config.data.resolution, config.optimizer.name, config.eval_steps = 16, "adamw", 0
    train(config, tmp_path)
    rows = list(read_rows(tmp_path))
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)
    sheet = media.decode_image(tmp_path / "samples" / "0000002.png")
    assert sheet.shape[0] > 3 * 128 and 128 < sheet.shape[1] < 256  # small, made and true, of one held out
    made = sd_jax.load(tmp_path).upscale(PICTURE, "a red circle", width=16, height=16, steps=2)
    assert made.shape == (1, 16, 16, 3) and [walk.concat.shape for walk in walks] == [(1, 16, 16, 3)] * 2
