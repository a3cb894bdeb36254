"""Multistep samplers: each is a table of coefficients, made of the ladder before the loop begins.

Written as an integral, the ODE of `samplers_ode.py`, Eq. 1, reads in two ways, with d = (x - D) / sigma:

    x(sigma') = x + integral of d over sigma                                                                (1)
    x(sigma') = (sigma' / sigma) x + sigma' integral of D over 1 / sigma                                    (2)

A linear multistep method puts a polynomial through the last p values of d (Eq. 1) or D (Eq. 2), in some measure of
time, and integrates it. With l_j the Lagrange polynomial that is 1 at the j-th last level and 0 at the others,

    x' = keep x + sum over j of weight_j d_j or D_j + up noise,    weight_j = integral of l_j               (3)

where p grows by one each step until it is the sampler's order. The integrals are Gauss-Legendre sums in jax, so the
table is traced like the ladder. `samplers_ode.py` says what a step takes and returns.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# On [0, 1]. Exact for polynomials of degree 31; exp(h theta) times a cubic is exact to rounding up to |h| = 10.
_POINTS, _WEIGHTS = (np.polynomial.legendre.leggauss(16) + np.array([[1.0], [0.0]])) / 2


class Linear(NamedTuple):
    """The coefficients of Eq. 3 for every step."""

    keep: Float[Array, " steps"]
    weights: Float[Array, "steps order"]  # of the newest value first
    up: Float[Array, " steps"] | None = None  # of the noise; None: deterministic


# --- the parts of which tables are made ------------------------------------------------------------------------------


def _places(count):
    return jnp.arange(count, dtype=jnp.int32)


def _past(values: Float[Array, " steps"], count: int) -> Float[Array, "steps count"]:
    """values[i - j] at [i, j]; the first value where there is none."""
    return values[jnp.maximum(_places(len(values))[:, None] - _places(count)[None], 0)]


def _orders(sigmas, options, start):
    """p of each step: as many values as there are, up to the order asked for."""
    return jnp.minimum(_places(len(sigmas) - 1) - start + 1, options.order)


def _nodes(starts, ends):
    """Points and weights of the quadrature over each interval, [steps, points]."""
    points, weights = (jnp.asarray(a, starts.dtype)[None] for a in (_POINTS, _WEIGHTS))
    length = (ends - starts)[:, None]
    return starts[:, None] + length * points, length * weights


def _lagrange_integrals(
    levels: Float[Array, "steps order"],  # in the polynomial's time, newest first
    used: Int[Array, " steps"],  # only so many of them count
    points: Float[Array, "steps points"],  # of the quadrature, in the same time
    weights: Float[Array, "steps points"],
) -> Float[Array, "steps order"]:
    """The integral of l_j over each step, 0 for levels that do not count."""
    counts = _places(levels.shape[1])[None] < used[:, None]
    others = counts[:, None, None] & ~jnp.eye(levels.shape[1], dtype=bool)[None, None]  # [steps, 1, j, k]
    ratio = (points[:, :, None, None] - levels[:, None, None]) / (levels[:, :, None] - levels[:, None])[:, None]
    basis = jnp.prod(jnp.where(others, ratio, 1), -1)  # [steps, points, j]
    return jnp.where(counts, jnp.sum(weights[:, :, None] * basis, 1), 0)


def _phi(k: int, z: Float[Array, " steps"]) -> Float[Array, " steps"]:
    """phi_k(z), the integral of exp((1 - t) z) t^(k - 1) / (k - 1)! over [0, 1]; no cancellation at small z."""
    t, weights = jnp.asarray(_POINTS, z.dtype)[None], jnp.asarray(_WEIGHTS / math.factorial(k - 1), z.dtype)[None]
    return jnp.sum(weights * t ** (k - 1) * jnp.exp((1 - t) * z[:, None]), 1)


# --- the step that they share ----------------------------------------------------------------------------------------


def history(order: int):
    """The `init` of a sampler that remembers so many values."""
    return lambda x: (jnp.zeros_like(x),) * order


def _weighted(weights, values):
    return sum(weights[j] * value for j, value in enumerate(values))


def by_denoised(denoise, x, values, at):
    """Eq. 3 on the history of D. 1 call a step."""
    denoised = denoise(x, at.sigma)
    values = (denoised, *values[:-1])
    x = at.table.keep * x + _weighted(at.table.weights, values)
    if at.table.up is not None:
        x = x + at.options.s_noise * at.table.up * at.noise[0]
    return x, denoised, values


def by_slope(denoise, x, values, at):
    """Eq. 3 on the history of d. 1 call a step."""
    denoised = denoise(x, at.sigma)
    values = ((x - denoised) / at.sigma, *values[:-1])
    return at.table.keep * x + _weighted(at.table.weights, values), denoised, values


# --- Adams-Bashforth on the slope ------------------------------------------------------------------------------------


def lms(sigmas, options, start):
    """LMS: Adams-Bashforth in sigma, of order 4 (Karras et al. 2022 name it; coefficients by Katherine Crowson, 2022).

    Order 4 once its four values are there (its first step is Euler's), 1 call a step, deterministic. As in k-diffusion
    the polynomial is carried on to sigma = 0 too.
    """
    points, weights = _nodes(sigmas[:-1], sigmas[1:])
    used = _orders(sigmas, options, start)
    table = _lagrange_integrals(_past(sigmas[:-1], 4), used, points, weights)
    return Linear(jnp.ones_like(sigmas[1:]), table)


_ADAMS_BASHFORTH = np.array(
    [[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
)


def ipndm(sigmas, options, start):
    """iPNDM of Zhang & Chen 2022 (arXiv 2204.13902): Liu et al. 2022 (arXiv 2202.09778), Eq. 12, begun by lower orders.

    Adams-Bashforth with the coefficients of equal steps, whatever the ladder. Order 4 where steps are equal and once
    four values are there, else 2; 1 call a step, deterministic. Equals ComfyUI's.
    """
    used = jnp.where(sigmas[1:] > 0, _orders(sigmas, options, start), 1)
    weights = (sigmas[1:] - sigmas[:-1])[:, None] * jnp.asarray(_ADAMS_BASHFORTH, sigmas.dtype)[used - 1]
    return Linear(jnp.ones_like(sigmas[1:]), weights)


def plms(denoise, x, values, at):
    """PLMS: Liu et al. 2022 (arXiv 2202.09778), Eq. 12, as Stable Diffusion uses it, named pndm too.

    The table of ipndm, but the first step is Heun's: its second call is at the second level, which the next step calls
    again. So leading spacing has its second timestep twice, as in diffusers' PNDMScheduler with skip_prk_steps=True,
    which this equals on that ladder. Order 3 on equal steps, else 2; 1 call a step, 2 on the first (1 in a run of one
    step, which is Euler's), deterministic.
    """
    x_next, denoised, values = by_slope(denoise, x, values, at)

    def corrected():
        slope_next = (x_next - denoise(x_next, at.sigma_next)) / at.sigma_next
        return x_next + (at.sigma_next - at.sigma) * (slope_next - values[0]) / 2

    first = (at.index == 0) & (at.steps > 1)
    return jax.lax.cond(first, corrected, lambda: x_next), denoised, values


def _vp_time(sigma, sigma_min=0.002, sigma_max=80.0, smallest=1e-3):
    """The time of the variance-preserving SDE at which the noise level is sigma: Karras et al. 2022, Table 1.

    Its betas are such that sigma_min is at 1e-3 and sigma_max at 1: those of diff-sampler and ComfyUI.
    """
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / smallest - high) / (smallest - 1)
    beta_min = high - beta_d / 2
    return (jnp.sqrt(beta_min**2 + 2 * beta_d * jnp.log1p(sigma**2)) - beta_min) / beta_d


def deis(sigmas, options, start, time=_vp_time):
    """DEIS: Zhang & Chen 2022 (arXiv 2204.13902), their tAB-DEIS with a quadratic (tAB2), as in ComfyUI.

    The polynomial is one in the time of the variance-preserving SDE; `time` may be another function of sigma, with log
    it is the logrho of diffusers. Order 3 once its three values are there, 1 call a step, deterministic.
    """
    safe = jnp.where(sigmas[1:] > 0, sigmas[1:], sigmas[:-1])
    used = jnp.where(sigmas[1:] > 0, _orders(sigmas, options, start), 1)
    log_sigma, weights = _nodes(jnp.log(sigmas[:-1]), jnp.log(safe))  # d sigma = sigma d log(sigma)
    points = jnp.exp(log_sigma)
    table = _lagrange_integrals(time(_past(sigmas[:-1], 3)), used, time(points), weights * points)
    euler = (sigmas[1:] - sigmas[:-1])[:, None] * jnp.asarray([[1, 0, 0]], sigmas.dtype)
    return Linear(jnp.ones_like(safe), jnp.where((used == 1)[:, None], euler, table))


# --- exponential integrators, on the denoised picture ----------------------------------------------------------------


def _log_steps(sigmas):
    """h = log(sigma / sigma_next) of each step, infinite on a step to 0, and sigma_next / sigma = exp(-h)."""
    ratio = sigmas[1:] / sigmas[:-1]
    return -jnp.log(ratio), ratio


def _second_order(sigmas, start, eta, slope_weight):
    """D and how it changed since the last step, D + slope_weight(h) (h / h_last) (D - D_last), with h as of the SDE.

    The change is left out on the first step and on a step to 0. `slope_weight` is a function of (1 + eta) h.
    """
    h, ratio = _log_steps(sigmas)
    usable = (_places(len(h)) > start) & (sigmas[1:] > 0)
    keep = ratio ** (1 + eta)
    change = jnp.where(usable, slope_weight(jnp.where(usable, (1 + eta) * h, 1)) * h / _past(h, 2)[:, 1], 0)
    return keep, jnp.stack([1 - keep + change, -change], 1)


def _midpoint_weight(h):
    return -jnp.expm1(-h) / 2


def _heun_weight(h):
    return h * _phi(2, -h)


def _fresh_noise(sigmas, eta):
    """How much noise the SDE adds over each step: sigma_next sqrt(1 - exp(-2 eta h)), 0 on a step to 0."""
    h, _ = _log_steps(sigmas)
    return jnp.where(sigmas[1:] > 0, sigmas[1:] * jnp.sqrt(-jnp.expm1(-2 * eta * jnp.minimum(h, 1e3))), 0)


def dpmpp_2m(sigmas, options, start):
    """DPM-Solver++(2M): Lu et al. 2022 (arXiv 2211.01095), Algorithm 2. Order 2, 1 call a step, deterministic.

    With h = log(sigma / sigma_next) it moves towards D extrapolated by half a step: D + (h / 2 h_last) (D - D_last).
    Plain D on the first step and on a step to sigma_next = 0.
    """
    return Linear(*_second_order(sigmas, start, 0.0, _midpoint_weight))


def dpmpp_2m_sde(sigmas, options, start, slope_weight=_midpoint_weight):
    """SDE-DPM-Solver++(2M) of Lu et al. 2022 (arXiv 2211.01095), as in k-diffusion (`midpoint`).

    dpmpp_2m with an interval 1 + eta times as long in log(sigma), and noise up to sigma_next again. One draw a step, of
    one Brownian path. Order 2 at eta = 0, 1 call a step, stochastic (eta 1, s_noise 1).
    """
    keep, weights = _second_order(sigmas, start, options.eta, slope_weight)
    return Linear(keep, weights, _fresh_noise(sigmas, options.eta))


def dpmpp_2m_sde_heun(sigmas, options, start):
    """dpmpp_2m_sde with the exact integral of the extrapolation in place of its middle: k-diffusion's `heun`."""
    return dpmpp_2m_sde(sigmas, options, start, _heun_weight)


def dpmpp_3m_sde(sigmas, options, start):
    """DPM-Solver++(3M) SDE, by Katherine Crowson (k-diffusion 2023) after Lu et al. (arXiv 2211.01095).

    A quadratic through three D, by divided differences; as in k-diffusion the second one has half the weight that would
    make it of order 3. One draw a step, of one Brownian path. Order 2 at eta = 0, 1 call a step, stochastic (eta 1,
    s_noise 1).
    """
    h, ratio = _log_steps(sigmas)
    h = jnp.where(sigmas[1:] > 0, h, 1)
    _, h_1, h_2 = jnp.split(_past(h, 3), 3, 1)
    h_1, h_2 = h_1[:, 0], h_2[:, 0]
    past = jnp.where(sigmas[1:] > 0, _places(len(h)) - start, 0)
    z = (1 + options.eta) * h
    phi_2, phi_3 = z * _phi(2, -z), z * _phi(3, -z)
    # k-diffusion's d1 and d2, sorted by D - D_1 and D_1 - D_2, with r the share of h_1 in h_1 + h_2
    r, u = jnp.where(past > 1, h_1 / (h_1 + h_2), 0), jnp.where(past > 1, h / (h_1 + h_2), 0)
    first = jnp.where(past > 0, (phi_2 * (1 + r) + phi_3 * u) * h / h_1, 0)
    second = -(phi_2 * r + phi_3 * u) * h / h_2
    keep = ratio ** (1 + options.eta)
    weights = jnp.stack([1 - keep + first, second - first, -second], 1)
    return Linear(keep, weights, _fresh_noise(sigmas, options.eta))


# --- predictor and corrector -----------------------------------------------------------------------------------------


def uni_pc_table(sigmas, options, start, b):
    """(predictor, corrector) of each step; the corrector's is that of the step before, by which x came here.

    Zhao et al. solve a Vandermonde system for the weights of D_j - D_0. Its solution is the integral of Eq. 2 over the
    polynomial through those D, in log(sigma), and B(h) cancels; it stays only in the two cases that they simplify to
    the weight 1/2: the predictor of order 2 and the corrector of order 1.
    """
    steps, safe = len(sigmas) - 1, jnp.where(sigmas[1:] > 0, sigmas[1:], sigmas[:-1])
    h, ratio = jnp.log(sigmas[:-1] / safe), safe / sigmas[:-1]
    used = jnp.minimum(_orders(sigmas, options, start), steps - _places(steps))
    levels = jnp.log(_past(sigmas[:-1], 3))
    points, weights = _nodes(jnp.log(sigmas[:-1]), jnp.log(safe))
    weights = -weights * jnp.exp(jnp.log(safe)[:, None] - points)  # sigma' d(1 / sigma)
    keep = sigmas[1:] / sigmas[:-1]

    plain = (1 - keep)[:, None] * jnp.asarray([[1, 0, 0]], sigmas.dtype)
    change = b(h) / 2 * h / jnp.log(_past(sigmas[:-1], 2)[:, 1] / sigmas[:-1])
    halved = plain + change[:, None] * jnp.asarray([[1, -1, 0]], sigmas.dtype)
    full = _lagrange_integrals(levels, used, points, weights)
    predictor = jnp.where((used == 1)[:, None], plain, jnp.where((used == 2)[:, None], halved, full))

    halved = jnp.stack([b(h) / 2, 1 - ratio - b(h) / 2, 0 * h, 0 * h], 1)
    full = _lagrange_integrals(jnp.concatenate([jnp.log(safe)[:, None], levels], 1), used + 1, points, weights)
    corrector = jnp.where((used == 1)[:, None], halved, full)
    return Linear(keep, predictor), jax.tree.map(lambda a: jnp.roll(a, 1, 0), Linear(keep, corrector))


def uni_pc(sigmas, options, start):
    """The table of UniPC with B_1(h) = h."""
    return uni_pc_table(sigmas, options, start, lambda h: h)


def uni_pc_bh2(sigmas, options, start):
    """The table of UniPC with B_2(h) = 1 - exp(-h), in the sign of Eq. 2."""
    return uni_pc_table(sigmas, options, start, lambda h: -jnp.expm1(-h))


def uni_pc_init(x):
    """The last three D, and x at the last level after its correction."""
    return (jnp.zeros_like(x),) * 3, x


def uni_pc_step(denoise, x, state, at):
    """UniPC: Zhao et al. 2023 (arXiv 2302.04867), Algorithms 1 and 2, on D, with order 3, as in ComfyUI and diffusers.

    D at the predicted x serves twice: it corrects that x (UniC), and from there the next step is predicted (UniP). The
    order falls to 2 and 1 on the last two steps. Order 4 between its ends, 3 with its first step, 1 call a step,
    deterministic. `uni_pc` is their B_1, `uni_pc_bh2` their B_2. ComfyUI stops at sigma = 0.001 in place of 0.
    """
    values, x_last = state
    predictor, corrector = at.table
    denoised = denoise(x, at.sigma)
    corrected = corrector.keep * x_last + _weighted(corrector.weights, (denoised, *values))
    x = jnp.where(at.index > 0, corrected, x)
    values = (denoised, *values[:-1])
    return predictor.keep * x + _weighted(predictor.weights, values), denoised, (values, x)
