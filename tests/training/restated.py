"""The loss of method `full` in float64 numpy, with a network of one line in place of the U-Net.

Draws are jax's own, from keys that are derived here as the words of `diffusion/noise.py` and `training/context.py` say;
all else is the papers'.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from sd_jax.config import training_defaults
from sd_jax.models.networks import Networks
from sd_jax.training.context import Context, EmptyPrompt
from sd_jax.types import NoiseScheduleConfig
from tests.training import tiny_xl

TIMESTEP, NOISE, POSTERIOR, DROPOUT, OFFSET, PYRAMID, PERTURBATION, LEVEL, SMALL_PICTURE = range(9)
EMPTY = (np.full((5, 48), 2.0, np.float32), np.full(24, 3.0, np.float32))


class OneLine:
    """A "U-Net" that reads all that it is given."""

    def apply(self, variables, x, timesteps, told):
        said = jnp.mean(told.context, (1, 2)) + jnp.mean(told.pooled, 1)
        return variables["params"] * x + (1e-3 * timesteps + 0.1 * said)[:, None, None, None]


def context_of(schedule=None, **diffusion) -> Context:
    """Batches of 8, with text that is cached and a network that is one line."""
    spec = dataclasses.replace(
        tiny_xl.BASE, force_zeros_for_empty_prompt=False, noise_schedule=schedule or NoiseScheduleConfig()
    )
    config = training_defaults("full")
    config.batch_size = 8
    config.data.cache_text = True
    config.diffusion.update({"train_text_encoder": False, **diffusion})
    return Context(Networks.of(spec)._replace(unet=OneLine()), config, EmptyPrompt(None, EMPTY))


PARAMS = {"unet": jnp.float32(0.4)}


def batch_of(count=8, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal((count, *shape)).astype(np.float32)  # noqa: E731
    slots = {"slot": np.arange(count, dtype=np.int32)}
    return {"moments": draw(6, 10, 8), "context": draw(5, 48), "pooled": draw(24), **slots}


def draws(key, slot, draw, shape, make=jax.random.normal):
    """float64 [batch, *shape] from fold_in(fold_in(key of the step, slot), draw)."""
    one = lambda i: make(jax.random.fold_in(jax.random.fold_in(key, i), draw), shape)  # noqa: E731
    return np.asarray(jax.vmap(one)(jnp.asarray(slot)), np.float64)


def times(name, u, mean, scale):
    return {
        "uniform": lambda: u,
        "logit_normal": lambda: special.expit(mean + scale * special.ndtri(u)),
        "mode": lambda: 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u),
    }[name]()


def errors(step_key, batch, context, batch_size=8, network=0.4, beside=0.0):
    """(squared error, min-SNR weight, timestep) of each image, under the context's config; not of pyramid noise.

    beside: what the network adds for what it is shown besides.
    """
    cfg, schedule = context.config.diffusion, context.networks.spec.noise_schedule
    slot, count = batch["slot"], len(batch["slot"])
    mean, logvar = np.split(batch["moments"].astype(np.float64), 2, axis=-1)
    x0 = mean + np.exp(logvar / 2) * draws(step_key, slot, POSTERIOR, mean.shape[1:])
    x0 = x0 * context.networks.spec.vae.scaling_factor

    u = (slot + draws(step_key, slot, TIMESTEP, (), jax.random.uniform)) / batch_size
    timestep = np.floor(1000 * times(cfg.timesteps, u, cfg.timestep_mean, cfg.timestep_scale)).astype(int)
    betas = np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)[timestep]
    a, b = (np.sqrt(x)[:, None, None, None] for x in (abar, 1 - abar))

    n = draws(step_key, slot, NOISE, x0.shape[1:])
    n = n + cfg.noise_offset * draws(step_key, slot, OFFSET, (1, 1, x0.shape[-1]))
    seen = n + cfg.input_perturbation * draws(step_key, slot, PERTURBATION, x0.shape[1:])
    dropped = draws(step_key, slot, DROPOUT, (), jax.random.uniform) < cfg.caption_dropout
    said = np.where(dropped, 5.0, np.mean(batch["context"], (1, 2), np.float64) + batch["pooled"].mean(1))

    target = {"epsilon": n, "v_prediction": a * n - b * x0, "sample": x0, "flow": n - x0}[schedule.prediction_type]
    given = (a * x0 + b * seen) / ((a + b) if schedule.prediction_type == "flow" else 1)
    output = network * given + (1e-3 * timestep + 0.1 * said)[:, None, None, None] + beside
    snr, gamma = abar / (1 - abar), cfg.min_snr_gamma
    divided = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1, "flow": (np.sqrt(snr) + 1) ** 2}
    weight = np.minimum(snr, gamma) / divided[schedule.prediction_type] if gamma else np.ones(count)
    return np.mean((output - target) ** 2, axis=(1, 2, 3)), weight, timestep
