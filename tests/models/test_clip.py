import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sd_jax.models.clip import CLIP, normalised
from sd_jax.models.presets import TINY_CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig

# Parity of the whole: tests/checkpoints/test_parity_clip.py


def test_fresh_parameters():
    shapes = jax.eval_shape(CLIP.of(TINY_CLIP).init, jax.random.key(0))
    assert sorted(shapes) == ["logit_scale", "text_model", "text_projection", "vision_model", "visual_projection"]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    vision = traverse_util.flatten_dict(shapes["vision_model"], sep="/")
    assert vision["embeddings/patch_embedding/kernel"].shape == (8, 8, 3, 48)
    assert "embeddings/patch_embedding/bias" not in vision


def test_similarity_is_the_scaled_cosine_of_pictures_and_texts():
    clip = CLIP.of(TINY_CLIP)
    images = normalised(jnp.asarray([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]]))
    np.testing.assert_allclose(images, [[0.6, 0.8], [0, 1], [0, 0]], atol=1e-6)
    texts = jnp.asarray([[1.0, 0.0], [0.0, -1.0]])
    scale = jnp.asarray(math.log(10.0), jnp.bfloat16)
    logits = clip.similarity({"logit_scale": scale}, images, texts)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, math.exp(float(scale)) * np.asarray([[0.6, -0.8], [0, -1], [0, 0]]), atol=1e-4)


def test_features_have_length_one_and_are_float32_in_half_precision():
    clip = CLIP.of(TINY_CLIP, "bfloat16")
    params = jax.eval_shape(clip.init, jax.random.key(0))
    images = jax.eval_shape(clip.encode_image, params, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32))
    texts = jax.eval_shape(clip.encode_text, params, jax.ShapeDtypeStruct((3, 77), jnp.int32))
    assert (images.shape, texts.shape) == ((2, 24), (3, 24))
    assert images.dtype == texts.dtype == jnp.float32


def test_pictures_of_the_model_are_read_as_those_of_files(initialise):
    """In [-1, 1], as autoencoders give them; of the CLIP's own size nothing is resized."""
    clip = CLIP.of(TINY_CLIP)
    params = initialise(clip.vision, jnp.zeros((1, 32, 32, 3)))
    levels = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    read = (levels - np.float32(TINY_CLIP.image_mean)) / np.float32(TINY_CLIP.image_std)
    ours, expected = jax.jit(lambda a, b: (clip.encode_picture(params, a), clip.encode_image(params, b)))(
        2 * levels - 1, read
    )
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    with pytest.raises(ValueError, match="pictures of 32x24: CLIP reads squares"):
        clip.encode_picture(params, jnp.zeros((1, 24, 32, 3)))


def test_it_can_be_static():
    assert hash(CLIP.of(TINY_CLIP)) == hash(CLIP.of(TINY_CLIP)) and CLIP.of(TINY_CLIP) == CLIP.of(TINY_CLIP)
    with pytest.raises(ValueError, match="remat"):
        CLIP.of(TINY_CLIP, remat="all")


def test_config_has_one_projection_dim_and_goes_through_json():
    config = CLIPConfig(CLIPTextConfig(projection_dim=3), CLIPVisionConfig(), projection_dim=7)
    assert config.text_config.projection_dim == config.vision_config.projection_dim == 7
    assert dataclasses.replace(config, projection_dim=9).text_config.projection_dim == 9
    assert CLIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(TypeError, match="colour"):
        CLIPConfig.from_dict({"colour": 1})
