"""The middle of every job: prompts, noise and a place to start from, to latents, in one compiled walk.

A job that starts from a picture skips the first steps of the ladder, as its strength says. Three programs count the
steps in three ways (`strength_steps`), for n steps and strength s:

    diffusers   the last int(n s) steps are walked
    a1111       the last int(n min(s, 0.999)) + 1; in the second pass of hires_fix as comfy
    comfy       n steps are walked, the last of a ladder of int(n / s)

A prompt that changes while sampling counts calls of the denoiser from the first that is made, over `steps` steps, as in
A1111: what it skips at the start is missing at the end.

The compiled walk takes its first and its last step as arguments. So strength compiles nothing, someone who looks on (a
progress bar, previews) gets the same program, called once for each step, and another model can take over on the way,
with all that a sampler remembers: SDXL's refiner, from the first step below a timestep on (`refiner_switch`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from sd_jax import sharding
from sd_jax.adapters.controlnet import ControlNet
from sd_jax.adapters.t2i_adapter import T2IAdapter
from sd_jax.diffusion import guidance, noise, noise_sources, samplers, schedules
from sd_jax.diffusion.denoiser import make_denoiser
from sd_jax.diffusion.inpainting import within_mask
from sd_jax.diffusion.predictions import along_batch, prediction
from sd_jax.diffusion.samplers_ode import SamplerOptions
from sd_jax.models.clip import CLIP
from sd_jax.models.networks import Networks
from sd_jax.sampling import adapters, control
from sd_jax.sampling.conditioning import Rows, Told, of_call, of_tile, tell
from sd_jax.sampling.control import Hint, Seen, Steered
from sd_jax.sampling.image_prompt import in_place_of_text, show
from sd_jax.sampling.tiles import tiled_denoiser
from sd_jax.tiles import lay_tiles
from sd_jax.types import AnyArray, Conditioning, Latents, Params, Recipe

if TYPE_CHECKING:
    from sd_jax.sampling.clip import Clip
    from sd_jax.sampling.pipeline import Pipeline


class Start(NamedTuple):
    """Where a walk begins; all sizes are those of latents."""

    size: tuple[int, int]  # height, width
    clean: Latents | None = None  # the picture's, for the whole batch or one for all; None = from nothing
    strength: float = 1.0  # how much of the ladder is walked; only with `clean`
    mask: Float[AnyArray, "batch_or_1 h w 1"] | None = None  # 1 = redrawn, 0 = kept as in `clean`
    concat: Float[AnyArray, "batch_or_1 h w extra"] | None = None  # what a U-Net sees beside the latents
    class_label: int | None = None  # what it is told of that
    from_noise: bool = False  # begin with noise alone, although there is a picture
    first_pass_steps: int | None = None  # in the second pass of hires_fix


class Given(NamedTuple):
    """What a caller may hand to a job in place of what the recipe would make."""

    latents: Latents | None = None  # the starting noise, unit variance
    draws: Float[AnyArray, "draws batch h w c"] | None = None  # recorded noise of a stochastic sampler
    conditioning: Conditioning | None = None
    negative_conditioning: Conditioning | None = None
    control: tuple[Hint, ...] = ()
    image_prompt: Any = None  # of the IP-Adapters that are on


def denoise(
    pipe: "Pipeline",
    prompt: str | Sequence[str],
    recipe: Recipe,
    start: Start,
    given: Given,
    callback: Callable | None = None,
    refiner: "Pipeline | None" = None,  # takes over at the recipe's refiner_switch
    clip: "Clip | None" = None,  # guides, as far as the recipe's clip_guidance_scale says
) -> Latents:
    """Latents of the pictures, float32. Raises ValueError, naming the field, for what cannot be made."""
    if recipe.batch_size < 1:
        raise ValueError(f"batch_size={recipe.batch_size}: at least 1 is needed")
    pipe, prompt = adapters.put_on_tagged(pipe, prompt)
    models = [pipe] if refiner is None else [pipe, refiner]
    for model in models:
        _check_channels(model, start)
    tile = _tile(pipe, recipe, start)
    for hint in given.control:
        hint.control.check_fits(pipe, start.size, tile)
    row = samplers.sampler_named(recipe.sampler)
    ladder, begin = plan(pipe, recipe, start)
    steps = samplers.count_steps(row, len(ladder.sigmas) - 1)
    turns = [begin, steps] if refiner is None else [begin, max(begin, _switch(pipe, recipe, ladder)), steps]
    options = SamplerOptions(**{name: _number(getattr(recipe, name, None)) for name in SamplerOptions._fields})

    # Prompts
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if pipe.spec.sees_pictures and given.conditioning is None:
        seen = in_place_of_text(pipe, prompts, recipe, given.image_prompt)
        given = given._replace(conditioning=seen, image_prompt=None)
    if refiner is not None and (given.conditioning is not None or given.negative_conditioning is not None):
        raise ValueError("conditioning is for one model: give prompts where a refiner takes over")
    told = [
        tell(
            model,
            prompts,
            recipe,
            row.calls * recipe.steps,
            None if start.first_pass_steps is None else row.calls * start.first_pass_steps,
            tuple(side * pipe.spec.vae.downscale for side in start.size),
            next((len(shown) for shown in (start.clean, start.concat) if shown is not None), None),
            given.conditioning,
            given.negative_conditioning,
            start.class_label,
        )
        for model in models
    ]
    if given.image_prompt is not None and not any(adapters.has_ip_adapter(model.adapters) for model in models):
        raise ValueError("image_prompt= is for IP-Adapters, and none is on: put it on by with_adapter()")
    told = [show(heard, model.adapters, given.image_prompt) for heard, model in zip(told, models, strict=True)]
    batch = told[0].batch

    # Noise
    shape = (*start.size, pipe.spec.vae.latent_channels)
    keys, latents, draws = _noise(recipe, shape, batch, samplers.count_draws(row, len(ladder.sigmas) - 1, options), row)
    latents = latents if given.latents is None else _for_each(given.latents, batch, "latents")
    draws = draws if given.draws is None else given.draws
    if latents.shape[1:] != shape:
        raise ValueError(f"latents have the shape {latents.shape[1:]}, pictures of this size {shape}")

    # Hints
    parts = 1 if told[0].weights is None else told[0].weights.shape[1]
    controls, steered = control.steer(pipe, given.control, start.size, batch, parts, steps - begin, row.calls)

    # Walk
    carry = _begin(
        latents,
        None if start.clean is None else _for_each(start.clean, batch, "image"),
        ladder,
        np.int32(begin),
        np.bool_(start.from_noise),
        sampler=recipe.sampler,
        momentum=recipe.apg_momentum is not None,
    )
    run = _Run(
        ladder=ladder,
        begin=None if row.ladder else np.int32(begin),
        told=told[0],
        guidance=_guidance(recipe, ladder.sigmas[begin:]),
        options=options,
        keys=keys,
        draws=draws,
        noise=None if start.mask is None else latents,
        clean=None if start.mask is None else _for_each(start.clean, batch, "image"),
        mask=None if start.mask is None else _for_each(start.mask, batch, "mask"),
        blind_from=None if start.mask is None else np.float32(ladder.sigmas[begin] if start.from_noise else np.inf),
        concat=None if start.concat is None else _for_each(start.concat, batch, "image"),
        clip=None if clip is None else _clip(pipe, clip, prompt, batch, recipe),
        adapters=None,
        steered=steered,
    )
    for model, heard, first, last in zip(models, told, turns[:-1], turns[1:], strict=True):
        steers = model is pipe  # not the refiner
        own = run._replace(
            told=heard,
            adapters=adapters.of_unet(model.adapters, row.calls * recipe.steps),
            steered=steered if steers else Steered(),
        )
        walk = functools.partial(
            _walk,
            model._part("unet"),
            own,
            networks=model.networks,
            sampler=recipe.sampler,
            tile=tile,
            clip=None if clip is None else clip.network,
            controls=controls if steers else (),
        )
        if callback is None:
            carry = walk(carry, np.int32(first), np.int32(last)) if first < last else carry
            continue
        for step in range(first, last):
            before = carry.sampler[0]
            carry = walk(carry, np.int32(step), np.int32(step + 1))
            callback(step - begin, before, carry.sampler[1])
    latents, finite = _end(carry.sampler[0], ladder.end, run.clean, run.mask)
    check_finite(finite, "denoising")
    return latents


def plan(pipe: "Pipeline", recipe: Recipe, start: Start) -> tuple[schedules.Ladder, int]:
    """The ladder and the first step that is walked, for `strength_steps` of the recipe. Raises ValueError."""
    steps, strength = recipe.steps, start.strength
    if start.clean is None:
        return _ladder(pipe, recipe, steps), 0
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength:g}: more than 0 and at most 1 is needed")
    fixed = recipe.strength_steps == "comfy"
    if recipe.strength_steps == "a1111":
        strength, fixed = min(strength, 0.999), start.first_pass_steps is not None
    elif recipe.strength_steps not in ("comfy", "diffusers"):
        raise ValueError(f"strength_steps={recipe.strength_steps!r} is unknown: use diffusers, a1111 or comfy")
    ladder = _ladder(pipe, recipe, int(steps / strength) if fixed else steps)
    length = len(ladder.sigmas) - 1
    if fixed:
        walked = min(steps, length)
    else:
        walked = int(length * strength) + (recipe.strength_steps == "a1111")
    if start.first_pass_steps is not None:
        walked = max(walked, 1)  # hires fix of few steps is hires fix still
    if walked < 1:
        raise ValueError(f"strength={strength:g} of steps={steps} leaves no step to walk: raise one of them")
    begin = length - walked
    if samplers.sampler_named(recipe.sampler).ladder:  # which is made from what is walked alone
        return ladder._replace(sigmas=ladder.sigmas[begin:]), 0
    return ladder, begin


def count_walked(pipe: "Pipeline", recipe: Recipe, start: Start) -> int:
    """How many steps of the sampler `denoise` takes."""
    ladder, begin = plan(pipe, recipe, start)
    return samplers.count_steps(recipe.sampler, len(ladder.sigmas) - 1) - begin


def check_finite(finite: Array, stage: str) -> None:
    if not bool(finite):
        raise FloatingPointError(f"{stage} gave numbers that are not finite: use dtype=float32 or bfloat16")


# -- What the walk is given ------------------------------------------------------------------------------------------


def _ladder(pipe, recipe, steps):
    return schedules.make_ladder(recipe.schedule, steps, pipe.spec.noise_schedule, recipe.sampler)


def _check_channels(pipe, start) -> None:
    """Raises ValueError, naming the job, for a U-Net that sees more than this job shows it."""
    latent = pipe.spec.vae.latent_channels
    shown = latent + (0 if start.concat is None else start.concat.shape[-1])
    wanted = pipe.spec.unet.in_channels
    if wanted != shown:
        use = {
            latent + 1: "give it image_to_image with depth=",
            latent + 3: "it is for upscaling, use it to upscale",
            2 * latent: "it is for upscaling, use it to upscale",
            2 * latent + 1: "use it to inpaint",
        }.get(wanted, "no job here shows it what it wants")
        raise ValueError(f"this U-Net takes {wanted} channels, not {shown}: {use}")


def _switch(pipe, recipe, ladder) -> int:
    """The first step that is the refiner's: that of the first timestep below round(T - refiner_switch * T)."""
    if not 0 < recipe.refiner_switch < 1:
        raise ValueError(f"refiner_switch={recipe.refiner_switch:g}: more than 0 and less than 1 is needed")
    if samplers.sampler_named(recipe.sampler).ladder:
        raise ValueError(f"sampler={recipe.sampler!r} goes up again: a refiner needs one that only goes down")
    trained = schedules.sigmas_of(pipe.spec.noise_schedule)
    timesteps = np.interp(np.log(ladder.sigmas[:-1].astype(float)), np.log(trained), np.arange(len(trained)))
    cut = round(len(trained) * (1 - recipe.refiner_switch))
    return int((np.round(timesteps, 2) >= cut).sum())


