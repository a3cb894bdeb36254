"""A loaded model and the jobs that it does: what `sd_jax.load` returns."""

import copy
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from logging import getLogger
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sd_jax import hardware, sharding, trees
from sd_jax.checkpoints.load import open_checkpoint
from sd_jax.checkpoints.place import place
from sd_jax.checkpoints.save import save_checkpoint
from sd_jax.diffusion import schedules
from sd_jax.media import Picture
from sd_jax.models.networks import Networks
from sd_jax.models.presets import ModelSpec
from sd_jax.models.vae import to_image, to_pixels
from sd_jax.names import hint
from sd_jax.prompts.encode import encode_texts
from sd_jax.prompts.tokenize import Tokenizer, load_tokenizer
from sd_jax.sampling import adapters, hires_fix, image_to_image, inpaint, text_to_image, upscale
from sd_jax.sampling.clip import Clip
from sd_jax.sampling.conditioning import refuse_untold, time_ids
from sd_jax.sampling.control import Hint
from sd_jax.sampling.denoising import Given, Start, check_finite, count_walked
from sd_jax.sampling.image_prompt import ImageEncoder
from sd_jax.sampling.tiles import FLAT, choose_tile, decode_tiled, encode_tiled
from sd_jax.types import AnyArray, Conditioning, Image, Latents, Params, Pixels, Recipe, TokenIds

# The fields that only some jobs read
_STARTED = ("image_to_image", "inpaint", "hires_fix")
JOBS_OF_FIELD = {
    "strength": (*_STARTED, "upscale"),
    "strength_steps": (*_STARTED, "upscale"),
    **dict.fromkeys(("only_masked", "padding", "extend"), ("inpaint",)),
    "scale": ("hires_fix", "upscale"),
    **dict.fromkeys(("second_steps", "upscaler"), ("hires_fix",)),
    "noise_level": ("upscale",),
    "refiner_switch": ("text_to_image",),
    **dict.fromkeys(("clip_guidance_scale", "clip_guidance_clamp"), ("text_to_image", *_STARTED)),
}
# What a job needs where a checkpoint lacks it
_MENDS = {
    "unet": "load a whole one",
    "vae": "give another checkpoint's, as vae= (--vae=)",
    "text_encoder": "give another checkpoint's, as text_encoder= (--text_encoder=)",
    "text_encoder_2": "give another checkpoint's, as text_encoder= (--text_encoder=)",
    "image_encoder": "load a whole one",
}

BUNDLED = pathlib.Path(__file__).parents[1] / "assets" / "shapes_64"
AT_ONCE = 2**28  # bytes of weights that `load` reads in a moment

logger = getLogger(__name__)


def load(
    path: str | pathlib.Path | None = None,  # a workdir, a folder, a file or a hub name; None = the bundled model
    dtype: str = "float32",  # of weights and computation
    tokenizer: str | None = None,  # a folder or hub name; None = the checkpoint's own, else CLIP's from the hub
    vae: str | pathlib.Path | None = None,  # another checkpoint to take the autoencoder from; a tiny one, too
    weights: str = "ema",  # "ema" (raw where there is none), "raw", or "ema:0.999" of a workdir with several
    config: Any = None,  # of a single file: a .yaml, a diffusers folder, a name of FAMILIES, a ModelSpec; None = found
    prediction_type: str | None = None,  # "epsilon", "v_prediction", ...; None = what the checkpoint says
    text_encoder: Any = None,  # another checkpoint to take the text encoders from, or a list of one for each of them
) -> "Pipeline":
    """Opens a checkpoint of any kind. Raises FileNotFoundError or CheckpointError, naming the file and the mend.

    Names and shapes are checked now. A small model is also read now; of one whose weights are more than AT_ONCE bytes,
    each part is read when a job first asks for it, so a weight that is not finite is found then.
    How what the checkpoint does not say was decided, such as the prediction type, is logged.
    """
    sharding.keep_compilations()
    source = BUNDLED if path is None else path
    checkpoint = open_checkpoint(source, weights, tokenizer, vae, dtype, config, prediction_type, text_encoder)
    for note in checkpoint.notes:
        logger.info("%s", note)
    pipe = Pipeline(checkpoint.spec, checkpoint.params, checkpoint.tokenizer, dtype, source)
    if trees.num_bytes(checkpoint.params) <= AT_ONCE:
        pipe.read()
    return pipe


