"""Runs whose U-Net is told pictures in place of captions: what it is told, what is refused, and a whole run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import image_variation as configs
from sd_jax.checkpoints.clip import vision_of
from sd_jax.config import training_defaults
from sd_jax.diffusion.noise import image_keys
from sd_jax.media import decode_image
from sd_jax.models.clip import CLIP
from sd_jax.sampling.pipeline import Pipeline, load
from sd_jax.training import conditioning
from sd_jax.training.context import Context
from sd_jax.training.loop import train
from sd_jax.training.methods import method_of
from sd_jax.training.metrics import read_rows
from tests.sampling.conftest import ONE_LEVEL
from tests.training.test_beside_runs import CLIP as TINY_EYES
from tests.training.test_ip_adapter import folder  # noqa: F401 - a fixture: a model and a CLIP

READS = dataclasses.replace(ONE_LEVEL.unet, cross_attention_dim=TINY_EYES.projection_dim)
SPEC = dataclasses.replace(ONE_LEVEL, unet=READS)
TOLD = SPEC.told_pictures(TINY_EYES)


def test_what_it_is_told_is_what_sampling_tells_or_zeros():
    side = TINY_EYES.vision_config.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (12, side, side, 3)).astype(np.uint8)
    pipe = Pipeline(TOLD, {"image_encoder": vision_of(CLIP.of(TINY_EYES).init(jax.random.key(0)))})
    batch, config = {"pixels": jnp.asarray(pixels)}, training_defaults("full")
    config.diffusion.caption_dropout = 0.5
    tell = jax.jit(lambda keys: conditioning.conditioning(context, pipe.params, batch, keys).context)
    context = Context(pipe.networks, config, None)
    told = np.asarray(tell(image_keys(0, 12)))
    dropped = (told == 0).all((1, 2))
    assert told.shape == (12, 1, TINY_EYES.projection_dim) and 0 < dropped.sum() < 12
    wanted = np.asarray(pipe.encode_pictures(list(pixels)).context)
    np.testing.assert_allclose(told[~dropped], wanted[~dropped], atol=1e-5)


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("full", {"data.cache_latents": True}, "config.data.cache_latents: CLIP sees pixels"),
        ("full", {"model.unet.cross_attention_dim": 7}, "cross_attention_dim=7: the features of config.init_clip"),
        ("inpainting", {}, "config.method='inpainting': a model that is told pictures is trained by 'full' alone"),
    ],
)
def test_what_cannot_be_is_named(method, changes, said):
    config, row = training_defaults(method), method_of(training_defaults(method))
    config.model = ConfigDict(row.begin(TOLD, {})[0].to_dict())
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=said):
        row.check(config, type(TOLD).from_dict(config.model.to_dict()))


@pytest.mark.slow
def test_a_run_leaves_a_model_that_is_told_pictures(folder, tmp_path):  # noqa: F811
    config = configs.get_config("runlocal")
    config.init, config.init_clip = str(folder / "model"), str(folder / "clip")
    config.model = ConfigDict(SPEC.to_dict())
    config.data.resolution, config.data.num_workers, config.sample_steps = 16, 0, 2
    config.samples.sampler, config.ema_decays = "euler", (0.0,)
    train(config, tmp_path / "run")
    assert np.isfinite([row["loss"] for row in read_rows(tmp_path / "run")]).all()
    (sheet,) = (tmp_path / "run" / "samples").iterdir()
    assert decode_image(sheet).shape[0] > 2 * 16  # pictures, and what it made of them
    pipe = load(tmp_path / "run")
    assert pipe.spec.unet == READS and pipe.spec.sees_pictures
    assert pipe.spec.image_encoder.vision_config == TINY_EYES.vision_config
    first, second = (np.full((16, 16, 3), colour, np.uint8) for colour in (0, 255))
    given = {"steps": 1, "width": 16, "height": 16, "output": "latents", "guidance_scale": 1.0}
    shown = [pipe.text_to_image(image_prompt=picture, **given) for picture in (first, second)]
    assert np.isfinite(shown).all()
