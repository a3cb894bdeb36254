"""Which timesteps training sees how often: a table of distributions, each drawn evenly over the whole batch.

With t in [0, 1] the share of the schedule, 0 clean and 1 noise, and u uniform over [0, 1), a row maps u to t

    name          t                                    density of t                                  reads
    uniform       u                                    1                                                       (1)
    logit_normal  sigmoid(m + s Phi^-1(u))             exp(-(logit t - m)^2 / 2 s^2)                 m, s      (2)
                                                         / (s sqrt(2 pi) t (1 - t))
    mode          1 - u - s (cos^2(pi u / 2) - 1 + u)  1 / |dt / du|                                 s         (3)
    cosmap        1 - 1 / (tan(pi u / 2) + 1)          2 / (pi - 2 pi t + 2 pi t^2)                            (4)
    cubic         1 - u^3                              (1 - t)^(-2/3) / 3                                      (5)

with m = timestep_mean, s = timestep_scale and Phi the normal distribution. Eq. 2 to 4 are Eq. 19 to 21 of Esser et al.
2024 (Stable Diffusion 3, arXiv 2403.03206), whose t is that of rectified flow; on another schedule they mean the same
share of its timesteps. Eq. 5 is that of T2I-Adapter (Mou et al. 2023, arXiv 2302.08453, section 3.4).

logit_normal with m = 0 is what kohya's scripts call "sigmoid". A shift of the schedule by a factor a (SD3's Eq. 23)
adds log a to logit t: it is logit_normal with the mean m + log a.

Every map is monotone, so equal parts of u become parts of t of equal probability: example i of B draws its u from the
i-th of B equal parts of [0, 1), and a batch follows its distribution closely.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sd_jax.diffusion.noise import uniform

Times = Callable[[Float[Array, " batch"]], Float[Array, " batch"]]  # u -> t


class Distribution(NamedTuple):
    """A row of the table above."""

    times: Callable  # (u, m, s) -> t
    reads: tuple[str, ...] = ()  # which of the two numbers
    scales: tuple[float, float] = (-math.inf, math.inf)  # the least and the largest s


def _logit_normal(u, m, s):
    return jax.nn.sigmoid(m + s * jax.scipy.special.ndtri(u))


def _mode(u, m, s):
    return 1 - u - s * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u)


def _cosmap(u, m, s):
    sine, cosine = jnp.sin(jnp.pi / 2 * u), jnp.cos(jnp.pi / 2 * u)
    return sine / (sine + cosine)  # Eq. 4 without its infinity at u = 1


MEAN, SCALE = "timestep_mean", "timestep_scale"
_UNREAD = {MEAN: 0.0, SCALE: 1.0}  # the defaults: nothing else may stand where a row does not read them

DISTRIBUTIONS = {
    "uniform": Distribution(lambda u, m, s: u),
    "logit_normal": Distribution(_logit_normal, (MEAN, SCALE), (1e-3, math.inf)),
    "mode": Distribution(_mode, (SCALE,), (-1.0, 2 / (math.pi - 2))),  # beyond these it is not monotone
    "cosmap": Distribution(_cosmap),
    "cubic": Distribution(lambda u, m, s: 1 - u**3),
}


def times_of(name: str, mean: float = 0.0, scale: float = 1.0) -> Times:
    """The map u -> t of a distribution.

    Raises ValueError, with the config key, for an unknown name, a scale that the distribution has not, and a number
    that it does not read.
    """
    key = "config.diffusion.timesteps"
    if name not in DISTRIBUTIONS:
        raise ValueError(f"{key}={name!r} is unknown: use {', '.join(DISTRIBUTIONS)}")
    row = DISTRIBUTIONS[name]
    for option, value in ((MEAN, mean), (SCALE, scale)):
        if option not in row.reads and value != _UNREAD[option]:
            raise ValueError(f"config.diffusion.{option}={value:g} is not read by {key}={name!r}: leave it out")
    least, largest = row.scales
    if not (least <= scale <= largest and math.isfinite(mean) and math.isfinite(scale)):
        raise ValueError(
            f"config.diffusion.{SCALE}={scale:g}, {MEAN}={mean:g}: {key}={name!r} takes scales "
            f"from {least:.4g} to {largest:.4g} and finite means"
        )
    return functools.partial(row.times, m=mean, s=scale)


def draw_timesteps(
    keys: Key[Array, " batch"],  # one for each example
    draw: int,  # the number of this draw among the example's
    num_train_timesteps: int,
    strata: tuple[Int[Array, " batch"], int] | None = None,  # (places in the global batch, its size)
    times: Times = lambda u: u,  # from `times_of`
) -> Int[Array, " batch"]:
    """Timesteps floor(num_train_timesteps t), in [0, num_train_timesteps).

    strata: None = independent of each other; else example i of B has the i-th of B equal parts of u. Examples must then
    come in random order.
    """
    u = uniform(keys, draw)
    if strata is not None:
        places, count = strata
        u = (places.astype(u.dtype) + u) / count
    timesteps = jnp.floor(times(u) * num_train_timesteps).astype(jnp.int32)
    return jnp.clip(timesteps, 0, num_train_timesteps - 1)  # t may be 1, and rounding may leave [0, 1]
