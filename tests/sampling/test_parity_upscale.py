"""upscale against diffusers' StableDiffusionUpscalePipeline, from the same noises, on the same tiny random model."""

import importlib

import numpy as np
import pytest

import sd_jax
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


def by_diffusers(theirs, monkeypatch, **given):
    """Pixels in [0, 255] before rounding."""
    import torch

    def torch_of(array):
        return torch.from_numpy(array.transpose(0, 3, 1, 2).copy())

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
