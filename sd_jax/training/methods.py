"""What can be trained: a table of methods, each a loss and the parts of the model that it moves.

A loss reads the whole model and a batch and answers with its mean over the batch. Batches hold

    pixels     uint8 [batch, height, width, 3], or in their place
    moments    float32 [batch, h, w, 2 c], the encoder's mean and log-variance, where latents are cached
    input_ids  int32 [batch, tokens], for methods that read captions, or in their place
    context    [batch, tokens, width] and pooled [batch, width], where text is cached
    time_ids   float32 [batch, numbers], for models that are told of sizes and crops (`Conditioning.time_ids`)
    slot       int32 [batch], each image's place in the global batch
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from sd_jax import sharding
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
from sd_jax.types import AnyArray, Params

Batch = dict[str, AnyArray]
Sums = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]  # (sum over examples, how many) of each measure


class Method(NamedTuple):
    trainable: Callable[[ConfigDict, ModelSpec], tuple[str, ...]]  # parts that move
    frozen: Callable[[ConfigDict, ModelSpec], tuple[str, ...]]  # parts that the loss reads besides
    check: Callable[[ConfigDict, ModelSpec], None]  # raises ValueError, naming the config key that cannot be
    loss: Callable[[Context, Params, Batch, Keys], tuple[Float[Array, ""], dict[str, Array]]]
    # What is measured of held-out images, of which "loss" is the one that tells the best checkpoint. The batch is the
    # global one, its slots 0, 1, 2, ...
    held_out: Callable[[Context, Params, Batch, Keys], Sums]
    # After the last step: (networks, whole model, held-out batches on the model's devices) -> networks, with what could
    # only be measured now
    finish: Callable[[Networks, Params, list[Batch]], Networks] | None = None


# --- full: the U-Net, and the text encoders with it or frozen --------------------------------------------------------


class Errors(NamedTuple):
    error: Float[Array, " batch"]  # of the network's answer
    weight: Float[Array, " batch"]  # the loss is mean(error * weight)
    timestep: Int[Array, " batch"]


def _errors(context: Context, params: Params, batch: Batch, keys: Keys, batch_size: int) -> Errors:
    """batch_size: of the global batch, over which timesteps are spread."""
    networks, cfg = context.networks, context.config.diffusion
    schedule = networks.spec.noise_schedule
    latents = _latents(networks, params, batch, keys)
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

    def predict(model_input, timestep, told):
        return networks.unet.apply({"params": params["unet"]}, model_input, timestep, told)

    error, weight = losses.denoising_losses(
        predict, latents, n, drawn, told, schedule, cfg.min_snr_gamma or None, input_noise
    )
    return Errors(error, weight, drawn)


def _full_loss(context: Context, params: Params, batch: Batch, keys: Keys):
    errors = _errors(context, params, batch, keys, context.config.batch_size)
    return jnp.mean(errors.error * errors.weight), {}


def _full_held_out(context: Context, params: Params, batch: Batch, keys: Keys) -> Sums:
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
    errors = _errors(context._replace(config=config), params, batch, keys, batch["slot"].shape[0])
    sums = {"loss": _sum(errors.error * errors.weight, jnp.ones_like(errors.error))}
    for first, last in _bins(config, context.networks.spec):
        inside = (errors.timestep >= first) & (errors.timestep <= last)
        sums[f"loss_t{first:04d}_{last:04d}"] = _sum(errors.error, inside.astype(errors.error.dtype))
    return sums


def _sum(values: Float[Array, " batch"], counts: Float[Array, " batch"]) -> tuple[Array, Array]:
    return jnp.sum(jnp.where(counts > 0, values, 0.0)), jnp.sum(counts)


def _bins(config: ConfigDict, spec: ModelSpec) -> list[tuple[int, int]]:
    """(first, last) timestep of each."""
    steps, count = spec.noise_schedule.num_train_timesteps, config.diffusion.eval_bins
    return [(steps * i // count, steps * (i + 1) // count - 1) for i in range(count)]


def _latents(networks: Networks, params: Params, batch: Batch, keys: Keys) -> Array:
    """Scaled latents, a sample of the posterior; no gradient reaches the encoder."""
    if "moments" in batch:
        posterior = Posterior.from_moments(batch["moments"])
    else:
        posterior = networks.vae.apply({"params": params["vae"]}, to_image(batch["pixels"]), method="encode")
    z = posterior.sample(noise.normal(keys, POSTERIOR, posterior.mean.shape[1:]))
    return jax.lax.stop_gradient(z) * networks.spec.vae.scaling_factor


def _full_check(config: ConfigDict, spec: ModelSpec) -> None:
    cfg, schedule = config.diffusion, spec.noise_schedule
    conditioning.check(config, spec)
    timesteps.times_of(cfg.timesteps, cfg.timestep_mean, cfg.timestep_scale)
    prediction(schedule.prediction_type)
    most = {"noise_offset": np.inf, "pyramid_discount": 1, "input_perturbation": np.inf, "min_snr_gamma": np.inf}
    for key, largest in {**most, "eval_bins": schedule.num_train_timesteps}.items():
        if not 0 <= cfg[key] <= largest:
            raise ValueError(f"config.diffusion.{key}={cfg[key]}: give a number from 0 (none) to {largest}")
    if cfg.noise_offset and cfg.pyramid_discount:
        raise ValueError(
            "config.diffusion.noise_offset and config.diffusion.pyramid_discount are two cures of one ill: set one to 0"
        )
    if schedule.rescale_betas_zero_snr and schedule.prediction_type == "epsilon":
        raise ValueError(
            "config.model.noise_schedule.rescale_betas_zero_snr needs prediction_type 'v_prediction' (there, or with "
            "`init` as config.prediction_type): where there is noise alone, epsilon learns nothing of the picture"
        )


# --- autoencoder: reconstruction and KL ------------------------------------------------------------------------------


def _autoencoder_loss(context: Context, params: Params, batch: Batch, keys: Keys):
    """l1 |d| + l2 d^2, averaged over the image's numbers, + kl KL(q || N(0, 1)), summed over the latents (in nats)."""
    cfg, vae = context.config.autoencoder, context.networks.vae
    image = to_image(batch["pixels"])
    posterior = vae.apply({"params": params["vae"]}, image, method="encode")
    z = posterior.sample(noise.normal(keys, POSTERIOR, posterior.mean.shape[1:]))
    difference = vae.apply({"params": params["vae"]}, z, method="decode").astype(jnp.float32) - image
    l1, l2, kl = jnp.mean(jnp.abs(difference)), jnp.mean(jnp.square(difference)), jnp.mean(posterior.kl())
    loss = cfg.l1_weight * l1 + cfg.l2_weight * l2 + cfg.kl_weight * kl
    return loss, {"l1": l1, "l2": l2, "kl": kl}


