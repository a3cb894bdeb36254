"""What a network that makes pictures learns by, an autoencoder or an upscaler: likeness, and a discriminator.

    L = l1 |d| + l2 d^2 + perceptual LPIPS(x, x') + discriminator w G(x')                                        (Eq. 1)
    w = min(|grad_k rec| / (|grad_k G| + 1e-4), 1e4),  k: the last kernel before x', rec: the terms of x' but G  (Eq. 2)

d = x' - x, averaged over a picture's numbers. The discriminator learns in the same step, from the same x'
(`models/discriminator.py`); neither of the two gradients reaches the other network. The weights are keys of
config.autoencoder or config.esrgan, as the method is called. Source: Esser et al. 2021 (Eq. 7).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from sd_jax.models import discriminator
from sd_jax.models.presets import ModelSpec
from sd_jax.training.context import Context
from sd_jax.training.method import Batch, Sums, sum_of
from sd_jax.types import Image, Params

_MOST = 1e4


def adversarial_loss(
    context: Context,
    params: Params,
    batch: Batch,
    image: Image,  # x
    make: Callable[[Params], Image],  # the part's parameters -> x', float32
    part: str,
    last: tuple[str, ...],  # where (Eq. 2)'s k is in them
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """(Eq. 1) and the discriminator's own loss, as one number, and what it is made of."""
    cfg, networks = settings(context.config), context.networks
    again = make(params[part])
    rec, measured = reconstruction(context, params, image, again)
    if not cfg.discriminator_weight:
        return jnp.mean(rec), measured

    judge = lambda params, image: networks.discriminator.apply({"params": params}, image)  # noqa: E731
    held = jax.lax.stop_gradient(params["discriminator"])
    generator = lambda again: -judge(held, again).mean()  # noqa: E731
    weight = jnp.float32(cfg.discriminator_weight)
    if cfg.adaptive_weight:
        of_rec = lambda again: reconstruction(context, params, image, again)[0].mean()  # noqa: E731
        weight *= _balance(make, params[part], last, again, of_rec, generator)
    started = 1.0 if "step" not in batch else (batch["step"] >= cfg.discriminator_start).astype(jnp.float32)
    of_generator = generator(again)
    real, fake = (judge(params["discriminator"], x) for x in (image, jax.lax.stop_gradient(again)))
    of_discriminator = discriminator.hinge(real, fake)
    measured |= {"generator": of_generator, "discriminator": of_discriminator, "discriminator_weight": started * weight}
    if cfg.r1_weight:
        penalty = discriminator.r1(networks.discriminator, params["discriminator"], image)
        of_discriminator, measured["r1"] = of_discriminator + cfg.r1_weight * penalty, penalty
    return jnp.mean(rec) + started * (weight * of_generator + of_discriminator), measured


def settings(config: ConfigDict) -> ConfigDict:
    """The part of the config that has the weights."""
    return config[config.method]


def reconstruction(
    context: Context, params: Params, image: Image, again: Image
) -> tuple[Float[Array, " batch"], dict[str, Array]]:
    """(Eq. 1)'s terms of both pictures, for each of a batch, and their means."""
    cfg = settings(context.config)
    l1, l2 = (f(again - image).mean(axis=(1, 2, 3)) for f in (jnp.abs, jnp.square))
    loss, measured = cfg.l1_weight * l1 + cfg.l2_weight * l2, {"l1": l1.mean(), "l2": l2.mean()}
    if cfg.perceptual_weight:
        distance = context.networks.perceptual.apply({"params": params["perceptual"]}, again, image)
        loss, measured["perceptual"] = loss + cfg.perceptual_weight * distance, distance.mean()
    return loss, measured


def psnr(image: Image, again: Image) -> Sums:
    """In decibels, of each of a batch."""
    mse = jnp.square(jnp.clip(again, -1.0, 1.0) - image).mean(axis=(1, 2, 3))
    return {"psnr": sum_of(10.0 * jnp.log10(4.0 / jnp.maximum(mse, 1e-10)))}


def check(config: ConfigDict, spec: ModelSpec) -> None:
    """Raises ValueError for a negative weight, and for one of a network that is not there."""
    cfg, name = settings(config), f"config.{config.method}"
    for key in (key for key in cfg if key.endswith("_weight") and key != "adaptive_weight"):
        if cfg[key] < 0:
            raise ValueError(f"{name}.{key}={cfg[key]}: give 0 (none) or more")
    if cfg.perceptual_weight and spec.perceptual is None:
        raise ValueError(
            f"{name}.perceptual_weight={cfg.perceptual_weight} needs a network: config.init_perceptual takes a run of "
            "method 'features', or 'vgg16.pth,vgg.pth' (torchvision's and the lpips package's)"
        )
    if cfg.discriminator_weight and spec.discriminator is None:
        raise ValueError(f"{name}.discriminator_weight={cfg.discriminator_weight} needs config.model.discriminator")


def trainable(part: str) -> Callable[[ConfigDict, ModelSpec], tuple[str, ...]]:
    """`Method.trainable`: the part, and the discriminator where it counts."""
    return lambda config, spec: (part, *("discriminator",) * bool(settings(config).discriminator_weight))


def frozen(config: ConfigDict, spec: ModelSpec) -> tuple[str, ...]:
    """`Method.frozen`: the perceptual distance's network where it counts."""
    return ("perceptual",) * bool(settings(config).perceptual_weight)


def _balance(make, own: Params, last: tuple[str, ...], again: Image, of_rec, generator) -> Float[Array, ""]:
    """(Eq. 2), a constant to the gradient."""
    own, again = jax.lax.stop_gradient((own, again))
    kernel = own
    for name in last:
        kernel = kernel[name]
    _, pull = jax.vjp(lambda kernel: make(_with(own, last, kernel)), kernel)
    rec, gan = (jnp.linalg.norm(pull(jax.grad(f)(again))[0].ravel()) for f in (of_rec, generator))
    return jax.lax.stop_gradient(jnp.clip(rec / (gan + 1e-4), 0.0, _MOST))


def _with(tree: Params, path: tuple[str, ...], leaf: Array) -> Params:
    """With another leaf at `path`."""
    name, *rest = path
    return {**tree, name: _with(tree[name], tuple(rest), leaf) if rest else leaf}
