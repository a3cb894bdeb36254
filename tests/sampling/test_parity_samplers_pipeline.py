"""Every sampler that k-diffusion or diffusers has, through the whole pipeline: guided, on the same tiny U-Net in torch.

Both sides get the same starting noise and the same recorded draws. On analytic models, with their options, the samplers
are compared in tests/diffusion/test_parity_samplers.py.
"""

import importlib

import numpy as np
import pytest

import sd_jax
from sd_jax.diffusion.samplers import count_draws
from tests.reference import diffusers, k_diffusion
from tests.reference_pipeline import tiny_diffusers_pipeline

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

STEPS, SCALE, PROMPT = 10, 7.5, "a photo of a cat"
SHAPE = (2, 8, 8, 4)
LATENTS = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
ONE_LEVEL = {  # of the U-Net: it compiles in half the time of two
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(our pipeline, theirs) of the same random weights."""
    diffusers()
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more wait for each other longer than a network of this size takes
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    theirs = tiny_diffusers_pipeline(folder, unet=ONE_LEVEL)
    yield sd_jax.load(folder), theirs
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def predict(both):
    """Their guided U-Net: (model input, timestep) -> epsilon."""
    import torch

    _, theirs = both
    texts = ["", "", PROMPT, PROMPT]
    ids = theirs.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        context = theirs.text_encoder(ids).last_hidden_state

    @torch.no_grad()
    def predict(x, t):
        twice = torch.cat([t, t]) if t.ndim else t
        uncond, cond = theirs.unet(torch.cat([x, x]), twice, encoder_hidden_states=context).sample.chunk(2)
        return uncond + SCALE * (cond - uncond)

    return predict


def to_torch(array):
    """NHWC to NCHW, also with draws in front."""
    import torch

    return torch.from_numpy(np.moveaxis(array, -1, -3).copy())


def draws_of(sampler):
    drawn = np.random.default_rng(1).standard_normal((count_draws(sampler, STEPS), *SHAPE))
    return drawn.astype(np.float32)


def ours(both, sampler, schedule, latents=LATENTS):
    draws = draws_of(sampler)
    return both[0].text_to_image(
        PROMPT,
        latents=latents,
        noise=draws if len(draws) else None,
        steps=STEPS,
        guidance_scale=SCALE,
        sampler=sampler,
        schedule=schedule,
        batch_size=len(LATENTS),
        output="latents",
    )


def check(name, made, wanted, rtol=1e-4):
    wanted = np.moveaxis(wanted.numpy(), -3, -1)
    error = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
    print(f"{name}: latents differ by {error:.1e} of their norm")
    assert error < rtol


# --- k-diffusion -----------------------------------------------------------------------------------------------------

K_DIFFUSION = [
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_2",
    "dpm_2_ancestral",
    "lms",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
]


@pytest.mark.parametrize("sampler", K_DIFFUSION)
def test_k_diffusion(both, predict, sampler):
    k = k_diffusion()

    class Denoiser(k.external.DiscreteEpsDDPMDenoiser):
        def get_eps(self, x, t):
            return predict(x, t)

    denoiser = Denoiser(None, both[1].scheduler.alphas_cumprod, quantize=False)
    ladders = {
        "karras": k.sampling.get_sigmas_karras(STEPS, float(denoiser.sigmas[0]), float(denoiser.sigmas[-1])),
        "normal": denoiser.get_sigmas(STEPS),
    }
    walk = getattr(k.sampling, f"sample_{sampler}")
    for schedule, sigmas in ladders.items():
        drawn = iter(to_torch(draws_of(sampler)))
        given = {"noise_sampler": lambda *_, drawn=drawn: next(drawn)} if len(draws_of(sampler)) else {}
        wanted = walk(denoiser, to_torch(LATENTS) * sigmas[0], sigmas, disable=True, **given)
        check(f"{sampler}/{schedule}", ours(both, sampler, schedule), wanted)


# --- diffusers -------------------------------------------------------------------------------------------------------


def by_scheduler(scheduler, predict, **timesteps):
    scheduler.set_timesteps(STEPS, **timesteps)
    x = to_torch(LATENTS) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    return x


def test_plms(both, predict):
    """The scheduler that Stable Diffusion 1 is published with."""
    wanted = by_scheduler(diffusers().PNDMScheduler.from_config(both[1].scheduler.config), predict)
    check("plms", ours(both, "plms", "leading"), wanted)


@pytest.mark.parametrize(
    ("sampler", "schedule", "name", "timesteps"),
    [("ddpm", "leading", "DDPMScheduler", {}), ("lcm", "lcm", "LCMScheduler", {"original_inference_steps": 50})],
)
def test_schedulers_that_add_noise(both, predict, monkeypatch, sampler, schedule, name, timesteps):
    """diffusers begins at variance-preserving noise, x = sqrt(1 + sigma^2) n; we, but for `leading`, at sigma n."""
    drawn = iter(to_torch(draws_of(sampler)))
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{sampler}")
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(drawn))
    scheduler = getattr(diffusers(), name).from_config(both[1].scheduler.config, clip_sample=False)
    wanted = by_scheduler(scheduler, predict, **timesteps)
    first = both[0].sigmas(schedule, STEPS, sampler)[0]
    start = LATENTS if schedule == "leading" else LATENTS * np.sqrt(1 + first**-2)
    check(sampler, ours(both, sampler, schedule, start), wanted)
