"""`config.method="autoencoder"`: reconstruction and KL, and what Stable Diffusion's own learnt by besides.

    L = l1 |d| + l2 d^2 + kl KL(q || N(0, 1)) + perceptual LPIPS(x, x') + discriminator w G(x')                  (Eq. 1)
    w = min(|grad_k rec| / (|grad_k G| + 1e-4), 1e4),  k: the decoder's last kernel, rec: the terms of x' but G  (Eq. 2)

d = x' - x, averaged over a picture's numbers, KL summed over its latents (in nats). The discriminator learns in the
same step, from the same reconstructions (`models/discriminator.py`); neither of the two gradients reaches the other
network. Source: Rombach et al. 2022 (section G), Esser et al. 2021 (Eq. 7).
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from sd_jax import sharding
from sd_jax.diffusion import noise
from sd_jax.models import discriminator
from sd_jax.models.networks import Networks
from sd_jax.models.presets import ModelSpec, TinyVAEConfig
from sd_jax.models.vae import to_image
from sd_jax.training.context import POSTERIOR, Context, Keys
from sd_jax.training.method import Batch, Method, Sums, sum_of
from sd_jax.types import Image, Params

_MOST = 1e4


def _loss(context: Context, params: Params, batch: Batch, keys: Keys):
    cfg, networks = context.config.autoencoder, context.networks
    image = to_image(batch["pixels"])
    posterior = networks.vae.apply({"params": params["vae"]}, image, method="encode")
    z = posterior.sample(noise.normal(keys, POSTERIOR, posterior.mean.shape[1:]))

    def decode(vae):
        return networks.vae.apply({"params": vae}, z, method="decode").astype(jnp.float32)

    again = decode(params["vae"])
    rec, measured = _reconstruction(context, params, image, again)
    kl = jnp.mean(posterior.kl())
    loss, measured = jnp.mean(rec) + cfg.kl_weight * kl, {**measured, "kl": kl}
    if not cfg.discriminator_weight:
        return loss, measured

    judge = lambda params, image: networks.discriminator.apply({"params": params}, image)  # noqa: E731
    held = jax.lax.stop_gradient(params["discriminator"])
    generator = lambda again: -judge(held, again).mean()  # noqa: E731
    weight = jnp.float32(cfg.discriminator_weight)
    if cfg.adaptive_weight:
        reconstruction = lambda again: _reconstruction(context, params, image, again)[0].mean()  # noqa: E731
        weight *= _balance(decode, params["vae"], again, reconstruction, generator)
    started = 1.0 if "step" not in batch else (batch["step"] >= cfg.discriminator_start).astype(jnp.float32)
    of_generator = generator(again)
    real, fake = (judge(params["discriminator"], x) for x in (image, jax.lax.stop_gradient(again)))
    of_discriminator = discriminator.hinge(real, fake)
    measured |= {"generator": of_generator, "discriminator": of_discriminator, "discriminator_weight": started * weight}
    if cfg.r1_weight:
        penalty = discriminator.r1(networks.discriminator, params["discriminator"], image)
        of_discriminator, measured["r1"] = of_discriminator + cfg.r1_weight * penalty, penalty
    return loss + started * (weight * of_generator + of_discriminator), measured


def _reconstruction(
    context: Context, params: Params, image: Image, again: Image
) -> tuple[Float[Array, " batch"], dict[str, Array]]:
    """(Eq. 1)'s terms of both pictures, for each of a batch, and their means."""
    cfg = context.config.autoencoder
    l1, l2 = (f(again - image).mean(axis=(1, 2, 3)) for f in (jnp.abs, jnp.square))
    loss, measured = cfg.l1_weight * l1 + cfg.l2_weight * l2, {"l1": l1.mean(), "l2": l2.mean()}
    if cfg.perceptual_weight:
        distance = context.networks.perceptual.apply({"params": params["perceptual"]}, again, image)
        loss, measured["perceptual"] = loss + cfg.perceptual_weight * distance, distance.mean()
    return loss, measured


def _balance(decode, vae: Params, again: Image, reconstruction, generator) -> Float[Array, ""]:
    """(Eq. 2), a constant to the gradient."""
    vae, again = jax.lax.stop_gradient((vae, again))
    _, pull = jax.vjp(lambda kernel: decode(_with_last(vae, kernel)), vae["decoder"]["conv_out"]["kernel"])
    rec, gan = (jnp.linalg.norm(pull(jax.grad(f)(again))[0].ravel()) for f in (reconstruction, generator))
    return jax.lax.stop_gradient(jnp.clip(rec / (gan + 1e-4), 0.0, _MOST))


def _with_last(vae: Params, kernel: Array) -> Params:
    """With another last kernel of the decoder, (Eq. 2)'s k."""
    decoder = vae["decoder"]
    return {**vae, "decoder": {**decoder, "conv_out": {**decoder["conv_out"], "kernel": kernel}}}


def _held_out(context: Context, params: Params, batch: Batch, keys: Keys) -> Sums:
    """Of the mean of each posterior, which sampling and training on latents come close to."""
    image, vae = to_image(batch["pixels"]), context.networks.vae
    posterior = vae.apply({"params": params["vae"]}, image, method="encode")
    again = vae.apply({"params": params["vae"]}, posterior.mean, method="decode").astype(jnp.float32)
    rec, _ = _reconstruction(context, params, image, again)
    mse = jnp.square(jnp.clip(again, -1.0, 1.0) - image).mean(axis=(1, 2, 3))
    psnr = 10.0 * jnp.log10(4.0 / jnp.maximum(mse, 1e-10))
    return {"loss": sum_of(rec + context.config.autoencoder.kl_weight * posterior.kl()), "psnr": sum_of(psnr)}


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
    for name in (name for name in cfg if name.endswith("_weight") and name != "adaptive_weight"):
        if cfg[name] < 0:
            raise ValueError(f"config.autoencoder.{name}={cfg[name]}: give 0 (none) or more")
    if cfg.perceptual_weight and spec.perceptual is None:
        raise ValueError(
            f"config.autoencoder.perceptual_weight={cfg.perceptual_weight} needs a network: config.init_perceptual "
            "takes a run of method 'features', or 'vgg16.pth,vgg.pth' (torchvision's and the lpips package's)"
        )
    if cfg.discriminator_weight and spec.discriminator is None:
        raise ValueError(
            f"config.autoencoder.discriminator_weight={cfg.discriminator_weight} needs config.model.discriminator"
        )
    if cfg.discriminator_weight and cfg.adaptive_weight and isinstance(spec.vae, TinyVAEConfig):
        raise ValueError(
            "config.autoencoder.adaptive_weight reads the last kernel of an AutoencoderKL, and config.model.vae is "
            "tiny: set it to False"
        )


def _parts(*parts: str):
    """Of the parts, those that count."""

    def chosen(config: ConfigDict, spec: ModelSpec) -> tuple[str, ...]:
        weights = {
            "vae": 1.0,
            **{part: config.autoencoder.get(f"{part}_weight", 0.0) for part in parts if part != "vae"},
        }
        return tuple(part for part in parts if weights[part])

    return chosen


AUTOENCODER = Method(
    trainable=_parts("vae", "discriminator"),
    frozen=_parts("perceptual"),
    reads=("pixels",),
    check=_check,
    loss=_loss,
    held_out=_held_out,
    finish=_measure_scaling_factor,
)
