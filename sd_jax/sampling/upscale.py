"""Upscaling: a large picture of a small one, in one of METHODS.

model     a U-Net sees the small picture, noised, and is told how much: Stable Diffusion's x4 upscaler, and what
          config.method='super_resolution' trains; or its latents as they are: Stable Diffusion's x2 latent upscaler
redraw    any model: the picture is enlarged, noised a part of the way and denoised again
enlarger  a network that enlarges in one step (`sd_jax.load_upscaler`), and nothing else
"""

import functools
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from sd_jax import sharding
from sd_jax.diffusion import low_resolution, noise
from sd_jax.models.presets import KUNetConfig
from sd_jax.models.vae import to_image
from sd_jax.sampling import canvas
from sd_jax.sampling.denoising import Start, denoise, keys_of
from sd_jax.sampling.image_to_image import encoded
from sd_jax.sampling.text_to_image import size_of

if TYPE_CHECKING:
    from sd_jax.models.presets import ModelSpec
    from sd_jax.sampling.pipeline import Pipeline
    from sd_jax.types import Pixels, Recipe

METHODS = ("model", "redraw", "enlarger")
NOISE_LEVEL = 20
STRENGTH, SCALE = 0.35, 2.0  # of redraw
TWICE = 2  # as large as what it sees the x2 latent upscaler makes latents


def is_upscaler(spec: "ModelSpec") -> bool:
    sees_pixels = spec.unet.num_class_embeds is not None and spec.unet.in_channels == spec.vae.latent_channels + 3
    return sees_pixels or sees_latents(spec)


def sees_latents(spec: "ModelSpec") -> bool:
    return isinstance(spec.unet, KUNetConfig)


def defaults(spec: "ModelSpec") -> dict[str, Any]:
    """What the job takes for such a model where the recipe has None."""
    if sees_latents(spec):
        return {}
    return {"noise_level": NOISE_LEVEL} if is_upscaler(spec) else {"strength": STRENGTH}


def upscale(
    pipe: "Pipeline",
    prompt,
    recipe: "Recipe",
    image,
    method: str | None,
    enlarger: Any,
    image_noise,
    given,
    output: str,
    callback,
) -> np.ndarray:
    """The job behind `Pipeline.upscale`, whose docstring says what the arguments are."""
    method = method_of(pipe.spec, method)
    if method == "model":
        if enlarger is not None or recipe.scale is not None or recipe.strength is not None:
            raise ValueError("enlarger=, scale= and strength= are for method='redraw': leave them out")
        if sees_latents(pipe.spec):
            return _by_latents(pipe, prompt, recipe, image, image_noise, given, output, callback)
        return _by_model(pipe, prompt, recipe, image, image_noise, given, output, callback)
    if image_noise is not None or recipe.noise_level is not None:
        raise ValueError("image_noise= and noise_level= are for models that were trained to enlarge: leave them out")
    pixels = canvas.read_pixels(image)
    if method == "enlarger":
        if enlarger is None or recipe.strength is not None or output != "images":
            raise ValueError("method='enlarger' makes pictures, by enlarger= alone: give sd_jax.load_upscaler(path)")
        return enlarged(pixels, *_enlarged_size(recipe, pixels, enlarger.scale, 1), enlarger, recipe.tile)
    size = _enlarged_size(recipe, pixels, SCALE, pipe.spec.vae.downscale)
    clean = encoded(pipe, enlarged(pixels, *size, enlarger, recipe.tile), recipe.tile)
    strength = STRENGTH if recipe.strength is None else recipe.strength
    start = Start(clean.shape[1:3], clean, strength)
    return pipe.finish(denoise(pipe, prompt, recipe, start, given, callback), output, recipe.tile)


def method_of(spec: "ModelSpec", method: str | None) -> str:
    """None = the only one that a model was trained for, or that it was not trained for. Raises ValueError."""
    trained = is_upscaler(spec)
    if method is None:
        return "model" if trained else "redraw"
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: use {', '.join(METHODS)}")
    if method == "model" and not trained:
        raise ValueError(
            "this model is no upscaler: load one, such as stabilityai/stable-diffusion-x4-upscaler, "
            "stabilityai/sd-x2-latent-upscaler or a run of config.method='super_resolution'"
        )
    if method == "redraw" and trained:
        raise ValueError("method='redraw' is for models that make pictures of prompts alone: leave it out")
    return method


def enlarged(pixels: "Pixels", height: int, width: int, enlarger: Any = None, tile: int | None = None) -> "Pixels":
    """By the enlarger until it is as large, and by Lanczos' filter to this size; without one by that alone."""
    while enlarger is not None and enlarger.scale > 1 and (pixels.shape[1] < height or pixels.shape[2] < width):
        pixels = enlarger(pixels, tile)
    return canvas.resize(pixels, height, width)


