"""Whole runs of a reduced SDXL: from nothing, resumed, and fine-tuned from the folder that it is saved to."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import demo, finetune
from sd_jax.checkpoints import native, read
from sd_jax.checkpoints.native import Checkpoints
from sd_jax.sampling.pipeline import load
from sd_jax.training.loop import train
from sd_jax.training.metrics import read_rows
from tests.training import tiny_xl
from tests.training.tiny_xl import random_params

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A run that has trained an autoencoder, as far as another run can tell."""
    workdir = tmp_path_factory.mktemp("autoencoder")
    params = {"vae": random_params(tiny_xl.BASE)["vae"]}
    checkpoints = Checkpoints(workdir / "checkpoints")
    meta = {"spec": tiny_xl.BASE.to_dict(), "step": 1, "tokenizer": None}
    checkpoints.save(1, {"params": params}, None, meta)
    checkpoints.close()
    return workdir


def config_of(autoencoder):
    config = demo.get_config("text_to_image,runlocal")
    config.model = ConfigDict(tiny_xl.BASE.to_dict())
    config.init = str(autoencoder)
    config.optimizer.name, config.optimizer.learning_rate = "adamw", 1e-3
    config.data.num_workers = 0
    config.eval_steps = config.sample_steps = 2
    config.samples.prompts, config.samples.steps = ("a red circle",), 2
    return config


@pytest.fixture(scope="module")
def trained(autoencoder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train(config_of(autoencoder), workdir)
    return workdir


def test_a_run_from_nothing_keeps_draws_and_resumes_all_parts(autoencoder, trained):
    rows = read_rows(trained)
    assert [row["step"] for row in rows] == [1, 2] and rows[-1]["skipped"] == 0 and "held_out_loss" in rows[-1]
    assert sorted(path.name for path in (trained / "samples").iterdir()) == ["0000002.png"]
    (shard,) = (trained / "cache" / "train").glob("*.safetensors")
    ids = read(shard)["time_ids"]
    np.testing.assert_array_equal(np.unique(ids, axis=0), [[32, 32, 0, 0, 32, 32]])
    raw, meta, step, _ = native.read_params(trained / "checkpoints", weights="raw")
    assert set(raw) == {"unet", "vae", "text_encoder", "text_encoder_2"} and step == 2
    texts = meta["spec"]["text_encoder"], meta["spec"]["text_encoder_2"]
    assert len({(text["vocab_size"], text["eos_token_id"], text["pad_token_id"]) for text in texts}) == 1

    config = config_of(autoencoder)
    config.total_steps = 3
    train(config, trained)
    assert [row["step"] for row in read_rows(trained)] == [1, 2, 3]


def test_what_was_trained_is_saved_and_fine_tuned(trained, tmp_path):
    pipe = load(trained)
    pipe.save(tmp_path / "folder")
    config = finetune.get_config("runlocal")
    config.init = str(tmp_path / "folder")
    config.data.path, config.data.num_examples, config.data.resolution = "shapes", 50, 32
    config.data.num_workers = config.eval_steps = config.sample_steps = 0
    train(config, tmp_path / "run")
    raw, meta, _, _ = native.read_params(tmp_path / "run" / "checkpoints", weights="raw")
    assert set(raw) == {"unet", "vae", "text_encoder", "text_encoder_2"}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        same = [
            np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (raw[part], pipe.params[part])), strict=True)
        ]
        assert all(same) == (part != "unet")  # the config freezes the text encoders
    unet = meta["spec"]["unet"]
    assert unet["addition_embed_type"] == "text_time" and meta["spec"]["force_zeros_for_empty_prompt"]
