"""The method that inpaints: what it shows is what sampling shows, it begins as what it came from, and a whole run."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import inpainting as configs
from sd_jax import media
from sd_jax.config import training_defaults
from sd_jax.diffusion import noise
from sd_jax.models.presets import TINY_SHAPES
from sd_jax.preprocessors import apply
from sd_jax.sampling import inpaint
from sd_jax.sampling.pipeline import Pipeline, load
from sd_jax.training import control, inpainting
from sd_jax.training.context import Context
from sd_jax.training.loop import train
from sd_jax.training.methods import METHODS
from sd_jax.training.metrics import read_rows
from sd_jax.types import Conditioning, Recipe
from tests.sampling.conftest import ONE_LEVEL, random_params
from tests.training import restated
from tests.training.test_adapting import base  # noqa: F401 - a fixture

METHOD = METHODS["inpainting"]
RNG = np.random.default_rng(0)
BATCH = {**restated.batch_of(), "pixels": RNG.integers(0, 256, (8, 24, 40, 3)).astype(np.uint8)}
WEIGHTS = jnp.arange(1, 6, dtype=jnp.float32)[None, None, None]


class OneLine(restated.OneLine):
    """Which sees nine channels, of which the last five are the mask and the masked picture's latents."""

    def apply(self, variables, x, timesteps, told):
        return super().apply(variables, x[..., :4], timesteps, told) + jnp.sum(x[..., 4:] * WEIGHTS, -1, keepdims=True)


class Squares:
    """An "autoencoder": means over squares of 4 pixels a side, a fourth channel of ones."""

    def apply(self, variables, image, method):
        small = image.reshape(-1, 6, 4, 10, 4, 3).mean((2, 4))
        return types.SimpleNamespace(mean=jnp.concatenate([small, jnp.ones_like(small[..., :1])], -1))


def context_of():
    context, config = restated.context_of(), training_defaults("inpainting")
    for name in ("batch_size", "data", "diffusion"):
        config[name] = context.config[name]
    return context._replace(config=config, networks=context.networks._replace(unet=OneLine(), vae=Squares()))


def keys_of(batch):
    return noise.example_keys(jax.random.key(0), 3, jnp.asarray(batch["slot"]))


def masks_of(config, batch, keys):
    return np.asarray(jax.jit(lambda keys: inpainting.masks_of(config, batch["pixels"], keys))(keys))


def test_loss_is_the_formula_and_draws_by_the_place_in_the_global_batch():
    context = context_of()
    loss_of = jax.jit(lambda batch: METHOD.loss(context, restated.PARAMS, batch, keys_of(batch))[0])
    masks = masks_of(context.config, BATCH, keys_of(BATCH))
    assert 0.1 < masks.mean() < 0.9
    kept = (BATCH["pixels"] / 127.5 - 1) * (1 - masks)
    kept = kept.reshape(8, 6, 4, 10, 4, 3).mean((2, 4)) * context.networks.spec.vae.scaling_factor
    ones = np.full((8, 6, 10, 1), context.networks.spec.vae.scaling_factor)
    seen = np.concatenate([masks[:, ::4, ::4], kept, ones], -1)
    beside = np.sum(seen * np.arange(1, 6), -1, keepdims=True)
    error, weight, _ = restated.errors(jax.random.fold_in(jax.random.key(0), 3), BATCH, context, beside=beside)
    np.testing.assert_allclose(loss_of(BATCH), np.mean(error * weight), rtol=1e-6)
    moved = {name: np.roll(value, 3, axis=0) for name, value in BATCH.items()}
    np.testing.assert_allclose(loss_of(moved), loss_of(BATCH), rtol=1e-6)
    assert abs(loss_of({**moved, "slot": BATCH["slot"]}) - loss_of(BATCH)) > 1e-4


@pytest.fixture(scope="module")
def pipe():
    return Pipeline(ONE_LEVEL, random_params(ONE_LEVEL))


