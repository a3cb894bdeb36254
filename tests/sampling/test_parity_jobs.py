"""image_to_image and inpaint against diffusers' pipelines of those names, from the same noise, on the same tiny model.

Their encoder is set to the posterior's mean, as ours is.
"""

import importlib

import numpy as np
import pytest

import sd_jax
from tests.reference import diffusers
from tests.reference_pipeline import tiny_diffusers_pipeline
from tests.sampling.test_parity_control import randomised

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

STEPS, PROMPTS, NEGATIVE = 10, ["a photo of a cat", "a red circle"], "the blur"
RNG = np.random.default_rng(0)
NOISE = RNG.standard_normal((2, 8, 8, 4)).astype(np.float32)
PIXELS = RNG.integers(0, 256, (2, 32, 32, 3), np.uint8)
MASK = np.zeros((2, 32, 32), np.uint8)
MASK[0, 8:24, 16:], MASK[1, :16] = 255, 255
ONE_LEVEL = {  # of the U-Net: it compiles in half the time of two
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
SCHEDULERS = {  # by our names of sampler and schedule
    ("euler", "normal"): ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
    ("ddim", "leading"): (
        "DDIMScheduler",
        {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
    ),
}
sampled = pytest.mark.parametrize(("sampler", "schedule"), SCHEDULERS)


def pair(folder, **unet):
    """(our pipeline, theirs) of the same random weights."""
    theirs = tiny_diffusers_pipeline(folder, unet={**ONE_LEVEL, **unet})
    return sd_jax.load(folder), theirs


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="module")
def both_of_nine_channels(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("tiny_inpaint") / "pipeline", in_channels=9)


def by_diffusers(theirs, kind, sampler, schedule, monkeypatch, networks=(), **given):
    """(latents NHWC, pixels in [0, 255] before rounding) of their pipeline of this kind."""
    import torch

    folder = "controlnet.pipeline_controlnet" if networks else "stable_diffusion.pipeline_stable_diffusion"
    module = importlib.import_module(f"diffusers.pipelines.{folder}_{kind.lower()}")
    noise = torch.from_numpy(NOISE.transpose(0, 3, 1, 2).copy())
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
    monkeypatch.setattr(module, "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    name, config = SCHEDULERS[sampler, schedule]
    scheduler = getattr(diffusers(), name).from_config(theirs.scheduler.config, **config)
    parts = {**theirs.components, "scheduler": scheduler, **dict(networks)}
    name = f"StableDiffusion{'ControlNet' if networks else ''}{kind}Pipeline"
    pipeline = getattr(diffusers(), name)(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        image=torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).astype(np.float32) / 255),
        num_inference_steps=STEPS,
        output_type="latent",
        **given,
    ).images
    with torch.no_grad():
        decoded = theirs.vae.decode(latents / theirs.vae.config.scaling_factor).sample
    pixels = 255 * (decoded / 2 + 0.5).clamp(0, 1)
    return tuple(array.numpy().transpose(0, 2, 3, 1) for array in (latents, pixels))


def ours(job, sampler, schedule, output, strength, guidance_scale, **given):
    return job(
        PROMPTS,
        negative_prompt=NEGATIVE,
        image=PIXELS,
        latents=NOISE,
        steps=STEPS,
        sampler=sampler,
        schedule=schedule,
        strength=strength,
        guidance_scale=guidance_scale,
        output=output,
        **given,
    )


def differences(made, wanted, pixels_made, pixels_wanted, where=True):
    """(of latents, relative to their norm; of pixels, the largest, where they are compared)."""
    of_pixels = np.abs(pixels_made.astype(np.float32) - pixels_wanted)
    return np.linalg.norm(made - wanted) / np.linalg.norm(wanted), of_pixels.max(initial=0, where=where)


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
@sampled
def test_image_to_image(both, monkeypatch, sampler, schedule, strength, guidance_scale):
    made, pixels = (
        ours(both[0].image_to_image, sampler, schedule, output, strength, guidance_scale)
        for output in ("latents", "images")
    )
    given = {"strength": strength, "guidance_scale": guidance_scale}
    wanted = by_diffusers(both[1], "Img2Img", sampler, schedule, monkeypatch, **given)
    of_latents, of_pixels = differences(made, wanted[0], pixels, wanted[1])
    print(f"{sampler}/{schedule}, {given}: latents differ by {of_latents:.1e}, pixels by {of_pixels:.2f} of 255")
    assert of_latents < 1e-4 and of_pixels <= 1.0


