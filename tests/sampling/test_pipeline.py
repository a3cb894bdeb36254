"""Pipeline: what jobs give back, what recompiles, what is refused."""

import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sd_jax
from sd_jax.checkpoints.place import place
from sd_jax.sampling import pipeline
from sd_jax.sampling.pipeline import Pipeline

FEW = {"steps": 3, "guidance_scale": 3.0}


def test_pictures_of_a_prompt(pipe):
    images = pipe.text_to_image("a red circle", seed=1, batch_size=2, **FEW)
    assert images.shape == (2, 32, 32, 3) and images.dtype == np.uint8
    assert not np.array_equal(images[0], images[1])
    assert np.array_equal(images, pipe.text_to_image("a red circle", seed=1, batch_size=2, **FEW))


def test_another_size(pipe):
    assert pipe.text_to_image("a red circle", width=48, height=32, **FEW).shape == (1, 32, 48, 3)


def test_the_prompt_the_negative_prompt_and_the_scale_matter(pipe):
    plain = pipe.text_to_image("a red circle", output="latents", **FEW)
    for change in ({"prompt": "a blue square"}, {"negative_prompt": "a star"}, {"guidance_scale": 5.0}, {"seed": 9}):
        other = pipe.text_to_image(**{"prompt": "a red circle", "output": "latents", **FEW, **change})
        assert np.abs(other - plain).max() > 1e-4, change


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_a_batch_of_four_equals_four_singles(pipe, sampler):
    """Within the rounding of differently shaped matrix products."""
    together = pipe.text_to_image("a star", seed=5, batch_size=4, sampler=sampler, output="latents", **FEW)
    alone = [pipe.text_to_image("a star", seed=5 + i, sampler=sampler, output="latents", **FEW) for i in range(4)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-4 * np.abs(together).max())


def test_conditioning_in_place_of_prompts(pipe):
    given = pipe.encode_prompts(["a red circle", "a blue square"])
    a = pipe.text_to_image(conditioning=given, output="latents", **FEW)
    b = pipe.text_to_image(["a red circle", "a blue square"], output="latents", **FEW)
    np.testing.assert_array_equal(a, b)


def test_latents_in_place_of_a_seed(pipe):
    from sd_jax.diffusion import noise

    latents = noise.starting_noise(noise.image_keys(3, 1), (8, 8, 4))
    a = pipe.text_to_image("a star", latents=latents, output="latents", **FEW)
    np.testing.assert_array_equal(a, pipe.text_to_image("a star", seed=3, output="latents", **FEW))


def test_no_guidance_is_the_limit_of_guidance(pipe):
    a = pipe.text_to_image("a star", output="latents", steps=3, guidance_scale=1.0)
    b = pipe.text_to_image("a star", output="latents", steps=3, guidance_scale=1.0 + 1e-6)
    np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(a).max())


def test_only_shapes_and_samplers_compile_anew(pipe, caplog):
    pipe.text_to_image("a star", **FEW)
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        pipe.text_to_image(
            "a blue square", seed=7, steps=3, guidance_scale=6.5, negative_prompt="red", schedule="karras"
        )
        assert [r for r in caplog.records if "Finished XLA compilation" in r.getMessage()] == []
        pipe.text_to_image("a star", steps=4, guidance_scale=3.0)
        assert [r for r in caplog.records if "Finished XLA compilation" in r.getMessage()]


def test_a_callback_hears_of_every_step(pipe):
    steps = []
    pipe.text_to_image("a star", callback=lambda step, x, denoised: steps.append(int(step)), **FEW)
    jax.effects_barrier()
    assert sorted(steps) == [0, 1, 2]


def test_image_to_latents_and_back(pipe):
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    latents = pipe.encode_image(pixels)
    assert latents.shape == (1, 8, 8, 4)
    np.testing.assert_allclose(latents, pipe.encode_image(-jnp.ones((1, 32, 32, 3))), rtol=1e-6)
    assert pipe.decode_latents(latents).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"width": 30}, "width=30 is not a multiple of 4"),
        ({"sampler": "eular"}, "eular"),
        ({"schedule": "carras"}, "carras"),
        ({"steps": 0}, "steps"),
        ({"output": "latent"}, "output='latent'"),
        ({"clip_skip": 9}, "clip_skip=9"),
    ],
)
def test_a_recipe_that_cannot_be_made_is_refused_by_name(pipe, recipe, words):
    with pytest.raises(ValueError, match=words):
        pipe.text_to_image("a star", **{**FEW, **recipe})


def test_numbers_that_are_not_finite_never_become_a_picture(pipe):
    broken = jax.tree.map(lambda x: x * jnp.nan, pipe.params["vae"])
    broken = Pipeline(pipe.spec, {**pipe.params, "vae": broken}, pipe.tokenizer)
    with pytest.raises(FloatingPointError, match="autoencoder"):
        broken.text_to_image("a star", **FEW)


@pytest.mark.parametrize("format", ["native", "diffusers"])
def test_saved_and_loaded_makes_the_same_picture(pipe, tmp_path, format):
    pipe.save(tmp_path / "model", format=format)
    again = sd_jax.load(tmp_path / "model")
    a, b = (p.text_to_image("a star", **FEW) for p in (pipe, again))
    np.testing.assert_array_equal(a, b)


def test_a_single_file_takes_a_tokenizer(pipe, tmp_path):
    pipe.save(tmp_path / "model.safetensors", format="single_file")
    pipe.tokenizer.save(tmp_path / "tokenizer")
    again = sd_jax.load(tmp_path / "model.safetensors", tokenizer=str(tmp_path / "tokenizer"))
    np.testing.assert_array_equal(pipe.text_to_image("a star", **FEW), again.text_to_image("a star", **FEW))
    with pytest.raises(FileNotFoundError, match="--tokenizer"):
        sd_jax.load(tmp_path / "model.safetensors").text_to_image("a star", **FEW)


def test_a_large_model_is_read_part_by_part_at_its_first_use(pipe, tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    pipe.save(file, "single_file")
    read = []

    def recorded(tree, *args, **kwargs):
        read.append(tree)
        return place(tree, *args, **kwargs)

    monkeypatch.setattr(pipeline, "place", recorded)
    monkeypatch.setattr(pipeline, "AT_ONCE", 1000)
    large = sd_jax.load(file, tokenizer=pipe.tokenizer.source)
    assert not read
    latents = np.zeros((1, 8, 8, 4), np.float32)
    np.testing.assert_array_equal(large.decode_latents(latents), pipe.decode_latents(latents))
    large.decode_latents(latents)
    assert len(read) == 1  # the autoencoder, once
    os.utime(file, (0, 0))
    with pytest.raises(sd_jax.checkpoints.CheckpointError, match="model.safetensors: changed since it was opened"):
        large.read()


def test_a_small_model_is_read_at_once_and_names_what_is_not_finite(pipe, tmp_path):
    broken = jax.tree.map(lambda x: x * jnp.nan, pipe.params["vae"])
    Pipeline(pipe.spec, {**pipe.params, "vae": broken}, pipe.tokenizer).save(tmp_path / "m.safetensors", "single_file")
    with pytest.raises(sd_jax.checkpoints.CheckpointError, match="m.safetensors: vae/.* not finite"):
        sd_jax.load(tmp_path / "m.safetensors")
