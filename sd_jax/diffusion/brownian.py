"""A Brownian path for each image, for the noise of SDE samplers: the same path for any number of steps.

The path W runs over t = sigma, as k-diffusion's. By Lévy's construction, with T = 2^14 and independent standard normal
z, one for every node of a binary tree of intervals,

    W(t) = t / sqrt(T) z_root + sum over d of sqrt(T / 2^d) / 2  tent(f_d)  z_(node of depth d above t)     (1)

where f_d in [0, 1) is where t lies in its interval of depth d and tent(f) = 1 - |2 f - 1|. So a value needs one draw
for each depth, found by the bits of t / T, and nothing that was drawn before. Between the finest nodes, 4e-6 apart, W
is linear. A sampler's noise over a step is the increment, normalised:

    (W(sigma) - W(sigma_next)) / sqrt(sigma - sigma_next)                                                   (2)
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

SPAN = 2.0**14  # T, more than any sigma; a power of two makes every f exact
DEPTH = 32
PATH = 2**31  # the number of the draw (`noise.py`) that keys an image's path, far from those of steps


def path(
    keys: Key[Array, " batch"],  # one for each image
    times: Float[Array, " points"],  # in [0, SPAN]
    shape: tuple[int, ...],  # of one image
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "points batch ..."]:
    """W at the given times (Eq. 1), W(0) = 0."""

    def value(key, t):
        f = jnp.minimum(t.astype(dtype) / SPAN, 1)

        def descend(depth, carry):  # depth 0 is the root, whose interval is all of it
            w, f, half, key = carry
            weight = jnp.where(depth == 0, SPAN**0.5 * f, half * (1 - jnp.abs(2 * f - 1)))
            node, *below = jax.random.split(key, 3)
            w = w + weight * jax.random.normal(node, shape, dtype)
            right = (depth > 0) & (f >= 0.5)
            f = jnp.where(depth == 0, f, 2 * f - right.astype(dtype))
            half = jnp.where(depth == 0, half, half * 0.5**0.5)
            return w, f, half, jnp.where(right, below[1], below[0])

        first = jnp.zeros(shape, dtype), f, jnp.asarray(SPAN**0.5 / 2, dtype), jax.random.fold_in(key, PATH)
        return jax.lax.fori_loop(0, DEPTH + 1, descend, first)[0]

    each_image = jax.vmap(value, in_axes=(0, None))
    return jax.vmap(each_image, in_axes=(None, 0))(keys, times)


def increments(
    keys: Key[Array, " batch"],
    sigma: Float[Array, ""],
    ends: tuple[Float[Array, ""], ...],  # below sigma
    shape: tuple[int, ...],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "ends batch ..."]:
    """The normalised noise (Eq. 2) over the intervals from sigma down to each end; standard normal, 0 where empty."""
    w = path(keys, jnp.stack([sigma, *ends]), shape, dtype)
    lengths = jnp.stack([jnp.maximum(sigma - end, jnp.finfo(dtype).tiny) for end in ends])
    return (w[:1] - w[1:]) / jnp.sqrt(lengths.astype(dtype)).reshape(-1, *[1] * (w.ndim - 1))
