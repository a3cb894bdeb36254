"""The denoiser, and guidance around it."""

import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion.denoiser import make_denoiser
from sd_jax.diffusion.guidance import classifier_free, conditioned
from sd_jax.diffusion.losses import noised
from sd_jax.diffusion.predictions import PREDICTIONS
from sd_jax.diffusion.schedules import sigmas_of
from sd_jax.types import Conditioning, NoiseScheduleConfig

SHAPE = (3, 4, 4, 2)
DRAWS = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_what_training_asks_for_is_what_sampling_reads(name):
    """A network that answers every training target exactly denoises exactly, and is asked in the same words."""
    cfg = NoiseScheduleConfig(prediction_type=name)
    x0, n = jnp.asarray(DRAWS)
    timesteps = jnp.asarray([0, 400, 999])
    batch = noised(x0, n, timesteps, cfg)
    asked = []

    def predict(x, timestep, conditioning):
        asked.append((x, timestep, conditioning))
        return batch.target

    denoised = make_denoiser(predict, cfg)(batch.x, batch.sigma, "prompt")
    np.testing.assert_allclose(denoised, x0, atol=5e-6)
    [(x, timestep, conditioning)] = asked
    np.testing.assert_allclose(x, batch.model_input, atol=1e-6)
    np.testing.assert_allclose(timestep, batch.told, atol=2e-4)
    told = np.log(batch.sigma) / 4 if name == "edm" else timesteps
    np.testing.assert_allclose(batch.told, told, rtol=1e-6)
    assert conditioning == "prompt"


def test_a_half_precision_network_is_denoised_in_float32():
    cfg = NoiseScheduleConfig()

    def predict(x, timestep, conditioning):
        assert x.dtype == timestep.dtype == jnp.float32 and timestep.shape == (3,)
        return x.astype(jnp.bfloat16)

    x = jnp.asarray(DRAWS[0])
    denoise = make_denoiser(predict, cfg)
    assert denoise(x, jnp.asarray(2.0)).dtype == jnp.float32
    assert denoise(x.astype(jnp.bfloat16), jnp.asarray(2.0, jnp.bfloat16)).dtype == jnp.float32


def _conditioning(value, pooled=False):
    context = jnp.broadcast_to(jnp.asarray(value, jnp.float32)[:, None, None], (3, 5, 6))
    return Conditioning(context, context[:, 0] if pooled else None)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("scale", [1.0, 7.5, [1.0, 0.0, 3.0]])
def test_guidance_is_one_call_on_both(scale, pooled):
    calls = []

    def predict(x, timestep, conditioning):
        calls.append(x.shape)
        return x * conditioning.context.mean((1, 2))[:, None, None, None] + timestep[:, None, None, None] / 1000

    cond, uncond = _conditioning([1.0, 2.0, 3.0], pooled), _conditioning([0.5, 0.0, -1.0], pooled)
    x = jnp.asarray(DRAWS[0])
    sigma, scale = jnp.asarray([0.5, 2.0, 9.0]), jnp.asarray(scale)
    denoise = make_denoiser(predict, NoiseScheduleConfig(prediction_type="v_prediction"))
    guided = classifier_free(denoise, cond, uncond, scale)(x, sigma)
    assert calls == [(6, *SHAPE[1:])]
    with_prompt, without = conditioned(denoise, cond)(x, sigma), conditioned(denoise, uncond)(x, sigma)
    scale = jnp.broadcast_to(scale, (3,))[:, None, None, None]
    np.testing.assert_allclose(guided, without + scale * (with_prompt - without), atol=1e-5)


def test_timesteps_are_not_rounded():
    sigmas = sigmas_of(NoiseScheduleConfig())
    seen = []

    def predict(x, timestep, conditioning):
        seen.append(timestep)
        return x

    between = jnp.asarray(np.sqrt(sigmas[500] * sigmas[501]), jnp.float32)
    make_denoiser(predict, NoiseScheduleConfig())(jnp.zeros(SHAPE), between)
    np.testing.assert_allclose(seen[0], np.full(3, 500.5), atol=1e-3)
