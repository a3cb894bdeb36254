"""Binding a denoiser to its conditioning, with or without guidance.

Classifier-free guidance, Ho & Salimans 2022 (arXiv 2207.12598), Eq. 6 in the notation that everybody uses (their w is
scale - 1), with D_c of the prompt and D_u of the negative one:

    D = D_u + scale (D_c - D_u)                                                                             (1)

For x0, epsilon, v and flow alike this is the same equation, since at a given x and sigma each is an affine function of
the others. Three refinements, each of which may be left out:

    interval   Kynkaanniemi et al. 2024 (arXiv 2404.07724): guide only at some noise levels, elsewhere D = D_c
    projected  Sadat et al. 2024 (arXiv 2410.02416), below
    rescale    Lin et al. 2023 (arXiv 2305.08891), Eq. 14-16: give the raw output F of Eq. 1 the spread of F_c again,

        F' = F (1 - rescale + rescale std(F_c) / std(F))                                                    (2)

A prompt of several parts p, with weights w_p (A1111's AND; Liu et al. 2022, arXiv 2206.01714, Eq. 13), has

    D_c = D_u + sum_p w_p (D_p - D_u)                                                                       (5)

Adaptive projected guidance works on x0. It adds what is left of earlier differences (momentum below 0 takes it away,
and so amplifies what changes from call to call), limits their length, and splits them along D_c and across it, for it
is the part along D_c that saturates colours:

    d <- D_c - D_u + momentum d,    d' = d min(1, norm_threshold / |d|)                                     (3)
    D = D_c + (scale - 1) (across + eta along),    d' = across + along                                      (4)

Without momentum and limit and with eta = 1 this is Eq. 1. ComfyUI's APG node adds `scale` times the difference to D_c,
not scale - 1 times, so it is this at cfg = scale - 1; and so is, on predictions of x0, AdaptiveProjectedGuidance of
diffusers with use_original_formulation=True. (Without it diffusers adds to D_u, and loses what eta keeps of D_c - D_u.)

Guidance by a classifier that knows noise, Dhariwal & Nichol 2021 (arXiv 2105.05233), Algorithm 2, goes up the gradient
of what it says of the noisy x; with CLIP's similarity as log p it is Nichol et al. 2021 (arXiv 2112.10741), Eq. 8:

    g = scale sigma^2 grad_x log p(c | x, sigma),    D' = D + g min(1, clamp / rms(g))                      (6)

The clamp is not theirs: what such a network says where there is mostly noise is worth little, and Eq. 6 makes most of
it there. Programs that are guided by CLIP have one (clamp_max of Disco Diffusion, there in its own units).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sd_jax.diffusion.denoiser import ConditionedDenoise, Denoise, state_dtype
from sd_jax.diffusion.predictions import along_batch, from_x0, to_x0

Number = ArrayLike  # scalar or [batch]


class Guidance(NamedTuple):
    """How to guide. What is None is left out of the compiled function; numbers are traced: others compile nothing."""

    scale: Number = 7.5  # of Eq. 1; 1 = no guidance
    rescale: Number | None = None  # of Eq. 2, 0 to 1: diffusers' guidance_rescale, RescaleCFG's multiplier in ComfyUI
    interval: tuple[Number, Number] | None = None  # guided where low < sigma < high; see `interval_of_steps`
    eta: Number | None = None  # of Eq. 4; None = 1, the paper's listing has 0
    norm_threshold: Number | None = None  # of Eq. 3; None or 0 = no limit, the paper's listing has 2.5
    momentum: Number | None = None  # of Eq. 3; None = 0, the paper's listing has -0.75


def conditioned(denoise: ConditionedDenoise, conditioning: Any) -> Denoise:
    """`denoise(x, sigma)` of the conditioning alone: no guidance, half the work of `guided`."""
    return lambda x, sigma: denoise(x, sigma, conditioning)


def classifier_free(denoise: ConditionedDenoise, cond: Any, uncond: Any, scale: Number) -> Denoise:
    """`guided` with nothing but a scale: Eq. 1."""
    return guided(denoise, cond, uncond, Guidance(scale))


def guided(
    denoise: ConditionedDenoise,
    cond: Any,  # a pytree whose arrays lead with the batch, such as a Conditioning
    uncond: Any,  # the same pytree with the same shapes
    guidance: Guidance,
    rescale_in: str = "v_prediction",  # what F is in Eq. 2
    memory: Any = None,  # for momentum: a jax.Ref of the latents' shape, zeros at first, that keeps d of Eq. 3
    weights: Float[Array, "batch parts"] | None = None,  # of Eq. 5; `cond` then leads with batch * parts
) -> Denoise:
    """The guided `denoise(x, sigma)`, by one call of the model on twice the batch: uncond, then cond.

    Outside the interval the model is called on cond alone, which is half the work, but the model is compiled twice; a
    prompt of parts always needs both. `memory` is updated once a call, as in diffusers and ComfyUI.
    Eq. 2 is taken on v by the paper and by ComfyUI, whatever the model predicts, and on the model's own output by
    diffusers: for that, give its prediction type as `rescale_in`.
    Raises ValueError for momentum without memory.
    """
    if guidance.momentum is not None and memory is None:
        raise ValueError("guidance with momentum remembers a difference: give it memory, a jax.Ref of zeros")
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), uncond, cond)

    def on_both(x, sigma, scale):
        parts = 1 if weights is None else weights.shape[1]
        pairs = (jnp.concatenate([a, jnp.repeat(a, parts, axis=0)]) for a in (x, sigma))
        x0_uncond, x0_parts = jnp.split(denoise(*pairs, both).astype(x.dtype), [x.shape[0]])
        if weights is None:
            x0_cond, difference = x0_parts, x0_parts - x0_uncond
        else:
            differences = x0_parts.reshape(x.shape[0], parts, *x.shape[1:]) - x0_uncond[:, None]
            difference = jnp.einsum("bp,bp...->b...", weights.astype(x.dtype), differences)
            x0_cond = x0_uncond + difference
        if guidance.momentum is not None:
            difference += _number(guidance.momentum, x) * memory[...]
            memory[...] = difference
        if all(option is None for option in (guidance.eta, guidance.norm_threshold, guidance.momentum)):
            x0 = x0_uncond + scale * difference
        else:
            difference = _limited(difference, guidance.norm_threshold)
            x0 = x0_cond + (scale - 1) * _projected(difference, x0_cond, guidance.eta)
        return x0 if guidance.rescale is None else _rescaled(x0, x0_cond, x, sigma, guidance.rescale, rescale_in)

    def on_cond(x, sigma, scale):
        return denoise(x, sigma, cond).astype(x.dtype)

    def guided_denoise(x: Float[Array, "batch *dims"], sigma: Float[Array, "..."]) -> Array:
        x = x.astype(state_dtype(x.dtype))
        sigma, scale = jnp.broadcast_to(sigma, x.shape[:1]), _number(guidance.scale, x)
        if guidance.interval is None:
            return on_both(x, sigma, scale)
        low, high = (jnp.asarray(end, sigma.dtype) for end in guidance.interval)
        within = (low < sigma) & (sigma < high)  # for each image; outside, Eq. 1 and 4 with scale 1 are D_c
        scale = jnp.where(within.reshape(scale.shape), scale, 1)
        if weights is not None:
            return on_both(x, sigma, scale)
        return jax.lax.cond(within.any(), on_both, on_cond, x, sigma, scale)

    return guided_denoise


def by_gradient(
    denoise: Denoise,
    log_likelihood: Callable[[Array, Array], Float[Array, " batch"]],  # (x, sigma [batch]) -> log p(c | x, sigma)
    scale: Number,
    clamp: Number = np.inf,  # the most that the root mean square over a picture may be
) -> Denoise:
    """Eq. 6, on top of any other guidance. Each picture's likelihood must hang on its own x alone."""

    def guided_denoise(x: Float[Array, "batch *dims"], sigma: Float[Array, "..."]) -> Array:
        x = x.astype(state_dtype(x.dtype))
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        gradient = jax.grad(lambda x: log_likelihood(x, sigma).sum())(x)
        step = _number(scale, x) * along_batch(sigma, x) ** 2 * gradient
        rms = _length(step) / math.sqrt(math.prod(x.shape[1:]))
        return denoise(x, sigma) + step * jnp.minimum(1, _number(clamp, x) / rms)

    return guided_denoise


