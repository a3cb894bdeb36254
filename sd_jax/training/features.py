"""`config.method="features"`: a VGG learns to find the words of captions in pictures, for a perceptual distance."""

import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from sd_jax.models.caption_words import words_loss
from sd_jax.models.presets import ModelSpec
from sd_jax.models.vae import to_image
from sd_jax.training.context import Context, Keys
from sd_jax.training.method import Batch, Method, Sums, sum_of
from sd_jax.types import Params


def _losses(context: Context, params: Params, batch: Batch) -> Float[Array, " batch"]:
    logits = context.networks.features.apply({"params": params["features"]}, to_image(batch["pixels"]))
    return words_loss(logits, batch["input_ids"])


def _loss(context: Context, params: Params, batch: Batch, keys: Keys):
    return jnp.mean(_losses(context, params, batch)), {}


def _held_out(context: Context, params: Params, batch: Batch, keys: Keys) -> Sums:
    return {"loss": sum_of(_losses(context, params, batch))}


def _check(config: ConfigDict, spec: ModelSpec) -> None:
    if spec.features is None:
        raise ValueError("config.method='features' needs config.model.features: a FeaturesConfig as a dict")


FEATURES = Method(
    trainable=lambda config, spec: ("features",),
    frozen=lambda config, spec: (),
    reads=("pixels", "captions"),
    check=_check,
    loss=_loss,
    held_out=_held_out,
)
