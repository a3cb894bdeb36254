"""What every job does: compilations, batches, masks, steps, refusals, the prompt language, noise, guidance."""

import collections
import dataclasses
import logging
import types

import jax
import numpy as np
import pytest

from sd_jax import media
from sd_jax.diffusion.noise_sources import webui_noise
from sd_jax.diffusion.samplers import count_draws
from sd_jax.diffusion.schedules import make_sigmas
from sd_jax.models.presets import TINY_SHAPES
from sd_jax.sampling import denoising
from sd_jax.sampling.pipeline import Pipeline
from sd_jax.types import Recipe
from tests.sampling.conftest import random_params

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (4, 32, 32, 3), np.uint8)
MASKS = np.zeros((4, 32, 32), np.uint8)
MASKS[0, 5:19, 3:22] = MASKS[1, ::3, 7:] = MASKS[2, 30:] = MASKS[3, 1, 1] = 255
# One sampler, number of steps and set of options for all that has no reason for another: each compiles a U-Net
FEW = {"steps": 4, "guidance_scale": 3.0, "sampler": "euler_ancestral", "eta": 0.5}


@pytest.fixture(scope="module")
def pipe(tokenizer):
    """Of one level, which compiles in half the time of two, and with weights that make the prompt matter."""
    unet = dataclasses.replace(TINY_SHAPES.unet, block_out_channels=(16,), attention_blocks=(True,))
    spec = dataclasses.replace(TINY_SHAPES, unet=unet)
    params = random_params(spec)
    return Pipeline(spec, {**params, "unet": jax.tree.map(lambda x: 3 * x, params["unet"])}, tokenizer)


@pytest.fixture
def standing(monkeypatch):
    """Jobs walk on the spot and no U-Net is compiled. The list holds what each walk was given."""
    walks = []

    def stand(params, run, carry, first, last, **static):
        walks.append(types.SimpleNamespace(run=run, x=np.asarray(carry.sampler[0]), first=int(first), last=int(last)))
        return carry

    monkeypatch.setattr(denoising, "_walk", stand)
    return walks


def latents_of(pipe, prompt="a red circle", **fields):
    return pipe.text_to_image(prompt, output="latents", **{**FEW, **fields})


def watched(pipe, prompt="a red circle", **fields):
    """([x before each step], [what was denoised in it], the latents in the end)."""
    seen = []
    end = latents_of(
        pipe, prompt, callback=lambda _, x, denoised: seen.append((np.array(x), np.array(denoised))), **fields
    )
    return [x for x, _ in seen], [denoised for _, denoised in seen], end


def close(a, b, tolerance=1e-4):
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


# --- Compilations ----------------------------------------------------------------------------------------------------

JOBS = {  # what each is given besides its prompt
    "text_to_image": {},
    "image_to_image": {"image": PICTURES[0], "strength": 0.5},
    "inpaint": {"image": PICTURES[0], "mask": MASKS[0], "strength": 0.5},
    "hires_fix": {"scale": 1.5, "strength": 0.5},
}


