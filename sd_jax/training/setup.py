"""What a run is made of before it has data or weights: the shapes of its state and of its batches, and its step.

The loop fills them; `plan.py` compiles them for devices that are not there.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd_jax import flops
from sd_jax.config import reads_hints
from sd_jax.data import mixed
from sd_jax.diffusion import noise
from sd_jax.models.networks import Networks
from sd_jax.models.presets import PARTS, ModelSpec
from sd_jax.training.conditioning import states_of
from sd_jax.training.context import Context
from sd_jax.training.method import Method
from sd_jax.training.optimizers import make_optimizer, moving
from sd_jax.training.state import TrainState, create
from sd_jax.training.step import MappedStep, train_step
from sd_jax.types import Params

Shapes = dict[str, jax.ShapeDtypeStruct]

# What can be made fresh. Its place numbers its random key: each keeps its own, so that runs can be repeated
_NUMBERED = (*PARTS, "clip", "features", "perceptual", "aesthetic", "discriminator", "adapter", "upscaler")
_NUMBERED += ("image_encoder",)


def check_batch(config: ConfigDict, mesh: Mesh) -> None:
    """Raises ValueError where the global batch does not divide."""
    parts = mesh.shape["slice"] * mesh.shape["data"] * mesh.shape["fsdp"] * config.grad_accumulation
    if config.batch_size % parts:
        raise ValueError(
            f"config.batch_size={config.batch_size} does not divide into {parts} parts (devices x grad_accumulation)"
        )


def check_reads(config: ConfigDict, method: Method, spec: ModelSpec) -> None:
    """Raises ValueError where a config caches what the method reads as it is, or draws what it cannot."""
    draws = {"unet", "vae", "adapter", "upscaler"} & set(method.trainable(config, spec))
    if config.sample_steps and not draws:
        raise ValueError(f"config.sample_steps: config.method={config.method!r} makes no pictures, set it to 0")
    for key, what in (("cache_latents", "latents"), ("cache_text", "captions")):
        if config.data[key] and (what not in method.reads or "latents" not in method.reads):
            raise ValueError(f"config.data.{key}: config.method={config.method!r} does not read it, set it to False")


def cached_parts(config: ConfigDict, spec: ModelSpec) -> tuple[str, ...]:
    """The parts whose answers are computed before training: the step does not read them."""
    return ("vae",) * config.data.cache_latents + tuple(spec.text_encoders) * config.data.cache_text


def _read_parts(config: ConfigDict, method: Method, spec: ModelSpec) -> list[str]:
    return [part for part in method.frozen(config, spec) if part not in cached_parts(config, spec)]


def frozen_dtype(config: ConfigDict, method: Method, path: tuple) -> np.dtype:
    """Of a parameter, found at `path` in its part's tree, that the step reads and does not move.

    Beside an adapter, kernels and embeddings have the dtype of the computation: their layers would cast them to it.
    """
    narrow = method.adapting is not None and path[-1].key in ("kernel", "embedding")
    return jnp.dtype(config.dtype if narrow else "float32")


def frozen_shapes(config: ConfigDict, method: Method, networks: Networks) -> Params:
    """Shapes of what a checkpoint gives `initial_state`: the parts that the method does not move."""

    def shape(path, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, frozen_dtype(config, method, path))

    parts = _read_parts(config, method, networks.spec)
    fresh = {part: jax.eval_shape(functools.partial(networks.init, part), jax.random.key(0)) for part in parts}
    return {part: jax.tree_util.tree_map_with_path(shape, tree) for part, tree in fresh.items()}


def initial_state(config: ConfigDict, method: Method, networks: Networks, loaded: dict[str, Params]) -> TrainState:
    """A state at step 0: of what the step reads, the parts that are loaded, and the others fresh."""
    spec = networks.spec

    def make(part: str) -> Params:
        key = jax.random.fold_in(jax.random.key(config.seed), _NUMBERED.index(part))
        if part == "adapter":
            return method.adapting.init(config, networks, key, frozen)
        return loaded[part] if part in loaded else networks.init(part, key)

    frozen = {part: make(part) for part in _read_parts(config, method, spec)}
    trained = {part: make(part) for part in method.trainable(config, spec)}
    return create(trained, frozen, make_optimizer(config), config.ema_decays)


def make_step(
    method: Method,
    context: Context,
    mesh: Mesh,
    abstract_state: TrainState,  # of `jax.eval_shape(initial_state)`
) -> MappedStep:
    """Raises ValueError where `config.trainable` names no parameter."""
    config = context.config
    if config.trainable and not any(jax.tree.leaves(moving(config, abstract_state.params))):
        parts = ", ".join(abstract_state.params)
        raise ValueError(f"config.trainable={config.trainable!r} matches no parameter of {parts}, e.g. 'vae/decoder/'")

    def loss(params, batch, keys):
        if config.trainable:  # what stays has no gradient to be computed
            trained = {part: params[part] for part in abstract_state.params}
            held = lambda leaf, moves: leaf if moves else jax.lax.stop_gradient(leaf)  # noqa: E731
            params = {**params, **jax.tree.map(held, trained, moving(config, trained))}
        return method.loss(context, params, batch, keys)

    step = functools.partial(
        train_step,
        loss=loss,
        optimizer=make_optimizer(config),
        ema_decays=tuple(config.ema_decays),
        seed=config.seed,
        grad_accumulation=config.grad_accumulation,
    )
    return MappedStep(step, mesh, config.parallelism, abstract_state, config.dtype)


def batch_shapes(config: ConfigDict, method: Method, networks: Networks, size: tuple[int, int]) -> Shapes:
    """The global batches of pictures of one size (height, width in pixels), by name; as the loader and the loop make
    them. Raises ValueError for a size that the autoencoder does not take."""
    spec, (height, width) = networks.spec, size
    uses_vae = "vae" in (*method.trainable(config, spec), *method.frozen(config, spec))
    if uses_vae and (height % spec.vae.downscale or width % spec.vae.downscale):
        raise ValueError(
            f"pictures of {width}x{height}: the autoencoder takes multiples of {spec.vae.downscale}; change "
            "config.data.resolution or config.data.buckets.step"
        )
    shape = lambda *dims, dtype: jax.ShapeDtypeStruct((config.batch_size, *dims), dtype)  # noqa: E731
    shapes = {"slot": shape(dtype=np.int32)}
    if config.data.cache_latents:
        h, w = height // spec.vae.downscale, width // spec.vae.downscale
        shapes["moments"] = shape(h, w, 2 * spec.vae.latent_channels, dtype=np.float32)
    else:
        h, w = height, width
        shapes["pixels"] = shape(height, width, 3, dtype=np.uint8)
    if "diffusion" in config and config.diffusion.masked_loss:
        shapes["mask"] = shape(h, w, dtype=np.uint8)
    if reads_hints(config):
        shapes["hint"] = shape(height, width, 3, dtype=np.uint8)
    if mixed.mixes(config):
        shapes["loss_weight"] = shape(dtype=np.float32)
    if "ratings" in method.reads:
        shapes["rating"] = shape(dtype=np.float32)
    if "captions" not in method.reads or spec.sees_pictures:
        return shapes
    parts = (*method.trainable(config, spec), *method.frozen(config, spec))
    if "unet" in parts and spec.num_time_ids:
        shapes["time_ids"] = shape(spec.num_time_ids, dtype=np.float32)
    ids = shape(num_tokens(config, spec, parts), dtype=np.int32)
    if not config.data.cache_text:
        return {**shapes, "input_ids": ids}
    params = {part: jax.eval_shape(lambda p=part: networks.init(p, jax.random.key(0))) for part in spec.text_encoders}
    context, pooled = jax.eval_shape(functools.partial(states_of, networks, config=config), params, ids)
    return {**shapes, "context": context, **({} if pooled is None else {"pooled": pooled})}


def num_tokens(config: ConfigDict, spec: ModelSpec, parts: Sequence[str]) -> int:
    """Of a caption, as the parts that read captions take it."""
    chunks = config.diffusion.text_chunks if "diffusion" in config else 1
    return chunks * min(spec.words_of(part).max_position_embeddings for part in spec.readers(parts))


def flops_per_image(method: Method, context: Context, abstract_state: TrainState, shapes: Shapes) -> float:
    """Multiplications and additions of a step for one image, without what is computed twice to save memory."""
    plain = context._replace(networks=Networks.of(context.networks.spec, context.config.dtype))
    one = {name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in shapes.items()}

    def loss(params, frozen, batch):
        keys = noise.example_keys(jax.random.key(0), jnp.zeros((), jnp.int32), batch["slot"])
        return method.loss(plain, {**frozen, **params}, batch, keys)[0]

    return flops.count_gradient(loss, abstract_state.params, abstract_state.frozen, one)
