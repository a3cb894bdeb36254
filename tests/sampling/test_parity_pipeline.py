"""Whole pictures against diffusers' schedulers and k-diffusion's samplers, on the same tiny U-Net in torch."""

import jax.numpy as jnp
import numpy as np
import pytest

import sd_jax
from tests.reference import diffusers, k_diffusion
from tests.reference_pipeline import tiny_diffusers_pipeline

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

STEPS, SCALE, PROMPT = 20, 7.5, "a photo of a cat"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(our pipeline, theirs) of the same random weights, and one starting noise, NHWC."""
    diffusers()
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    theirs = tiny_diffusers_pipeline(folder)
    ours = sd_jax.load(folder)
    noise = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    return ours, theirs, noise


def conditioning(theirs):
    import torch

    def encode(text):
        ids = theirs.tokenizer([text] * 2, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return theirs.text_encoder(ids).last_hidden_state

    with torch.no_grad():
        return encode(PROMPT), encode("")


def torch_noise(noise):
    import torch

    return torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())


def by_scheduler(theirs, scheduler, noise):
    """diffusers' own loop: init_noise_sigma, scale_model_input, CFG in one batch, step."""
    import torch

    cond, uncond = conditioning(theirs)
    scheduler.set_timesteps(STEPS)
    x = torch_noise(noise) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            model_input = scheduler.scale_model_input(torch.cat([x, x]), t)
            out = theirs.unet(model_input, t, encoder_hidden_states=torch.cat([uncond, cond])).sample
            u, c = out.chunk(2)
            x = scheduler.step(u + SCALE * (c - u), t, x).prev_sample
    return x


def by_k_diffusion(theirs, noise, schedule):
    import torch

    k = k_diffusion()
    cond, uncond = conditioning(theirs)
    alphas = theirs.scheduler.alphas_cumprod

    class Wrapped(k.external.DiscreteEpsDDPMDenoiser):
        def get_eps(self, x, t, **kwargs):
            return theirs.unet(x, t, encoder_hidden_states=torch.cat([uncond, cond])).sample

    denoiser = Wrapped(None, alphas, quantize=False)

    def guided(x, sigma):
        u, c = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma])).chunk(2)
        return u + SCALE * (c - u)

    lowest, highest = float(denoiser.sigmas[0]), float(denoiser.sigmas[-1])
    sigmas = k.sampling.get_sigmas_karras(STEPS, lowest, highest)
    with torch.no_grad():
        return k.sampling.sample_dpmpp_2m(guided, torch_noise(noise) * sigmas[0], sigmas, disable=True)


def reference(name, theirs, noise):
    d = diffusers()
    config = theirs.scheduler.config
    if name == "euler":
        return by_scheduler(theirs, d.EulerDiscreteScheduler.from_config(config, timestep_spacing="linspace"), noise)
    if name == "heun":
        scheduler = d.HeunDiscreteScheduler.from_config(config, timestep_spacing="linspace", use_karras_sigmas=True)
        return by_scheduler(theirs, scheduler, noise)
    if name == "ddim":
        spacing = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
        return by_scheduler(theirs, d.DDIMScheduler.from_config(config, **spacing), noise)
    return by_k_diffusion(theirs, noise, "karras")


@pytest.mark.parametrize(
    ("sampler", "schedule"), [("euler", "normal"), ("heun", "karras"), ("dpmpp_2m", "karras"), ("ddim", "leading")]
)
def test_twenty_guided_steps(both, sampler, schedule):
    import torch

    ours, theirs, noise = both
    expected = reference(sampler, theirs, noise)
    recipe = {"steps": STEPS, "guidance_scale": SCALE, "sampler": sampler, "schedule": schedule, "batch_size": 2}
    latents = ours.text_to_image(PROMPT, latents=jnp.asarray(noise), output="latents", **recipe)
    wanted = expected.numpy().transpose(0, 2, 3, 1)
    error = np.linalg.norm(latents - wanted) / np.linalg.norm(wanted)
    print(f"{sampler}/{schedule}: latents differ by {error:.2e} of their norm")
    assert error < 1e-4

    images = ours.text_to_image(PROMPT, latents=jnp.asarray(noise), **recipe)
    with torch.no_grad():
        decoded = theirs.vae.decode(expected / theirs.vae.config.scaling_factor).sample
    pixels = (decoded / 2 + 0.5).clamp(0, 1).numpy().transpose(0, 2, 3, 1)
    assert np.abs(images.astype(np.float32) - 255 * pixels).max() <= 1.0
