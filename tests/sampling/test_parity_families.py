"""Twenty-step pictures of every family against diffusers' own pipelines, on the same tiny random models and noise.

Their encoder is set to the posterior's mean, as ours is. SD 1 is in test_parity_pipeline.py and test_parity_jobs.py.
"""

import functools
import importlib

import jax
import numpy as np
import pytest

import sd_jax
from tests.reference import diffusers
from tests.reference_families import saved_family
from tests.reference_pipeline import tiny_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

STEPS, SCALE = 20, 7.5
PROMPTS, NEGATIVE = ["a photo of a cat", "a red circle"], "the blur"
RNG = np.random.default_rng(0)
NOISE = RNG.standard_normal((2, 8, 8, 4)).astype(np.float32)
PIXELS = RNG.integers(0, 256, (2, 32, 32, 3), np.uint8)
MASK = np.zeros((2, 32, 32), np.uint8)
MASK[0, 8:24, 16:], MASK[1, :16] = 255, 255
SCHEDULERS = {  # by our names of sampler and schedule
    ("euler", "normal"): ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
    ("ddim", "trailing"): ("DDIMScheduler", {"timestep_spacing": "trailing"}),
}
EULER = ("euler", "normal")


@pytest.fixture(scope="module")
def load():
    """`load(family)` -> our pipeline of the same weights, opened once."""
    return functools.cache(lambda family: sd_jax.load(saved_family(family)[0]))


@pytest.fixture
def by_diffusers(monkeypatch):
    """`run(family, kind, walk, **given)` -> latents NHWC of their pipeline called `kind`, on the walk's scheduler."""
    import torch

    def run(family, kind, walk=EULER, **given):
        theirs = saved_family(family)[1]
        pipeline = getattr(diffusers(), kind)
        module = importlib.import_module(pipeline.__module__)
        noise = torch.from_numpy(NOISE.transpose(0, 3, 1, 2).copy())
        if hasattr(module, "retrieve_latents"):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
            monkeypatch.setattr(module, "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
        else:
            given["latents"] = noise
        name, config = SCHEDULERS[walk]
        scheduler = getattr(diffusers(), name).from_config(theirs.scheduler.config, **config)
        settings = {k: v for k, v in theirs.config.items() if k in SETTINGS}
        pipeline = pipeline(**{**theirs.components, "scheduler": scheduler}, **settings)
        pipeline.set_progress_bar_config(disable=True)
        given = {"negative_prompt": [NEGATIVE] * 2, **given}
        latents = pipeline(
            PROMPTS, num_inference_steps=STEPS, guidance_scale=SCALE, output_type="latent", **given
        ).images
        return latents.numpy().transpose(0, 2, 3, 1)

    return run


SETTINGS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score", "requires_safety_checker")


def pixels_of(vae, latents):
    """[0, 255] before rounding, by a decoder of theirs."""
    import torch

    with torch.no_grad():
        z = torch.from_numpy(latents.transpose(0, 3, 1, 2) / vae.config.scaling_factor)
        return 255 * (vae.decode(z).sample / 2 + 0.5).clamp(0, 1).numpy().transpose(0, 2, 3, 1)


def check(name, family, job, wanted, walk=EULER, where=True, **given):
    """Our latents and pixels, made from the same noise, against theirs."""
    fields = {"negative_prompt": NEGATIVE, "steps": STEPS, "guidance_scale": SCALE, "latents": NOISE, **given}
    fields |= dict(zip(("sampler", "schedule"), walk, strict=True))
    latents, pixels = (job(PROMPTS, output=output, **fields) for output in ("latents", "images"))
    of_latents = np.linalg.norm(latents - wanted) / np.linalg.norm(wanted)
    theirs = pixels_of(saved_family(family)[1].vae, wanted)
    of_pixels = np.abs(pixels - theirs).max(initial=0, where=where)
    print(f"{name}: latents differ by {of_latents:.1e} of their norm, pixels by {of_pixels:.2f} of 255")
    assert of_latents < 1e-3 and of_pixels <= 1.0
    assert theirs.std() > 10
    return latents


# --- From noise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15_lcm", "sd2_base", "sd2_v"])
def test_text_to_image(load, by_diffusers, family):
    """sd2_v predicts v on a schedule that ends in pure noise; sd15_lcm is told the guidance scale."""
    walk = ("ddim", "trailing") if family == "sd2_v" else EULER
    wanted = by_diffusers(family, "StableDiffusionPipeline", walk)
    check(family, family, load(family).text_to_image, wanted, walk)


SIZES = {"original_size": (100, 75), "target_size": (48, 64), "crops_coords_top_left": (5, 9)}


@pytest.mark.parametrize(
    ("family", "sizes", "negative"),
    [("sdxl", SIZES, NEGATIVE), ("sdxl", {}, ""), ("sdxl_lcm", SIZES, "")],
)
def test_sdxl(load, by_diffusers, family, sizes, negative):
    """diffusers' negative_prompt=None is our empty one."""
    theirs = {"negative_prompt": [negative] * 2 if negative else None}
    wanted = by_diffusers(family, "StableDiffusionXLPipeline", **sizes, **theirs)
    made = check(f"{family} {sizes}", family, load(family).text_to_image, wanted, negative_prompt=negative, **sizes)
    if sizes:
        plain = by_diffusers(family, "StableDiffusionXLPipeline", **theirs)
        assert np.linalg.norm(made - plain) > 0.01 * np.linalg.norm(plain)


@pytest.mark.parametrize("switch", [0.8, 0.35])
def test_sdxl_hands_over_to_its_refiner(load, by_diffusers, switch):
    import torch

    halfway = by_diffusers("sdxl", "StableDiffusionXLPipeline", denoising_end=switch, **SIZES)
    scores = {"aesthetic_score": 8.0, "negative_aesthetic_score": 1.5}
    wanted = by_diffusers(
        "sdxl_refiner",
        "StableDiffusionXLImg2ImgPipeline",
        image=torch.from_numpy(halfway.transpose(0, 3, 1, 2).copy()),
        denoising_start=switch,
        original_size=SIZES["original_size"],
        crops_coords_top_left=SIZES["crops_coords_top_left"],
        negative_crops_coords_top_left=SIZES["crops_coords_top_left"],
        **scores,
    )
    given = {"refiner": load("sdxl_refiner"), "refiner_switch": switch, **SIZES, **scores}
    made = check(f"refiner from {switch} on", "sdxl", load("sdxl").text_to_image, wanted, **given)
    assert np.linalg.norm(made - halfway) > 0.01 * np.linalg.norm(halfway)


# --- From a picture --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sdxl", "sdxl_refiner"])
def test_sdxl_image_to_image(load, by_diffusers, family):
    given = {"image": PIXELS.astype(np.float32) / 255, "strength": 0.6, "crops_coords_top_left": (5, 9)}
    more = {"negative_crops_coords_top_left": (5, 9)}
    wanted = by_diffusers(family, "StableDiffusionXLImg2ImgPipeline", **given, **more)
    check(f"{family} image_to_image", family, load(family).image_to_image, wanted, **{**given, "image": PIXELS})


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("sd2_inpainting", "StableDiffusionInpaintPipeline"),
        ("sdxl_inpainting", "StableDiffusionXLInpaintPipeline"),
    ],
)
def test_inpaint_by_unets_of_nine_channels(load, by_diffusers, family, kind):
    import torch

    mask = torch.from_numpy(MASK[:, None].astype(np.float32) / 255)
    given = {"image": PIXELS.astype(np.float32) / 255, "height": 32, "width": 32, "strength": 1.0}
    wanted = by_diffusers(family, kind, mask_image=mask, **given)
    redrawn = np.broadcast_to(MASK[..., None] > 0, PIXELS.shape)
    check(family, family, load(family).inpaint, wanted, where=redrawn, image=PIXELS, mask=MASK)


