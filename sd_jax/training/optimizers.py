"""The optimiser of a run: AdamW (Loshchilov & Hutter 2019) with warm-up, a schedule and clipping by global norm."""

import jax
import optax
from ml_collections import ConfigDict

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
    """Biases, norms and other vectors are not decayed."""
    cfg = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        optax.adamw(
            learning_rate(config),
            b1=cfg.b1,
            b2=cfg.b2,
            weight_decay=cfg.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )
