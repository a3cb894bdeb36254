"""The table of samplers and the one loop that runs them.

A sampler sees a model only as `denoise(x, sigma) -> x0` and walks down a ladder of sigmas. The loop is a single one in
XLA; everything but the sampler's name, the number of steps and which options are given is traced, so another ladder of
the same length, another picture, another prompt or another eta does not recompile. `sample` walks all of it; `prepare`
hands out the step, for who wants to stop between steps.

Fresh noise comes from three places. Recorded draws, `noise[d]` being the d-th that the sampler makes, for noise made
elsewhere; else, for the samplers that k-diffusion gives a Brownian tree, the path of `brownian.py`, which is the same
for any number of steps; else `noise.py`, keyed by image and draw.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from sd_jax import names
from sd_jax.diffusion import brownian
from sd_jax.diffusion import samplers_distilled as distilled
from sd_jax.diffusion import samplers_multistep as multi
from sd_jax.diffusion import samplers_ode as ode
from sd_jax.diffusion import samplers_restart as restarts
from sd_jax.diffusion import samplers_sde as sde
from sd_jax.diffusion.denoiser import Denoise, state_dtype
from sd_jax.diffusion.noise import step_noise
from sd_jax.diffusion.samplers_ode import SamplerOptions, Step


class Sampler(NamedTuple):
    """A row of the table; `samplers_ode.py` says what `step` and `init` take and return."""

    step: Callable  # (denoise, x, state, at) -> (x, denoised, state)
    init: Callable = ode.stateless  # (x) -> state
    table: Callable | None = None  # (sigmas, options, start) -> arrays [steps, ...], of which a step sees its entry
    options: SamplerOptions = SamplerOptions()  # those that it reads, with their defaults
    draws: int = 0  # of noise in a step
    only_if: str = ""  # the option whose being given makes it stochastic; "": always, if it draws
    ends: Callable | None = None  # (at) -> sigmas: the draws are a Brownian path's increments from at.sigma to these
    ladder: Callable | None = None  # (sigmas) -> what is walked instead; draws are then made on its moves up
    moves_up: Callable = lambda steps: 0  # (steps) -> how many those are
    calls: int = 1  # of the model in a step


_CHURN = {
    "options": SamplerOptions(s_churn=0.0, s_tmin=0.0, s_tmax=np.inf, s_noise=1.0),
    "draws": 1,
    "only_if": "s_churn",
}
_ANCESTRAL = {"options": SamplerOptions(eta=1.0, s_noise=1.0), "draws": 1}
_BROWNIAN = {**_ANCESTRAL, "ends": lambda at: (at.sigma_next,)}
_UNI_PC = {"step": multi.uni_pc_step, "init": multi.uni_pc_init, "options": SamplerOptions(order=3)}

SAMPLERS = {  # k-diffusion's and ComfyUI's names
    "euler": Sampler(ode.euler, **_CHURN),
    "euler_ancestral": Sampler(sde.euler_ancestral, **_ANCESTRAL),
    "heun": Sampler(ode.heun, calls=2, **_CHURN),
    "heunpp2": Sampler(ode.heunpp2, table=ode.heunpp2_table, calls=3, **_CHURN),
    "dpm_2": Sampler(ode.dpm_2, calls=2, **_CHURN),
    "dpm_2_ancestral": Sampler(sde.dpm_2_ancestral, calls=2, **_ANCESTRAL),
    "lms": Sampler(multi.by_slope, multi.history(4), multi.lms, SamplerOptions(order=4)),
    "dpmpp_2s_ancestral": Sampler(sde.dpmpp_2s_ancestral, calls=2, **_ANCESTRAL),
    "dpmpp_sde": Sampler(
        sde.dpmpp_sde,
        options=SamplerOptions(eta=1.0, s_noise=1.0, r=0.5),
        draws=2,
        ends=sde.dpmpp_sde_ends,
        calls=2,
    ),
    "dpmpp_2m": Sampler(multi.by_denoised, multi.history(2), multi.dpmpp_2m),
    "dpmpp_2m_sde": Sampler(multi.by_denoised, multi.history(2), multi.dpmpp_2m_sde, **_BROWNIAN),
    "dpmpp_2m_sde_heun": Sampler(multi.by_denoised, multi.history(2), multi.dpmpp_2m_sde_heun, **_BROWNIAN),
    "dpmpp_3m_sde": Sampler(multi.by_denoised, multi.history(3), multi.dpmpp_3m_sde, **_BROWNIAN),
    "ddpm": Sampler(sde.ddpm, draws=1),
    "ddim": Sampler(sde.ddim, options=SamplerOptions(eta=0.0), draws=1, only_if="eta"),
    "plms": Sampler(multi.plms, multi.history(4), multi.ipndm, SamplerOptions(order=4)),
    "pndm": Sampler(multi.plms, multi.history(4), multi.ipndm, SamplerOptions(order=4)),
    "uni_pc": Sampler(table=multi.uni_pc, **_UNI_PC),
    "uni_pc_bh2": Sampler(table=multi.uni_pc_bh2, **_UNI_PC),
    "deis": Sampler(multi.by_slope, multi.history(3), multi.deis, SamplerOptions(order=3)),
    "ipndm": Sampler(multi.by_slope, multi.history(4), multi.ipndm, SamplerOptions(order=4)),
    "lcm": Sampler(distilled.lcm, options=SamplerOptions(s_noise=1.0), draws=1),
    "restart": Sampler(
        restarts.restart,
        restarts.restart_init,
        options=SamplerOptions(s_noise=1.0),
        draws=1,
        ladder=restarts.restart_ladder,
        moves_up=restarts.restarts,
        calls=2,
    ),
}


def sampler_named(name: str) -> Sampler:
    """The row of that name. Raises ValueError for an unknown one, with the nearest names."""
    if name not in SAMPLERS:
        nearest = names.nearest(name, SAMPLERS) or SAMPLERS
        raise ValueError(f"unknown sampler {name!r}: the nearest are {', '.join(nearest)}")
    return SAMPLERS[name]


def count_draws(sampler: str | Sampler, steps: int, options: SamplerOptions | None = None) -> int:
    """How many draws the sampler makes in so many steps, with these options: the length of `noise` in `sample`.

    Those of a step to sigma 0 count, though they come to nothing (k-diffusion and ComfyUI do not make them).
    """
    row = sampler_named(sampler) if isinstance(sampler, str) else sampler
    if row.only_if and getattr(options or SamplerOptions(), row.only_if) is None:
        return 0
    return row.moves_up(steps) if row.ladder is not None else row.draws * steps


def count_steps(sampler: str | Sampler, steps: int) -> int:
    """How many steps the sampler takes on a ladder of so many: more only where it goes back up between."""
    row = sampler_named(sampler) if isinstance(sampler, str) else sampler
    return steps + row.moves_up(steps)


class Walk(NamedTuple):
    """A run of a sampler. `step` for every index in range(start, steps), one after the other, is the whole of it."""

    carry: Any  # (x, D of the last step, the sampler's state) before the first step
    step: Callable  # (index, carry) -> carry
    steps: int  # those that `start` skips included


def prepare(
    denoise: Denoise,
    x: Float[Array, "batch *dims"],
    sigmas: Float[Array | np.ndarray, " steps_plus_1"],
    sampler: str | Sampler = "euler",
    rng: Key[Array, "*batch_or_none"] | None = None,
    noise: Float[Array | np.ndarray, "draws batch *dims"] | None = None,
    options: SamplerOptions | None = None,
    start: Int[Array, ""] | int | None = None,
) -> Walk:
    """What `sample` walks; its arguments, and what it raises, are described there."""
    name = sampler if isinstance(sampler, str) else getattr(sampler.step, "__name__", "of one's own")
    row = sampler_named(sampler) if isinstance(sampler, str) else sampler
    x = x.astype(state_dtype(x.dtype))
    sigmas = jnp.asarray(sigmas, x.dtype)
    if len(sigmas) < 2:
        raise ValueError(f"sigmas has {len(sigmas)} levels: a step needs 2")
    draws = count_draws(row, len(sigmas) - 1, options)
    if draws:
        rng, noise = _noise_source(name, x, (draws, *x.shape), rng, noise)
    options = _filled_in(name, row.options, options or SamplerOptions(), x.dtype)
    if row.ladder is not None:
        if start is not None:
            raise ValueError(f"sampler {name!r} has a ladder of its own and no start: give it sigmas[start:]")
        sigmas = row.ladder(sigmas)
    steps, begin = len(sigmas) - 1, 0 if start is None else jnp.asarray(start, jnp.int32)
    table = row.table(sigmas, options, begin) if row.table is not None else None
    jumps = jnp.cumsum(sigmas[1:] > sigmas[:-1]) - 1 if row.ladder is not None else None

    def model(x, sigma):
        return denoise(x, sigma).astype(x.dtype)

    def fresh_noise(at, draw):
        if noise is not None:
            return jax.lax.dynamic_slice_in_dim(noise, draw, row.draws)
        if row.ends is not None:
            return brownian.increments(rng, at.sigma, row.ends(at), x.shape[1:], x.dtype)
        return jnp.stack([step_noise(rng, draw + i, x.shape[1:], x.dtype) for i in range(row.draws)])

    def step(index, carry):
        x, _, state = carry
        entry = jax.tree.map(lambda column: column[index], table)
        at = Step(index - begin, steps - begin, sigmas[index], sigmas[index + 1], options, entry)
        if draws:
            draw = (index - begin) * row.draws if jumps is None else jumps[index]
            at = at._replace(noise=fresh_noise(at, draw))
        return row.step(model, x, state, at)

    return Walk((x, jnp.zeros_like(x), row.init(x)), step, steps)


def sample(
    denoise: Denoise,
    x: Float[Array, "batch *dims"],  # x0 + sigmas[start] * noise; from nothing, latents * ladder.start
    sigmas: Float[Array | np.ndarray, " steps_plus_1"],  # descending; traced
    sampler: str | Sampler = "euler",  # a key of SAMPLERS, or a row of one's own
    rng: Key[Array, "*batch_or_none"] | None = None,  # a key per image, or one for all; stochastic samplers only
    noise: Float[Array | np.ndarray, "draws batch *dims"] | None = None,  # recorded draws in order, in place of rng
    callback: Callable[[Array, Array, Array], None] | None = None,  # on the host: (step, x before it, denoised)
    options: SamplerOptions | None = None,  # None = the sampler's defaults
    start: Int[Array, ""] | int | None = None,  # skip the steps before this one; traced. None = 0
) -> Float[Array, "batch *dims"]:
    """Walks x down from sigmas[start] to sigmas[-1]. Float32 throughout, whatever the model's dtype.

    To be called within jit. Image i of a batch gets what it would get alone, given the same key. `noise` has the length
    that `count_draws` says. With `start` it gives what `sigmas[start:]` and the first of the draws alone would give, at
    the same cost, for every start by one compilation. The callback is only built in when given, must be the same object
    for the same jitted function, counts steps from `start`, and may hear of them out of order.
    Raises ValueError for an unknown sampler, an option that the sampler does not read, a ladder without a step, and for
    a stochastic sampler without rng or noise.
    """
    walk = prepare(denoise, x, sigmas, sampler, rng, noise, options, start)
    begin = 0 if start is None else start

    def step(index, carry):
        after = walk.step(index, carry)
        if callback is not None:
            jax.debug.callback(callback, index - begin, carry[0], after[1])
        return after

    return jax.lax.fori_loop(begin, walk.steps, step, walk.carry)[0]


def _filled_in(name: str, defaults: SamplerOptions, given: SamplerOptions, dtype) -> SamplerOptions:
    """The options that a sampler reads, as arrays of the state's dtype."""
    filled = {}
    for key, default, value in zip(SamplerOptions._fields, defaults, given, strict=True):
        if default is None and value is not None:
            reads = ", ".join(k for k, v in zip(SamplerOptions._fields, defaults, strict=True) if v is not None)
            raise ValueError(f"sampler {name!r} has no option {key}: it has {reads or 'none'}")
        if default is not None:
            filled[key] = jnp.asarray(default if value is None else value, jnp.int32 if key == "order" else dtype)
    if "order" in filled:
        filled["order"] = jnp.clip(filled["order"], 1, defaults.order)
    return SamplerOptions(**filled)


def _noise_source(name, x, shape, rng, noise):
    """(a key per image, None) or (None, recorded draws), checked."""
    if noise is not None:
        noise = jnp.asarray(noise, x.dtype)
        if noise.shape != shape:
            raise ValueError(f"noise has the shape {noise.shape}: sampler {name!r} needs {shape} for these steps")
        return None, noise
    if rng is None:
        raise ValueError(f"sampler {name!r} is stochastic: give it rng (a key per image) or noise")
    if rng.ndim == 0:
        rng = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(x.shape[0]))
    return rng, None
