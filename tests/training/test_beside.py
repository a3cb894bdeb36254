"""Losses of the networks beside the model, against NumPy; what is refused; optimisers of some parameters alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.beside import get_config
from sd_jax.config import training_defaults
from sd_jax.models.caption_words import words_loss
from sd_jax.models.presets import SHAPES_CLIP, AestheticConfig, ModelSpec
from sd_jax.training.aesthetic import AESTHETIC, pair_losses
from sd_jax.training.contrastive import CLIP, contrastive_losses
from sd_jax.training.optimizers import make_optimizer, moving


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_contrastive_loss_is_symmetric_cross_entropy():
    logits = np.random.default_rng(0).normal(0, 3, (5, 5))
    expected = -(np.diag(log_softmax(logits)) + np.diag(log_softmax(logits.T))) / 2
    np.testing.assert_allclose(contrastive_losses(jnp.asarray(logits, jnp.float32)), expected, rtol=1e-5)


def test_words_loss_is_the_mean_over_the_vocabulary():
    logits = np.random.default_rng(1).normal(size=(2, 6))
    ids = np.array([[1, 1, 3], [0, 5, 2]], np.int32)
    said = np.array([[0, 1, 0, 1, 0, 0], [1, 0, 1, 0, 0, 1]])
    p = 1 / (1 + np.exp(-logits))
    expected = -(said * np.log(p) + (1 - said) * np.log(1 - p)).mean(-1)
    np.testing.assert_allclose(words_loss(jnp.asarray(logits, jnp.float32), jnp.asarray(ids)), expected, rtol=1e-5)


def test_pairs_are_those_whose_ratings_differ():
    scores, ratings = np.array([0.3, -1.0, 2.0, 0.5]), np.array([1.0, 0.0, 1.0, 5.0])
    pairs = [(i, j) for i in range(4) for j in range(4) if ratings[i] > ratings[j]]
    total, count = pair_losses(jnp.asarray(scores, jnp.float32), jnp.asarray(ratings, jnp.float32))
    assert int(count) == len(pairs) == 5
    np.testing.assert_allclose(total, sum(np.log1p(np.exp(scores[j] - scores[i])) for i, j in pairs), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.resolution": 64}, "squares of 32 pixels"),
        ({"grad_accumulation": 2}, "config.grad_accumulation=1"),
        ({"parallelism": "pmap"}, "config.parallelism='jit'"),
    ],
)
def test_a_clip_compares_whole_steps_of_its_own_size(changes, message):
    config = get_config("clip")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        CLIP.check(config, ModelSpec(clip=SHAPES_CLIP))


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        (ModelSpec(aesthetic=AestheticConfig()), {}, "config.init_clip"),
        (ModelSpec(clip=SHAPES_CLIP), {}, "config.model.aesthetic"),
        (ModelSpec(clip=SHAPES_CLIP, aesthetic=AestheticConfig()), {}, "config.model.aesthetic.width=768"),
        (ModelSpec(clip=SHAPES_CLIP, aesthetic=AestheticConfig(width=64)), {"aesthetic.loss": "x"}, "ratings or pairs"),
        (ModelSpec(clip=SHAPES_CLIP, aesthetic=AestheticConfig(width=64)), {"data.rating_key": ""}, "rating_key"),
    ],
)
def test_an_aesthetic_head_needs_a_clip_and_ratings(spec, changes, message):
    config = training_defaults("aesthetic")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        AESTHETIC.check(config, spec)


def test_a_spec_with_everything_beside_it_survives_json():
    import json

    for method in ("clip", "features", "aesthetic"):
        spec = ModelSpec.from_dict(get_config(method).model.to_dict())
        assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.aesthetic == AestheticConfig("mlp_relu", 64)
    clip = ModelSpec(clip=SHAPES_CLIP).with_vocabulary("clip", vocab_size=500)
    assert clip.clip == dataclasses.replace(
        SHAPES_CLIP, text_config=dataclasses.replace(SHAPES_CLIP.text_config, vocab_size=500)
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_what_is_trainable_moves_and_the_discriminator_has_its_own_optimiser(name):
    config = training_defaults("autoencoder")
    config.trainable = "^vae/decoder/|^discriminator"
    config.autoencoder.discriminator_weight = 0.5
    config.optimizer.update(name=name, warmup_steps=0, clip_norm=1e-3, weight_decay=0.1)
    leaf = jnp.full((3, 3), 0.5)
    params = {"vae": {"encoder": {"kernel": leaf}, "decoder": {"kernel": leaf}}, "discriminator": {"kernel": leaf}}
    assert moving(config, params) == {
        "vae": {"encoder": {"kernel": False}, "decoder": {"kernel": True}},
        "discriminator": {"kernel": True},
    }
    optimizer = make_optimizer(config)
    state = optimizer.init(params)
    assert not any("encoder" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))
    updates, _ = optimizer.update(jax.tree.map(lambda x: 100.0 * x, params), state, params)
    assert not np.any(updates["vae"]["encoder"]["kernel"]) and np.all(updates["vae"]["decoder"]["kernel"] != 0)
    # Its first step is Adam's: the rate, whatever the gradient and the norm that the model's is clipped to
    rate = config.autoencoder.discriminator_learning_rate
    np.testing.assert_allclose(updates["discriminator"]["kernel"], -rate * np.ones((3, 3)), rtol=1e-4)