def _enlarged_size(recipe, pixels, scale, multiple) -> tuple[int, int]:
    scale = scale if recipe.scale is None else recipe.scale
    if scale <= 1:
        raise ValueError(f"scale={scale:g}: more than 1 is needed")
    return canvas.fit_size(*size_of(recipe, *(round(side * scale) for side in pixels.shape[1:3])), multiple)


def _by_model(pipe, prompt, recipe, image, image_noise, given, output, callback) -> np.ndarray:
    level = _level(pipe, recipe)
    small, size = _sized(pipe, recipe, canvas.read_pixels(image))
    texts = 1 if isinstance(prompt, str) else len(prompt)
    told = texts * recipe.batch_size if given.conditioning is None else len(given.conditioning.context)
    batch = max(len(small), told)  # each picture has noise of its own
    if not {len(small), told} <= {1, batch}:
        raise ValueError(f"image holds {len(small)} pictures, the prompts ask for {told}")
    shape = small.shape[1:]
    if image_noise is None:
        image_noise = _small_noise(keys_of(recipe, batch), shape)
    elif np.shape(image_noise) not in ((1, *shape), (batch, *shape)):
        raise ValueError(f"image_noise has the shape {np.shape(image_noise)}, small pictures {(batch, *shape)}")
    concat = _beside_latents(small, jnp.asarray(image_noise), np.int32(level), size)
    start = Start(size, concat=concat, class_label=level)
    return pipe.finish(denoise(pipe, prompt, recipe, start, given, callback), output, recipe.tile)


def _by_latents(pipe, prompt, recipe, image, image_noise, given, output, callback) -> np.ndarray:
    if image_noise is not None or recipe.noise_level is not None:
        raise ValueError("image_noise= and noise_level=: this model sees the small picture as it is, leave them out")
    small = _small_latents(pipe, recipe, image)
    concat = small.repeat(TWICE, axis=1).repeat(TWICE, axis=2)
    start = Start(concat.shape[1:3], concat=concat)
    return pipe.finish(denoise(pipe, prompt, recipe, start, given, callback), output, recipe.tile)


def _small_latents(pipe, recipe, image) -> np.ndarray:
    """[batch, h, w, c], of a picture, or latents as jobs return them."""
    spec = pipe.spec
    multiple = spec.unet.multiple // TWICE
    if np.ndim(image) == 4 and np.shape(image)[-1] == spec.vae.latent_channels:
        latents = np.asarray(image, np.float32)
        height, width = (side * TWICE * spec.vae.downscale for side in latents.shape[1:3])
        if size_of(recipe, height, width) != (height, width):
            raise ValueError(f"width=, height=: of these latents it makes {width}x{height} pixels, leave them out")
        if latents.shape[1] % multiple or latents.shape[2] % multiple:
            raise ValueError(f"latents of the shape {latents.shape}: height and width must be multiples of {multiple}")
        return latents
    pixels = canvas.read_pixels(image)
    size = size_of(recipe, *(side * TWICE for side in pixels.shape[1:3]))
    size = canvas.fit_size(*size, TWICE * multiple * spec.vae.downscale)
    return np.asarray(encoded(pipe, canvas.resize(pixels, *(side // TWICE for side in size)), recipe.tile))


def _level(pipe, recipe) -> int:
    level = NOISE_LEVEL if recipe.noise_level is None else recipe.noise_level
    highest = low_resolution.highest_level(pipe.spec.unet.num_class_embeds)
    if not 0 <= level <= highest:
        raise ValueError(f"noise_level={level}: this model knows levels 0 to {highest}")
    return level


def _sized(pipe, recipe, pixels: "Pixels") -> tuple["Pixels", tuple[int, int]]:
    """The small picture as it is shown, and the latents' height and width."""
    factor, (height, width) = pipe.spec.vae.downscale, pixels.shape[1:3]
    if factor == 1:
        for name in ("width", "height"):
            if getattr(recipe, name) is None:
                raise ValueError(f"{name}= is needed: a model that works on pixels does not say how much it enlarges")
        return pixels, size_of(recipe, height, width)
    height, width = canvas.fit_size(*size_of(recipe, height * factor, width * factor), factor)
    size = height // factor, width // factor
    return canvas.resize(pixels, *size), size


@functools.partial(sharding.jit, static_argnums=1)
def _small_noise(keys, shape):
    return noise.normal(keys, noise.SMALL_PICTURE, shape)


@functools.partial(sharding.jit, static_argnums=3)
def _beside_latents(pixels, image_noise, level, size):
    image = to_image(pixels)
    batch = max(len(image), len(image_noise))
    small, n = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in (image, image_noise.astype(jnp.float32)))
    return low_resolution.enlarged(low_resolution.noised(small, n, jnp.broadcast_to(level, batch)), size)
