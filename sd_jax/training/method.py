"""What a training method is: a loss, the parts of the model that it moves, and what it reads of the data.

Batches hold, as far as the method reads it (`Method.reads`),

    pixels     uint8 [batch, height, width, 3]; for "latents", or
    moments    float32 [batch, h, w, 2 c], the encoder's mean and log-variance, where latents are cached
    input_ids  int32 [batch, tokens], for "captions", or
    context    [batch, tokens, width] and pooled [batch, width], where text is cached
    time_ids   float32 [batch, numbers], for models that are told of sizes and crops (`Conditioning.time_ids`)
    rating     float32 [batch], for "ratings"
    loss_weight  float32 [batch], where other pictures are mixed in (`data/mixed.py`)
    mask       uint8 [batch, height, width], or [batch, h, w] beside moments, where `config.diffusion.masked_loss`
    hint       uint8 [batch, height, width, 3], for methods that train a control
    slot       int32 [batch], each image's place in the global batch
    step       int32 [], optimiser steps done before this one; in training alone
"""

import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from sd_jax.models.networks import Networks
from sd_jax.models.presets import ModelSpec
from sd_jax.training.context import Context, Keys
from sd_jax.types import AnyArray, Params

Batch = dict[str, AnyArray]
Sums = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]  # (sum over examples, how many) of each measure


class Adapting(NamedTuple):
    """What a method that trains an adapter, the part "adapter", says of it; the model itself stays as it is."""

    # (config, spec, loaded parts, tokenizer) -> the same with what the adapter brings, before anything is compiled
    prepare: Callable[[ConfigDict, ModelSpec, Params, Any], tuple[ModelSpec, Params, Any]]
    init: Callable[[ConfigDict, Networks, Any, Params], Params]  # (config, networks, a random key, loaded parts)
    # (context, parameters, batch, keys of its dropout or None for none) -> context and parameters with it on
    wear: Callable[[Context, Params, Batch, Keys | None], tuple[Context, Params]]
    put_on: Callable[[ConfigDict, Any, Params], Any]  # (config, pipeline, the adapter) -> a pipeline with it on
    save: Callable[[ConfigDict, Any, Params, pathlib.Path], None]  # (config, model, the adapter, the workdir)


class Method(NamedTuple):
    trainable: Callable[[ConfigDict, ModelSpec], tuple[str, ...]]  # parts that move
    frozen: Callable[[ConfigDict, ModelSpec], tuple[str, ...]]  # parts that the loss reads besides
    reads: tuple[Literal["latents", "pixels", "captions", "ratings"], ...]
    check: Callable[[ConfigDict, ModelSpec], None]  # raises ValueError, naming the config key that cannot be
    loss: Callable[[Context, Params, Batch, Keys], tuple[Float[Array, ""], dict[str, Array]]]
    # What is measured of held-out images, of which "loss" is the one that tells the best checkpoint. The batch is the
    # global one, its slots 0, 1, 2, ...
    held_out: Callable[[Context, Params, Batch, Keys], Sums]
    beside_latents: Callable[[ModelSpec], int] = lambda spec: 0  # channels that the U-Net reads besides
    # (spec, parts) of the checkpoint that it starts from -> as this method goes on with them
    begin: Callable[[ModelSpec, Params], tuple[ModelSpec, Params]] = lambda spec, params: (spec, params)
    adapting: Adapting | None = None  # checkpoints then hold the adapter alone
    # After the last step: (context, whole model, held-out batches on the model's devices) -> networks, with what could
    # only be measured now
    finish: Callable[[Context, Params, list[Batch]], Networks] | None = None


def sum_of(values: Float[Array, "*batch"], counts: Float[Array, "*batch"] | None = None) -> tuple[Array, Array]:
    """(sum, how many) of what counts; None = all do."""
    if counts is None:
        counts = jnp.ones_like(values)
    return jnp.sum(jnp.where(counts > 0, values, 0.0)), jnp.sum(counts)
