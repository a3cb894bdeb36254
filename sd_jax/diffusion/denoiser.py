"""From a network to `denoise(x, sigma) -> x0`, the only thing that samplers know of a model.

The network answers to scaled latents and a timestep; samplers speak of x = x0 + sigma n and sigma. Between them,

    denoise(x, sigma) = c_skip x + c_out F(c_in x, t(sigma), conditioning)                                  (1)

with the coefficients of `predictions.py` and the fractional timestep t(sigma) of `schedules.py`, not rounded. A network
that predicts flow counts the same timesteps of the same discrete schedule; only what it sees and answers is another.
EDM's is told c_noise of `predictions.py` in place of t.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sd_jax.diffusion.predictions import along_batch, prediction, to_x0
from sd_jax.diffusion.schedules import sigma_to_timestep, sigmas_of
from sd_jax.types import NoiseScheduleConfig

# (scaled latents [batch, ...], timesteps or c_noise [batch], conditioning) -> raw output [batch, ...]
Predict = Callable[[Array, Array, Any], Array]
# (x [batch, ...], sigma, scalar or [batch], conditioning) -> x0 [batch, ...]
ConditionedDenoise = Callable[[Array, Array, Any], Array]
# (x [batch, ...], sigma, scalar or [batch]) -> x0 [batch, ...]
Denoise = Callable[[Array, Array], Array]


def make_denoiser(predict: Predict, cfg: NoiseScheduleConfig) -> ConditionedDenoise:
    """The denoiser of Eq. 1 for a network trained on the discrete schedule `cfg`.

    It computes in float32 whatever the network's dtype: `predict` gets float32 latents and timesteps and may answer in
    any floating dtype. What it conditions on passes through untouched; `guidance.py` binds it.
    """
    log_sigmas = np.log(sigmas_of(cfg))
    row = prediction(cfg.prediction_type)

    def denoise(x: Float[Array, "batch *dims"], sigma: Float[Array, "..."], conditioning: Any = None) -> Array:
        x = x.astype(state_dtype(x.dtype))
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        told = row.c_noise(sigma) if row.c_noise else sigma_to_timestep(sigma, jnp.asarray(log_sigmas, x.dtype))
        output = predict(x * row.c_in(along_batch(sigma, x)), told, conditioning)
        return to_x0(cfg.prediction_type, output.astype(x.dtype), x, sigma)

    return denoise


def state_dtype(dtype: DTypeLike) -> DTypeLike:
    """What a sampler computes in: float32, or float64 where x already is (in tests)."""
    return jnp.dtype(dtype) if dtype == jnp.float64 else jnp.dtype(jnp.float32)
