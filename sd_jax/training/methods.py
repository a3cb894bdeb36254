"""What can be trained: a table of methods, each a loss and the parts of the model that it moves.

A loss reads the whole model and a batch and answers with its mean over the batch. Batches hold

    pixels     uint8 [batch, height, width, 3], or in their place
    moments    float32 [batch, h, w, 2 c], the encoder's mean and log-variance, where latents are cached
    input_ids  int32 [batch, tokens], for methods that read captions
    time_ids   float32 [batch, numbers], for models that are told of sizes and crops (`Conditioning.time_ids`)
    slot       int32 [batch], each image's place in the global batch
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from sd_jax import sharding
from sd_jax.diffusion import losses, noise
from sd_jax.models.networks import Networks
from sd_jax.models.presets import ModelSpec
from sd_jax.models.vae import Posterior, to_image
from sd_jax.types import Conditioning, Params

# The numbers of an example's draws: each use of randomness has its own
TIMESTEP, NOISE, POSTERIOR, DROPOUT = range(4)

Keys = Key[Array, " batch"]


class Context(NamedTuple):
    """What a loss is told besides the model and the batch."""

    networks: Networks
    config: ConfigDict
    empty_ids: np.ndarray | None  # token ids of the empty prompt, [tokens]


class Method(NamedTuple):
    trainable: Callable[[ConfigDict, ModelSpec], tuple[str, ...]]  # parts that move
    frozen: Callable[[ConfigDict, ModelSpec], tuple[str, ...]]  # parts that the loss reads besides
    loss: Callable[[Context, Params, dict[str, Array], Keys], tuple[Float[Array, ""], dict[str, Array]]]
    # After the last step: (networks, whole model, held-out batches) -> networks, with what could only be measured now
    finish: Callable[[Networks, Params, list[dict[str, Array]]], Networks] | None = None


# --- full: the U-Net, and the text encoders with it or frozen --------------------------------------------------------


def _full_loss(context: Context, params: Params, batch: dict[str, Array], keys: Keys):
    networks, cfg = context.networks, context.config.diffusion
    latents = _latents(networks, params, batch, keys)
    timesteps = losses.draw_timesteps(
        keys,
        TIMESTEP,
        networks.spec.noise_schedule.num_train_timesteps,
        strata=(batch["slot"], context.config.batch_size),
    )

    def predict(model_input, timesteps, told):
        return networks.unet.apply({"params": params["unet"]}, model_input, timesteps, told)

    errors, weights = losses.denoising_losses(
        predict,
        latents,
        noise.normal(keys, NOISE, latents.shape[1:]),
        timesteps,
        conditioning(context, params, batch, keys),
        networks.spec.noise_schedule,
        cfg.min_snr_gamma or None,
    )
    return jnp.mean(errors * weights), {}


def conditioning(context: Context, params: Params, batch: dict[str, Array], keys: Keys) -> Conditioning:
    """What the U-Net is told of each picture.

    A dropped caption is what sampling makes of an empty negative prompt: the empty prompt's encoding or, in families
    that were trained so (SDXL), zeros.
    """
    networks, ids = context.networks, batch["input_ids"]
    drop = noise.uniform(keys, DROPOUT) < context.config.diffusion.caption_dropout
    if networks.spec.force_zeros_for_empty_prompt:
        told = networks.encode_text(params, ids)
        told = Conditioning(
            jnp.where(drop[:, None, None], jnp.zeros_like(told.context), told.context),
            jnp.where(drop[:, None], jnp.zeros_like(told.pooled), told.pooled),
        )
    else:
        told = networks.encode_text(params, jnp.where(drop[:, None], jnp.asarray(context.empty_ids)[None], ids))
    return told.replace(time_ids=batch.get("time_ids"))


def _latents(networks: Networks, params: Params, batch: dict[str, Array], keys: Keys) -> Array:
    """Scaled latents, a sample of the posterior; no gradient reaches the encoder."""
    if "moments" in batch:
        posterior = Posterior.from_moments(batch["moments"])
    else:
        posterior = networks.vae.apply({"params": params["vae"]}, to_image(batch["pixels"]), method="encode")
    z = posterior.sample(noise.normal(keys, POSTERIOR, posterior.mean.shape[1:]))
    return jax.lax.stop_gradient(z) * networks.spec.vae.scaling_factor


# --- autoencoder: reconstruction and KL ------------------------------------------------------------------------------


def _autoencoder_loss(context: Context, params: Params, batch: dict[str, Array], keys: Keys):
    """l1 |d| + l2 d^2, averaged over the image's numbers, + kl KL(q || N(0, 1)), summed over the latents (in nats)."""
    cfg, vae = context.config.autoencoder, context.networks.vae
    image = to_image(batch["pixels"])
    posterior = vae.apply({"params": params["vae"]}, image, method="encode")
    z = posterior.sample(noise.normal(keys, POSTERIOR, posterior.mean.shape[1:]))
    difference = vae.apply({"params": params["vae"]}, z, method="decode").astype(jnp.float32) - image
    l1, l2, kl = jnp.mean(jnp.abs(difference)), jnp.mean(jnp.square(difference)), jnp.mean(posterior.kl())
    loss = cfg.l1_weight * l1 + cfg.l2_weight * l2 + cfg.kl_weight * kl
    return loss, {"l1": l1, "l2": l2, "kl": kl}


def _measure_scaling_factor(networks: Networks, params: Params, batches: list[dict[str, Array]]) -> Networks:
    """The factor that gives latents unit variance, as Rombach et al. (2022, section D.1) found SD's 0.18215."""
    encode = sharding.jit(lambda p, x: networks.vae.apply({"params": p}, to_image(x), method="encode").mean)
    z = np.concatenate([np.asarray(encode(params["vae"], batch["pixels"])) for batch in batches])
    return networks.with_scaling_factor(float(1.0 / z.std(dtype=np.float64)))


def _text_encoders(config: ConfigDict, spec: ModelSpec, trained: bool) -> tuple[str, ...]:
    return tuple(spec.text_encoders) if config.diffusion.train_text_encoder == trained else ()


METHODS = {
    "full": Method(
        trainable=lambda config, spec: ("unet", *_text_encoders(config, spec, trained=True)),
        frozen=lambda config, spec: ("vae", *_text_encoders(config, spec, trained=False)),
        loss=_full_loss,
    ),
    "autoencoder": Method(
        trainable=lambda config, spec: ("vae",),
        frozen=lambda config, spec: (),
        loss=_autoencoder_loss,
        finish=_measure_scaling_factor,
    ),
}


def method_of(config: ConfigDict) -> Method:
    """The row of `config.method`. Raises ValueError with the names that there are."""
    if config.method not in METHODS:
        raise ValueError(f"config.method={config.method!r} is unknown: use {', '.join(METHODS)}")
    return METHODS[config.method]