def _autoencoder_held_out(context: Context, params: Params, batch: Batch, keys: Keys) -> Sums:
    count = jnp.asarray(float(batch["slot"].shape[0]))
    return {"loss": (_autoencoder_loss(context, params, batch, keys)[0] * count, count)}


def _measure_scaling_factor(networks: Networks, params: Params, batches: list[Batch]) -> Networks:
    """The factor that gives latents unit variance, as Rombach et al. (2022, section D.1) found SD's 0.18215."""

    @sharding.jit
    def moments(params, pixels):  # scalars, which every process of a mesh can read
        z = networks.vae.apply({"params": params}, to_image(pixels), method="encode").mean.astype(jnp.float32)
        return jnp.mean(z), jnp.var(z)

    counts = np.array([batch["pixels"].size for batch in batches], np.float64)
    means, variances = np.array([jax.device_get(moments(params["vae"], b["pixels"])) for b in batches], np.float64).T
    mean = np.average(means, weights=counts)
    variance = np.average(variances + (means - mean) ** 2, weights=counts)
    return networks.with_scaling_factor(float(variance**-0.5))


def _text_encoders(config: ConfigDict, spec: ModelSpec, trained: bool) -> tuple[str, ...]:
    return tuple(spec.text_encoders) if config.diffusion.train_text_encoder == trained else ()


METHODS = {
    "full": Method(
        trainable=lambda config, spec: ("unet", *_text_encoders(config, spec, trained=True)),
        frozen=lambda config, spec: ("vae", *_text_encoders(config, spec, trained=False)),
        check=_full_check,
        loss=_full_loss,
        held_out=_full_held_out,
    ),
    "autoencoder": Method(
        trainable=lambda config, spec: ("vae",),
        frozen=lambda config, spec: (),
        check=lambda config, spec: None,
        loss=_autoencoder_loss,
        held_out=_autoencoder_held_out,
        finish=_measure_scaling_factor,
    ),
}


def method_of(config: ConfigDict) -> Method:
    """The row of `config.method`. Raises ValueError with the names that there are."""
    if config.method not in METHODS:
        raise ValueError(f"config.method={config.method!r} is unknown: use {', '.join(METHODS)}")
    return METHODS[config.method]
