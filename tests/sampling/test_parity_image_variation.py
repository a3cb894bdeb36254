"""Image variation against diffusers' StableDiffusionImageVariationPipeline: its folder, and the one that we write."""

import warnings

import numpy as np
import pytest
from PIL import Image

import sd_jax
from tests.reference_families import saved_family
from tests.sampling.test_parity_ip_adapter import FEATURES, write_encoder

pytestmark = pytest.mark.parity
SIDE, STEPS = 32, 4
RECIPE = {"sampler": "ddim", "schedule": "leading", "steps": STEPS, "width": SIDE, "height": SIDE}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, one_thread):
    """(the folder of a tiny random pipeline, it)"""
    import diffusers
    import torch
    import transformers

    folder, (_, base) = tmp_path_factory.mktemp("variation"), saved_family("sd15")
    write_encoder(folder / "tower")
    unet = diffusers.UNet2DConditionModel.from_config({**base.unet.config, "cross_attention_dim": FEATURES}).eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in unet.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = centre + 0.1 * torch.randn(parameter.shape, generator=generator)
    pixels = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "image_mean": [0.4, 0.5, 0.6]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = diffusers.StableDiffusionImageVariationPipeline(
            vae=base.vae,
            image_encoder=transformers.CLIPVisionModelWithProjection.from_pretrained(folder / "tower").eval(),
            unet=unet,
            scheduler=diffusers.DDIMScheduler.from_config(base.scheduler.config, clip_sample=False),
            safety_checker=None,
            feature_extractor=transformers.CLIPImageProcessor(**pixels),
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    return folder / "model", pipeline


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_pictures_are_those_of_diffusers(theirs, tmp_path, guidance_scale):
    import diffusers
    import torch

    folder, pipeline = theirs
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    pictures = rng.integers(0, 256, (2, 40, 57, 3), np.uint8)

    def wanted(pipeline):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = pipeline(
                [Image.fromarray(picture) for picture in pictures],
                latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
                height=SIDE,
                width=SIDE,
                num_inference_steps=STEPS,
                guidance_scale=guidance_scale,
                output_type="np",
            )
        return 255 * made.images

    pipe = sd_jax.load(folder)
    made = pipe.text_to_image(image_prompt=pictures, latents=noise, guidance_scale=guidance_scale, **RECIPE)
    made = made.astype(np.float32)
    assert np.abs(made[0] - made[1]).max() > 8 and np.abs(made - wanted(pipeline)).max() <= 2
    if guidance_scale == 1.0:
        return
    pipe.save(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours", safety_checker=None)
    assert type(back) is type(pipeline)
    back.scheduler = pipeline.scheduler
    back.set_progress_bar_config(disable=True)
    assert np.abs(made - wanted(back)).max() <= 2
