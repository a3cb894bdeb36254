"""The picture that a run draws of its progress: of prompts, or what the model makes of pictures that there are."""

from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from sd_jax import media
from sd_jax.diffusion.low_resolution import make_small
from sd_jax.diffusion.noise import image_keys
from sd_jax.models.vae import to_image, to_pixels
from sd_jax.sampling.pipeline import Pipeline
from sd_jax.training import control, inpainting
from sd_jax.training.methods import method_of
from sd_jax.training.start import Model
from sd_jax.types import Conditioning, Params, Pixels
from sd_jax.upscalers.esrgan import Upscaler

SEED = 0  # the same noise at every step of a run: what changes is the model


SHOWN = 12  # pictures that are shown again


def draw(config: ConfigDict, model: Model, params: Params, batch: dict[str, np.ndarray]) -> np.ndarray:
    """A sheet, uint8 [height, width, 3]. An autoencoder shows pictures of `batch` and, below, what it makes of them; a
    model that enlarges shows them made small, what it makes of those, and them; one that inpaints shows them with a
    part hidden, and what it makes of those and of `samples.prompts`; a control its hints, what it makes of them with
    the same captions, and the pictures that they are of; an IP-Adapter pictures, and below what it makes of them and of
    `samples.prompts`; a model that is told pictures likewise, without prompts."""
    params = dict(params)
    if config.method == "esrgan":
        larger = Upscaler(model.networks.spec.upscaler, params["upscaler"], config.dtype)
        return _enlarged(larger, larger.scale, batch["pixels"][:SHOWN])
    adapter = params.pop("adapter", None)
    pipe = Pipeline(model.networks.spec, params, model.tokenizer, config.dtype)
    if adapter is not None:
        pipe = method_of(config).adapting.put_on(config, pipe, adapter)
    if config.method == "autoencoder":
        pixels = batch["pixels"][:SHOWN]
        again = np.asarray(to_pixels(pipe.decode_latents(pipe.encode_image(pixels))))
        return media.contact_sheet(np.concatenate([pixels, again]), columns=len(pixels))
    recipe = config.samples
    fields = {
        "sampler": recipe.sampler,
        "schedule": recipe.schedule,
        "steps": recipe.steps,
        "guidance_scale": recipe.guidance_scale,
        "seed": SEED,
    }
    if adapter is not None and "control" in config:
        batch = {name: values[:SHOWN] for name, values in batch.items()}
        hints = np.asarray(control.hints_of(config, batch, image_keys(SEED, len(batch["pixels"]))))
        return _steered(pipe, control.model_of(config, model.networks.spec, adapter), hints, batch, fields)
    if config.method == "super_resolution":
        told = _told(pipe, batch)
        size = {"height": batch["pixels"].shape[1], "width": batch["pixels"].shape[2]}
        enlarge = lambda small: pipe.upscale(small, conditioning=told, **size, **fields)  # noqa: E731
        return _enlarged(enlarge, config.super_resolution.factor, batch["pixels"][:SHOWN])
    if config.method == "inpainting":
        return _redrawn(config, pipe, recipe.prompts, batch, fields)
    if pipe.spec.sees_pictures:
        return _shown(pipe, [""] * len(recipe.prompts), batch, fields)
    if config.method == "ip_adapter":
        return _shown(pipe, recipe.prompts, batch, fields)
    size = config.data.resolution
    images = pipe.text_to_image(list(recipe.prompts), width=size, height=size, **fields)
    return media.contact_sheet(images, captions=recipe.prompts)


def _told(pipe: Pipeline, batch: dict[str, np.ndarray]) -> Conditioning:
    """What the captions of the pictures that are shown say."""
    if "input_ids" in batch:
        return pipe.encode_tokens(batch["input_ids"][:SHOWN])
    return Conditioning(**{name: batch[name][:SHOWN] for name in ("context", "pooled") if name in batch})


def _redrawn(config, pipe, prompts, batch, fields) -> np.ndarray:
    shown = batch["pixels"][np.arange(len(prompts)) % len(batch["pixels"])]
    masks = np.asarray(inpainting.masks_of(config, shown, image_keys(SEED, len(shown))))
    made = pipe.inpaint(list(prompts), image=shown, mask=masks[..., 0], **fields)
    hidden = np.where(masks == 1, np.uint8(128), shown)
    return media.contact_sheet(np.concatenate([hidden, made]), columns=len(shown))


def _steered(pipe, steering, hints, batch, fields) -> np.ndarray:
    real = batch["pixels"]
    size = {"height": real.shape[1], "width": real.shape[2]}
    made = pipe.text_to_image(control=steering.hint(hints), conditioning=_told(pipe, batch), **size, **fields)
    seen = np.where(hints < 0, np.uint8(128), np.rint(255 * hints).astype(np.uint8))
    return media.contact_sheet(np.concatenate([seen, made, real]), columns=len(real))


def _shown(pipe, prompts, batch, fields) -> np.ndarray:
    shown = batch["pixels"][np.arange(len(prompts)) % len(batch["pixels"])]
    size = {"height": shown.shape[1], "width": shown.shape[2]}
    made = pipe.text_to_image(list(prompts), image_prompt=shown, **size, **fields)
    return media.contact_sheet(np.concatenate([shown, made]), columns=len(shown))


def _enlarged(enlarge: Callable[[Pixels], Pixels], factor: int, large: Pixels) -> np.ndarray:
    """Pictures made so much smaller, what is made of those, and the pictures."""
    small = np.asarray(to_pixels(make_small(to_image(large), factor)))
    shown = small.repeat(factor, axis=1).repeat(factor, axis=2)
    return media.contact_sheet(np.concatenate([shown, enlarge(small), large]), columns=len(large))
