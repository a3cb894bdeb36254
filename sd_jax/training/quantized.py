"""Adam whose moments take a byte for each number instead of four.

As in Dettmers et al. 2022, "8-bit optimizers via block-wise quantization" (arXiv 2110.02861), whose table of 256 values
is here a power.

An array is cut, in the order of its memory, into blocks of 256 numbers, each with the largest of its magnitudes s. A
number x is kept as a whole number c of 8 bits, whose steps are fine where x is small:

    x = s sign(c) (|c| / 127)^2     -127 <= c <= 127    of the first moment                                      (1)
    x = s (c / 255)^4                  0 <= c <= 255    of the second, which spans twice the orders of magnitude  (2)

Two points decide whether this trains as Adam does:

 1. An average of decay 0.999 moves by a thousandth a step, the steps of (2) are a hundredth at best: rounded to the
    nearest, it would never fall. So x is rounded up or down by chance, with shares that keep its mean. The chance is a
    Weyl sequence in the step and the number's place, which needs no state and is the same on any devices.
 2. A second moment that is not zero is never rounded to zero, or the step were divided by nothing (Li et al. 2023,
    "Memory efficient optimizers with 4-bit states", arXiv 2309.01507, section 4.1).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Shaped

from sd_jax.types import Params

BLOCK = 256

_STEP, _PLACE = 0x9E3779B9, 0xC13FA9A9  # odd, and 2^32 divided by the golden ratio and by the plastic number


class Code(NamedTuple):
    """How a number of magnitude 0 to 1 is kept: as `largest` x^(1 / power), rounded."""

    dtype: jnp.dtype
    largest: int
    power: int
    least: int  # of what is not zero

    def decode(self, codes: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
        codes = codes.astype(jnp.float32) / self.largest
        return jnp.sign(codes) * jnp.abs(codes) ** self.power


FIRST = Code(jnp.dtype(jnp.int8), 127, 2, 0)  # (Eq. 1)
SECOND = Code(jnp.dtype(jnp.uint8), 255, 4, 1)  # (Eq. 2)


class QuantizedState(NamedTuple):
    """Codes have the shapes of their parameters, and so lie on the devices where these do."""

    count: Int[Array, ""]
    mu: Params  # int8
    mu_scales: Params  # float32 [blocks]
    nu: Params  # uint8
    nu_scales: Params  # float32 [blocks]


def scale_by_quantized_adam(b1: float, b2: float, eps: float = 1e-8) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with a state of a quarter of its size."""

    def init(params):
        codes = lambda code: jax.tree.map(lambda p: jnp.zeros(p.shape, code.dtype), params)  # noqa: E731
        scales = lambda: jax.tree.map(lambda p: jnp.zeros(-(-p.size // BLOCK), jnp.float32), params)  # noqa: E731
        return QuantizedState(jnp.zeros((), jnp.int32), codes(FIRST), scales(), codes(SECOND), scales())

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        t = count.astype(jnp.float32)

        def one(gradient, mu, mu_scales, nu, nu_scales):
            g = gradient.astype(jnp.float32)
            m = b1 * dequantized(mu, mu_scales, FIRST) + (1 - b1) * g
            v = b2 * dequantized(nu, nu_scales, SECOND) + (1 - b2) * g * g
            step = (m / (1 - b1**t)) / (jnp.sqrt(v / (1 - b2**t)) + eps)
            kept = (*quantized(m, FIRST, count), *quantized(v, SECOND, count))
            return step.astype(gradient.dtype), *kept

        trees = (updates, *state[1:])
        outer, inner = jax.tree.structure(updates), jax.tree.structure((0,) * 5)
        updates, *kept = jax.tree.transpose(outer, inner, jax.tree.map(one, *trees))
        return updates, QuantizedState(count, *kept)

    return optax.GradientTransformation(init, update)


def quantized(
    x: Float[Array, "*shape"],
    code: Code,
    step: Int[Array, ""],  # of which the chance is
) -> tuple[Shaped[Array, "*shape"], Float[Array, " blocks"]]:
    """(codes, the largest magnitude of each block)."""
    blocks = _blocks(x)
    scales = jnp.max(jnp.abs(blocks), axis=1)
    magnitude = jnp.abs(blocks) / jnp.maximum(scales, jnp.finfo(jnp.float32).tiny)[:, None]
    below = jnp.clip(jnp.floor(code.largest * magnitude ** (1 / code.power)), 0, code.largest - 1)
    low, high = code.decode(below), code.decode(below + 1)
    share = (magnitude - low) / (high - low)  # of the times that it is rounded up
    codes = below + (_chance(step, blocks.size).reshape(blocks.shape) < share).astype(jnp.float32)
    codes = jnp.sign(blocks) * jnp.where(magnitude > 0, jnp.maximum(codes, code.least), 0)
    return codes.reshape(-1)[: x.size].reshape(x.shape).astype(code.dtype), scales


def dequantized(codes: Shaped[Array, "*shape"], scales: Float[Array, " blocks"], code: Code) -> Float[Array, "*shape"]:
    x = _blocks(code.decode(codes)) * scales[:, None]
    return x.reshape(-1)[: codes.size].reshape(codes.shape)


def _blocks(x: Float[Array, "*shape"]) -> Float[Array, "blocks 256"]:
    """The last one is filled with zeros."""
    flat = x.reshape(-1)
    return jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)


def _chance(step: Int[Array, ""], count: int) -> Float[Array, " count"]:
    """A number from 0 on and below 1 for each place; over the steps, and over the places, they are spread evenly."""
    places = jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(_PLACE)
    bits = places + step.astype(jnp.uint32) * jnp.uint32(_STEP)
    return (bits >> 8).astype(jnp.float32) / jnp.float32(2**24)
