"""Runs of an IP-Adapter: it alone learns, of pictures of which some are not shown, and its file does what it learnt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ip_adapter as configs
from sd_jax.adapters.ip_adapter import KINDS
from sd_jax.checkpoints.clip import save_clip
from sd_jax.data.shapes import ShapesWorld
from sd_jax.media import decode_image
from sd_jax.models.clip import CLIP
from sd_jax.prompts.tokenize import train_tokenizer
from sd_jax.sampling.pipeline import Pipeline, load
from sd_jax.training import ip_adapter, plan
from sd_jax.training.loop import train
from sd_jax.training.metrics import read_rows
from tests.sampling.conftest import ONE_LEVEL, random_params
from tests.training.test_beside_runs import CLIP as TINY_EYES

RECIPE = {"prompt": "a red circle", "steps": 2, "width": 16, "height": 16, "output": "latents", "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a model and a CLIP in it."""
    folder = tmp_path_factory.mktemp("base")
    world = ShapesWorld(16, num_examples=200, seed=0, split="train")
    tokenizer = train_tokenizer([world.caption(i) for i in range(200)], folder / "tokenizer", 560)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    spec = ONE_LEVEL.with_vocabulary("text_encoder", vocab_size=tokenizer.vocab_size, **ids)
    Pipeline(spec, random_params(spec), tokenizer).save(folder / "model")
    params, rng = CLIP.of(TINY_EYES).init(jax.random.key(0)), np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), params)
    save_clip(folder / "clip", TINY_EYES, moved)
    return folder


def config_of(folder, kind="base"):
    config = configs.get_config("runlocal,plus" if kind == "plus" else "runlocal")
    config.init, config.init_clip = str(folder / "model"), str(folder / "clip")
    config.data.resolution, config.data.num_workers, config.data.held_out = 16, 0, 4
    config.eval_batches, config.checkpoint_steps = 1, 0
    config.optimizer.learning_rate, config.samples.sampler = 0.01, "euler"
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_a_file_that_does_what_it_learnt(folder, tmp_path, kind):
    config = config_of(folder, kind)
    config.sample_steps, config.eval_steps = (2, 2) if kind == "base" else (0, 0)
    train(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run")
    assert len(rows) == 2 and np.isfinite([row["loss"] for row in rows]).all()
    if kind == "base":
        assert np.isfinite(rows[-1]["held_out_loss"])
        (sheet,) = (tmp_path / "run" / "samples").iterdir()
        assert decode_image(sheet).shape[1] >= 32  # two pictures, and what it made of them
    pipe = load(folder / "model")
    on = pipe.with_adapter(tmp_path / "run", image_encoder=folder / "clip")
    assert on.adapters[0].adapter.kind == kind
    first, second = (np.full((16, 16, 3), colour, np.uint8) for colour in (0, 255))
    shown = [on.text_to_image(**RECIPE, image_prompt=picture) for picture in (first, second)]
    assert np.abs(shown[0] - shown[1]).max() > 1e-5 and np.abs(shown[0] - pipe.text_to_image(**RECIPE)).max() > 1e-3


def test_what_it_sees_through_is_planned(folder):
    spec = plan._spec(config_of(folder))
    assert spec.image_encoder.vision_config == TINY_EYES.vision_config and spec.unet == ONE_LEVEL.unet


def test_what_is_dropped_together_and_apart():
    config = configs.get_config()
    keys = jax.vmap(jax.random.key)(jnp.arange(20_000, dtype=jnp.uint32))
    picture = np.asarray(ip_adapter._dropped(config, keys))
    caption = np.asarray(ip_adapter.noise.uniform(keys, ip_adapter.DROPOUT) < config.diffusion.caption_dropout)
    for share in (picture & caption, picture & ~caption, caption & ~picture):
        assert share.mean() == pytest.approx(0.05, abs=0.006)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("init_clip", "", "config.method='ip_adapter' sees through a CLIP: give its path as config.init_clip"),
        ("ip_adapter.kind", "faceid", "config.ip_adapter.kind='faceid' is unknown: use base or plus"),
        ("ip_adapter.image_dropout", 1.5, r"config.ip_adapter.image_dropout=1.5: give a share"),
        ("data.cache_latents", True, "config.data.cache_latents: CLIP sees pixels"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_compiled(folder, tmp_path, monkeypatch, key, value, message):
    config = config_of(folder)
    config.update_from_flattened_dict({key: value})
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_, **__: pytest.fail("compiled"))
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run")