class Pipeline:
    """A model on the device. Every method is a pure function of its arguments and the weights."""

    def __init__(
        self,
        spec: ModelSpec,
        params: Params,  # {part: tree}, of arrays or Tensors; a part may be missing until a job needs it
        tokenizer: Tokenizer | str | pathlib.Path | None = None,  # None = CLIP's, from the hub or its cache
        dtype: str = "float32",
        where: str | pathlib.Path = "the model",  # for messages: what the params are of
    ):
        self.spec, self.dtype, self._where = spec, dtype, where
        self._params = dict(params)
        self._on_device: set[str] = set()  # parts
        self.networks = Networks.of(spec, dtype)
        self.adapters: tuple[adapters.Worn, ...] = ()  # of `with_adapter`, in their order
        self.tag_folder: pathlib.Path | None = None  # of `with_tags`
        self._tokenizer = tokenizer

    @property
    def params(self) -> Params:
        """{part: tree} on the device, of the parts that are there. What no job has used yet is read now."""
        return {part: self._part(part) for part in self._params}

    def read(self) -> None:
        """All parts, now. Raises CheckpointError naming a weight that is not finite."""
        for part in self._params:
            self._part(part)

    @property
    def tokenizer(self) -> Tokenizer:
        """Loaded at first use: a file without one is good for everything but prompts."""
        if not isinstance(self._tokenizer, Tokenizer):
            self._tokenizer = load_tokenizer(self._tokenizer)
            for config in self.spec.text_encoders.values():
                self._tokenizer.check(config)
            self._tokenizer.pad_as(next(iter(self.spec.text_encoders.values())))
        return self._tokenizer

    @property
    def positions(self) -> int:
        """Tokens that the text encoders read at once."""
        return self.spec.positions

    @property
    def state_widths(self) -> tuple[int, ...]:
        """Of each text encoder's states, in the order in which they are joined."""
        return tuple(config.hidden_size for config in self.spec.text_encoders.values())

    # --- Adapters ----------------------------------------------------------------------------------------------------

    def with_adapter(
        self,
        path: Any,  # a file, a folder of embeddings, a workdir; or layers as `sd_jax.adapters.deltas` has them
        strength: adapters.Schedule = 1.0,  # in the U-Net; or (share of the steps from which on, strength) pairs
        text_strength: float | None = None,  # in the text encoders; None = that of the U-Net
        blocks: Mapping[str, float] | None = None,  # pattern of re.search in "part/path": times so much; first match
        image_encoder: Any = None,  # of IP-Adapters alone: the CLIP that they see through, any path of `load_clip`, or
        # transformers' folder of its vision tower; None = the folder image_encoder beside the file
    ) -> "Pipeline":
        """A new pipeline with an adapter on, over those that this one has. This one stays as it is.

        Of the LoRA family (kohya's, LyCORIS', PEFT's files), a hypernetwork (A1111's), an IP-Adapter, whose pictures
        jobs then take as image_prompt=, or embeddings of textual inversion, which prompts then call by their tokens.
        Another strength or picture, or another adapter of the same shapes, compiles nothing. Raises FileNotFoundError
        or CheckpointError, naming file and key, for what does not belong to this model; ValueError for a strength that
        is none, or a pattern that finds no layer.
        """
        return adapters.put_on(self, path, strength, text_strength, blocks, image_encoder)

    def with_tags(self, folder: str | pathlib.Path) -> "Pipeline":
        """A new pipeline that does what `<lora:name:0.8>`, `<lyco:...>` and `<hypernet:...>` in a prompt ask for, with
        the files of this folder and the folders in it. Without, such tags are left out with a warning."""
        folder = pathlib.Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no such folder: {folder}")
        return self.changed(tag_folder=folder)

    def merge_adapters(self) -> "Pipeline":
        """A new pipeline with the LoRA family's changes in its weights: as fast as a model without. Hypernetworks,
        which change no weights, stay on. Raises ValueError where a strength changes on the way."""
        return adapters.merge_into(self)

    def changed(self, **attributes) -> "Pipeline":
        """The same pipeline but for these attributes; parameters are shared."""
        other = copy.copy(self)
        other._params, other._on_device = dict(self._params), set(self._on_device)
        for name, value in attributes.items():
            setattr(other, name, value)
        return other

    # --- The parts ---------------------------------------------------------------------------------------------------

    def encode_prompts(
        self, prompts: Sequence[str], clip_skip: int | None = None, syntax: str = "a1111"
    ) -> Conditioning:
        """Prompts -> the text encoders' states, weighted and chunked as `syntax` says (a1111, comfy or plain).

        Schedules and AND are text here: they take turns and add up while a picture is made. An empty prompt is encoded
        like any other, also where the family's empty negative prompt is zeros (SDXL).
        """
        encode = functools.partial(self.encode_tokens, clip_skip=clip_skip)
        return encode_texts(prompts, self.tokenizer, encode, self.positions, syntax, self.state_widths)

    def encode_tokens(self, ids: TokenIds, clip_skip: int | None = None) -> Conditioning:
        """`clip_skip` as A1111 counts: 1 = last layer; None = the family's own (SD 1.x: 1, SDXL: 2)."""
        params = {part: self._part(part) for part in self.spec.text_encoders}
        on = adapters.of_text_encoders(self.adapters)
        return _encode_tokens(params, self.networks, jnp.asarray(ids, jnp.int32), clip_skip, on)

    def encode_pictures(self, pictures: Sequence[Picture]) -> Conditioning:
        """Of models that are told pictures in place of text: for each, of any size, its CLIP features as one token."""
        encoder = ImageEncoder(self.spec.image_encoder, self._part("image_encoder"), self.dtype)
        return Conditioning(encoder.features(pictures)[:, None])

    def predict(
        self,
        latents: Float[AnyArray, "batch h w seen"],  # and what such a U-Net sees beside them
        timesteps: Float[AnyArray, " batch"],  # of the x2 latent upscaler: ln(sigma) / 4
        conditioning: Conditioning,
    ) -> Latents:
        """The raw output of the U-Net, NHWC, for latents as it sees them (scaled by 1 / sqrt(1 + sigma^2)).

        `time_ids` that a family reads and the conditioning lacks are those of an uncropped picture of this size.
        """
        if conditioning.time_ids is None:
            size = (side * self.spec.vae.downscale for side in latents.shape[1:3])
            ids, _ = time_ids(self.spec, Recipe(), *size)
            ids = None if ids is None else jnp.broadcast_to(jnp.asarray(ids)[None], (len(latents), len(ids)))
            conditioning = conditioning.replace(time_ids=ids)
        on = adapters.of_unet(self.adapters, 1)
        latents, timesteps = jnp.asarray(latents), jnp.asarray(timesteps)
        return _predict(self._part("unet"), self.networks, latents, timesteps, conditioning, on)

    def encode_image(self, image: Image | Pixels, tile: int | None = None) -> Latents:
        """uint8 pixels, or floats in [-1, 1], NHWC -> scaled latents, the mean of the posterior.

        This and `decode_latents` work in overlapping tiles where memory would not do for the whole; with `tile`, that
        of a recipe, also where a picture is larger than it and than 1024 pixels (`tiles.FLAT`).
        """
        encode = functools.partial(_encode_image, self._part("vae"), self.networks)
        tile = self._tile_for(image.shape[0], *image.shape[1:3], tile)
        if tile is None:
            return encode(jnp.asarray(image))
        return jnp.asarray(encode_tiled(encode, image, self.spec.vae.downscale, tile))

    def decode_latents(self, latents: Latents, tile: int | None = None) -> Image:
        """Scaled latents -> image, about [-1, 1], float32, not clipped."""
        decode = functools.partial(_decode_latents, self._part("vae"), self.networks)
        factor = self.spec.vae.downscale
        tile = self._tile_for(latents.shape[0], *(side * factor for side in latents.shape[1:3]), tile)
        return (
            decode(jnp.asarray(latents)) if tile is None else jnp.asarray(decode_tiled(decode, latents, factor, tile))
        )

    def _tile_for(self, batch: int, height: int, width: int, tile: int | None) -> int | None:
        most = None if tile is None else max(tile, FLAT)
        return choose_tile(self.spec.vae, height, width, batch, hardware.free_memory(), most)

    # --- Jobs --------------------------------------------------------------------------------------------------------
    #
    # All take the fields of a Recipe by name, and
    #     prompt                 a string, or several, which make one batch; `batch_size` pictures of each
    #     latents                the starting noise, unit variance, [batch, h, w, c]; None = drawn from the seed
    #     noise                  the same by another name; or, with one axis more in front, recorded draws for a
    #                            stochastic sampler, [draws, batch, h, w, c], see `samplers.count_draws`
    #     conditioning           in place of prompts; negative_conditioning likewise
    #     control                hints of ControlNets and T2I-Adapters, `sd_jax.load_control(path).hint(image)`
    #     image_prompt           what an IP-Adapter shows, or a model is told in place of text (image variation): a
    #                            picture as in image_to_image (an array may hold one for each that is made), or a list
    #                            of such, which are shown at once; where several adapters are on, a list with one of
    #                            these for each
    #     output                 "images": uint8 [batch, height, width, 3]; "latents": scaled, float32
    #     callback               called on the host after each step: (step, x before it, denoised). Compiles nothing
    # and all but upscale
    #     clip                   of `load_clip`: guides by the middle square, as far as clip_guidance_scale says
    #
    # They raise ValueError, naming the field, for a recipe that cannot be made, and FloatingPointError, naming the
    # stage, where numbers are not finite (half precision is the usual cause).

    def text_to_image(
        self,
        prompt: str | Sequence[str] = "",
        *,
        latents: Latents | None = None,
        noise: AnyArray | None = None,
        conditioning: Conditioning | None = None,
        negative_conditioning: Conditioning | None = None,
        control: Any = (),  # hints, one or several
        image_prompt: Any = None,
        output: str = "images",
        callback: Callable | None = None,
        refiner: "Pipeline | None" = None,  # another model of the same latents, which walks the last steps
        clip: Clip | None = None,
        **recipe,  # of them, with a refiner: refiner_switch
    ) -> np.ndarray:
        """Pictures of a prompt."""
        made = self._recipe("text_to_image", output, recipe, refiner, clip)
        given = _given(latents, noise, conditioning, negative_conditioning, control, image_prompt)
        return text_to_image.text_to_image(self, prompt, made, given, output, callback, refiner, clip)

    def image_to_image(
        self,
        prompt: str | Sequence[str] = "",
        *,
        image: Any,  # a path, a PIL image, or an array: uint8 or floats in [0, 1], [height, width, 3] or a batch
        depth: Any = None,  # for models that see depth: a map as the image, or one number a pixel; bright = near
        latents: Latents | None = None,
        noise: AnyArray | None = None,
        conditioning: Conditioning | None = None,
        negative_conditioning: Conditioning | None = None,
        control: Any = (),  # hints, one or several
        image_prompt: Any = None,
        output: str = "images",
        callback: Callable | None = None,
        clip: Clip | None = None,
        **recipe,  # of them: strength, strength_steps
    ) -> np.ndarray:
        """A picture redrawn with a prompt: the higher `strength`, the freer. Its own size unless width or height say.

        Raises media.BadImage for a file that is no picture.
        """
        made = self._recipe("image_to_image", output, recipe, clip=clip)
        given = _given(latents, noise, conditioning, negative_conditioning, control, image_prompt)
        return image_to_image.image_to_image(self, prompt, made, image, depth, given, output, callback, clip)

    def inpaint(
        self,
        prompt: str | Sequence[str] = "",
        *,
        image: Any,  # as in image_to_image
        mask: Any = None,  # the same, or without channels, or bool: white is redrawn; None = only what `extend` adds
        latents: Latents | None = None,
        noise: AnyArray | None = None,
        conditioning: Conditioning | None = None,
        negative_conditioning: Conditioning | None = None,
        control: Any = (),  # hints, one or several
        image_prompt: Any = None,
        output: str = "images",
        callback: Callable | None = None,
        clip: Clip | None = None,
        **recipe,  # of them: strength, strength_steps, only_masked, padding, extend
    ) -> np.ndarray:
        """The white part of the mask redrawn; pixels where it is black come back equal to the bit.

        Raises ValueError for a mask of another size than the image's, media.BadImage for a file that is no picture.
        """
        made = self._recipe("inpaint", output, recipe, clip=clip)
        given = _given(latents, noise, conditioning, negative_conditioning, control, image_prompt)
        return inpaint.inpaint(self, prompt, made, image, mask, given, output, callback, clip)

    def hires_fix(
        self,
        prompt: str | Sequence[str] = "",
        *,
        latents: Latents | None = None,  # these, noise and draws are for the first pass
        noise: AnyArray | None = None,
        conditioning: Conditioning | None = None,
        negative_conditioning: Conditioning | None = None,
        control: Any = (),  # hints, one or several
        image_prompt: Any = None,
        output: str = "images",
        callback: Callable | None = None,
        clip: Clip | None = None,
        enlarger: Any = None,  # of `load_upscaler`: enlarges the picture, in place of `upscaler`
        **recipe,  # of them: scale, second_steps, strength, strength_steps, upscaler
    ) -> np.ndarray:
        """Pictures `scale` times as large as width and height: made, enlarged, and denoised a part of the way again."""
        made = self._recipe("hires_fix", output, recipe, clip=clip)
        given = _given(latents, noise, conditioning, negative_conditioning, control, image_prompt)
        return hires_fix.hires_fix(self, prompt, made, given, output, callback, clip, enlarger)

    def upscale(
        self,
        image: Any,  # as in image_to_image; the small picture. The x2 latent upscaler takes its latents as well
        prompt: str | Sequence[str] = "",
        *,
        method: str | None = None,  # "model", "redraw" or "enlarger"; None = the first, of models trained to, or redraw
        enlarger: Any = None,  # of `load_upscaler`; None = Lanczos' filter enlarges what is redrawn
        image_noise: AnyArray | None = None,  # on the small picture, unit variance, [batch or 1, h, w, 3]; None = drawn
        latents: Latents | None = None,
        noise: AnyArray | None = None,
        conditioning: Conditioning | None = None,
        negative_conditioning: Conditioning | None = None,
        control: Any = (),  # hints, one or several
        image_prompt: Any = None,
        output: str = "images",
        callback: Callable | None = None,
        **recipe,  # of them: noise_level (of model); scale, strength, strength_steps (of redraw, which is in tiles
        # where `tile` says so, and follows `control`)
    ) -> np.ndarray:
        """A picture made larger: by a model that was trained to, such as Stable Diffusion's x4 upscaler, by any model
        that redraws it enlarged, or by an enlarger alone.

        "model": where width and height do not say, it becomes as much larger as a picture is than its latents, which
        have the size of the small picture: 4 times. On pixels, where the two are one, both must be given. The higher
        `noise_level`, the less of the small picture is kept, and the more is made up. The x2 latent upscaler makes it
        twice as large, reads no noise_level, and takes what Stable Diffusion's jobs return with output="latents" in
        place of a picture. "redraw": `scale` times as large, 2; the higher `strength`, 0.35, the more is made up.
        Raises ValueError for a method that is not this model's, media.BadImage for a file that is no picture.
        """
        made = self._recipe("upscale", output, recipe)
        given = _given(latents, noise, conditioning, negative_conditioning, control, image_prompt)
        return upscale.upscale(self, prompt, made, image, method, enlarger, image_noise, given, output, callback)

    def make(
        self,
        recipe: Recipe,
        image: Any = None,
        mask: Any = None,
        callback: Callable | None = None,
        prompts: Sequence[str] | None = None,  # one batch of several, in place of the recipe's
        depth: Any = None,
        refiner: "Pipeline | None" = None,
        clip: Clip | None = None,
        control: Any = (),  # hints, one or several
        image_prompt: Any = None,
        enlarger: Any = None,
    ) -> np.ndarray:
        """The pictures of a recipe, by the job that it and what is given with it mean (`job_of`).

        Raises ValueError for an input that this job has no use for.
        """
        job = job_of(recipe, image, mask, depth, refiner, clip, self.spec, enlarger)
        inputs = {"image": image, "mask": mask, "depth": depth, "refiner": refiner, "clip": clip}
        inputs |= {"image_prompt": image_prompt, "enlarger": enlarger}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        fields = _fields(recipe) | ({} if prompts is None else {"prompt": prompts})
        return getattr(self, job)(callback=callback, control=control, **inputs, **fields)

    def steps_of(
        self,
        recipe: Recipe,
        image: Any = None,
        mask: Any = None,
        depth: Any = None,
        refiner: "Pipeline | None" = None,
        clip: Clip | None = None,
    ) -> int:
        """How many steps `make` takes: as often as it calls its callback."""
        job = job_of(recipe, image, mask, depth, refiner, clip, self.spec)
        recipe = self._recipe(job, "images", _fields(recipe), refiner, clip)
        if job == "hires_fix":
            return hires_fix.count_both(self, recipe)
        if job == "text_to_image" or (job == "upscale" and upscale.is_upscaler(self.spec)):
            return count_walked(self, recipe, Start((1, 1)))
        module = {"inpaint": inpaint, "upscale": upscale}.get(job, image_to_image)
        strength = module.STRENGTH if recipe.strength is None else recipe.strength
        return count_walked(self, recipe, Start((1, 1), clean=(), strength=strength))

    def sigmas(self, schedule: str = "normal", steps: int = 20, sampler: str = "euler") -> np.ndarray:
        """The noise levels that a job walks down, [steps + 1], descending, float32."""
        return schedules.make_ladder(schedule, steps, self.spec.noise_schedule, sampler).sigmas

    def finish(self, latents: Latents, output: str = "images", tile: int | None = None) -> np.ndarray:
        """What a job returns for its latents. tile: the recipe's."""
        if output == "latents":
            return np.asarray(latents)
        pixels, finite = _to_pixels(self.decode_latents(latents, tile))
        check_finite(finite, "decoding by the autoencoder")
        return np.asarray(pixels)

    def _recipe(
        self, job: str, output: str, fields: dict, refiner: "Pipeline | None" = None, clip: Clip | None = None
    ) -> Recipe:
        """The recipe of a job. Raises ValueError for what does not belong into it."""
        if output not in ("images", "latents"):
            raise ValueError(f"output={output!r} is unknown: use images or latents")
        unknown = sorted(set(fields) - set(_fields(Recipe())))
        if unknown:
            raise ValueError(f"{unknown[0]}= is no field of a recipe: {hint(unknown[0], _fields(Recipe()))}")
        for name, jobs in JOBS_OF_FIELD.items():
            if job not in jobs and fields.get(name, getattr(Recipe, name)) != getattr(Recipe, name):
                raise ValueError(f"{name}={fields[name]!r} is for {' and '.join(jobs)}, not for {job}: leave it out")
        if isinstance(fields.get("tile_prompts"), str):
            raise ValueError(f"tile_prompts={fields['tile_prompts']!r} is one text: give a list, for each tile its own")
        recipe = Recipe(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
        if (clip is None) != (recipe.clip_guidance_scale is None):
            raise ValueError("clip= guides as far as clip_guidance_scale= says: give both or neither")
        if clip is None and recipe.clip_guidance_clamp is not None:
            raise ValueError("clip_guidance_clamp= limits how far clip= guides: give both, or leave it out")
        refuse_untold(recipe, [self.spec] if refiner is None else [self.spec, refiner.spec])
        if job == "text_to_image" and refiner is None and recipe.refiner_switch != Recipe.refiner_switch:
            raise ValueError(f"refiner_switch={recipe.refiner_switch:g} is for a refiner: give it, or leave this out")
        return recipe

    def save(self, path: str | pathlib.Path, format: str = "diffusers") -> None:
        """Writes "diffusers" (a folder), "single_file" (.safetensors, CompVis layout) or "native" (a workdir).

        Raises ValueError where adapters are on, which no such file holds.
        """
        if self.adapters:
            raise ValueError(f"{self.adapters[0].source} is on: save what merge_adapters() gives, or load without it")
        save_checkpoint(path, self.spec, self.params, self._tokenizer_for_saving(format), format=format)

    def _tokenizer_for_saving(self, format: str) -> Tokenizer | None:
        return self.tokenizer if format != "single_file" and self.spec.text_encoders else None

    def _part(self, name: str) -> Params:
        if name == "vae" and name not in self.spec.parts:
            return {}
        if name not in self._params:
            raise ValueError(f"this checkpoint has no {name}: {_MENDS[name]}")
        if name not in self._on_device:
            self._params |= _on_device({name: self._params[name]}, self.dtype, self._where)
            self._on_device.add(name)
        return self._params[name]


def job_of(
    recipe: Recipe,
    image: Any = None,
    mask: Any = None,
    depth: Any = None,
    refiner: Any = None,
    clip: Any = None,
    spec: ModelSpec | None = None,  # None = of a model that is no upscaler
    enlarger: Any = None,
) -> str:
    """The name of the job that a recipe means, with or without pictures that it starts from, for a model.

    Raises ValueError for an input that this job has no use for.
    """
    if image is None and (mask is not None or recipe.extend is not None):
        raise ValueError("a mask, or extend, needs the picture that it belongs to: give an image")
    if image is None:
        job = "text_to_image" if recipe.scale is None else "hires_fix"
    else:
        job = "image_to_image" if mask is None and recipe.extend is None else "inpaint"
        enlarges = recipe.scale is not None or (spec is not None and upscale.is_upscaler(spec))
        if job == "image_to_image" and enlarges:
            job = "upscale"
    clipped = JOBS_OF_FIELD["clip_guidance_scale"]
    owners = {"depth": ("image_to_image",), "refiner": ("text_to_image",), "clip": clipped}
    owners["enlarger"] = ("hires_fix", "upscale")
    for (name, jobs), given in zip(owners.items(), (depth, refiner, clip, enlarger), strict=True):
        if given is not None and job not in jobs:
            raise ValueError(f"{name} is for {' and '.join(jobs)}, not for {job}: leave it out")
    return job


def _fields(recipe: Recipe) -> dict[str, Any]:
    return {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}


def _given(latents, noise, conditioning, negative_conditioning, control, image_prompt) -> Given:
    draws = None
    if noise is not None and np.ndim(noise) == 5:
        draws = noise
    elif noise is not None:
        if latents is not None:
            raise ValueError("latents and noise are both the starting noise: give one of them")
        latents = noise
    hints = (control,) if isinstance(control, Hint) else tuple(control)
    if not all(isinstance(each, Hint) for each in hints):
        raise ValueError("control= takes what `sd_jax.load_control(path).hint(image)` makes, one or several")
    return Given(latents, draws, conditioning, negative_conditioning, hints, image_prompt)


def _on_device(tree: Params, dtype: str, where: str | pathlib.Path) -> Params:
    """What is there already, in this dtype, is not copied."""
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree)):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.dtype(dtype)), tree)
    return place(tree, dtype, where=where)


# Module-level functions: pipelines of the same networks share their compilations


@functools.partial(sharding.jit, static_argnums=(1, 3))
def _encode_tokens(params, networks, ids, clip_skip, on):
    return adapters.wearing(networks, on).encode_text(params, ids, clip_skip)


@functools.partial(sharding.jit, static_argnums=1)
def _predict(params, networks, latents, timesteps, conditioning, on):
    unet = adapters.wearing(networks, on).unet
    return unet.apply({"params": params}, latents, timesteps, conditioning)


@functools.partial(sharding.jit, static_argnums=1)
def _encode_image(params, networks, image):
    image = to_image(image) if image.dtype == jnp.uint8 else image
    posterior = networks.vae.apply({"params": params}, image, method="encode")
    return posterior.mean * networks.spec.vae.scaling_factor


@functools.partial(sharding.jit, static_argnums=1)
def _decode_latents(params, networks, latents):
    z = latents / networks.spec.vae.scaling_factor
    return networks.vae.apply({"params": params}, z, method="decode").astype(jnp.float32)


@sharding.jit
def _to_pixels(image):
    return to_pixels(image), jnp.isfinite(image).all()
