"""CLIP as the model stage: its columns are those of the networks called by hand."""

import dataclasses
import json
import pathlib
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sd_jax
from sd_jax.checkpoints import aesthetic, clip
from sd_jax.data import filters, preparation, shards, stages
from sd_jax.data.clip_pixels import preprocess
from sd_jax.data.clip_scorer import clip_scorer
from sd_jax.data.preparation import Settings
from sd_jax.models.aesthetic import AestheticConfig, AestheticHead
from sd_jax.models.clip import CLIP
from sd_jax.models.presets import TINY_CLIP
from sd_jax.prompts.tokenize import load_tokenizer

TOKENIZER = pathlib.Path(sd_jax.__file__).parent / "assets" / "shapes_64" / "tokenizer"
CAPTIONS = ("a red circle", "", "two " * 100, "a blue square", "x")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(a CLIP's folder, a head's file, their config and parameters)."""
    root = tmp_path_factory.mktemp("clip")
    words = load_tokenizer(TOKENIZER)
    text = dataclasses.replace(
        TINY_CLIP.text_config,
        vocab_size=words.vocab_size,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    config = dataclasses.replace(TINY_CLIP, text_config=text)
    rng = np.random.default_rng(0)
    fresh = jax.eval_shape(CLIP.of(config).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), fresh)
    clip.save_clip(root / "clip", config, params, tokenizer=words)
    head = AestheticConfig("linear", config.projection_dim)
    weights = {"params": {"kernel": np.ones((head.width, 1), np.float32), "bias": np.full(1, 5.0, np.float32)}}
    aesthetic.save(root / "head.safetensors", head, weights)
    return root / "clip", root / "head.safetensors", config, params, weights


@pytest.fixture(scope="module")
def pictures():
    return [np.random.default_rng(i).integers(0, 256, (30 + i, 50, 3), np.uint8) for i in range(len(CAPTIONS))]


@pytest.fixture(scope="module")
def scorer(files):
    return clip_scorer(str(files[0]), str(files[1]), batch_size=4)


def test_equals_the_networks(files, pictures, scorer):
    _, _, config, params, weights = files
    some = slice(0, 4)
    inputs = np.stack([scorer.preprocess(picture) for picture in pictures[some]])
    found = scorer.score({"inputs": inputs, "caption": list(CAPTIONS[some])})
    network = CLIP.of(config)
    images = network.encode_image(params, jnp.asarray(preprocess(pictures[some], config)))
    tokenizer = load_tokenizer(TOKENIZER)
    with pytest.warns(UserWarning, match="prompt too long"):
        ids = tokenizer(CAPTIONS[some], config.text_config.max_position_embeddings)
    expected = np.einsum("if,if->i", images, network.encode_text(params, jnp.asarray(ids)))
    assert [value is None for value in found["similarity"]] == [False, True, False, False]
    told = [i for i, value in enumerate(found["similarity"]) if value is not None]
    np.testing.assert_allclose([found["similarity"][i] for i in told], expected[told], atol=1e-5)
    scores = AestheticHead(AestheticConfig("linear", config.projection_dim)).apply(weights, images)
    np.testing.assert_allclose(found["aesthetic"], scores, rtol=1e-5)


def test_the_whole_way(files, pictures, scorer, tmp_path):
    (tmp_path / "in").mkdir()
    for i, (pixels, caption) in enumerate(zip(pictures, CAPTIONS, strict=True)):
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")
        (tmp_path / "in" / f"{i}.txt").write_text(caption)
        (tmp_path / "in" / f"{i}.json").write_text('{"AESTHETIC_SCORE": 1.0, "similarity": 9.0}')
    records = list(shards.read(shards.find([str(tmp_path / "in")], 10)[0]))
    looks = stages.look(records, scorer.preprocess, stages.Sizes())
    parts = ((records[:4], looks[:4]), (records[4:], looks[4:]))
    scores = [stages.score(scorer, stages.table(part, seen), seen)["aesthetic"] for part, seen in parts]
    scores = [score for part in scores for score in part]
    threshold = float(np.median(scores))
    settings = Settings(filters.resolve({"aesthetic": threshold}), batch_size=4)
    found = shards.find([str(tmp_path / "in")], 10)
    report = preparation.prepare(found, tmp_path / "out", settings, scorer)
    # The head's score counts, not what the data said
    assert report["kept"] == report["filters"]["aesthetic"]["kept"] == sum(score > threshold for score in scores) == 2
    assert sum(report["histograms"]["similarity"]["all"]) == 4 and (tmp_path / "out" / "sheet.png").exists()
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        rows = [json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith(".json")]
    assert all(row["aesthetic"] > threshold and row["similarity"] is None or row["similarity"] < 1 for row in rows)


def test_what_is_scored_with_is_told(files, scorer):
    alone = clip_scorer(str(files[0]))
    assert alone.name != scorer.name == clip_scorer(str(files[0]), str(files[1])).name
    found = alone.score({"inputs": np.zeros((1, 32, 32, 3), np.uint8), "caption": ["a"]})
    assert set(found) == {"similarity"}


def test_a_head_of_another_clip(files, tmp_path):
    config = AestheticConfig("linear", 768)
    weights = {"params": {"kernel": np.zeros((768, 1), np.float32), "bias": np.zeros(1, np.float32)}}
    aesthetic.save(tmp_path / "l14.safetensors", config, weights)
    with pytest.raises(ValueError, match="reads features of 768 numbers, those of --clip=.* have 24"):
        clip_scorer(str(files[0]), str(tmp_path / "l14.safetensors"))
