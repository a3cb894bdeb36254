"""`config.method="full"`: the U-Net learns to denoise, and the text encoders with it or frozen.

With `config.init_clip` it is told the picture itself in place of its caption, as one token of that CLIP's features:
image variation.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from sd_jax.data import mixed
from sd_jax.diffusion import losses, noise, timesteps, training_noise
from sd_jax.diffusion.predictions import prediction
from sd_jax.models.networks import Networks
from sd_jax.models.presets import ModelSpec
from sd_jax.models.vae import Posterior, to_image
from sd_jax.training import conditioning
from sd_jax.training.context import (
    NOISE,
    OFFSET,
    PERTURBATION,
    POSTERIOR,
    PYRAMID,
    TIMESTEP,
    Context,
    Keys,
)
from sd_jax.training.method import Batch, Method, Sums, sum_of
from sd_jax.types import Params


class Errors(NamedTuple):
    error: Float[Array, " batch"]  # of the network's answer
    weight: Float[Array, " batch"]  # the loss is mean(error * weight)
    timestep: Int[Array, " batch"]


class Beside(NamedTuple):
    """What a U-Net reads besides noised latents and text."""

    channels: Float[Array, "batch h w extra"]
    class_labels: Int[Array, " batch"] | None = None


Show = Callable[[Context, Params, Batch, Keys, tuple[int, int]], Beside]  # of a batch; the latents' height and width


def _errors(show: Show | None, context: Context, params: Params, batch: Batch, keys: Keys, batch_size: int) -> Errors:
    """batch_size: of the global batch, over which timesteps are spread."""
    networks, cfg = context.networks, context.config.diffusion
    schedule = networks.spec.noise_schedule
    latents = latents_of(networks, params, batch, keys)
    times = timesteps.times_of(cfg.timesteps, cfg.timestep_mean, cfg.timestep_scale)
    strata = (batch["slot"], batch_size)
    drawn = timesteps.draw_timesteps(keys, TIMESTEP, schedule.num_train_timesteps, strata, times)
    n = noise.normal(keys, NOISE, latents.shape[1:])
    if cfg.noise_offset:
        n = training_noise.with_offset(n, keys, OFFSET, cfg.noise_offset)
    if cfg.pyramid_discount:
        n = training_noise.with_pyramid(n, keys, PYRAMID, cfg.pyramid_discount)
    gamma = cfg.input_perturbation
    input_noise = training_noise.perturbed(n, keys, PERTURBATION, gamma) if gamma else None
    told = conditioning.conditioning(context, params, batch, keys)
    beside = None if show is None else show(context, params, batch, keys, latents.shape[1:3])
    if beside is not None:
        told = told.replace(class_labels=beside.class_labels)

    def predict(model_input, timestep, told):
        if beside is not None:
            model_input = jnp.concatenate([model_input, beside.channels], axis=-1)
        return networks.unet.apply({"params": params["unet"]}, model_input, timestep, told)

    mask = masks_of(batch, latents.shape[1:3]) if cfg.masked_loss else None
    error, weight = losses.denoising_losses(
        predict, latents, n, drawn, told, schedule, cfg.min_snr_gamma or None, input_noise, mask
    )
    return Errors(error, weight, drawn)


def _loss(show: Show | None, context: Context, params: Params, batch: Batch, keys: Keys):
    errors = _errors(show, context, params, batch, keys, context.config.batch_size)
    return jnp.mean(errors.error * errors.weight * batch.get("loss_weight", jnp.float32(1.0))), {}


def _held_out(show: Show | None, context: Context, params: Params, batch: Batch, keys: Keys) -> Sums:
    """The weighted loss, and for each of `eval_bins` equal parts of the schedule the error without weight.

    All that only training does is left out: timesteps are uniform, noise is white and not perturbed, no caption is
    dropped. It is the task that sampling sets the network, and runs that differ in how they train can be compared.
    """
    config = context.config.copy_and_resolve_references()
    config.diffusion.update(
        timesteps="uniform",
        timestep_mean=0.0,
        timestep_scale=1.0,
        noise_offset=0.0,
        pyramid_discount=0.0,
        input_perturbation=0.0,
        caption_dropout=0.0,
    )
    errors = _errors(show, context._replace(config=config), params, batch, keys, batch["slot"].shape[0])
    sums = {"loss": sum_of(errors.error * errors.weight)}
    for first, last in _bins(config, context.networks.spec):
        inside = (errors.timestep >= first) & (errors.timestep <= last)
        sums[f"loss_t{first:04d}_{last:04d}"] = sum_of(errors.error, inside.astype(errors.error.dtype))
    return sums


def _bins(config: ConfigDict, spec: ModelSpec) -> list[tuple[int, int]]:
    """(first, last) timestep of each."""
    steps, count = spec.noise_schedule.num_train_timesteps, config.diffusion.eval_bins
    return [(steps * i // count, steps * (i + 1) // count - 1) for i in range(count)]


def masks_of(batch: Batch, size: tuple[int, int]) -> Float[Array, "batch h w 1"]:
    """The share of each latent that counts, from 0 to 1: the mean over the pixels that it stands for."""
    (h, w), (n, height, width) = size, batch["mask"].shape
    shares = batch["mask"].astype(jnp.float32).reshape(n, h, height // h, w, width // w) / 255
    return shares.mean((2, 4))[..., None]


def latents_of(networks: Networks, params: Params, batch: Batch, keys: Keys) -> Array:
    """Scaled latents, a sample of the posterior; no gradient reaches the encoder."""
    if "moments" in batch:
        posterior = Posterior.from_moments(batch["moments"])
    else:
        posterior = networks.vae.apply({"params": params.get("vae", {})}, to_image(batch["pixels"]), method="encode")
    z = posterior.sample(noise.normal(keys, POSTERIOR, posterior.mean.shape[1:]))
    return jax.lax.stop_gradient(z) * networks.spec.vae.scaling_factor


def check(config: ConfigDict, spec: ModelSpec) -> None:
    """Raises ValueError, naming key and mend, for what no denoising method can do."""
    cfg, schedule = config.diffusion, spec.noise_schedule
    conditioning.check(config, spec)
    timesteps.times_of(cfg.timesteps, cfg.timestep_mean, cfg.timestep_scale)
    prediction(schedule.prediction_type)
    most = {"noise_offset": np.inf, "pyramid_discount": 1, "input_perturbation": np.inf, "min_snr_gamma": np.inf}
    for key, largest in {**most, "eval_bins": schedule.num_train_timesteps}.items():
        if not 0 <= cfg[key] <= largest:
            raise ValueError(f"config.diffusion.{key}={cfg[key]}: give a number from 0 (none) to {largest}")
    if mixed.mixes(config):
        mixed.count_of(config)
    if config.data.cache_latents and "vae" not in spec.parts:
        raise ValueError("config.data.cache_latents: this model works on pixels and has no latents, set it to False")
    if cfg.noise_offset and cfg.pyramid_discount:
        raise ValueError(
            "config.diffusion.noise_offset and config.diffusion.pyramid_discount are two cures of one ill: set one to 0"
        )
    if schedule.rescale_betas_zero_snr and schedule.prediction_type == "epsilon":
        raise ValueError(
            "config.model.noise_schedule.rescale_betas_zero_snr needs prediction_type 'v_prediction' (there, or with "
            "`init` as config.prediction_type): where there is noise alone, epsilon learns nothing of the picture"
        )


def _text_encoders(config: ConfigDict, spec: ModelSpec, trained: bool) -> tuple[str, ...]:
    if spec.sees_pictures:
        return () if trained else ("image_encoder",)
    return tuple(spec.text_encoders) if config.diffusion.train_text_encoder == trained else ()


def denoising(show: Show | None = None, **fields) -> Method:
    """The method of a U-Net that learns to denoise, and is shown something besides. fields: of Method."""
    return Method(
        trainable=lambda config, spec: ("unet", *_text_encoders(config, spec, trained=True)),
        frozen=lambda config, spec: ("vae",) * ("vae" in spec.parts) + _text_encoders(config, spec, trained=False),
        reads=("latents", "captions"),
        loss=functools.partial(_loss, show),
        held_out=functools.partial(_held_out, show),
        **fields,
    )


FULL = denoising(check=check)
