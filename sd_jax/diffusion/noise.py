"""Every random number of the diffusion, keyed per image: the same seed gives the same picture in any batch.

An image has one threefry key; its draws are numbered, and draw d is keyed by fold_in(key, d). So image i of a batch
does not depend on the batch's size, on its neighbours, on how the batch lies on devices, or on how often others draw.

    sampling   image i of a batch has the key of seed + i; draw 0 is the starting noise, draw 1 + k belongs to step k,
               SMALL_PICTURE is the noise of the small picture that is enlarged
    training   example i of the global batch has the key (run key, step, i); the caller names its draws
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

STARTING_NOISE = 0  # the draw's number
SMALL_PICTURE = 2**31 - 1  # another's; no step gets there


def image_keys(seed: int, batch_size: int) -> Key[Array, " batch"]:
    """Keys of images seed, seed + 1, ...; all 64 bits of a seed count (it is taken modulo 2^64), on any device.

    Below 2^32 they are those of `jax.random.key(seed + i)`, which drops the higher bits.
    """
    seeds = [(seed + i) % 2**64 for i in range(batch_size)]
    data = np.array([[s >> 32, s & 0xFFFFFFFF] for s in seeds], np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(data), impl="threefry2x32")


def example_keys(
    key: Key[Array, ""],  # the run's
    step: Int[Array, ""] | int,
    examples: Int[Array, " batch"],  # places in the global batch, or any numbers that tell examples apart
) -> Key[Array, " batch"]:
    """Keys of the examples of a training step."""
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda example: jax.random.fold_in(step_key, example))(examples)


def normal(
    keys: Key[Array, " batch"],
    draw: Int[Array, ""] | int,  # which draw of each image this is
    shape: tuple[int, ...],  # of one image
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "batch ..."]:
    """Standard normal numbers, [batch, *shape]."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, draw), shape, dtype))(keys)


def uniform(keys: Key[Array, " batch"], draw: Int[Array, ""] | int) -> Float[Array, " batch"]:
    """One number in [0, 1) for each image."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, draw)))(keys)


def starting_noise(keys: Key[Array, " batch"], shape: tuple[int, ...]) -> Float[Array, "batch ..."]:
    """The latents from which pictures start, unit variance, [batch, *shape], float32."""
    return normal(keys, STARTING_NOISE, shape)


def step_noise(
    keys: Key[Array, " batch"],
    step: Int[Array, ""] | int,  # of the sampler, from 0
    shape: tuple[int, ...],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "batch ..."]:
    """What a stochastic sampler adds at a step, before its scaling, [batch, *shape]."""
    return normal(keys, STARTING_NOISE + 1 + step, shape, dtype)
