"""What a network may predict (epsilon, v, x0, flow, EDM's), and how each is read: one table for training and sampling.

Everything is said in the variance-exploding convention of Karras et al. 2022 (arXiv 2206.00364),

    x = x0 + sigma n,    n ~ N(0, I)                                                                        (1)

where a denoiser D is made of a network F by three coefficients (their Eq. 7), and F's target follows:

    D(x, sigma) = c_skip x + c_out F(c_in x),    F* = (x0 - c_skip x) / c_out                               (2)

    type          c_in                c_skip         c_out                      target F*
    epsilon       1 / sqrt(1 + s^2)   1              -s                         n
    v_prediction  1 / sqrt(1 + s^2)   1 / (1 + s^2)  -s / sqrt(1 + s^2)         (n - s x0) / sqrt(1 + s^2)
    sample        1 / sqrt(1 + s^2)   0              1                          x0
    flow          1 / (1 + s)         1 / (1 + s)    -s / (1 + s)               n - x0
    edm           1 / sqrt(1 + s^2)   1 / (1 + s^2)  s / sqrt(1 + s^2)          (s x0 - n) / sqrt(1 + s^2)

All but flow's see the variance-preserving c_in x = sqrt(abar) x0 + sqrt(1 - abar) n of Ho et al. 2020, with
abar = 1 / (1 + s^2); v is that of Salimans & Ho 2022 (arXiv 2202.00512). Flow matching (Lipman et al. 2023, arXiv
2210.02747) goes along a straight line: with t = s / (1 + s), so s = t / (1 - t),

    c_in x = (1 - t) x0 + t n,    F* = d(c_in x) / dt = n - x0                                              (3)

EDM's network is that of Karras et al. (their Table 1, for data of unit variance): -v, and of the noise it is not told
the timestep but

    c_noise = ln(s) / 4                                                                                     (4)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Prediction(NamedTuple):
    """A row of the table above; each entry is a function of arrays that broadcast against each other."""

    c_in: Callable  # (s) -> what the noisy latents are multiplied by before the network sees them
    c_skip: Callable  # (s)
    c_out: Callable  # (s)
    target: Callable  # (x0, n, s) -> what the network should answer
    c_noise: Callable | None = None  # (s) -> what the network is told of s; None = the timestep


def _c_in(s):
    return 1 / jnp.sqrt(1 + s**2)


PREDICTIONS = {
    "epsilon": Prediction(
        c_in=_c_in,
        c_skip=lambda s: jnp.ones_like(s),
        c_out=lambda s: -s,
        target=lambda x0, n, s: n,
    ),
    "v_prediction": Prediction(
        c_in=_c_in,
        c_skip=lambda s: 1 / (1 + s**2),
        c_out=lambda s: -s / jnp.sqrt(1 + s**2),
        target=lambda x0, n, s: (n - s * x0) / jnp.sqrt(1 + s**2),
    ),
    "sample": Prediction(
        c_in=_c_in,
        c_skip=lambda s: jnp.zeros_like(s),
        c_out=lambda s: jnp.ones_like(s),
        target=lambda x0, n, s: x0,
    ),
    "flow": Prediction(
        c_in=lambda s: 1 / (1 + s),
        c_skip=lambda s: 1 / (1 + s),
        c_out=lambda s: -s / (1 + s),
        target=lambda x0, n, s: n - x0,
    ),
    "edm": Prediction(
        c_in=_c_in,
        c_skip=lambda s: 1 / (1 + s**2),
        c_out=lambda s: s / jnp.sqrt(1 + s**2),
        target=lambda x0, n, s: (s * x0 - n) / jnp.sqrt(1 + s**2),
        c_noise=lambda s: jnp.log(s) / 4,
    ),
}


def prediction(name: str) -> Prediction:
    """The row of that name. Raises ValueError for an unknown one."""
    if name not in PREDICTIONS:
        raise ValueError(f"unknown prediction_type {name!r}: choose one of {', '.join(PREDICTIONS)}")
    return PREDICTIONS[name]


def along_batch(values: Float[Array, "..."], x: Float[Array, "batch *dims"]) -> Float[Array, "..."]:
    """A scalar or [batch] values in x's dtype, as [batch, 1, 1, ...] of x's rank, to be multiplied with x."""
    values = jnp.broadcast_to(jnp.asarray(values, x.dtype), x.shape[:1])
    return values.reshape(x.shape[:1] + (1,) * (x.ndim - 1))


def to_x0(
    name: str,  # what the network predicts
    output: Float[Array, "batch *dims"],  # its raw output
    x: Float[Array, "batch *dims"],  # noisy latents, Eq. 1
    sigma: Float[Array, "..."],  # scalar or [batch]
) -> Float[Array, "batch *dims"]:
    """The clean latents that a raw output stands for (Eq. 2, left)."""
    row, s = prediction(name), along_batch(sigma, x)
    return row.c_skip(s) * x + row.c_out(s) * output


def from_x0(
    name: str,
    x0: Float[Array, "batch *dims"],
    x: Float[Array, "batch *dims"],
    sigma: Float[Array, "..."],
) -> Float[Array, "batch *dims"]:
    """The raw output that stands for clean latents x0 (Eq. 2, right); sigma > 0. Inverse of `to_x0`."""
    row, s = prediction(name), along_batch(sigma, x)
    return (x0 - row.c_skip(s) * x) / row.c_out(s)


def convert(
    output: Float[Array, "batch *dims"],
    x: Float[Array, "batch *dims"],
    sigma: Float[Array, "..."],
    source: str,
    target: str,
) -> Float[Array, "batch *dims"]:
    """The same knowledge told as another prediction type; sigma > 0."""
    return from_x0(target, to_x0(source, output, x, sigma), x, sigma)
