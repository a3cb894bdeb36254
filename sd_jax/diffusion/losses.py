"""The training side: noising a batch, what the network should answer, and how much each example counts.

For clean latents x0, noise n and a timestep t of the discrete schedule, with s = sigma_t,

    x = x0 + s n,    network input c_in x,    loss = w(s) mean((F(c_in x, t) - F*)^2)                       (1)

with c_in and the target F* of `predictions.py`, the table that samplers read too. `timesteps.py` draws t, `noise.py`
and `training_noise.py` draw n. Where the input is to hold another noise n' than the target is made of, x = x0 + s n'.

min-SNR (Hang et al. 2023, arXiv 2303.09556: Min-SNR-gamma) weighs the error of x0 by min(snr, gamma), where snr =
1 / s^2. An error of x0 is c_out times one of F, so for every prediction type

    w = min(snr, gamma) c_out^2                                                                             (2)

        epsilon       min(snr, gamma) / snr
        v_prediction  min(snr, gamma) / (snr + 1)
        sample        min(snr, gamma)
        flow          min(snr, gamma) / (sqrt(snr) + 1)^2
        edm           min(snr, gamma) / (snr + 1)

At the last timestep of a zero-terminal schedule (Lin et al. 2023, arXiv 2305.08891) snr = 0 and the input is n alone.
To predict epsilon the network need only repeat it, and learns nothing; v = -x0 asks it for the picture. The weight
there is 1 for epsilon and 0 for the others: with min-SNR the very last timestep learns from its neighbours alone.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sd_jax.diffusion.denoiser import Predict
from sd_jax.diffusion.predictions import along_batch, prediction
from sd_jax.diffusion.schedules import sigmas_of
from sd_jax.types import NoiseScheduleConfig


class Noised(NamedTuple):
    """A batch as the network meets it in training."""

    x: Float[Array, "batch *dims"]  # x0 + sigma n'
    sigma: Float[Array, " batch"]
    model_input: Float[Array, "batch *dims"]  # c_in x
    told: Float[Array, " batch"]  # t, or c_noise
    target: Float[Array, "batch *dims"]  # what the raw output should be


def noised(
    latents: Float[Array, "batch *dims"],  # clean, x0
    noise: Float[Array, "batch *dims"],  # n, unit variance
    timesteps: Int[Array, " batch"],
    cfg: NoiseScheduleConfig,
    input_noise: Float[Array, "batch *dims"] | None = None,  # n', what the input holds; None = n
) -> Noised:
    """The network's input and target at the given timesteps (Eq. 1), in float32."""
    x0, n = latents.astype(jnp.float32), noise.astype(jnp.float32)
    sigma = jnp.asarray(sigmas_of(cfg), jnp.float32)[timesteps]
    row, s = prediction(cfg.prediction_type), along_batch(sigma, x0)
    x = x0 + s * (n if input_noise is None else input_noise.astype(jnp.float32))
    told = row.c_noise(sigma) if row.c_noise else timesteps.astype(jnp.float32)
    return Noised(x, sigma, row.c_in(s) * x, told, row.target(x0, n, s))


def min_snr_weights(sigma: Float[Array, " batch"], prediction_type: str, gamma: float | None) -> Float[Array, " batch"]:
    """w of Eq. 2 for each example; gamma None = all ones. 5 is the paper's choice.

    At snr = 0 and at infinity it has its limits (at snr = 0: 1 for epsilon, else 0), never NaN.
    """
    if gamma is None:
        return jnp.ones_like(sigma)
    s = jnp.clip(sigma, 1e-8, 1e8)
    return jnp.minimum(s**-2, gamma) * prediction(prediction_type).c_out(s) ** 2


def denoising_losses(
    predict: Predict,
    latents: Float[Array, "batch *dims"],
    noise: Float[Array, "batch *dims"],
    timesteps: Int[Array, " batch"],
    conditioning: Any,
    cfg: NoiseScheduleConfig,
    min_snr_gamma: float | None = None,
    input_noise: Float[Array, "batch *dims"] | None = None,  # None = `noise`
    mask: Float[Array, "batch *rest"] | None = None,  # times the squared error; None = 1
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    """(mean squared error of the raw output, weight) of each example, in float32; the loss is mean(error * weight)."""
    batch = noised(latents, noise, timesteps, cfg, input_noise)
    output = predict(batch.model_input, batch.told, conditioning).astype(jnp.float32)
    squared = (output - batch.target) ** 2
    error = jnp.mean(squared if mask is None else squared * mask, axis=tuple(range(1, output.ndim)))
    return error, min_snr_weights(batch.sigma, cfg.prediction_type, min_snr_gamma)
