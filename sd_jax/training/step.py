"""One optimiser step, written once; `map_step` maps it over devices.

Every random draw is keyed by (seed, step, slot), slot being an image's place in the global batch. How the batch is cut
over devices, hosts and micro-batches therefore changes no draw.
"""

import functools
from collections.abc import Callable

import flax.jax_utils
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from sd_jax import sharding
from sd_jax.diffusion import noise
from sd_jax.training import ema
from sd_jax.training.state import TrainState
from sd_jax.types import Params

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]
Loss = Callable[[Params, Batch, Key[Array, " batch"]], tuple[Float[Array, ""], Metrics]]


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss: Loss,  # (whole model, batch, a key per image) -> mean loss, metrics
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    seed: int,
    grad_accumulation: int = 1,
    mean: Callable = lambda tree: tree,  # over the devices that each see a part of the batch
) -> tuple[TrainState, Metrics]:
    """A step whose loss or gradient is not finite changes nothing but the count (`skipped` = 1)."""

    def of_params(params, micro_batch):
        keys = noise.example_keys(jax.random.key(seed), state.step, micro_batch["slot"])
        return loss({**state.frozen, **params}, micro_batch, keys)

    def accumulate(total, micro_batch):
        (value, metrics), grads = jax.value_and_grad(of_params, has_aux=True)(state.params, micro_batch)
        return jax.tree.map(lambda a, b: a + b / grad_accumulation, total, ((value, metrics), grads)), None

    if grad_accumulation == 1:
        (value, metrics), grads = jax.value_and_grad(of_params, has_aux=True)(state.params, batch)
    else:
        micro_batches = jax.tree.map(functools.partial(_split, parts=grad_accumulation), batch)
        first = jax.tree.map(lambda x: x[0], micro_batches)
        shapes = jax.eval_shape(lambda b: jax.value_and_grad(of_params, has_aux=True)(state.params, b), first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        ((value, metrics), grads), _ = jax.lax.scan(accumulate, zeros, micro_batches)
    value, metrics, grads = mean((value, metrics, grads))

    grad_norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    updated = (params, ema.update(state.ema, params, ema_decay, state.step), opt_state)
    ok = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    params, average, opt_state = jax.tree.map(
        lambda new, old: jnp.where(ok, new, old), updated, (state.params, state.ema, state.opt_state)
    )
    metrics = {"loss": value, **metrics, "grad_norm": grad_norm, "skipped": 1.0 - ok.astype(jnp.float32)}
    return TrainState(state.step + 1, params, state.frozen, average, opt_state), metrics


def _split(x: Array, parts: int) -> Array:
    """[batch, ...] -> [parts, batch / parts, ...], each part taking every parts-th image, so that a batch that is split
    over devices stays split."""
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


class MappedStep:
    """A step mapped over devices: `jit` over the mesh or `pmap` over all devices. Both give the same losses."""

    def __init__(self, step: Callable, mesh: Mesh, parallelism: str, abstract_state: TrainState):
        """`step` is `train_step` with all its keyword arguments but `mean`."""
        self.mesh, self.pmap = mesh, parallelism == "pmap"
        if parallelism not in ("jit", "pmap"):
            raise ValueError(f"config.parallelism={parallelism!r} is unknown: use jit or pmap")
        if self.pmap and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
            raise ValueError(
                "config.parallelism='pmap' is plain data parallelism: set config.mesh.fsdp and .tensor to 1"
            )
        self.shardings = sharding.state_shardings(abstract_state, mesh)
        if self.pmap:
            across = lambda tree: jax.lax.pmean(tree, "batch")  # noqa: E731
            self._step = jax.pmap(functools.partial(step, mean=across), axis_name="batch", donate_argnums=0)
        else:
            self._step = sharding.jit(
                step,
                in_shardings=(self.shardings, sharding.batch_sharding(mesh)),
                out_shardings=(self.shardings, sharding.replicated(mesh)),
                donate_argnums=0,
            )

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        state, metrics = self._step(state, batch)
        return state, flax.jax_utils.unreplicate(metrics) if self.pmap else metrics

    def place_state(self, state: TrainState) -> TrainState:
        """A state on the devices where the step wants it."""
        return flax.jax_utils.replicate(state) if self.pmap else jax.device_put(state, self.shardings)

    def whole_state(self, state: TrainState) -> TrainState:
        """One copy, for checkpoints, evaluation and samples."""
        return flax.jax_utils.unreplicate(state) if self.pmap else state

    def place_batch(self, batch: dict[str, np.ndarray]) -> Batch:
        """Host arrays [this process' images, ...] -> device arrays."""
        if self.pmap:
            devices = jax.local_device_count()
            return jax.tree.map(lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), batch)
        place = functools.partial(jax.make_array_from_process_local_data, sharding.batch_sharding(self.mesh))
        return jax.tree.map(place, batch)
