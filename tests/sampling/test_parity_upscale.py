"""upscale against diffusers' StableDiffusionUpscalePipeline and StableDiffusionLatentUpscalePipeline, from the same
noises, on the same tiny random models."""

import importlib

import numpy as np
import pytest

import sd_jax
from sd_jax.types import Conditioning
from tests.reference import diffusers
from tests.reference_families import saved_family

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

STEPS, PROMPTS, NEGATIVE = 10, ["a photo of a cat", "a red circle"], "the blur"
RNG = np.random.default_rng(0)
NOISE = RNG.standard_normal((2, 8, 8, 4)).astype(np.float32)
IMAGE_NOISE = RNG.standard_normal((2, 8, 8, 3)).astype(np.float32)
PIXELS = RNG.integers(0, 256, (2, 8, 8, 3), np.uint8)
LOW_RES = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear", "clip_sample": True}


@pytest.fixture(scope="module")
def both():
    """(our pipeline, theirs), opened from the same folder; theirs with the published low_res_scheduler."""
    folder, theirs = saved_family("sd_x4_upscaler")
    library = diffusers()
    scheduler = library.EulerDiscreteScheduler.from_config(theirs.scheduler.config, timestep_spacing="linspace")
    theirs = library.StableDiffusionUpscalePipeline(
        **{**theirs.components, "scheduler": scheduler, "low_res_scheduler": library.DDPMScheduler(**LOW_RES)}
    )
    theirs.set_progress_bar_config(disable=True)
    return sd_jax.load(folder), theirs


def torch_of(array):
    import torch

    return torch.from_numpy(array.transpose(0, 3, 1, 2).copy())


def by_diffusers(theirs, monkeypatch, **given):
    """Pixels in [0, 255] before rounding."""
    module = importlib.import_module("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale")
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch_of(IMAGE_NOISE))
    return 255 * np.asarray(
        theirs(
            PROMPTS,
            negative_prompt=[NEGATIVE] * 2,
            image=PIXELS.astype(np.float32) / 255,
            latents=torch_of(NOISE),
            num_inference_steps=STEPS,
            output_type="np",
            **given,
        ).images
    )


@pytest.mark.parametrize(("noise_level", "guidance_scale"), [(20, 9.0), (45, 3.0), (45, 1.0)])
def test_upscale(both, monkeypatch, noise_level, guidance_scale):
    given = {"noise_level": noise_level, "guidance_scale": guidance_scale}
    wanted = by_diffusers(both[1], monkeypatch, **given)
    fields = {"negative_prompt": NEGATIVE, "steps": STEPS, "latents": NOISE, "image_noise": IMAGE_NOISE, **given}
    made = both[0].upscale(PIXELS, PROMPTS, **fields).astype(np.float32)
    print(f"{given}: pixels differ by {np.abs(made - wanted).max():.2f} of 255")
    assert made.shape == (2, 32, 32, 3) and wanted.std() > 10
    assert np.abs(made - wanted).max() <= 1.0


# --- The x2 latent upscaler ------------------------------------------------------------------------------------------

LATENTS = RNG.standard_normal((2, 4, 6, 4)).astype(np.float32)
LARGE_NOISE = RNG.standard_normal((2, 8, 12, 4)).astype(np.float32)
SMALL_PICTURES = RNG.integers(0, 256, (2, 16, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def both_x2():
    """(our pipeline, theirs by interpolation_type of its scheduler)."""
    folder, theirs = saved_family("sd_x2_latent_upscaler")
    library = diffusers()

    def pipeline(interpolation):
        config = {"timestep_spacing": "linspace", "interpolation_type": interpolation}
        scheduler = library.EulerDiscreteScheduler.from_config(theirs.scheduler.config, **config)
        made = library.StableDiffusionLatentUpscalePipeline(**{**theirs.components, "scheduler": scheduler})
        made.set_progress_bar_config(disable=True)
        return made

    return sd_jax.load(folder), pipeline


def test_network_of_the_latent_upscaler(both_x2):
    import torch

    pipe, unet = both_x2[0], saved_family("sd_x2_latent_upscaler")[1].unet
    latents, context = (RNG.standard_normal(shape).astype(np.float32) for shape in ((2, 8, 12, 8), (2, 7, 48)))
    pooled, told = RNG.standard_normal((2, 48)).astype(np.float32), np.float32([-0.9, 0.6])
    level = np.repeat(np.float32([[1, 0]]), 2, axis=0).repeat(64, axis=1)  # cos 0, sin 0
    with torch.no_grad():
        condition = torch.from_numpy(np.concatenate([level, pooled], axis=1))
        wanted = unet(torch_of(latents), torch.from_numpy(told), torch.from_numpy(context), timestep_cond=condition)
    wanted = wanted.sample.numpy().transpose(0, 2, 3, 1)[..., :-1]
    made = np.asarray(pipe.predict(latents, told, Conditioning(context, pooled)))
    of_norm = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
    print(f"the U-Net's answer differs by {of_norm:.1e} of its norm")
    assert made.shape == wanted.shape and of_norm < 1e-4 and np.linalg.norm(wanted) > 1


@pytest.mark.parametrize(
    ("schedule", "interpolation", "guidance_scale", "of_pictures"),
    [("normal", "linear", 9.0, True), ("log_linear", "log_linear", 3.0, False)],
)
def test_latent_upscale(both_x2, monkeypatch, schedule, interpolation, guidance_scale, of_pictures):
    pipe, theirs = both_x2[0], both_x2[1](interpolation)
    module = importlib.import_module("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_latent_upscale")
    monkeypatch.setattr(module, "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    given = {"guidance_scale": guidance_scale}
    wanted = 255 * np.asarray(
        theirs(
            PROMPTS,
            image=SMALL_PICTURES.astype(np.float32) / 255 if of_pictures else torch_of(LATENTS),
            negative_prompt=[NEGATIVE] * 2,
            latents=torch_of(LARGE_NOISE),
            num_inference_steps=STEPS,
            output_type="np",
            **given,
        ).images
    )
    fields = {"negative_prompt": NEGATIVE, "steps": STEPS, "latents": LARGE_NOISE, "schedule": schedule, **given}
    made = pipe.upscale(SMALL_PICTURES if of_pictures else LATENTS, PROMPTS, **fields).astype(np.float32)
    print(f"{schedule}, {given}: pixels differ by {np.abs(made - wanted).max():.2f} of 255")
    assert made.shape == (2, 32, 48, 3) and wanted.std() > 10
    assert np.abs(made - wanted).max() <= 1.0