def seeds_of(recipe: Recipe, batch: int) -> list[int]:
    """Of the pictures of a batch; those that a variation seed tells apart share one."""
    return [recipe.seed + (0 if recipe.variation_strength else i) for i in range(batch)]


def keys_of(recipe: Recipe, batch: int) -> Key[Array, " batch"]:
    return jnp.concatenate([noise.image_keys(seed, 1) for seed in seeds_of(recipe, batch)])


def _noise(recipe, shape, batch, num_draws, row):
    """(keys, the starting noise, the sampler's draws or None for those of the keys)."""
    mixed, seeds, keys = recipe.variation_strength != 0, seeds_of(recipe, batch), keys_of(recipe, batch)
    if recipe.noise_source != "threefry":
        if recipe.noise_source not in noise_sources.SOURCES:
            known = ", ".join(("threefry", *noise_sources.SOURCES))
            raise ValueError(f"noise_source={recipe.noise_source!r} is unknown: use one of {known}")
        made = [
            noise_sources.webui_noise(
                recipe.noise_source,
                seed,
                shape,
                0 if row.ends else num_draws,
                recipe.ensd,
                recipe.variation_seed + i,
                recipe.variation_strength,
            )
            for i, seed in enumerate(seeds)
        ]
        draws = None if row.ends or not num_draws else np.stack([d for _, d in made], axis=1)
        return keys, np.stack([first for first, _ in made]), draws
    if recipe.ensd:
        raise ValueError(f"ensd={recipe.ensd} is for noise_source torch_cpu and nv: threefry has no such generator")
    if not mixed:
        return keys, _starting_noise(keys, shape), None
    first, other = (
        np.asarray(_starting_noise(k, shape)) for k in (keys, noise.image_keys(recipe.variation_seed, batch))
    )
    pairs = zip(first.transpose(0, 3, 1, 2), other.transpose(0, 3, 1, 2), strict=True)
    between = [noise_sources.slerp(a, b, recipe.variation_strength) for a, b in pairs]
    return keys, np.stack(between).transpose(0, 2, 3, 1), None