def test_it_begins_as_what_it_came_from_and_is_shown_what_sampling_shows(pipe):
    spec, params = METHOD.begin(pipe.spec, pipe.params)
    widened = Pipeline(spec, params)
    told = Conditioning(jnp.asarray(RNG.standard_normal((2, 5, 32)), jnp.float32))
    latents, more = (jnp.asarray(RNG.standard_normal((2, 8, 8, c)), jnp.float32) for c in (4, 5))
    seen = jnp.concatenate([latents, more], -1)
    before = pipe.predict(latents, jnp.array([3.0, 700.0]), told)
    np.testing.assert_allclose(widened.predict(seen, jnp.array([3.0, 700.0]), told), before, atol=1e-6)
    again = METHOD.begin(spec, params)
    assert again[0] == spec and again[1] is params

    pixels, config = RNG.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8), training_defaults("inpainting")
    config.inpainting.whole = 0.0
    keys = noise.image_keys(0, 2)
    context, batch = Context(widened.networks, config, None), {"pixels": pixels}
    shown = jax.jit(lambda keys: inpainting._show(context, params, batch, keys, (8, 8)).channels)(keys)
    start = inpaint.start_of(widened, Recipe(), pixels, masks_of(config, batch, keys))
    np.testing.assert_allclose(shown, start.concat, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "changes", "said"),
    [
        (TINY_SHAPES, {}, "unet.in_channels=4: config.method='inpainting' needs 9"),
        (None, {"data.cache_latents": True}, "config.data.cache_latents: masks hide pixels"),
        (None, {"inpainting.side": 2.0}, "config.inpainting.side=2.0: give a share"),
        (None, {"diffusion.caption_dropout": 2.0}, "config.diffusion.caption_dropout=2"),
    ],
)
def test_what_cannot_be_is_named(spec, changes, said):
    nine, _ = METHOD.begin(TINY_SHAPES, {})
    config = training_defaults("inpainting")
    METHOD.check(config, nine)
    config.model = ConfigDict(nine.to_dict())
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=said) as refused:
        METHOD.check(config, spec or nine)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_run_widens_a_model_that_then_inpaints(base, tmp_path):  # noqa: F811
    config = configs.get_config("runlocal")
    config.init, config.data.resolution, config.data.num_workers = str(base), 16, 0
    config.sample_steps, config.samples.sampler, config.ema_decays = 2, "euler", (0.0,)
    train(config, tmp_path / "run")
    assert np.isfinite([row["loss"] for row in read_rows(tmp_path / "run")]).all()
    pipe = load(tmp_path / "run")
    assert pipe.spec.unet == dataclasses.replace(load(base).spec.unet, in_channels=9)
    assert np.abs(pipe.params["unet"]["conv_in"]["kernel"][:, :, 4:]).max() > 1e-6  # they learn
    (sheet,) = (tmp_path / "run" / "samples").iterdir()
    assert media.decode_image(sheet).shape[0] > 2 * 16  # pictures with a part hidden, and what it made of them
    picture, mask = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), bool)
    mask[:8] = True
    made = pipe.inpaint("a red circle", image=picture, mask=mask, steps=2)
    assert (made[0, 8:] == 0).all() and made[0, :8].any()


# --- A ControlNet that redraws ---------------------------------------------------------------------------------------


def test_hints_are_pictures_with_a_part_hidden():
    config = training_defaults("controlnet")
    config.control.hint_key = "inpaint"
    context = Context(None, config, None)
    hinted = control._hinted(lambda context, params, batch, keys: batch["hint"])
    seen = jax.jit(lambda keys: hinted(context, {}, BATCH, keys))(keys_of(BATCH))
    masks = masks_of(config, BATCH, keys_of(BATCH))
    np.testing.assert_allclose(seen, apply("inpaint", BATCH["pixels"], mask=masks[..., 0]), atol=1e-6)
