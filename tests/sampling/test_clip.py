"""A CLIP as guide and as judge of candidates, small and of random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sd_jax
from sd_jax.checkpoints.clip import save_clip
from sd_jax.models.clip import CLIP
from sd_jax.models.presets import SHAPES_CLIP
from sd_jax.sampling.clip import Clip

CONFIG = dataclasses.replace(
    SHAPES_CLIP,
    text_config=dataclasses.replace(SHAPES_CLIP.text_config, num_hidden_layers=1),
    vision_config=dataclasses.replace(SHAPES_CLIP.vision_config, num_hidden_layers=1, patch_size=16),
)
PROMPTS = ["a red circle", "a blue star"]
QUICK = {"steps": 2, "guidance_scale": 1.0, "sampler": "euler", "seed": 3}


@pytest.fixture(scope="module")
def clip(pipe):
    tokenizer = pipe.tokenizer
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = dataclasses.replace(CONFIG.text_config, vocab_size=tokenizer.vocab_size, **ids)
    config = dataclasses.replace(CONFIG, text_config=text)
    params, rng = jax.jit(CLIP.of(config).init)(jax.random.key(0)), np.random.default_rng(0)
    moved = lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype)  # noqa: E731
    return Clip(config, jax.tree.map(moved, params), tokenizer)


def test_the_best_are_the_nearest(clip):
    images = np.random.default_rng(0).integers(0, 256, (5, 40, 48, 3)).astype(np.uint8)
    features, text = clip.encode_images(images), clip.encode_texts(PROMPTS[:1])
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    assert clip.best_of(images, PROMPTS[0], 3).tolist() == np.argsort(-(features @ text[0]))[:3].tolist()
    with pytest.raises(ValueError, match="keep=6"):
        clip.best_of(images, PROMPTS[0], 6)


def test_guidance_leads_towards_the_prompts(pipe, clip):
    """Each picture towards its own, the more the larger the scale, which compiles nothing; at 0 nowhere."""

    def near(images):
        return (clip.encode_images(images) * clip.encode_texts(PROMPTS)).sum(1)

    plain = pipe.text_to_image(PROMPTS, **QUICK)
    guided = [pipe.text_to_image(PROMPTS, clip=clip, clip_guidance_scale=s, **QUICK) for s in (0.0, 0.3, 1.0)]
    assert np.abs(guided[0].astype(int) - plain).max() <= 1
    assert np.all(near(guided[1]) > near(plain)) and np.all(near(guided[2]) > near(guided[1]))


def test_a_clip_and_its_scale_belong_together(pipe, clip):
    with pytest.raises(ValueError, match="clip_guidance_scale= says: give both or neither"):
        pipe.text_to_image(PROMPTS, clip=clip, **QUICK)
    with pytest.raises(ValueError, match="give both or neither"):
        pipe.text_to_image(PROMPTS, clip_guidance_scale=1.0, **QUICK)


def test_a_folder_of_transformers_is_loaded_with_its_tokenizer(clip, tmp_path):
    save_clip(tmp_path / "clip", clip.config, clip.params, tokenizer=clip.tokenizer)
    again = sd_jax.load_clip(tmp_path / "clip")
    np.testing.assert_array_equal(again.encode_texts(PROMPTS), clip.encode_texts(PROMPTS))
    assert jnp.asarray(again.params["logit_scale"]).dtype == jnp.float32
