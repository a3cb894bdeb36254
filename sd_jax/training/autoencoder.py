"""`config.method="autoencoder"`: reconstruction and KL, and what Stable Diffusion's own learnt by besides.

    L = rec(x, x') + kl KL(q || N(0, 1)) + discriminator w G(x')                                                 (Eq. 1)

rec: l1, l2 and the perceptual distance (`training/adversarial.py`); KL is summed over a picture's latents (in nats).
Source: Rombach et al. 2022 (section G), Esser et al. 2021 (Eq. 7).
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sd_jax import sharding
from sd_jax.diffusion import noise
from sd_jax.models.networks import Networks
from sd_jax.models.presets import ModelSpec, TinyVAEConfig
from sd_jax.models.vae import to_image
from sd_jax.training import adversarial
from sd_jax.training.context import POSTERIOR, Context, Keys
from sd_jax.training.method import Batch, Method, Sums, sum_of
from sd_jax.types import Params

_LAST = ("decoder", "conv_out", "kernel")


def _loss(context: Context, params: Params, batch: Batch, keys: Keys):
    networks, image = context.networks, to_image(batch["pixels"])
    posterior = networks.vae.apply({"params": params["vae"]}, image, method="encode")
    z = posterior.sample(noise.normal(keys, POSTERIOR, posterior.mean.shape[1:]))

    def decode(vae):
        return networks.vae.apply({"params": vae}, z, method="decode").astype(jnp.float32)

    loss, measured = adversarial.adversarial_loss(context, params, batch, image, decode, "vae", _LAST)
    kl = jnp.mean(posterior.kl())
    return loss + context.config.autoencoder.kl_weight * kl, {**measured, "kl": kl}


def _held_out(context: Context, params: Params, batch: Batch, keys: Keys) -> Sums:
    """Of the mean of each posterior, which sampling and training on latents come close to."""
    image, vae = to_image(batch["pixels"]), context.networks.vae
    posterior = vae.apply({"params": params["vae"]}, image, method="encode")
    again = vae.apply({"params": params["vae"]}, posterior.mean, method="decode").astype(jnp.float32)
    rec, _ = adversarial.reconstruction(context, params, image, again)
    loss = rec + context.config.autoencoder.kl_weight * posterior.kl()
    return {"loss": sum_of(loss), **adversarial.psnr(image, again)}


def _measure_scaling_factor(context: Context, params: Params, batches: list[Batch]) -> Networks:
    """The factor that gives latents unit variance, as Rombach et al. (2022, section D.1) found SD's 0.18215.

    Where the encoder did not move it keeps the one that it had."""
    networks, config = context.networks, context.config
    if config.trainable and not re.search(config.trainable, "vae/encoder/conv_in/kernel"):
        return networks

    @sharding.jit
    def moments(params, pixels):  # scalars, which every process of a mesh can read
        z = networks.vae.apply({"params": params}, to_image(pixels), method="encode").mean.astype(jnp.float32)
        return jnp.mean(z), jnp.var(z)

    counts = np.array([batch["pixels"].size for batch in batches], np.float64)
    means, variances = np.array([jax.device_get(moments(params["vae"], b["pixels"])) for b in batches], np.float64).T
    mean = np.average(means, weights=counts)
    variance = np.average(variances + (means - mean) ** 2, weights=counts)
    return networks.with_scaling_factor(float(variance**-0.5))


def _check(config: ConfigDict, spec: ModelSpec) -> None:
    cfg = config.autoencoder
    adversarial.check(config, spec)
    if cfg.discriminator_weight and cfg.adaptive_weight and isinstance(spec.vae, TinyVAEConfig):
        raise ValueError(
            "config.autoencoder.adaptive_weight reads the last kernel of an AutoencoderKL, and config.model.vae is "
            "tiny: set it to False"
        )


AUTOENCODER = Method(
    trainable=adversarial.trainable("vae"),
    frozen=adversarial.frozen,
    reads=("pixels",),
    check=_check,
    loss=_loss,
    held_out=_held_out,
    finish=_measure_scaling_factor,
)
