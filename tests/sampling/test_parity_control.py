"""Pictures steered by ControlNets and T2I-Adapters, against diffusers' pipelines, on tiny models of SD 1.5 and SDXL."""

import warnings

import numpy as np
import pytest

import sd_jax
from tests.reference_families import saved_family

pytestmark = pytest.mark.parity
PROMPT, SIDE, STEPS = "a photo of the sea", 32, 4


def randomised(module, seed, spread=0.1):
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = centre + spread * torch.randn(parameter.shape, generator=generator)
    return module.eval()


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def family(request, tmp_path_factory, one_thread):
    """(name, diffusers' pipeline, ours, folder for files)"""
    import diffusers

    folder, pipeline = saved_family(request.param)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    return request.param, pipeline, sd_jax.load(folder), tmp_path_factory.mktemp("control")


@pytest.fixture(scope="module")
def controlnets(family):
    """Two of diffusers', and the folders that it wrote."""
    import diffusers

    _, pipeline, _, folder = family
    made = []
    for seed in (1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = diffusers.ControlNetModel.from_unet(
                pipeline.unet, conditioning_embedding_out_channels=(8, 16, 16), load_weights_from_unet=False
            )
            made.append((randomised(net, seed), folder / f"controlnet_{seed}"))
        made[-1][0].save_pretrained(made[-1][1])
    return made


@pytest.fixture(scope="module")
def adapters(family):
    import diffusers

    name, pipeline, _, folder = family
    kind, factor = ("full_adapter_xl", 8) if name == "sdxl" else ("full_adapter", 4)
    made = []
    for seed in (1, 2):
        config = {"in_channels": 3, "channels": list(pipeline.unet.config.block_out_channels), "num_res_blocks": 2}
        adapter = diffusers.T2IAdapter(**config, downscale_factor=factor, adapter_type=kind)
        made.append((randomised(adapter, seed, 0.15), folder / f"adapter_{seed}"))
        made[-1][0].save_pretrained(made[-1][1])
    return made


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def hints():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for _ in range(2)]


def theirs(family, kind, networks, images, noise, **kwargs):
    import torch
    from PIL import Image

    name, pipeline, _, _ = family
    parts = {part: value for part, value in pipeline.components.items() if part != "image_encoder"}
    xl = "XL" if name == "sdxl" else ""
    networks = networks[0] if len(networks) == 1 else networks
    images = [Image.fromarray(image) for image in images]
    images = images[0] if len(images) == 1 else images
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        steered = getattr(diffusers, f"StableDiffusion{xl}{kind}Pipeline")
        part = "controlnet" if kind == "ControlNet" else "adapter"
        if kind == "Adapter" and isinstance(networks, list):
            networks = diffusers.MultiAdapter(networks)
        if xl:
            parts = {part: parts[part] for part in parts if part not in ("feature_extractor",)}
            extra = {} if kind == "Adapter" else {"add_watermarker": False}
        else:
            extra = {"requires_safety_checker": False}
        pipe = steered(**parts, **{part: networks}, **extra)
        pipe.set_progress_bar_config(disable=True)
        latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
        settings = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "guidance_scale": 3.0, **kwargs}
        return pipe(PROMPT, image=images, latents=latents, output_type="np", **settings).images * 255


def ours(pipe, noise, hints=()):
    recipe = {"sampler": "ddim", "schedule": "leading", "steps": STEPS, "guidance_scale": 3.0}
    made = pipe.text_to_image(PROMPT, latents=noise, width=SIDE, height=SIDE, control=hints, **recipe)
    return made.astype(np.float32)


CONTROLNET = {
    "whole": ((1.0,), {}, {}),
    "weak": ((0.4,), {}, {}),
    "for a part of the steps": (
        (1.0,),
        {"start": 0.25, "end": 0.75},
        {"control_guidance_start": 0.25, "control_guidance_end": 0.75},
    ),
    "guess mode": ((1.0,), {"guess_mode": True}, {"guess_mode": True}),
    "two": ((0.7, 1.2), {}, {}),
}


@pytest.mark.parametrize("case", CONTROLNET)
def test_controlnets(family, controlnets, hints, noise, case):
    strengths, own, kwargs = CONTROLNET[case]
    pipe, used = family[2], controlnets[: len(strengths)]
    scale = strengths[0] if len(strengths) == 1 else list(strengths)
    networks, images = [network for network, _ in used], hints[: len(strengths)]
    wanted = theirs(family, "ControlNet", networks, images, noise, controlnet_conditioning_scale=scale, **kwargs)
    given = [
        sd_jax.load_control(folder).hint(image, strength=strength, **own)
        for (_, folder), image, strength in zip(used, images, strengths, strict=True)
    ]
    made = ours(pipe, noise, given)
    assert np.abs(made - ours(pipe, noise)).max() > 8, "the ControlNet changes nothing"
    assert np.abs(made - wanted).max() <= 2


@pytest.mark.parametrize("strengths", [(1.0,), (0.5,), (0.6, 1.3)])
def test_t2i_adapters(family, adapters, hints, noise, strengths):
    pipe, used = family[2], adapters[: len(strengths)]
    scale = strengths[0] if len(strengths) == 1 else list(strengths)
    networks, images = [network for network, _ in used], hints[: len(strengths)]
    wanted = theirs(family, "Adapter", networks, images, noise, adapter_conditioning_scale=scale)
    given = [
        sd_jax.load_control(folder).hint(image, strength=strength)
        for (_, folder), image, strength in zip(used, images, strengths, strict=True)
    ]
    made = ours(pipe, noise, given)
    assert np.abs(made - ours(pipe, noise)).max() > 8, "the T2I-Adapter changes nothing"
    assert np.abs(made - wanted).max() <= 2