def check_inpaint(both, monkeypatch, sampler, schedule, strength, guidance_scale, mask=MASK):
    import torch

    made, pixels = (
        ours(both[0].inpaint, sampler, schedule, output, strength, guidance_scale, mask=mask)
        for output in ("latents", "images")
    )
    given = {"strength": strength, "guidance_scale": guidance_scale, "height": 32, "width": 32}
    mask_image = torch.from_numpy(mask[:, None].astype(np.float32) / 255)
    wanted = by_diffusers(both[1], "Inpaint", sampler, schedule, monkeypatch, mask_image=mask_image, **given)
    redrawn = np.broadcast_to(mask[..., None] > 0, PIXELS.shape)
    of_latents, of_pixels = differences(made, wanted[0], pixels, wanted[1], redrawn)
    print(f"{sampler}/{schedule}, {given}: latents differ by {of_latents:.1e}, pixels by {of_pixels:.2f} of 255")
    assert of_latents < 1e-4 and of_pixels <= 1.0
    np.testing.assert_array_equal(pixels[~redrawn], PIXELS[~redrawn])
    assert np.abs(pixels[redrawn].astype(int) - PIXELS[redrawn]).mean() > 10


@pytest.mark.parametrize(("kind", "start", "end"), [("Img2Img", 0.3, 0.7), ("Inpaint", 0.3, 0.7)])
def test_steered_by_a_controlnet(both, tmp_path, monkeypatch, kind, start, end):
    """Its part of the steps is one of those that are walked."""
    import torch

    pipe, theirs = both
    options = {"conditioning_embedding_out_channels": (8, 16, 16), "load_weights_from_unet": False}
    net = randomised(diffusers().ControlNetModel.from_unet(theirs.unet, **options), 1)
    net.save_pretrained(tmp_path)
    drawn = np.random.default_rng(5).integers(0, 256, PIXELS.shape, np.uint8)
    job, masked, given = pipe.image_to_image, {}, {}
    if kind == "Inpaint":
        job, masked = pipe.inpaint, {"mask": MASK}
        given = {"mask_image": torch.from_numpy(MASK[:, None].astype(np.float32) / 255)}
    given |= {"control_image": torch.from_numpy(drawn.transpose(0, 3, 1, 2).astype(np.float32) / 255)}
    given |= {"controlnet_conditioning_scale": 1.0, "control_guidance_start": start, "control_guidance_end": end}
    given |= {"strength": 0.6, "guidance_scale": 5.0, "height": 32, "width": 32}
    wanted, _ = by_diffusers(theirs, kind, "ddim", "leading", monkeypatch, {"controlnet": net}, **given)
    hint = sd_jax.load_control(tmp_path).hint(drawn, start=start, end=end)
    made, without = (ours(job, "ddim", "leading", "latents", 0.6, 5.0, control=c, **masked) for c in ([hint], []))
    of_latents = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
    assert of_latents < 1e-4 < 1e-2 < np.linalg.norm(made - without) / np.linalg.norm(wanted)


@pytest.mark.parametrize(("strength", "guidance_scale"), [(1.0, 7.5), (0.6, 7.5), (0.6, 1.0)])
@sampled
def test_inpaint(both, monkeypatch, sampler, schedule, strength, guidance_scale):
    check_inpaint(both, monkeypatch, sampler, schedule, strength, guidance_scale)


@pytest.mark.parametrize(("strength", "guidance_scale"), [(1.0, 7.5), (0.6, 7.5), (0.6, 1.0)])
@sampled
def test_inpaint_by_a_unet_of_nine_channels(
    both_of_nine_channels, monkeypatch, sampler, schedule, strength, guidance_scale
):
    """Which alone decides what is kept: diffusers leaves its latents as they are outside the mask."""
    check_inpaint(both_of_nine_channels, monkeypatch, sampler, schedule, strength, guidance_scale)


def test_a_unet_of_nine_channels_sees_the_mask_at_every_fourth_pixel(both_of_nine_channels, monkeypatch):
    """For masks that part what one latent covers, diffusers takes the pixel at the top left of each latent."""
    mask = np.zeros_like(MASK)
    mask[:, 5:22, 7:27] = 255
    check_inpaint(both_of_nine_channels, monkeypatch, "euler", "normal", 1.0, 7.5, mask)
