"""Whole runs of the networks beside the model, as small as can be: each starts from what the one before it left."""

import dataclasses
import io

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import sd_jax
from configs import autoencoder, beside
from sd_jax.checkpoints.beside import open_beside
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.data.shards import TarWriter
from sd_jax.models.presets import SHAPES_CLIP, AestheticConfig, FeaturesConfig, ModelSpec
from sd_jax.training.loop import train
from sd_jax.training.metrics import read_rows

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP = dataclasses.replace(
    SHAPES_CLIP,
    text_config=dataclasses.replace(SHAPES_CLIP.text_config, **TINY),
    vision_config=dataclasses.replace(SHAPES_CLIP.vision_config, **TINY, image_size=16, patch_size=8),
    projection_dim=8,
)


def run(config, workdir, **model):
    """-> the rows of its metrics."""
    if model:
        config.model = ConfigDict(ModelSpec(**model).to_dict())
    config.data.resolution, config.eval_batches, config.log_steps = 16, 1, 0
    train(config, workdir)
    rows = list(read_rows(workdir))
    assert len(rows) == config.total_steps and all(np.isfinite(row["loss"]) for row in rows)
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("beside")


@pytest.fixture(scope="module")
def clip(folder):
    rows = run(beside.get_config("clip,runlocal"), folder / "clip", clip=CLIP)
    assert 0 <= rows[-1]["held_out_top1"] <= 1 and rows[-1]["logit_scale"] == pytest.approx(2.659, abs=0.01)
    return folder / "clip"


@pytest.fixture(scope="module")
def features(folder):
    config = beside.get_config("features,runlocal")
    run(config, folder / "features", features=FeaturesConfig((4, 8), (1, 1), max_position_embeddings=24))
    return folder / "features"


def test_a_clip_is_loaded_from_its_run(clip):
    loaded = sd_jax.load_clip(clip)
    assert loaded.config.vision_config == dataclasses.replace(CLIP.vision_config, projection_dim=8)
    assert loaded.encode_texts(["a red circle", "a blue star"]).shape == (2, 8)
    with pytest.raises(CheckpointError, match="no aesthetic in it, only clip"):
        open_beside("aesthetic", clip)


def test_a_head_learns_ratings_from_tars(clip, folder):
    (folder / "rated").mkdir()
    with TarWriter(folder / "rated" / "00000.tar") as tar:
        for i in range(24):
            png = io.BytesIO()
            Image.new("RGB", (16, 16), (10 * i, 0, 0)).save(png, "PNG")
            tar.add(f"{i:03d}", png.getvalue(), ("a picture",), {"rating": float(i % 9)})
    config = beside.get_config("aesthetic,runlocal")
    config.init_clip, config.data.path = str(clip), str(folder / "rated")
    config.data.rating_key = "json.rating"
    rows = run(config, folder / "head", aesthetic=AestheticConfig("linear", 8))
    assert 0 <= rows[-1]["held_out_order"] <= 1
    head = open_beside("aesthetic", folder / "head")
    assert head.config == AestheticConfig("linear", 8) and head.params["kernel"].shape == (8, 1)


def test_an_autoencoder_learns_from_features_and_a_discriminator(features, folder):
    config = autoencoder.get_config("runlocal")
    config.init_perceptual, config.autoencoder.perceptual_weight = str(features), 1.0
    config.autoencoder.discriminator_start = 1
    config.trainable = "^vae/(decoder|post_quant_conv)/|^discriminator/"
    config.sample_steps = 0
    before, after = run(config, folder / "autoencoder")
    assert before["discriminator_weight"] == 0 < after["discriminator_weight"]
    assert after["perceptual"] > 0
    assert set(open_beside("perceptual", features).params) == {"features_0", "features_3", "lin0", "lin1"}
    assert sd_jax.load(folder / "autoencoder").params.keys() == {"vae"}
