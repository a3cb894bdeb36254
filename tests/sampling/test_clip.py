"""A CLIP as guide and as judge of candidates, small and of random weights."""

import jax.numpy as jnp
import numpy as np
import pytest

import sd_jax
from sd_jax.checkpoints.clip import save_clip
from sd_jax.sampling import hires_fix, inpaint

PROMPTS = ["a red circle", "a blue star"]
QUICK = {"steps": 2, "guidance_scale": 1.0, "sampler": "euler", "seed": 3}


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
    held = pipe.text_to_image(PROMPTS, clip=clip, clip_guidance_scale=1.0, clip_guidance_clamp=1e-6, **QUICK)
    assert np.abs(held.astype(int) - plain).max() <= 1


SLOPE = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
WIDE = np.concatenate([SLOPE, SLOPE[:, :16]], axis=1)
MASK = np.zeros((32, 48), bool)
MASK[8:, 8:40] = True


@pytest.mark.parametrize(
    ("job", "inputs"),
    [
        ("image_to_image", {"image": SLOPE, "strength": 1.0}),
        pytest.param("inpaint", {"image": WIDE, "mask": MASK}, marks=pytest.mark.slow),
    ],
)
def test_other_jobs_are_guided(pipe, clip, job, inputs):
    plain, guided = (
        getattr(pipe, job)(PROMPTS, clip=clip, clip_guidance_scale=scale, **inputs, **QUICK) for scale in (0.0, 1.0)
    )
    if job == "image_to_image":  # whose programs are those of text_to_image
        assert np.abs(pipe.image_to_image(PROMPTS, **inputs, **QUICK).astype(int) - plain).max() <= 1
    near, texts = clip.encode_images, clip.encode_texts(PROMPTS)
    assert np.all((near(guided) * texts).sum(1) > (near(plain) * texts).sum(1))
    if job == "inpaint":
        np.testing.assert_array_equal(guided[:, ~MASK], np.stack([WIDE[~MASK]] * 2))


@pytest.mark.parametrize(
    ("module", "inputs", "walks"), [(inpaint, {"image": WIDE, "mask": MASK}, 1), (hires_fix, {}, 2)]
)
def test_every_walk_hears_of_the_clip(pipe, clip, monkeypatch, module, inputs, walks):
    guides = []

    def denoise(pipe, prompt, recipe, start, given, callback, clip=None):
        guides.append(clip)
        return jnp.zeros((1, *start.size, 4))

    monkeypatch.setattr(module, "denoise", denoise)
    job = getattr(pipe, module.__name__.rpartition(".")[2])
    job(PROMPTS[0], clip=clip, clip_guidance_scale=1.0, output="latents", **inputs, **QUICK)
    assert guides == [clip] * walks


def test_a_clip_and_its_scale_belong_together(pipe, clip):
    for job, inputs in (("text_to_image", {}), ("image_to_image", {"image": SLOPE})):
        for half in ({"clip": clip}, {"clip_guidance_scale": 1.0}):
            with pytest.raises(ValueError, match="clip_guidance_scale= says: give both or neither"):
                getattr(pipe, job)(PROMPTS, **half, **inputs, **QUICK)
    with pytest.raises(ValueError, match="give both or neither"):
        pipe.steps_of(sd_jax.Recipe(**QUICK), clip=clip)
    with pytest.raises(ValueError, match="clip_guidance_clamp= limits"):
        pipe.text_to_image(PROMPTS, clip_guidance_clamp=0.3, **QUICK)


def test_a_folder_of_transformers_is_loaded_with_its_tokenizer(clip, tmp_path):
    save_clip(tmp_path / "clip", clip.config, clip.params, tokenizer=clip.tokenizer)
    again = sd_jax.load_clip(tmp_path / "clip")
    np.testing.assert_array_equal(again.encode_texts(PROMPTS), clip.encode_texts(PROMPTS))
    assert jnp.asarray(again.params["logit_scale"]).dtype == jnp.float32
