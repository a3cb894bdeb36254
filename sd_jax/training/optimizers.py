"""The optimiser of a run, with warm-up, a schedule, clipping by norm, and rates of their own for groups of parameters.

    name        numbers a parameter   source
    adamw       2                     Loshchilov & Hutter 2019
    adamw8bit   1/2                   Dettmers et al. 2022; see `quantized.py`
    muon        1 for a kernel        Jordan et al. 2024
    lion        1                     Chen et al. 2023; its rate is a third to a tenth of AdamW's, its b2 0.99
    adafactor   nearly 0              Shazeer & Stern 2018, with a rate that is given and no average of the gradient
    prodigy     4                     Mishchenko & Defazio 2024; it finds its rate, and learning_rate is a factor, 1

The numbers are those that the optimiser keeps in 32 bits; where a kernel has a side below 128, adafactor keeps 1.
"""

import functools
import operator
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from ml_collections import ConfigDict

from sd_jax.config import ADVERSARIAL
from sd_jax.training.anchor import pull_to_start
from sd_jax.training.quantized import scale_by_quantized_adam
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
    """Biases, norms and other vectors are not decayed. Raises ValueError for an unknown optimiser or a rate that cannot
    be; and its `init` for a pattern of `config.optimizer.rates` that no parameter's path has.
    """
    cfg, rate = config.optimizer, learning_rate(config)
    if cfg.name not in _OPTIMIZERS:
        raise ValueError(f"config.optimizer.name={cfg.name!r} is unknown: use {', '.join(_OPTIMIZERS)}")
    links = [optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()]
    links += [_OPTIMIZERS[cfg.name](cfg, rate)]
    links += [pull_to_start(rate, cfg.l2_sp)] if cfg.l2_sp else []
    links += [scale_by_group(cfg.rates)] if cfg.rates else []
    links += [keep_norms()] if config.get("textual_inversion", {}).get("keep_norm") else []
    chain = optax.chain(*links)
    if config.method in ADVERSARIAL and config[config.method].discriminator_weight:
        # The networks that play against each other have each their own Adam and their own norm
        other = optax.adam(config[config.method].discriminator_learning_rate, b1=0.5, b2=0.9)
        own = lambda params: {part: "model" if part != "discriminator" else part for part in params}  # noqa: E731
        chain = optax.partition({"model": chain, "discriminator": other}, own)
    if not config.trainable:
        return chain
    stays = lambda params: jax.tree.map(operator.not_, moving(config, params))  # noqa: E731
    return optax.chain(optax.masked(chain, functools.partial(moving, config)), optax.masked(optax.set_to_zero(), stays))


def moving(config: ConfigDict, params: Params) -> Params:
    """Which parameters `config.trainable` names, all where it is empty: a tree of bool."""
    named = lambda keys, _: re.search(config.trainable, _path(keys)) is not None  # noqa: E731
    return jax.tree_util.tree_map_with_path(named, params)


def scale_by_group(rates: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Updates times the number of the first pattern (re.search) that a parameter's path ("unet/mid_block/...") has.

    Of a parameter that none finds the update stays. `init` raises ValueError for a pattern that finds none at all.
    """
    for pattern, times in rates:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"config.optimizer.rates: {pattern!r} is no pattern of re.search ({error})") from None
        if times < 0:
            raise ValueError(f"config.optimizer.rates: {pattern!r} has {times}: give 0 or more")

    def init(params):
        paths = [_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
        for pattern, _ in rates:
            if not any(re.search(pattern, path) for path in paths):
                example = paths[0] if paths else "none is trained"
                raise ValueError(f"config.optimizer.rates: {pattern!r} matches no parameter, e.g. {example}")
        return optax.EmptyState()

    def update(updates, state, params=None):
        times = lambda path: next((times for pattern, times in rates if re.search(pattern, path)), 1.0)  # noqa: E731
        return jax.tree_util.tree_map_with_path(lambda keys, x: times(_path(keys)) * x, updates), state

    return optax.GradientTransformation(init, update)


def keep_norms() -> optax.GradientTransformation:
    """The last link of a chain: rows of what it updates keep the length that they had at `init`."""

    def update(updates, state, params=None):
        def one(update, before, norm):
            after = before + update
            return after * norm / jnp.maximum(_norm(after), jnp.finfo(after.dtype).tiny) - before

        return jax.tree.map(one, updates, params, state), state

    return optax.GradientTransformation(functools.partial(jax.tree.map, _norm), update)


def _norm(rows: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(rows), axis=-1, keepdims=True))


_path = functools.partial(jax.tree_util.keystr, simple=True, separator="/")


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


def _adamw8bit(cfg: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    """Small arrays keep moments of 32 bits: they are nothing beside the others, and biases and norms matter much."""
    size = lambda params: jax.tree.map(lambda p: "small" if p.size < 4096 else "large", params)  # noqa: E731
    adam = {"small": optax.scale_by_adam(cfg.b1, cfg.b2), "large": scale_by_quantized_adam(cfg.b1, cfg.b2)}
    return optax.chain(optax.partition(adam, size), *_decay_and_rate(cfg, rate))


def _lion(cfg: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.lion(rate, b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay, mask=_matrices)


def _adafactor(cfg: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    """Updates have a root mean square of at most 1, as Adam's have, so rates carry over."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), *_decay_and_rate(cfg, rate))


def _decay_and_rate(cfg: ConfigDict, rate: optax.Schedule) -> tuple[optax.GradientTransformation, ...]:
    return optax.add_decayed_weights(cfg.weight_decay, _matrices), optax.scale_by_learning_rate(rate)


def _prodigy(cfg: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    """Its estimate d of the rate grows from 1e-6; weights decay by learning_rate * d * weight_decay.

    Raises ValueError for a learning_rate that is one of Adam's: d times that would be nothing.
    """
    if cfg.learning_rate < 0.01:
        raise ValueError(
            f"config.optimizer.learning_rate={cfg.learning_rate}: prodigy finds its rate and multiplies it by this, "
            "set it to 1.0"
        )
    prodigy = optax.contrib.prodigy(rate, betas=(cfg.b1, cfg.b2), safeguard_warmup=True)

    def init(params):
        # Copies, as it keeps where it began: params are donated to the step, and a buffer cannot be donated twice
        return prodigy.init(jax.tree.map(jnp.copy, params))

    def update(updates, state, params=None):
        updates, after = prodigy.update(updates, state, params)
        decay = state.estim_lr * rate(state.count) * cfg.weight_decay  # optax's own spares no vectors
        decayed = jax.tree.map(lambda u, p, matrix: u - decay * p if matrix else u, updates, params, _matrices(params))
        return decayed, after

    return optax.GradientTransformation(init, update)


_OPTIMIZERS = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "muon": _muon,
    "lion": _lion,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
}


def _matrices(params: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _as_matrices(params: Params) -> Params:
    """Which axes of each kernel Muon joins; None = Adam's: vectors and embeddings, whose rows are independent."""

    def axes(path, leaf):
        if leaf.ndim < 2 or path[-1].key != "kernel":
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), (leaf.ndim - 1,))

    return jax.tree_util.tree_map_with_path(axes, params)