def interval_of_steps(
    sigmas: Float[np.ndarray, " steps_plus_1"],  # the ladder
    start: float = 0.0,  # a fraction of the steps: guided from step int(start * steps) on,
    stop: float = 1.0,  # and before step int(stop * steps), as the guiders of diffusers count
) -> tuple[np.float32, np.float32]:
    """The interval of sigma that holds just these steps, for `Guidance.interval`.

    Its ends lie between two steps, nearer to the later one, so that a sampler's calls halfway to its next step belong
    to the step, and so do those to which churn has added some noise. ComfyUI's start_percent and end_percent are
    fractions of the timesteps instead: those two are `timestep_to_sigma((1 - percent) * (T - 1), sigmas_of(cfg))`.
    Raises ValueError unless 0 <= start <= stop <= 1.
    """
    if not 0 <= start <= stop <= 1:
        raise ValueError(f"guidance from {start} to {stop} of the steps: 0 <= start <= stop <= 1 is needed")
    steps = len(sigmas) - 1
    ends = np.concatenate([[np.inf], sigmas[:-2] ** 0.4 * sigmas[1:-1] ** 0.6, [0.0]])
    return np.float32(ends[int(stop * steps)]), np.float32(ends[int(start * steps)])


def _limited(difference, norm_threshold):
    """d' of Eq. 3."""
    if norm_threshold is None:
        return difference
    threshold = _number(norm_threshold, difference)
    return difference * jnp.where(threshold > 0, jnp.minimum(1, threshold / _length(difference)), 1)


def _projected(difference, x0_cond, eta):
    """across + eta along, of Eq. 4."""
    if eta is None:
        return difference
    direction = x0_cond / _length(x0_cond)
    along = jnp.sum(difference * direction, _all_but_batch(difference), keepdims=True) * direction
    return difference + (_number(eta, difference) - 1) * along


def _rescaled(x0, x0_cond, x, sigma, rescale, prediction_type):
    """Eq. 2."""
    output, output_cond = (from_x0(prediction_type, answer, x, sigma) for answer in (x0, x0_cond))
    spread, spread_cond = (jnp.std(f, _all_but_batch(f), keepdims=True) for f in (output, output_cond))
    ratio = spread_cond / jnp.maximum(spread, jnp.finfo(spread.dtype).tiny)
    return to_x0(prediction_type, output * (1 + _number(rescale, x) * (ratio - 1)), x, sigma)


def _number(value, x):
    return along_batch(jnp.asarray(value, x.dtype), x)


def _length(x):
    """The norm of each image, kept above 0."""
    return jnp.maximum(jnp.sqrt(jnp.sum(x**2, _all_but_batch(x), keepdims=True)), 1e-12)


def _all_but_batch(x):
    return tuple(range(1, x.ndim))