@pytest.fixture
def compiled(caplog):
    """A function: names of the programs that were compiled since it was called last."""

    def since():
        found = [r.getMessage().split() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
        caplog.clear()
        return collections.Counter(words[words.index("of") + 1] for words in found)

    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        yield since


def change_all_that_compiles_nothing(job, **given):
    job("a blue square on the [left:right:0.5]", **{**given, "guidance_scale": 6.5, "eta": 0.9}, seed=7)
    job("a red circle", negative_prompt="(a star:1.3)", **given)
    if "strength" in given:
        job("a red circle", **{**given, "strength": 0.8})
        job("a red circle", **{**given, "strength": 1.0}, strength_steps="a1111")


@pytest.mark.parametrize("job", ["text_to_image", "image_to_image", "inpaint"])
def test_another_prompt_seed_scale_strength_or_eta_compiles_nothing(pipe, compiled, job):
    run, given = getattr(pipe, job), {**FEW, **JOBS[job]}
    run("a red circle", **given)
    compiled()
    change_all_that_compiles_nothing(run, **given)
    if "image" in given:
        run("a red circle", **{**given, "image": PICTURES[1]})
    if "mask" in given:
        run("a red circle", **{**given, "mask": MASKS[1]})
    assert not compiled()


def test_another_size_compiles_each_network_once(pipe, compiled):
    """Every job of that size has the same ones."""
    pipe.text_to_image("a star", **FEW)
    compiled()
    given = {**FEW, "scale": 1.25, "strength": 0.5, "upscaler": "lanczos"}
    made = pipe.hires_fix("a star", **given)
    assert made.shape == (1, 40, 40, 3) and made.dtype == np.uint8
    networks = ("encode_image", "walk", "decode")
    count = lambda: [sum(n for name, n in found.items() if part in name) for part in networks]  # noqa: E731
    found = compiled()
    assert count() == [1, 1, 1]
    change_all_that_compiles_nothing(pipe.hires_fix, **given)
    np.testing.assert_array_equal(made, pipe.hires_fix("a star", second_steps=4, **given))
    assert not np.array_equal(made, pipe.hires_fix("a star", **{**given, "strength": 0.25}))
    assert not compiled()
    for job in ("text_to_image", "image_to_image"):
        getattr(pipe, job)("a star", width=40, height=40, **FEW, **JOBS[job])
    found = compiled()
    assert count() == [0, 0, 0]


# --- Batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", ["image_to_image", "inpaint"])
def test_a_batch_of_four_equals_four_singles(pipe, job):
    """Within the rounding of differently shaped matrix products. The sampler draws noise for each picture."""
    walk = getattr(pipe, job)
    given = {"image": PICTURES, "strength": 1.0, **FEW} | ({"mask": MASKS} if job == "inpaint" else {})
    one = lambda i: {**given, **{k: given[k][i] for k in ("image", "mask") if k in given}, "seed": 5 + i}  # noqa: E731
    together = walk("a star", seed=5, output="latents", **given)
    close(together, np.concatenate([walk("a star", output="latents", **one(i)) for i in range(4)]))
    again, first = (walk("a star", seed=5, **given) for _ in range(2))
    assert first.shape == (4, 32, 32, 3)
    np.testing.assert_array_equal(again, first)


# --- Masks -----------------------------------------------------------------------------------------------------------


def picture(height, width, count=1):
    return np.random.default_rng(1).integers(0, 256, (count, height, width, 3), np.uint8)


@pytest.mark.parametrize("masks", [MASKS[:1], MASKS[3:], MASKS, 1 - MASKS.astype(np.float32) / 255, MASKS > 0])
def test_what_is_not_masked_comes_back_to_the_bit(pipe, masks):
    made = pipe.inpaint("a star", image=PICTURES, mask=masks, **FEW)
    redrawn = np.broadcast_to((masks > 0)[..., None], PICTURES.shape)
    np.testing.assert_array_equal(made[~redrawn], PICTURES[~redrawn])
    assert np.abs(made[redrawn].astype(int) - PICTURES[redrawn]).mean() > 10


@pytest.mark.parametrize(("height", "width"), [(33, 35), (34, 32)])
def test_sizes_that_the_autoencoder_cannot_make(pipe, height, width):
    """The work is done in 32x32."""
    image, mask = picture(height, width)[0], np.zeros((height, width), bool)
    mask[3:20, 30:] = True
    made = pipe.inpaint("a star", image=image, mask=mask, **FEW)
    assert made.shape == (1, height, width, 3)
    np.testing.assert_array_equal(made[0][~mask], image[~mask])
    assert np.abs(made[0][mask].astype(int) - image[mask]).mean() > 10


@pytest.mark.parametrize("padding", [0, 9])
def test_only_masked(pipe, padding):
    image, mask = picture(50, 41)[0], np.zeros((50, 41), bool)
    mask[40:47, 3:9] = True
    given = {"image": image, "mask": mask, "only_masked": True, "padding": padding, **FEW}
    made = pipe.inpaint("a star", **given)
    assert made.shape == (1, 50, 41, 3)
    np.testing.assert_array_equal(made[0][~mask], image[~mask])
    assert np.abs(made[0][mask].astype(int) - image[mask]).mean() > 10
    far = image.copy()
    far[:20] = 0  # beyond the padding: what lies there is not worked on
    np.testing.assert_array_equal(pipe.inpaint("a star", **{**given, "image": far})[0][mask], made[0][mask])


@pytest.mark.parametrize("mask", [None, MASKS[0, :27, :29]])
def test_outpainting(pipe, mask):
    """Of what was there, 8 pixels along what is added are redrawn too."""
    image = picture(27, 29)[0]
    made = pipe.inpaint("a star", image=image, mask=mask, extend=(2, 5, 1, 0), **FEW)
    assert made.shape == (1, 32, 32, 3)
    kept = np.zeros((27, 29), bool)
    kept[8:, 8:-8] = True
    kept &= True if mask is None else mask == 0
    np.testing.assert_array_equal(made[0, 5:, 2:-1][kept], image[kept])
    assert np.abs(made[0, :5, 2:-1].astype(int) - image[:1]).mean() > 10


# --- Steps -----------------------------------------------------------------------------------------------------------

WALKS = [  # sampler, schedule, steps; steps of text_to_image, and of the others at strength 0.6
    ("euler", "normal", 5, 5, 3),
    ("heun", "karras", 5, 5, 3),
    ("plms", "leading", 5, 5, 3),
    ("dpmpp_2m", "ddim_uniform", 7, 8, 4),  # 1000 // 7 goes 8 times
    ("restart", "karras", 25, 26, 15),  # a restart from 20 steps on
]


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(("sampler", "schedule", "steps", "whole", "part"), WALKS)
def test_the_callback_is_called_as_often_as_steps_of_says(pipe, standing, sampler, schedule, steps, whole, part, job):
    inputs = {k: v for k, v in JOBS[job].items() if k in ("image", "mask")}
    fields = {} if job == "text_to_image" else {"strength": 0.6}
    fields |= {"scale": 1.5} if job == "hires_fix" else {}
    recipe = Recipe("a star", sampler=sampler, schedule=schedule, steps=steps, **fields)
    called = []
    pipe.make(recipe, **inputs, callback=lambda step, x, denoised: called.append(step))
    expected = {"text_to_image": whole, "hires_fix": whole + part}.get(job, part)
    assert called == list(range(expected))
    assert pipe.steps_of(recipe, **inputs) == expected
    walked = [step for walk in standing for step in range(walk.first, walk.last)]
    assert len(walked) == expected
    del standing[:]
    pipe.make(recipe, **inputs)  # without a callback: all at once
    assert [step for walk in standing for step in range(walk.first, walk.last)] == walked
    assert len(standing) == (2 if job == "hires_fix" else 1)


@pytest.mark.parametrize("upscaler", ["nearest", "bilinear", "bicubic", "bislerp", "lanczos"])
def test_sizes_of_hires_fix(pipe, standing, upscaler):
    made = pipe.hires_fix("a star", scale=1.5, upscaler=upscaler, output="latents", **FEW)
    assert made.shape == (1, 12, 12, 4)
    assert [walk.x.shape[1:3] for walk in standing] == [(8, 8), (12, 12)]
    wide = pipe.hires_fix("a star", width=24, scale=1.3, output="latents", **FEW)
    assert wide.shape == (1, 10, 8, 4)  # 41.6 x 31.2 pixels, to the nearest that the autoencoder makes


STRENGTHS = [  # steps, strength; walked by diffusers, by A1111
    (20, 1.0, 20, 20),
    (20, 0.75, 15, 16),
    (20, 0.5, 10, 11),
    (20, 0.3, 6, 7),
    (20, 0.04, 0, 1),
    (30, 0.35, 10, 11),
    (7, 0.5, 3, 4),
    (1, 1.0, 1, 1),
    (1, 0.5, 0, 1),
]


@pytest.mark.parametrize(("steps", "strength", "diffusers", "a1111"), STRENGTHS)
def test_strength_counts_steps_in_three_ways(pipe, steps, strength, diffusers, a1111):
    walked = {"diffusers": diffusers, "a1111": a1111, "comfy": steps}
    ladders = {}
    for counting, expected in walked.items():
        recipe = Recipe(steps=steps, strength=strength, strength_steps=counting)
        start = denoising.Start((8, 8), clean=(), strength=strength)
        if not expected:
            with pytest.raises(ValueError, match=f"strength={strength:g} of steps={steps} leaves no step"):
                denoising.plan(pipe, recipe, start)
            continue
        assert pipe.steps_of(recipe, image=PICTURES) == pipe.steps_of(recipe, PICTURES, MASKS) == expected
        ladder, begin = denoising.plan(pipe, recipe, start)
        ladders[counting] = ladder.sigmas[begin:]
    noise_schedule = pipe.spec.noise_schedule
    plain, longer = (make_sigmas("normal", n, noise_schedule) for n in (steps, int(steps / strength)))
    for counting, sigmas in ladders.items():
        whole = longer if counting == "comfy" else plain
        np.testing.assert_array_equal(sigmas, whole[len(whole) - len(sigmas) :])


def test_the_second_pass_of_hires_fix_counts_as_comfy_for_a1111(pipe):
    for counting, expected in {"diffusers": 10 + 2, "a1111": 10 + 5, "comfy": 10 + 5}.items():
        recipe = Recipe(steps=10, scale=2.0, second_steps=5, strength=0.5, strength_steps=counting)
        assert pipe.steps_of(recipe) == expected


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_the_second_pass_of_hires_fix_is_walked_however_few_the_steps(pipe, steps):
    assert pipe.steps_of(Recipe(steps=steps, scale=2.0)) == steps + max(int(0.4 * steps), 1)


# --- What cannot be made ---------------------------------------------------------------------------------------------

PICTURE = {"image": PICTURES[0]}
MASKED = {**PICTURE, "mask": MASKS[0]}
REFUSED = [
    ("text_to_image", {"steps": 0}, "steps is 0: at least 1"),
    ("text_to_image", {"width": 30}, "width=30 is not a multiple of 4: use 32"),
    ("text_to_image", {"height": 0}, "height=0"),
    ("text_to_image", {"sampler": "eular"}, "unknown sampler 'eular'.*euler"),
    ("text_to_image", {"schedule": "karas"}, "unknown schedule 'karas'.*karras"),
    ("text_to_image", {"noise_source": "cuda"}, "noise_source='cuda'.*threefry, torch_cpu.* nv"),
    ("text_to_image", {"prompt_syntax": "a111"}, "prompt_syntax='a111'.*a1111"),
    ("text_to_image", {"stregth": 0.5}, "stregth= is no field.*strength"),
    ("text_to_image", {"strength": 0.5}, "strength=0.5 is for image_to_image and inpaint and hires_fix"),
    ("text_to_image", {"extend": (1, 1, 1, 1)}, "extend=.* is for inpaint, not for text_to_image"),
    ("text_to_image", {"upscaler": "nearest"}, "upscaler='nearest' is for hires_fix"),
    ("text_to_image", {"ensd": 31337}, "ensd=31337"),
    ("text_to_image", {"guidance_start": 0.8, "guidance_stop": 0.2}, "guidance.* 0.8 .*0.2"),
    ("text_to_image", {"sampler": "lms"}, "'lms' has no option eta"),
    ("text_to_image", {"latents": np.zeros((1, 6, 8, 4), np.float32)}, r"latents have the shape \(6, 8, 4\)"),
    ("text_to_image", {"batch_size": 0}, "batch_size=0"),
    ("image_to_image", {**PICTURE, "strength": 0.0}, "strength=0: more than 0"),
    ("image_to_image", {**PICTURE, "strength": 1.5}, "strength=1.5.*at most 1"),
    ("image_to_image", {**PICTURE, "strength": 0.1}, "strength=0.1 of steps=4 leaves no step"),
    ("image_to_image", {**PICTURE, "strength_steps": "forge"}, "strength_steps='forge'.*diffusers, a1111 or comfy"),
    ("image_to_image", {**PICTURE, "only_masked": True}, "only_masked=True is for inpaint"),
    ("image_to_image", {"image": PICTURES[0, 0]}, r"image has the shape \(32, 3\)"),
    ("image_to_image", {"image": PICTURES, "batch_size": 2}, "image holds 4 pictures, the prompts ask for 2"),
    ("image_to_image", {**PICTURE, "height": 0}, "height=0"),
    ("image_to_image", {**PICTURE, "width": -8}, "width=-8"),
    ("inpaint", {**PICTURE, "mask": MASKS[0, :, 1:]}, "mask is 31x32 pixels, the image 32x32"),
    ("inpaint", {**PICTURE, "mask": 0 * MASKS[0]}, "mask is black"),
    ("inpaint", PICTURE, "inpaint has no mask"),
    ("inpaint", {**MASKED, "strength": 0.0}, "strength=0: more than 0"),
    ("inpaint", {**MASKED, "extend": (0, -3, 0, 0)}, "extend by -3 pixels at the top"),
    ("inpaint", {**MASKED, "scale": 2.0}, "scale=2.0 is for hires_fix"),
    ("hires_fix", {"scale": 1.0}, "scale=1: more than 1"),
    ("hires_fix", {"upscaler": "bilnear"}, "upscaler='bilnear'.*bilinear"),
    ("hires_fix", {"strength": 1.5}, "strength=1.5"),
    ("hires_fix", {"second_steps": -1}, "second_steps=-1"),
]


@pytest.mark.parametrize(("job", "fields", "words"), REFUSED)
def test_what_cannot_be_made_is_refused_in_one_line(pipe, job, fields, words):
    with pytest.raises(ValueError, match=words) as refused:
        getattr(pipe, job)("a star", **{**FEW, **fields})
    assert "\n" not in str(refused.value)


def test_a_unet_made_for_inpainting_does_nothing_else(pipe, tokenizer):
    unet = dataclasses.replace(pipe.spec.unet, in_channels=9)
    inpainting = Pipeline(dataclasses.replace(pipe.spec, unet=unet), {"unet": {}}, tokenizer)
    with pytest.raises(ValueError, match="takes 9 channels, not 4: use it to inpaint"):
        inpainting.text_to_image("a star", **FEW)


def test_files_that_are_no_pictures(pipe, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for given in ({"image": broken}, {**PICTURE, "mask": str(broken)}):
        job = pipe.inpaint if "mask" in given else pipe.image_to_image
        with pytest.raises(media.BadImage, match="broken.png") as refused:
            job("a star", **given, **FEW)
        assert "\n" not in str(refused.value)
    with pytest.raises((media.BadImage, FileNotFoundError), match="missing.png"):
        pipe.image_to_image("a star", image=tmp_path / "missing.png", **FEW)


# --- The prompt language ---------------------------------------------------------------------------------------------


def test_a_weight_of_one_is_none(pipe):
    np.testing.assert_array_equal(latents_of(pipe, "(a red circle:1.0)"), latents_of(pipe, "a red circle"))
    assert np.abs(latents_of(pipe, "(a red circle:1.5)") - latents_of(pipe, "a red circle")).max() > 1e-4


def test_a_scheduled_prompt_switches_after_the_step_it_names(pipe):
    """As A1111 does, which counts from 0 and switches behind the step: [a:b:0.5] of 4 steps is a in the first three."""
    x, denoised, end = watched(pipe, "[a red circle:a blue square:0.5]")
    x_a, denoised_a, end_a = watched(pipe, "a red circle")
    for step in range(3):
        np.testing.assert_array_equal(denoised[step], denoised_a[step])
    np.testing.assert_array_equal(x[3], x_a[3])
    assert np.abs(denoised[3] - denoised_a[3]).max() > 1e-5
    assert np.abs(end - end_a).max() > 1e-5
    np.testing.assert_array_equal(end_a, latents_of(pipe, "a red circle"))  # that one looks on changes nothing


def test_a_sampler_of_two_calls_a_step_switches_between_them(pipe):
    """Eight calls in four steps: the first five are a, and the fifth is the first one of the third step."""
    heun = {"sampler": "heun", "eta": None}
    x, denoised, _ = watched(pipe, "[a red circle:a blue square:0.5]", **heun)
    x_a, denoised_a, _ = watched(pipe, "a red circle", **heun)
    for step in range(3):
        np.testing.assert_array_equal(x[step], x_a[step])
        np.testing.assert_array_equal(denoised[step], denoised_a[step])
    assert np.abs(x[3] - x_a[3]).max() > 1e-3


def test_a_part_of_no_weight_plays_no_part(pipe):
    close(latents_of(pipe, "a red circle :1 AND a blue square :0"), latents_of(pipe, "a red circle"))
    both = latents_of(pipe, "a red circle :1 AND a blue square :1")
    assert np.abs(both - latents_of(pipe, "a red circle")).max() > 1e-3


def test_every_chunk_of_a_long_prompt_counts(pipe):
    words = ["small"] * 60  # 22 to a chunk; against a negative prompt of one
    assert pipe.encode_prompts([" ".join(words)]).context.shape[1] == 3 * 24
    first, last = latents_of(pipe, " ".join(words)), latents_of(pipe, " ".join([*words, "star"]))
    assert np.isfinite(first).all() and np.abs(first - last).max() > 1e-4


# --- Noise -----------------------------------------------------------------------------------------------------------


def begins_with(pipe, standing, **fields):
    """The starting noise of a job, and the draws of its sampler."""
    del standing[:]
    latents_of(pipe, **fields)
    (walk,) = standing
    return walk.x / pipe.sigmas("normal", FEW["steps"])[0], walk.run.draws


@pytest.mark.parametrize("source", ["torch_cpu", "nv"])
def test_noise_of_other_programs(pipe, standing, source):
    start, draws = begins_with(pipe, standing, noise_source=source, seed=5, batch_size=2, ensd=3)
    for i in range(2):
        wanted, drawn = webui_noise(source, 5 + i, (8, 8, 4), count_draws("euler_ancestral", 4), 3)
        np.testing.assert_allclose(start[i], wanted, rtol=1e-6)
        np.testing.assert_array_equal(draws[:, i], drawn)


def test_recorded_noise_makes_the_same_picture(pipe):
    start, draws = webui_noise("torch_cpu", 5, (8, 8, 4), 4)
    given = latents_of(pipe, latents=start[None], noise=draws[:, None])
    np.testing.assert_array_equal(given, latents_of(pipe, noise_source="torch_cpu", seed=5))


@pytest.mark.parametrize("source", ["threefry", "torch_cpu"])
def test_ends_of_variation(pipe, standing, source):
    noise = lambda **fields: begins_with(pipe, standing, noise_source=source, batch_size=2, **fields)[0]  # noqa: E731
    seed, other = noise(seed=5), noise(seed=50)
    np.testing.assert_array_equal(noise(seed=5, variation_seed=50, variation_strength=0.0), seed)
    whole = noise(seed=5, variation_seed=50, variation_strength=1.0)
    close(whole, other, 1e-5)
    half = noise(seed=5, variation_seed=50, variation_strength=0.5)
    assert np.abs(half[0] - seed[0]).max() > 0.1 and np.abs(half[0] - other[0]).max() > 0.1
    # All pictures of a batch vary the first seed's noise
    np.testing.assert_allclose(noise(seed=5, variation_seed=51, variation_strength=0.5)[0], half[1], rtol=1e-5)


def test_ensd_is_of_the_samplers_draws_alone(pipe, standing):
    ancestral = {"noise_source": "torch_cpu", "seed": 5}
    (start, draws), (same, others) = (begins_with(pipe, standing, ensd=ensd, **ancestral) for ensd in (0, 31337))
    np.testing.assert_array_equal(start, same)
    assert np.abs(draws - others).max() > 0.1
    euler = {**ancestral, "sampler": "euler", "eta": None}
    (start, draws), (same, others) = (begins_with(pipe, standing, ensd=ensd, **euler) for ensd in (0, 31337))
    np.testing.assert_array_equal(start, same)
    assert draws is None and others is None


# --- Guidance and options --------------------------------------------------------------------------------------------


def test_guidance_of_no_step_is_none(pipe):
    close(latents_of(pipe, guidance_start=0.0, guidance_stop=0.0), latents_of(pipe, guidance_scale=1 + 1e-9))
    first_half, whole = latents_of(pipe, guidance_start=0.0, guidance_stop=0.5), latents_of(pipe)
    assert np.abs(first_half - whole).max() > 1e-3


def test_projected_guidance_that_projects_nothing_is_plain(pipe):
    close(latents_of(pipe, apg_eta=1.0, apg_norm_threshold=0.0, apg_momentum=0.0), latents_of(pipe))
    projected = {"apg_eta": 0.0, "apg_norm_threshold": 2.5, "apg_momentum": -0.75}
    *_, end = watched(pipe, **projected)
    assert np.abs(end - latents_of(pipe)).max() > 1e-3
    np.testing.assert_array_equal(end, latents_of(pipe, **projected))  # the momentum lasts from step to step


def test_an_ancestral_sampler_without_noise_is_plain(pipe):
    close(latents_of(pipe, eta=0.0), latents_of(pipe, sampler="euler", eta=None))
