"""Text to image: prompts, noise, one jitted loop, decode."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from sd_jax import sharding
from sd_jax.diffusion import guidance, noise, samplers, schedules
from sd_jax.diffusion.denoiser import make_denoiser
from sd_jax.models.networks import Networks
from sd_jax.models.vae import to_pixels
from sd_jax.types import Conditioning, Latents, Params, Recipe

if TYPE_CHECKING:
    from sd_jax.sampling.pipeline import Pipeline


def text_to_image(
    pipe: "Pipeline",
    prompt: str | Sequence[str],
    recipe: Recipe,
    latents: Latents | None = None,
    conditioning: Conditioning | None = None,
    negative_conditioning: Conditioning | None = None,
    output: str = "images",
    callback: Callable | None = None,
) -> np.ndarray:
    """The job behind `Pipeline.text_to_image`, whose docstring says what the arguments are."""
    if output not in ("images", "latents"):
        raise ValueError(f"output={output!r} is unknown: use images or latents")

    # Prompts
    if conditioning is None:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        conditioning = _repeat(pipe.encode_prompts(prompts, recipe.clip_skip), recipe.batch_size)
    batch = conditioning.context.shape[0]
    guided = float(recipe.guidance_scale) != 1.0
    if guided and negative_conditioning is None:
        negative_conditioning = _repeat(pipe.encode_prompts([recipe.negative_prompt], recipe.clip_skip), batch)

    # Noise
    keys = noise.image_keys(recipe.seed, batch)
    if latents is None:
        latents = noise.starting_noise(keys, latent_shape(pipe.spec, recipe))
    elif latents.shape[0] != batch:
        raise ValueError(f"latents hold {latents.shape[0]} pictures, the prompts ask for {batch}")

    # Denoise, decode
    ladder = schedules.make_ladder(recipe.schedule, recipe.steps, pipe.spec.noise_schedule, recipe.sampler)
    latents = _denoise(
        pipe._part("unet"),
        jnp.asarray(latents),
        ladder,
        conditioning,
        negative_conditioning,
        jnp.float32(recipe.guidance_scale),
        keys,
        networks=pipe.networks,
        sampler=recipe.sampler,
        guided=guided,
        callback=callback,
    )
    _check_finite(latents, "denoising")
    if output == "latents":
        return np.asarray(latents)
    image = pipe.decode_latents(latents)
    _check_finite(image, "decoding by the autoencoder")
    return np.asarray(_to_pixels(image))


def latent_shape(spec, recipe: Recipe) -> tuple[int, int, int]:
    """[height, width, channels] of a picture's latents. Raises ValueError for a size that the networks cannot make."""
    factor = spec.vae.downscale
    multiple = factor * 2 ** (len(spec.unet.block_out_channels) - 1)
    trained = spec.unet.sample_size * factor
    sides = {"height": recipe.height or trained, "width": recipe.width or trained}
    for name, side in sides.items():
        if side < 1 or side % multiple:
            near = max(multiple, round(side / multiple) * multiple)
            raise ValueError(f"{name}={side} is not a multiple of {multiple}: use {near}")
    return sides["height"] // factor, sides["width"] // factor, spec.vae.latent_channels


def _repeat(conditioning: Conditioning, times: int) -> Conditioning:
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), conditioning)


@functools.partial(sharding.jit, static_argnames=("networks", "sampler", "guided", "callback"))
def _denoise(
    params: Params,
    latents: Latents,
    ladder: schedules.Ladder,
    conditioning: Conditioning,
    negative_conditioning: Conditioning | None,
    guidance_scale: jax.Array,
    keys: jax.Array,
    *,
    networks: Networks,
    sampler: str,
    guided: bool,
    callback: Callable | None,
) -> Latents:
    """The whole loop as one compiled function: only shapes, sampler and `guided` compile anew."""

    def predict(model_input, timesteps, conditioning):
        return networks.unet.apply({"params": params}, model_input, timesteps, conditioning.context)

    denoise = make_denoiser(predict, networks.spec.noise_schedule)
    if guided:
        denoise = guidance.classifier_free(denoise, conditioning, negative_conditioning, guidance_scale)
    else:
        denoise = guidance.conditioned(denoise, conditioning)
    x = samplers.sample(denoise, latents * ladder.start, ladder.sigmas, sampler, rng=keys, callback=callback)
    return x * ladder.end


_to_pixels = sharding.jit(to_pixels)


def _check_finite(x: jax.Array, stage: str) -> None:
    if not bool(jnp.isfinite(x).all()):
        raise FloatingPointError(f"{stage} gave numbers that are not finite: use dtype=float32 or bfloat16")
