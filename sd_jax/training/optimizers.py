"""The optimiser of a run: AdamW (Loshchilov & Hutter 2019) or Muon, with warm-up, a schedule and clipping by norm."""

import functools
import operator
import re

import jax
import optax
import optax.contrib
from ml_collections import ConfigDict

from sd_jax.types import Params

SCHEDULES = ("constant", "cosine", "linear")


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Optimiser step -> rate: linear warm-up to `learning_rate`, then constant, or a fall to zero at `total_steps`.

    Steps are optimiser steps, whatever the number of devices or of accumulated micro-batches.
    Raises ValueError for an unknown schedule, or a warm-up as long as the run.
    """
    cfg, total = config.optimizer, config.total_steps
    peak, warmup = cfg.learning_rate, cfg.warmup_steps
    if cfg.schedule not in SCHEDULES:
        raise ValueError(f"config.optimizer.schedule={cfg.schedule!r} is unknown: use {', '.join(SCHEDULES)}")
    if warmup >= total:
        raise ValueError(f"config.optimizer.warmup_steps={warmup} leaves nothing of config.total_steps={total}")
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, total - warmup),
        "linear": lambda: optax.linear_schedule(peak, 0.0, total - warmup),
    }[cfg.schedule]()
    # The first step has rate peak / warmup, not 0: no step is spent on nothing
    return optax.join_schedules(
        [optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1)), after], [warmup]
    )


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Biases, norms and other vectors are not decayed. Raises ValueError for an unknown optimiser."""
    cfg, rate = config.optimizer, learning_rate(config)
    if cfg.name not in _OPTIMIZERS:
        raise ValueError(f"config.optimizer.name={cfg.name!r} is unknown: use {', '.join(_OPTIMIZERS)}")
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    chain = optax.chain(clip, _OPTIMIZERS[cfg.name](cfg, rate))
    if "autoencoder" in config and config.autoencoder.discriminator_weight:
        # The networks that play against each other have each their own Adam and their own norm
        other = optax.adam(config.autoencoder.discriminator_learning_rate, b1=0.5, b2=0.9)
        own = lambda params: {part: "model" if part != "discriminator" else part for part in params}  # noqa: E731
        chain = optax.partition({"model": chain, "discriminator": other}, own)
    if not config.trainable:
        return chain
    stays = lambda params: jax.tree.map(operator.not_, moving(config, params))  # noqa: E731
    return optax.chain(optax.masked(chain, functools.partial(moving, config)), optax.masked(optax.set_to_zero(), stays))


def moving(config: ConfigDict, params: Params) -> Params:
    """Which parameters `config.trainable` names, all where it is empty: a tree of bool."""
    path = lambda keys: "/".join(key.key for key in keys)  # noqa: E731
    named = lambda keys, _: re.search(config.trainable, path(keys)) is not None  # noqa: E731
    return jax.tree_util.tree_map_with_path(named, params)


def _adamw(cfg: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay, mask=_matrices)


def _muon(cfg: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for kernels, a convolution's being [height width in, out]; Adam for the rest.

    Updates are scaled to the root mean square of Adam's (Liu et al. 2025, section 2.2), so rates carry over.
    """
    return optax.contrib.muon(
        rate,
        adam_b1=cfg.b1,
        adam_b2=cfg.b2,
        weight_decay=cfg.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_as_matrices,
    )


_OPTIMIZERS = {"adamw": _adamw, "muon": _muon}


def _matrices(params: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _as_matrices(params: Params) -> Params:
    """Which axes of each kernel Muon joins; None = Adam's: vectors and embeddings, whose rows are independent."""

    def axes(path, leaf):
        if leaf.ndim < 2 or path[-1].key != "kernel":
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), (leaf.ndim - 1,))

    return jax.tree_util.tree_map_with_path(axes, params)