def _guidance(recipe: Recipe, sigmas) -> guidance.Guidance:
    interval = None
    if (recipe.guidance_start, recipe.guidance_stop) != (0.0, 1.0):
        interval = guidance.interval_of_steps(sigmas, recipe.guidance_start, recipe.guidance_stop)
    return guidance.Guidance(
        _number(recipe.guidance_scale),
        _number(recipe.guidance_rescale),
        interval,
        _number(recipe.apg_eta),
        _number(recipe.apg_norm_threshold),
        _number(recipe.apg_momentum),
    )


def _clip(pipe, clip, prompt, batch, recipe) -> "_Clip":
    texts = jnp.asarray(clip.encode_texts([prompt] if isinstance(prompt, str) else prompt))
    texts = jnp.repeat(texts, batch // len(texts), axis=0)
    clamp = np.inf if recipe.clip_guidance_clamp is None else recipe.clip_guidance_clamp
    return _Clip(clip.params, pipe._part("vae"), texts, _number(recipe.clip_guidance_scale), _number(clamp))


def _number(value):
    return None if value is None else np.float32(value)


def _for_each(array, batch, name):
    """One for all, or one for each picture."""
    array = jnp.asarray(array)
    if len(array) not in (1, batch):
        raise ValueError(f"{name} holds {len(array)} pictures, the prompts ask for {batch}")
    return jnp.broadcast_to(array, (batch, *array.shape[1:]))


def _tile(pipe, recipe, start) -> int | None:
    """The side of a tile in latents. Raises ValueError where it, or the number of prompts for tiles, cannot be."""
    prompts = recipe.tile_prompts or ()
    if recipe.tile is None:
        if prompts:
            raise ValueError("tile_prompts= is for the tiles of tile=: give both, or leave it out")
        return None
    factor = pipe.spec.vae.downscale
    if recipe.tile < 4 * factor or recipe.tile % factor:
        raise ValueError(f"tile={recipe.tile}: a multiple of {factor} pixels is needed, at least {4 * factor}")
    tile = recipe.tile // factor
    if prompts:
        corners = lay_tiles(*start.size, tile).corners
        rows = len({top for top, _ in corners})
        if len(prompts) != len(corners):
            laid = f"{rows} rows of {len(corners) // rows}"
            raise ValueError(f"tile_prompts= holds {len(prompts)}, and here are {len(corners)} tiles, {laid}")
    return tile


# -- The walk --------------------------------------------------------------------------------------------------------


class _Carry(NamedTuple):
    """What is kept between steps."""

    sampler: Any  # (x, D of the last step, the sampler's state)
    call: Int[Array, ""]  # how often the denoiser was called
    momentum: Float[Array, "batch h w c"] | None  # of the guidance


class _Shown(NamedTuple):
    """What the U-Net sees of the prompt or of the negative one, and beside the latents."""

    rows: Rows
    concat: Any
    seen: tuple[Seen, ...]  # of each hint


class _Clip(NamedTuple):
    params: Params
    vae: Params
    texts: Float[Array, "batch width"]
    scale: Any
    clamp: Any


class _Run(NamedTuple):
    """What stays the same; all of it traced."""

    ladder: schedules.Ladder
    begin: Any  # the first step; None = 0, for samplers that make their own ladder
    told: Told
    guidance: guidance.Guidance
    options: SamplerOptions
    keys: Any
    draws: Any
    noise: Any  # with a mask: the starting noise
    clean: Any
    mask: Any
    blind_from: Any  # with a mask: the sigma from which up the model sees nothing of the picture
    concat: Any
    clip: _Clip | None
    adapters: adapters.On | None  # of the U-Net
    steered: Steered  # by hints


# A program of its own: so the same noise, given by hand, makes the same picture to the bit
_starting_noise = functools.partial(sharding.jit, static_argnums=1)(noise.starting_noise)


@functools.partial(sharding.jit, static_argnames=("sampler", "momentum"))
def _begin(latents, clean, ladder, begin, from_noise, *, sampler, momentum):
    """The carry before the first step."""
    latents = latents.astype(jnp.float32)
    x = latents * ladder.start
    if clean is not None:
        x = jnp.where(from_noise, x, clean.astype(jnp.float32) + ladder.sigmas[begin] * latents)
    state = (x, jnp.zeros_like(x), samplers.sampler_named(sampler).init(x))
    return _Carry(state, jnp.zeros((), jnp.int32), jnp.zeros_like(x) if momentum else None)


@functools.partial(sharding.jit, static_argnames=("networks", "sampler", "tile", "clip", "controls"))
def _walk(
    params: Params,
    run: _Run,
    carry: _Carry,
    first,
    last,
    *,
    networks: Networks,
    sampler: str,
    tile: int | None,
    clip: CLIP | None,
    controls: tuple[ControlNet | T2IAdapter, ...],
) -> _Carry:
    """Steps first to last - 1. Only shapes, the sampler and which options are given compile anew."""
    call = jax.new_ref(carry.call)
    momentum = None if carry.momentum is None else jax.new_ref(carry.momentum)

    # Guidance shows each picture twice, to differ in context alone
    alone = run.told.negative is not None and run.told.weights is None and networks.spec.unet.told_by_context_alone

    def predict(model_input, timesteps, shown: _Shown):
        if alone:
            pictures = carry.sampler[0].shape[0]
            model_input, timesteps = model_input[:pictures], timesteps[:pictures]
        conditioning = of_call(run.told.table, shown.rows, call[...])
        added = control.control_of(
            controls, run.steered.steering, shown.seen, call[...], model_input, timesteps, conditioning
        )
        if shown.concat is not None:
            concat = shown.concat[: model_input.shape[0]].astype(model_input.dtype)
            model_input = jnp.concatenate([model_input, concat], axis=-1)
        unet = adapters.wearing(networks, run.adapters, call[...], shown.rows.pictures).unet
        return unet.apply({"params": params}, model_input, timesteps, conditioning, added)

    def of_place(shown: _Shown, cut, number) -> _Shown:
        seen = tuple(each._replace(read=cut(each.read)) for each in shown.seen)
        return _Shown(of_tile(shown.rows, number), None if shown.concat is None else cut(shown.concat), seen)

    model = make_denoiser(predict, networks.spec.noise_schedule)
    if tile is not None:
        model = tiled_denoiser(model, tile, cut=of_place)
    weights = run.told.weights
    parts = 1 if weights is None else weights.shape[1]
    concat = None if run.concat is None else jnp.repeat(run.concat, parts, axis=0)
    positive = _Shown(run.told.positive, concat, run.steered.positive)
    if run.told.negative is None:
        bound = guidance.conditioned(model, positive)
    else:
        negative = _Shown(run.told.negative, run.concat, run.steered.negative)
        told_scale = networks.spec.unet.time_cond_proj_dim is not None  # and so only adds up the parts of a prompt
        guide = run.guidance._replace(scale=np.float32(1)) if told_scale else run.guidance
        rescale_in = networks.spec.noise_schedule.prediction_type
        bound = guidance.guided(model, positive, negative, guide, rescale_in, momentum, weights)
    if clip is not None:
        likeness = functools.partial(_likeness, networks, clip, run.clip)
        bound = guidance.by_gradient(bound, likeness, run.clip.scale, run.clip.clamp)
    if run.mask is not None:
        bound = within_mask(bound, run.clean, run.noise, run.mask, run.blind_from)

    def counted(x, sigma):
        denoised = bound(x, sigma)
        call[...] = call[...] + 1
        return denoised

    walk = samplers.prepare(
        counted, carry.sampler[0], run.ladder.sigmas, sampler, run.keys, run.draws, run.options, run.begin
    )
    state = jax.lax.fori_loop(first, last, walk.step, carry.sampler)
    return _Carry(state, call[...], None if momentum is None else momentum[...])


def _likeness(networks: Networks, clip: CLIP, guide: _Clip, x, sigma) -> Float[Array, " batch"]:
    """How near the prompts CLIP finds the noisy pictures' middle squares, as log p of guidance: its logits."""
    c_in = prediction(networks.spec.noise_schedule.prediction_type).c_in
    latents = along_batch(c_in(sigma), x) * x / networks.spec.vae.scaling_factor
    image = networks.vae.apply({"params": guide.vae}, latents, method="decode")
    side = min(image.shape[1:3])
    top, left = ((length - side) // 2 for length in image.shape[1:3])
    features = clip.encode_picture(guide.params, image[:, top : top + side, left : left + side])
    return jnp.exp(guide.params["logit_scale"]) * jnp.sum(features * guide.texts, axis=-1)


@sharding.jit
def _end(x, factor, clean, mask):
    latents = x * factor
    if mask is not None:  # where a ladder ends above sigma 0, x still has noise
        latents = mask * latents + (1 - mask) * clean.astype(jnp.float32)
    return latents, jnp.isfinite(latents).all()