def test_depth(load, by_diffusers):
    import torch

    depth = RNG.uniform(3, 20, (2, 40, 24)).astype(np.float32)
    given = {"image": PIXELS.astype(np.float32) / 255, "strength": 0.8}
    kind = "StableDiffusionDepth2ImgPipeline"
    wanted = by_diffusers("sd2_depth", kind, depth_map=torch.from_numpy(depth), **given)
    job = load("sd2_depth").image_to_image
    made = check("sd2_depth", "sd2_depth", job, wanted, image=PIXELS, depth=depth, strength=0.8)
    other = by_diffusers("sd2_depth", kind, depth_map=torch.from_numpy(-depth), **given)
    assert np.linalg.norm(made - other) > 0.01 * np.linalg.norm(other)


# --- Single files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd2_base", "sdxl", "sdxl_refiner"])
def test_a_file_pads_as_its_folder_does(load, tmp_path, family):
    """With a tokenizer that pads as CLIP's does, which is what files without one are given."""
    load(family).save(tmp_path / "model.safetensors", format="single_file")
    pipe = sd_jax.load(tmp_path / "model.safetensors", tokenizer=str(tiny_tokenizer(tmp_path / "words")))
    both = (jax.tree.leaves(each.encode_prompts(PROMPTS)) for each in (pipe, load(family)))
    for of_file, of_folder in zip(*both, strict=True):
        np.testing.assert_array_equal(of_file, of_folder)


# --- Tiny autoencoders -----------------------------------------------------------------------------------------------


def test_tiny_autoencoder(tmp_path):
    import torch

    tiny = (
        diffusers()
        .AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 2, 1),
            num_decoder_blocks=(2, 1, 1),
        )
        .eval()
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in tiny.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    tiny.save_pretrained(tmp_path / "tiny")
    pipe = sd_jax.load(saved_family("sd15")[0], vae=tmp_path / "tiny")
    theirs = pixels_of(tiny, NOISE)
    assert np.abs(pipe.finish(NOISE) - theirs).max() <= 1.0 and theirs.std() > 10
    with torch.no_grad():
        latents = tiny.encode(torch.from_numpy(PIXELS.transpose(0, 3, 1, 2) / np.float32(127.5) - 1)).latents
    np.testing.assert_allclose(pipe.encode_image(PIXELS), latents.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
