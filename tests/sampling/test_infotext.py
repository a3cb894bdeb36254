import dataclasses

import pytest

from sd_jax.diffusion.samplers import SAMPLERS
from sd_jax.diffusion.schedules import SCHEDULES
from sd_jax.sampling import infotext
from sd_jax.types import Recipe

BASE = Recipe("a cat", seed=7, width=512, height=768, guidance_scale=7.0, noise_source="nv")


def parsed(text):
    """The recipe of a text of which all is understood."""
    found = infotext.parse(text)
    assert found.ignored == []
    return found.recipe


# -- Out -------------------------------------------------------------------------------------------------------------


def test_text_to_image():
    recipe = dataclasses.replace(
        BASE, negative_prompt="blurry", sampler="dpmpp_2m", schedule="karras", clip_skip=2, seed=1
    )
    assert infotext.write(recipe, model="v1-5", model_hash="6ce0161689", version="v1.10.1") == (
        "a cat\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x768, "
        "Model hash: 6ce0161689, Model: v1-5, Clip skip: 2, RNG: NV, Version: v1.10.1"
    )


def test_every_key_stands_in_its_place():
    recipe = Recipe(
        "x",
        guidance_scale=6.5,
        sampler="euler_ancestral",
        seed=3,
        width=64,
        height=64,
        clip_skip=2,
        eta=0.5,
        s_noise=1.01,
        noise_source="torch_cpu",
        ensd=31337,
        variation_seed=9,
        variation_strength=0.25,
        strength=0.6,
        scale=1.5,
        second_steps=10,
        upscaler="bilinear",
    )
    text = infotext.write(recipe, "m", "0123456789", "v", "9876543210", "v1", "r [5555555555]")
    assert text.split("\n")[1] == (
        "Steps: 20, Sampler: Euler a, Schedule type: Normal, CFG scale: 6.5, Seed: 3, Size: 64x64, "
        "Model hash: 0123456789, Model: m, VAE hash: 9876543210, VAE: v, Variation seed: 9, "
        "Variation seed strength: 0.25, Denoising strength: 0.6, Clip skip: 2, ENSD: 31337, RNG: CPU, Eta: 0.5, "
        "Sigma noise: 1.01, Hires upscale: 1.5, Hires steps: 10, Hires upscaler: Latent, "
        "Refiner: r [5555555555], Refiner switch at: 0.8, Version: v1"
    )
    inpainted = infotext.write(dataclasses.replace(BASE, only_masked=True, padding=16, strength=1.0))
    assert inpainted.endswith("Denoising strength: 1, RNG: NV, Inpaint area: Only masked, Masked area padding: 16")


def test_hashes_of_adapters_and_words():
    hashes = {"lora:ink, thick": "0123456789ab", "embed:zorp": "ba9876543210", "lora:b": "1" * 12, "hypernet:c": "2"}
    text = infotext.write(BASE, hashes=hashes, version="v1")
    written = '"ink thick: 0123456789ab, b: 111111111111"'  # A1111 leaves out commas and colons of names
    assert text.endswith(f'RNG: NV, Lora hashes: {written}, TI hashes: "zorp: ba9876543210", Version: v1')
    read = {"lora:ink thick": "0123456789ab", "lora:b": "1" * 12, "embed:zorp": "ba9876543210"}
    assert infotext.parse(text).hashes == read
    assert infotext.parse(infotext.write(BASE)).hashes == {}


def test_values_are_quoted_as_json():
    text = infotext.write(BASE, model='one, two: "three"', version="ü:")
    assert r'Model: "one, two: \"three\"", RNG: NV, Version: "ü:"' in text
    assert infotext.parse(text).model == 'one, two: "three"'


# -- Both ways -------------------------------------------------------------------------------------------------------

PROMPTS = [
    "a cat",
    "",
    "two\nlines",
    "\n a line between blank ones \n\n",
    'she said "Steps: 3", twice',
    "Steps: 1, Sampler: Euler, Seed: 2\nin the prompt",
    "colons: and, commas",
    "猫 naïve 🐈, (x:1.3) [a|b] <lora:c:1>",
    "ends in a backslash \\",
]


