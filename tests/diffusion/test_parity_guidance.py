"""Guidance against diffusers' guiders; what ComfyUI's nodes compute is restated here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion.guidance import Guidance, guided, interval_of_steps
from sd_jax.diffusion.predictions import from_x0, to_x0
from tests.reference import diffusers

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # torch tensors in diffusers
]
SHAPE = (2, 4, 4, 3)
X, *ANSWERS = np.random.default_rng(0).standard_normal((13, *SHAPE)).astype(np.float32)
PAIRS = list(zip(ANSWERS[::2], ANSWERS[1::2], strict=True))  # predictions of six calls: (cond, uncond)
SIGMA = np.float32(3.0)


def close(ours, theirs, atol=5e-6):
    difference = np.max(np.abs(np.asarray(ours) - np.asarray(theirs)))
    print(f"difference {difference:.1e}")
    assert difference < atol * max(1, np.max(np.abs(np.asarray(theirs))))


def recorded(guidance, pairs, prediction_type="sample", x=X, **kwargs):
    """Our answers as raw outputs, to a network that gives the recorded outputs one after the other."""
    calls = iter(pairs)

    def denoise(x, sigma, _):
        cond, uncond = next(calls)
        return to_x0(prediction_type, jnp.concatenate([jnp.asarray(uncond), jnp.asarray(cond)]), x, sigma)

    nothing = jnp.zeros(len(x))
    memory = jax.new_ref(jnp.zeros(x.shape, jnp.float32))
    denoiser = guided(denoise, nothing, nothing, guidance, memory=memory, **kwargs)
    x0s = [denoiser(jnp.asarray(x), jnp.asarray(SIGMA)) for _ in pairs]
    return [from_x0(prediction_type, x0, jnp.asarray(x), jnp.asarray(SIGMA)) for x0 in x0s]


@pytest.mark.parametrize("rescale", [None, 0.7])
@pytest.mark.parametrize("momentum", [None, -0.5, 0.6])
@pytest.mark.parametrize(("eta", "norm_threshold"), [(1.0, 0.0), (0.0, 2.5), (0.4, 100.0)])
def test_adaptive_projected_guidance(eta, norm_threshold, momentum, rescale):
    """On predictions of x0, six calls after each other."""
    import torch

    diffusers()
    from diffusers.guiders import AdaptiveProjectedGuidance
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

    guider = AdaptiveProjectedGuidance(
        guidance_scale=6.5,
        adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_rescale=norm_threshold,
        eta=eta,
        guidance_rescale=rescale or 0.0,
        use_original_formulation=True,
    )
    guider.momentum_buffer = MomentumBuffer(momentum) if momentum is not None else None
    guidance = Guidance(7.5, rescale, None, eta, norm_threshold, momentum)
    for ours, (cond, uncond) in zip(recorded(guidance, PAIRS, rescale_in="sample"), PAIRS, strict=True):
        close(ours, guider.forward(torch.from_numpy(cond), torch.from_numpy(uncond)).pred, 2e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescale_of_diffusers(rescale, prediction_type):
    """On the model's own output."""
    import torch

    diffusers()
    from diffusers.guiders import ClassifierFreeGuidance

    guider = ClassifierFreeGuidance(guidance_scale=7.5, guidance_rescale=rescale)
    for (cond, uncond), ours in zip(
        PAIRS, recorded(Guidance(7.5, rescale), PAIRS, prediction_type, rescale_in=prediction_type), strict=True
    ):
        close(ours, guider.forward(torch.from_numpy(cond), torch.from_numpy(uncond)).pred)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_rescale_of_comfy(prediction_type):
    """On v, whatever the model predicts: RescaleCFG, restated in float64 from the two denoised answers."""
    [(cond, uncond)] = PAIRS[:1]
    spread = 1 / np.sqrt(SIGMA**2 + 1)
    x0_cond, x0_uncond = (
        np.asarray(to_x0(prediction_type, jnp.asarray(a), jnp.asarray(X), jnp.asarray(SIGMA)), float)
        for a in (cond, uncond)
    )
    v_cond, v_uncond = ((X * spread**2 - x0) / (SIGMA * spread) for x0 in (x0_cond, x0_uncond))
    v = v_uncond + 7.5 * (v_cond - v_uncond)
    matched = v * (v_cond.std((1, 2, 3), ddof=1) / v.std((1, 2, 3), ddof=1))[:, None, None, None]
    theirs = X * spread**2 - (0.7 * matched + 0.3 * v) * SIGMA * spread
    [ours] = recorded(Guidance(7.5, 0.7), PAIRS[:1], prediction_type)
    close(to_x0(prediction_type, ours, jnp.asarray(X), jnp.asarray(SIGMA)), theirs)


def test_comfys_apg():
    """The APG node, restated: its guidance is added `cfg` times, where ours is added scale - 1 times."""
    running = 0
    for ours, (cond, uncond) in zip(recorded(Guidance(6.0, None, None, 0.3, 3.0, -0.4), PAIRS), PAIRS, strict=True):
        running = cond - uncond - 0.4 * running
        length = np.sqrt((running**2).sum((1, 2, 3), keepdims=True))
        limited = running * np.minimum(1, 3.0 / length)
        unit = cond / np.sqrt((cond**2).sum((1, 2, 3), keepdims=True))
        along = (limited * unit).sum((1, 2, 3), keepdims=True) * unit
        modified = uncond + (limited - along + 0.3 * along) + (cond - uncond) / 5
        close(ours, uncond + 5 * (modified - uncond))


@pytest.mark.parametrize("steps", [1, 7, 10, 25, 100])
@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (0.2, 0.8), (0.29, 0.57), (0.0, 0.05), (0.95, 1.0)])
def test_interval_of_steps(start, stop, steps):
    """The steps that the guiders of diffusers guide."""
    import torch

    diffusers()
    from diffusers.guiders import ClassifierFreeGuidance

    guider = ClassifierFreeGuidance(start=start, stop=stop)
    sigmas = np.append(np.geomspace(14, 0.03, steps), 0).astype(np.float32)
    low, high = interval_of_steps(sigmas, start, stop)
    for step in range(steps):
        guider.set_state(step=step, num_inference_steps=steps, timestep=torch.tensor(0))
        assert (guider.num_conditions == 2) == (low < sigmas[step] < high)
