"""One optimiser step, written once; `MappedStep` maps it over devices.

Every random draw is keyed by (seed, step, slot), slot being an image's place in the global batch. How the batch is cut
over devices, hosts and micro-batches therefore changes no draw.
"""

import functools
from collections.abc import Callable, Sequence

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
    ema_decays: Sequence[float],
    seed: int,
    grad_accumulation: int = 1,
    gather: Callable[[Params], Params] = lambda params: params,  # from where parameters lie to where they are used
    mean: Callable = lambda tree: tree,  # over the devices that each see a part of the batch
) -> tuple[TrainState, Metrics]:
    """A step whose loss or gradient is not finite changes nothing but the count (`skipped` = 1)."""

    def of_params(params, micro_batch):
        keys = noise.example_keys(jax.random.key(seed), state.step, micro_batch["slot"])
        return loss(gather({**state.frozen, **params}), {**micro_batch, "step": state.step}, keys)

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
    updated = (params, ema.update(state.averages, params, state.step, ema_decays), opt_state)
    ok = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    params, averages, opt_state = jax.tree.map(
        lambda new, old: jnp.where(ok, new, old), updated, (state.params, state.averages, state.opt_state)
    )
    metrics = {"loss": value, **metrics, "grad_norm": grad_norm, "skipped": 1.0 - ok.astype(jnp.float32)}
    updated = state.replace(step=state.step + 1, params=params, averages=averages, opt_state=opt_state)
    return updated, metrics


def _split(x: Array, parts: int) -> Array:
    """[batch, ...] -> [parts, batch / parts, ...], each part taking every parts-th image, so that a batch that is split
    over devices stays split."""
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


class MappedStep:
    """A step mapped over devices: `jit` over the mesh or `pmap` over all devices. Both give the same losses.

    With `jit` each size of picture has a program of its own, compiled ahead (`compile`) or when it first comes.
    """

    def __init__(self, step: Callable, mesh: Mesh, parallelism: str, abstract_state: TrainState, dtype: str):
        """`step` is `train_step` with all its keyword arguments but `mean` and `gather`; dtype: of the computation."""
        self.mesh, self.pmap = mesh, parallelism == "pmap"
        if parallelism not in ("jit", "pmap"):
            raise ValueError(f"config.parallelism={parallelism!r} is unknown: use jit or pmap")
        if self.pmap and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
            raise ValueError(
                "config.parallelism='pmap' is plain data parallelism: set config.mesh.fsdp and .tensor to 1"
            )
        self.programs: dict[tuple, jax.stages.Compiled] = {}  # by the shapes of a batch
        self.shardings = sharding.state_shardings(abstract_state, mesh)
        self.abstract_state = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            abstract_state,
            self.shardings,
        )
        self.gather = lambda params: params
        if self.pmap:
            across = lambda tree: jax.lax.pmean(tree, "batch")  # noqa: E731
            self._step = jax.pmap(functools.partial(step, mean=across), axis_name="batch", donate_argnums=0)
            return
        if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
            lies = sharding.state_shardings(abstract_state.raw_model, mesh)
            used = sharding.gathered_shardings(abstract_state.raw_model, mesh)
            self.gather = lambda params: _gather(params, lies, used, jnp.dtype(dtype))
        self._step = sharding.jit(
            functools.partial(step, gather=self.gather),
            in_shardings=(self.shardings, sharding.batch_sharding(mesh)),
            out_shardings=(self.shardings, sharding.replicated(mesh)),
            donate_argnums=0,
        )

    def compile(self, batch: dict[str, jax.ShapeDtypeStruct]) -> jax.stages.Compiled | None:
        """Makes the program for global batches of these shapes. With `pmap` that happens at the first one: None."""
        if self.pmap:
            return None
        over = sharding.batch_sharding(self.mesh)
        batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over) for name, x in batch.items()}
        with jax.set_mesh(self.mesh):  # which the models ask how many devices share a batch
            program = self._step.lower(self.abstract_state, batch).compile()
        self.programs[_signature(batch)] = program
        return program

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if self.pmap:
            state, metrics = self._step(state, batch)
            return state, flax.jax_utils.unreplicate(metrics)
        if _signature(batch) not in self.programs:
            self.compile(batch)
        return self.programs[_signature(batch)](state, batch)

    def place_state(self, state: TrainState) -> TrainState:
        """A state on the devices where the step wants it."""
        return flax.jax_utils.replicate(state) if self.pmap else jax.device_put(state, self.shardings)

    def whole_state(self, state: TrainState) -> TrainState:
        """One copy over the mesh, for checkpoints and evaluation."""
        if not self.pmap:
            return state
        state = flax.jax_utils.unreplicate(state)
        if jax.process_count() == 1:
            return state
        everywhere = functools.partial(jax.make_array_from_process_local_data, sharding.replicated(self.mesh))
        return jax.tree.map(lambda leaf: everywhere(np.asarray(leaf)), state)

    def place_batch(self, batch: dict[str, np.ndarray]) -> Batch:
        """Host arrays [this process' images, ...] -> device arrays."""
        if self.pmap:
            devices = jax.local_device_count()
            return jax.tree.map(lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), batch)
        return sharding.place_batch(batch, self.mesh)


def _signature(batch: dict) -> tuple:
    return tuple(sorted((name, x.shape) for name, x in batch.items()))


def _gather(params: Params, lies: Params, used: Params, dtype: jnp.dtype) -> Params:
    """Parameters from where they lie to where they are used, in the dtype of the computation.

    Without this the partitioner may send activations about instead, which are larger. Kernels and embeddings alone are
    cast beforehand (it halves what is sent): their layers would cast them to the same numbers. Gradients go the same
    way back: each device gets the sum of its own part.
    """
    constrain = jax.lax.with_sharding_constraint

    def one(path, leaf, lies, used):
        if lies == used:
            return leaf
        sent = dtype if path[-1].key in ("kernel", "embedding") else leaf.dtype

        @jax.custom_vjp
        def gather(leaf):
            return constrain(constrain(leaf.astype(sent), lies), used)

        gather.defvjp(lambda leaf: (gather(leaf), None), lambda _, g: (constrain(g, lies).astype(leaf.dtype),))
        return gather(leaf)

    return jax.tree_util.tree_map_with_path(one, params, lies, used)
