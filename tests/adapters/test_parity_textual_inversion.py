"""Pictures with embeddings against diffusers' `load_textual_inversion`, on the same tiny Stable Diffusion 1."""

import numpy as np
import pytest

import sd_jax
from sd_jax.adapters.textual_inversion import Embedding, with_embeddings
from sd_jax.checkpoints import embeddings
from sd_jax.sampling.pipeline import Pipeline
from tests.reference import diffusers
from tests.reference_pipeline import tiny_diffusers_pipeline

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

PROMPT, NEGATIVE, STEPS, SCALE = "the <sks> red, of <one>!", "<one>, the", 8, 5.0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder, {word: embedding}, noise)."""
    diffusers()
    folder = tmp_path_factory.mktemp("tiny") / "base"
    tiny_diffusers_pipeline(folder)
    rng = np.random.default_rng(0)
    made = {
        word: Embedding(word, {"text_encoder": rng.normal(0, 0.5, (count, 32)).astype(np.float32)})
        for word, count in {"<sks>": 3, "<one>": 1}.items()
    }
    return folder, made, rng.standard_normal((1, 8, 8, 4)).astype(np.float32)


def theirs_of(folder, files=()):
    library = diffusers()
    pipeline = library.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.scheduler = library.EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="linspace"
    )
    pipeline.set_progress_bar_config(disable=True)
    for file, word in files:
        pipeline.load_textual_inversion(str(file.parent), weight_name=file.name, token=word, local_files_only=True)
    return pipeline


def their_picture(pipeline, noise):
    import torch

    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    words = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "guidance_scale": SCALE}
    return pipeline(**words, height=32, width=32, latents=latents, output_type="np").images * 255


def our_picture(pipe, noise):
    words = {"negative_prompt": NEGATIVE, "steps": STEPS, "guidance_scale": SCALE, "prompt_syntax": "plain"}
    return pipe.text_to_image(PROMPT, latents=noise, **words).astype(np.float32)


def ours_with(folder, made):
    pipe = sd_jax.load(folder)
    return Pipeline(*with_embeddings(pipe.spec, pipe.params, pipe.tokenizer, made))


@pytest.mark.parametrize(("format", "ending"), [("diffusers", ".bin"), ("diffusers", ".safetensors"), ("a1111", ".pt")])
def test_pictures(base, tmp_path, format, ending):
    """Of our files, read by both; one word of three vectors and one of one, in the prompt and in the negative one."""
    folder, made, noise = base
    files = [(tmp_path / f"{word}{ending}", word) for word in made]
    for file, word in files:
        embeddings.save(file, made[word], format)
    wanted = their_picture(theirs_of(folder, files), noise)
    ours = ours_with(folder, [embeddings.load(file) for file, _ in files])
    got = our_picture(ours, noise)
    print(f"{format}{ending}: {np.abs(got - wanted).max():.2f} of 255")
    assert np.abs(got - wanted).max() <= 2
    without = sd_jax.load(folder)
    assert np.abs(our_picture(without, noise) - wanted).max() > 8


def test_ids(base, tmp_path):
    folder, made, _ = base
    embeddings.save(tmp_path / "learned_embeds.safetensors", made["<sks>"])
    theirs = theirs_of(folder, [(tmp_path / "learned_embeds.safetensors", None)])
    _, _, tokenizer = with_embeddings(
        *(getattr(sd_jax.load(folder), n) for n in ("spec", "params", "tokenizer")), [made["<sks>"]]
    )
    for prompt in ("a <sks>", "(<sks>), the <sks>! <SKS", "red<sks>red"):
        words = theirs.maybe_convert_prompt(prompt, theirs.tokenizer)
        ids = theirs.tokenizer(words, padding="max_length", max_length=77, truncation=True).input_ids
        assert tokenizer([prompt])[0].tolist() == ids


def test_a_saved_model_keeps_its_words(base, tmp_path):
    """Diffusers opens it, tokenizer and all, and makes the same picture; so do we."""
    folder, made, noise = base
    ours = ours_with(folder, list(made.values()))
    ours.save(tmp_path / "saved")
    picture = our_picture(ours, noise)
    np.testing.assert_array_equal(our_picture(sd_jax.load(tmp_path / "saved"), noise), picture)
    assert np.abs(their_picture(theirs_of(tmp_path / "saved"), noise) - picture).max() <= 2