@pytest.mark.parametrize("negative", ["", "blurry", 'two\nlines: and "quotes"\n', " Steps: 4, Seed: 5, Size: 1x1"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_survive(prompt, negative):
    recipe = dataclasses.replace(BASE, prompt=prompt, negative_prompt=negative)
    assert parsed(infotext.write(recipe)) == recipe


def test_every_sampler_and_schedule_survives():
    for sampler in SAMPLERS:
        for schedule in SCHEDULES:
            recipe = dataclasses.replace(BASE, sampler=sampler, schedule=schedule)
            assert parsed(infotext.write(recipe)) == recipe


@pytest.mark.parametrize(
    "fields",
    [
        {"guidance_scale": 7.123456789, "seed": 2**40, "steps": 1, "noise_source": "threefry"},
        {"sampler": "ddim", "eta": 0.3, "s_churn": 1.0, "s_tmin": 0.0, "s_tmax": float("inf")},
        {"variation_seed": 5, "variation_strength": 1e-05, "ensd": -3, "clip_skip": 3},
        {"strength": 0.4, "strength_steps": "a1111"},
        {"strength": 0.9, "strength_steps": "a1111", "only_masked": True, "padding": 64},
        {"strength": 0.5, "strength_steps": "a1111", "scale": 1.5, "second_steps": 7},
        *(
            {"strength": 0.5, "strength_steps": "a1111", "scale": 2.0, "upscaler": upscaler}
            for upscaler in infotext.UPSCALERS
        ),
    ],
)
def test_fields_that_have_a_key_survive(fields):
    recipe = dataclasses.replace(BASE, **fields)
    assert parsed(infotext.write(recipe)) == recipe


# -- In: texts as A1111 writes them ----------------------------------------------------------------------------------

# (Sampler, Schedule type or None) -> (sampler, schedule)
NAMED = [
    ("Euler a", None, "euler_ancestral", "normal"),
    ("Euler", "Automatic", "euler", "normal"),
    ("Euler", "Uniform", "euler", "normal"),
    ("DPM++ 2M Karras", None, "dpmpp_2m", "karras"),
    ("DPM++ 2M", None, "dpmpp_2m", "normal"),
    ("DPM++ 2M", "Automatic", "dpmpp_2m", "karras"),
    ("DPM++ 2M", "karras", "dpmpp_2m", "karras"),
    ("DPM++ 2M SDE Heun Exponential", None, "dpmpp_2m_sde_heun", "exponential"),
    ("DPM++ 2M SDE Heun", None, "dpmpp_2m_sde_heun", "normal"),
    ("DPM++ 2M SGMUniform", None, "dpmpp_2m", "sgm_uniform"),
    ("DPM++ 2M SGM Uniform", None, "dpmpp_2m", "sgm_uniform"),
    ("DPM++ SDE Karras", "Automatic", "dpmpp_sde", "karras"),
    ("DPM++ 3M SDE", "Automatic", "dpmpp_3m_sde", "exponential"),
    ("DPM2 a Karras", None, "dpm_2_ancestral", "karras"),
    ("LMS Karras", None, "lms", "karras"),
    ("DDIM", None, "ddim", "leading"),
    ("PLMS", "Automatic", "plms", "leading"),
    ("UniPC", "Automatic", "uni_pc", "sgm_uniform"),
    ("Restart", "Automatic", "restart", "karras"),
    ("LCM", "Automatic", "lcm", "normal"),
    ("HeunPP2", "Beta", "heunpp2", "beta_webui"),
    ("Euler", "Align Your Steps", "euler", "align_your_steps_webui"),
    ("Euler", "KL Optimal", "euler", "kl_optimal"),
    ("Euler", "DDIM", "euler", "ddim_uniform"),
    ("Euler", "beta", "euler", "beta"),
]


@pytest.mark.parametrize(("theirs", "schedule_type", "sampler", "schedule"), NAMED)
def test_names(theirs, schedule_type, sampler, schedule):
    between = f", Schedule type: {schedule_type}" if schedule_type else ""
    recipe = parsed(f"x\nSteps: 20, Sampler: {theirs}{between}, CFG scale: 7, Seed: 1, Size: 512x512")
    assert (recipe.sampler, recipe.schedule) == (sampler, schedule)


def test_an_old_picture():
    text = (
        "(masterpiece:1.2), a cat,\nsitting\n"
        "Negative prompt: lowres, text\n"
        "Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 965400086, Size: 512x768, Model hash: 45dee52b, "
        "Model: anything, Denoising strength: 0.5, Clip skip: 2, ENSD: 31337, Hires upscale: 2, Hires steps: 0, "
        "Hires upscaler: Latent (bicubic antialiased)"
    )
    found = infotext.parse(text)
    assert found.recipe == Recipe(
        "(masterpiece:1.2), a cat,\nsitting",
        "lowres, text",
        width=512,
        height=768,
        steps=28,
        guidance_scale=7.5,
        sampler="dpmpp_2m",
        schedule="karras",
        seed=965400086,
        clip_skip=2,
        noise_source="nv",
        ensd=31337,
        strength=0.5,
        strength_steps="a1111",
        scale=2.0,
    )
    assert (found.model, found.model_hash) == ("anything", "45dee52b")
    assert found.ignored == ["Hires upscaler: Latent (bicubic antialiased)"]


def test_a_new_picture():
    text = (
        "a cat <lora:fur:0.8>\n"
        "Steps: 30, Sampler: Euler a, Schedule type: Automatic, CFG scale: 5, Seed: 1, Face restoration: CodeFormer, "
        "Size: 640x640, Model hash: 6ce0161689, Model: v1-5, Variation seed: 2, Variation seed strength: 0.1, "
        'RNG: CPU, Eta: 0.67, Hires resize: 1280x1280, Lora hashes: "fur: 1f2e, b: 3", Version: v1.10.1'
    )
    found = infotext.parse(text)
    recipe = found.recipe
    assert (recipe.noise_source, recipe.eta, recipe.scale) == ("torch_cpu", 0.67, 2.0)
    assert (recipe.variation_seed, recipe.variation_strength) == (2, 0.1)
    assert found.hashes == {"lora:fur": "1f2e", "lora:b": "3"}
    assert found.ignored == ["Face restoration: CodeFormer"]


def test_a_picture_that_a_refiner_finished():
    found = infotext.parse(
        "x\nSteps: 30, Sampler: Euler, Seed: 1, Refiner: xl_refiner [7440042bbd], Refiner switch at: 0.7"
    )
    assert found.recipe.refiner_switch == 0.7 and found.ignored == ["Refiner: xl_refiner [7440042bbd]"]


def test_what_is_not_understood_is_named_and_left_at_its_default():
    found = infotext.parse(
        "x\nSteps: many, Sampler: DPM adaptive, Schedule type: Turbo, CFG scale: 7, Seed: 1, Size: large, RNG: XPU, "
        "Hires resize: 0x64, Hires upscaler: R-ESRGAN 4x+, Denoising strength: 0.3"
    )
    assert set(found.ignored) == {
        "Steps: many",
        "Sampler: DPM adaptive",
        "Schedule type: Turbo",
        "Size: large",
        "RNG: XPU",
        "Hires resize: 0x64",
        "Hires upscaler: R-ESRGAN 4x+",
    }
    assert found.recipe == Recipe("x", guidance_scale=7.0, seed=1, strength=0.3, strength_steps="a1111")


@pytest.mark.parametrize("text", ["", "a cat", "a cat\nSteps: 20", "Negative prompt: x\nSteps: 1, Seed: 2"])
def test_a_text_without_settings(text):
    with pytest.raises(ValueError, match="no settings"):
        infotext.parse(text)


def test_tables_name_only_what_there_is():
    assert set(infotext.SAMPLERS) | set(infotext.OURS_ALONE) == set(SAMPLERS)
    assert set(infotext.SCHEDULES) | set(infotext.SCHEDULES_OURS_ALONE) == set(SCHEDULES)
    assert set(infotext.AUTOMATIC) <= set(SAMPLERS) and set(infotext.AUTOMATIC.values()) <= set(SCHEDULES)
