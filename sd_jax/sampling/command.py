"""What sample.py is asked for: pictures of a prompt, of a file of prompts, of a grid, or a picture made again."""

import dataclasses
import itertools
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from logging import getLogger
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from sd_jax import media
from sd_jax.diffusion import samplers
from sd_jax.prompts import tags
from sd_jax.prompts.encode import encode_prompts
from sd_jax.sampling import adapters, grid, hires_fix, image_to_image, inpaint, upscale
from sd_jax.sampling.clip import Clip, load_clip
from sd_jax.sampling.control import load_control
from sd_jax.sampling.pipeline import BUNDLED, Pipeline, job_of, load
from sd_jax.sampling.preview import LatentPreview
from sd_jax.sampling.recipe import (
    Origin,
    Record,
    asked_for,
    hash_of_file,
    hash_of_weights,
    own_recipe,
    read_record,
    texts,
    whole_recipe,
)
from sd_jax.sampling.text_to_image import latent_size
from sd_jax.types import Conditioning, Recipe
from sd_jax.upscalers.esrgan import load_upscaler

logger = getLogger(__name__)

# Fields of an Origin: what `load` takes; and the paths of weights, of which it has the hashes
LOADING = ("checkpoint", "dtype", "tokenizer", "vae", "weights", "config", "prediction_type", "text_encoder")
WEIGHTS = ("checkpoint", "vae", "text_encoder", "refiner", "clip", "enlarger")
INPUTS = {"image": "--init_image", "mask": "--mask", "depth": "--depth"}
SECONDS_BETWEEN_PREVIEWS = 0.5


@dataclasses.dataclass(frozen=True)
class Order:
    """A command, as it was given."""

    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the Recipe, those that were given
    loading: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of LOADING, refiner, clip, enlarger
    image: str | None = None  # what it starts from, the mask, and the map of depth
    mask: str | None = None
    depth: str | None = None
    recipe: str | None = None  # a picture to make again; what is given above wins over what it says
    grid: str | None = None  # see grid.py
    prompts_file: str | None = None
    image_prompts: Sequence[str] = ()  # what IP-Adapters show: one for each, or of a single one all at once
    image_encoder: str | None = None  # the CLIP that they see through; None = that beside their file
    adapters: Sequence[str] = ()  # PATH, PATH:STRENGTH or PATH:STRENGTH:STRENGTH_IN_TEXT_ENCODERS, in their order
    embeddings: str | None = None  # a file of textual inversion, or a folder of them
    control: Sequence[str] = ()  # PATH:IMAGE, PATH:IMAGE:STRENGTH or PATH:IMAGE:STRENGTH:START:END
    adapter_folder: str | None = None  # where `<lora:name:0.8>` finds its file
    best_of: int | None = None  # candidates for each picture, see `_best_of`
    out: pathlib.Path = pathlib.Path("samples")
    format: str = "png"  # of the pictures, one of media.FORMATS
    previews: bool = False  # whether out/preview.png shows what is being made


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Pictures that are made at once."""

    recipe: Recipe
    numbers: Sequence[int | None]  # of their files; None = is not written
    prompts: Sequence[str] | None = None  # one for each; None = the recipe's


def carry_out(order: Order) -> Iterator[pathlib.Path]:
    """Makes the pictures and writes 00000.png, 00001.png, ... and sheet.png, or grid.png: their paths, as they come.

    Raises ValueError, OSError or FloatingPointError with one line that names what is wrong.
    """
    # What is asked for
    told = Record(Recipe()) if order.recipe is None else read_record(order.recipe)
    recipe = dataclasses.replace(told.recipe, **order.fields)
    axes = grid.parse(order.grid) if order.grid else []
    prompts = read_prompts(order.prompts_file) if order.prompts_file else []
    if prompts and (axes or "prompt" in order.fields):
        raise ValueError(f"--prompts_file, and {'--grid' if axes else '--prompt'}: give one of the two")
    if not axes and not prompts:
        axes = grid.from_json(told.grid or [])
        prompts = told.prompts if told.prompts and "prompt" not in order.fields else []
    image, mask, depth = (_input(order, told, name) for name in INPUTS)
    if order.recipe and told.origin is None and recipe.strength and recipe.scale is None and image is None:
        raise ValueError(f"{order.recipe} was made from a picture that it does not name: give it as --init_image=")
    loading = _loading(order, told)
    best_of = told.best_of if order.best_of is None else order.best_of
    if best_of is not None and best_of < 1:
        raise ValueError(f"--best_of={best_of}: at least 1 is needed")
    if best_of is not None and loading["clip"] is None:
        raise ValueError(f"--best_of={best_of} needs a CLIP that chooses: give it as --clip=PATH")
    texts_from = _paths(loading, "text_encoder")
    several = {"text_encoder": texts_from} if len(texts_from) > 1 else {}
    recorded = [] if told.origin is None else told.origin.adapters
    again = ((each["path"], each["strength"], each["text_strength"]) for each in recorded)
    worn = adapters_of(order.adapters) if order.adapters else [_worn(*each) for each in again]
    pipe = load(loading["checkpoint"], **{name: loading[name] for name in LOADING[1:]} | several)
    refiner = None
    if loading["refiner"] is not None:
        weights = loading["weights"].partition(":")[0]  # of which average is for the model alone
        refiner = load(loading["refiner"], weights=weights, **{name: loading[name] for name in ("dtype", "tokenizer")})
    folders = {
        name: getattr(order, name) or getattr(told.origin, name, None) for name in ("embeddings", "adapter_folder")
    }
    image_encoder = order.image_encoder or getattr(told.origin, "image_encoder", None)
    recorded = [] if told.origin is None else told.origin.image_prompts
    shown = list(order.image_prompts) or [_unchanged(order, each, "--image_prompt") for each in recorded]
    pipe = pipe if folders["embeddings"] is None else pipe.with_adapter(folders["embeddings"])
    for each in worn:
        pipe = pipe.with_adapter(each["path"], each["strength"], each["text_strength"], image_encoder=image_encoder)
    pipe = pipe if folders["adapter_folder"] is None else pipe.with_tags(folders["adapter_folder"])
    clip = load_clip(loading["clip"], loading["dtype"]) if loading["clip"] is not None else None
    enlarger = load_upscaler(loading["enlarger"], loading["dtype"]) if loading["enlarger"] is not None else None
    hints = _hints(order, told)
    control = [load_control(each["path"], loading["dtype"], pipe).hint(**_how(each)) for each in hints]

    # What is made at once
    if axes:
        work, more = [_Batch(cell, [number]) for number, cell in grid.cells(recipe, axes)], {"grid": grid.to_json(axes)}
    elif prompts:
        work, more = batches_of(pipe, recipe, prompts), {"prompts": list(prompts)}
    elif told.batch and not order.fields:
        work, more = [_again(recipe, told.batch)], {"batch": told.batch}
    else:
        work, more = [_Batch(recipe, range(recipe.batch_size))], {}
    more |= {} if best_of is None else {"best_of": best_of}
    guides = [None if best_of and batch.recipe.clip_guidance_scale is None else clip for batch in work]
    each = zip(work, guides, strict=True)
    steps = sum(pipe.steps_of(batch.recipe, image, mask, depth, refiner, guide) for batch, guide in each)
    origin = _origin(loading, {"image": image, "mask": mask, "depth": depth})
    hashes = _hashes(worn, work, **folders)
    named = {"image_encoder": image_encoder, "image_prompts": [_named(path) for path in shown]}
    origin = dataclasses.replace(origin, adapters=worn, hashes=hashes, control=hints, **folders, **named)
    _tell_differences(order, told, origin)

    # Pictures
    made: dict[int, tuple[media.Picture, Recipe]] = {}
    with _Progress(pipe, steps * (best_of or 1), order) as progress:
        for batch, guide in zip(work, guides, strict=True):
            inputs = image, mask, progress, batch.prompts, depth, refiner, guide, control, shown or None, enlarger
            make = lambda recipe, inputs=inputs: pipe.make(recipe, *inputs)  # noqa: E731
            images, recipes, scores = _best_of(make, batch, clip, best_of, len(prompts) or len(batch.numbers))
            size = images.shape[2], images.shape[1]
            origin = dataclasses.replace(origin, job=job_of(batch.recipe, image, mask, spec=pipe.spec))
            by = origin if guide is clip else dataclasses.replace(origin, clip=None, clip_hash=None)
            whole = {"size": len(images)} | ({"prompts": list(batch.prompts)} if batch.prompts else {})
            for i, number in enumerate(batch.numbers):
                if number is not None:
                    own = own_recipe(recipes[i], i, batch.prompts[i] if batch.prompts else None)
                    own = _resolved(pipe, own, origin.job, size)
                    place = {"batch": {**whole, "index": i} if len(images) > 1 else None}
                    if scores is not None:
                        score = {"candidates": best_of, "score": float(scores[i]), "clip_hash": origin.clip_hash}
                        place["chosen"] = score
                    made[number] = images[i], own
                    yield _write(order.out / f"{number:05d}.{order.format}", images[i], texts(own, by, size, **place))

    # All together: A1111's text of the first, and our recipe of them all
    pixels, owns = zip(*(made[number] for number in sorted(made)), strict=True)
    size = pixels[0].shape[1], pixels[0].shape[0]
    if axes:
        name, sheet = "grid.png", grid.picture(axes, pixels)
    else:
        name, sheet = "sheet.png", media.contact_sheet(np.stack(pixels), [own.prompt for own in owns])
        recipe = _resolved(pipe, recipe, origin.job, size)
    yield _write(order.out / name, sheet, texts(owns[0], origin, size, **recipe.to_dict(), **more))


def _write(path: pathlib.Path, pixels: media.Picture, text: Mapping[str, str]) -> pathlib.Path:
    media.write_picture(path, pixels, text)
    return path


# -- What is asked for -----------------------------------------------------------------------------------------------


def read_prompts(path: str) -> list[str]:
    """One a line; blank lines, and those that begin with #, are skipped. Raises ValueError where there is none."""
    lines = [line.strip() for line in pathlib.Path(path).read_text(encoding="utf-8-sig").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path}: no prompts in it")
    return prompts


def adapters_of(texts: Sequence[str]) -> list[dict[str, Any]]:
    """What `--adapter=PATH:STRENGTH` means, as an Origin keeps it. Raises ValueError for a strength that is none."""
    found = []
    for text in texts:
        path, *numbers = text.split(":") if not pathlib.Path(text).exists() else [text]
        try:
            strengths = [float(number) for number in numbers] or [1.0]
            strength, text_strength = {1: strengths * 2, 2: strengths}[len(strengths)]
        except (ValueError, KeyError):
            raise ValueError(f"--adapter={text}: give PATH, PATH:STRENGTH or PATH:STRENGTH:TEXT_STRENGTH") from None
        found.append(_worn(path, strength, text_strength))
    return found


def _hints(order: Order, told: Record) -> list[dict[str, Any]]:
    """What `--control=PATH:IMAGE:STRENGTH` means, as an Origin keeps it, or what a recipe says."""
    if not order.control:
        recorded = [] if told.origin is None else told.origin.control
        for each in recorded:
            _unchanged(order, each, "--control", "image")
        return recorded
    found = []
    for text in order.control:
        path, *rest = text.split(":")
        image, numbers = (rest or [""])[0], rest[1:]
        try:
            how = dict(zip(("strength", "start", "end"), map(float, numbers or ["1"]), strict=False))
            if not image or len(numbers) not in (0, 1, 3):
                raise ValueError
        except ValueError:
            raise ValueError(f"--control={text}: give PATH:IMAGE:STRENGTH, and :START:END if you like") from None
        place = {"path": str(pathlib.Path(path).absolute()), "image": str(pathlib.Path(image).absolute())}
        found.append({**place, "sha256": hash_of_file(image), **{"start": 0.0, "end": 1.0}, **how})
    return found


def _how(hint: Mapping[str, Any]) -> dict[str, Any]:
    return {name: hint[name] for name in ("image", "strength", "start", "end")}


def _worn(path: str, strength: float, text_strength: float) -> dict[str, Any]:
    path = pathlib.Path(path).absolute()
    kind, _, name = next(iter(adapters.hashes(path)), "").partition(":")
    return {
        "path": str(path),
        "strength": strength,
        "text_strength": text_strength,
        "sha256": hash_of_file(path) if path.is_file() else None,
        "tag": tags.written(kind, name, text_strength, strength) if kind in tags.WEIGHED else "",
    }


def _hashes(
    worn: Sequence[Mapping[str, Any]], work: Sequence[_Batch], embeddings: str | None, adapter_folder: str | None
) -> dict[str, str]:
    """`adapters.hashes` of what is on, of what prompts name by tags, and of the words that they say."""
    prompts = sorted({prompt for batch in work for prompt in batch.prompts or [batch.recipe.prompt]})
    found: dict[str, str] = {}
    for path in filter(None, [*(each["path"] for each in worn), embeddings]):
        found |= adapters.hashes(path)
    for prompt in prompts if adapter_folder else []:
        found |= adapters.hashes_of_tags(prompt, adapter_folder)
    asked = [*prompts, *(batch.recipe.negative_prompt for batch in work), *(each["tag"] for each in worn)]
    asked += itertools.chain.from_iterable(batch.recipe.tile_prompts or () for batch in work)
    return asked_for(found, "\n".join(asked))


def _input(order: Order, told: Record, name: str) -> str | None:
    """A picture of INPUTS: as given, else that of the recipe, if the file is still the same."""
    flag = INPUTS[name]
    given, recorded = getattr(order, name), told.origin and getattr(told.origin, name)
    return given if given is not None or recorded is None else _unchanged(order, recorded, flag)


def _unchanged(order: Order, recorded: Mapping[str, str], flag: str, key: str = "path") -> str:
    """A picture's path, if the file is still the same."""
    path = recorded[key]
    try:
        same = hash_of_file(path) == recorded["sha256"]
    except OSError as error:
        reason = f"{path}, from which {order.recipe} was made, cannot be read ({error.strerror})"
        raise FileNotFoundError(f"{reason}: give it as {flag}=") from error
    if not same:
        raise ValueError(f"{path} is no longer what {order.recipe} was made from: give that as {flag}=")
    return path


def _loading(order: Order, told: Record) -> dict[str, Any]:
    """What the model is loaded with: as given, else as the picture says."""
    if order.recipe and told.origin is None and "checkpoint" not in order.loading:
        model = f"{told.model or 'an unnamed model'} (hash {told.model_hash or 'unknown'})"
        raise ValueError(f"{order.recipe} was made by another program with {model}: give it as --checkpoint=PATH")
    names = (*LOADING, "refiner", "clip", "enlarger")
    defaults = {field.name: field.default for field in dataclasses.fields(Origin) if field.name in names}
    recorded = {} if told.origin is None else {name: getattr(told.origin, name) for name in names}
    return {**defaults, **recorded, **order.loading}


def _origin(loading: Mapping[str, Any], inputs: Mapping[str, str | None]) -> Origin:
    sources = {name: path and _named(path) for name, path in inputs.items()}
    hashes = {name: ",".join(map(hash_of_weights, _paths(loading, name))) for name in WEIGHTS}
    return Origin(**loading, **sources, **{f"{name}_hash": found or None for name, found in hashes.items()})


def _named(path: str) -> dict[str, str]:
    return {"path": str(pathlib.Path(path).absolute()), "sha256": hash_of_file(path)}


def _paths(loading: Mapping[str, Any], name: str) -> list[str | pathlib.Path]:
    """None, one, or two text encoders with a comma between them."""
    path = BUNDLED if name == "checkpoint" and loading[name] is None else loading[name]
    if path is None:
        return []
    return path.split(",") if name == "text_encoder" else [path]


def _tell_differences(order: Order, told: Record, here: Origin) -> None:
    """A warning that names what may make another picture of a recipe than it was."""
    now = _versions(here)
    then = {"checkpoint": told.model_hash, **told.hashes} if told.origin is None else _versions(told.origin)
    changes = {name: old for name, old in then.items() if old not in (None, now.get(name))}
    different = [f"{name} {old} (here {now.get(name, 'none')})" for name, old in changes.items()]
    if different:
        logger.warning("%s was made with %s: it may come out otherwise", order.recipe, ", ".join(different))


def _versions(origin: Origin) -> dict[str, str | None]:
    hashes = {name: getattr(origin, f"{name}_hash") for name in WEIGHTS}
    return {**hashes, **origin.hashes, "platform": origin.platform, **origin.versions}


# -- What is made at once --------------------------------------------------------------------------------------------


def batches_of(pipe: Pipeline, recipe: Recipe, prompts: Sequence[str]) -> list[_Batch]:
    """Prompts in their order, `batch_size` at a time; prompt k is drawn from seed + k, as in one batch of them all.

    Only neighbours of one shape go together, so that each is encoded as it would be alone. The last batch of such
    neighbours reaches back into the one before it instead of being smaller: another size would compile anew.
    """
    size, batches = recipe.batch_size, []
    for _, group in itertools.groupby(range(len(prompts)), key=lambda k: _shape_of(pipe, recipe, prompts[k])):
        run = list(group)
        for at in range(0, len(run), size):
            taken = run[max(0, min(at, len(run) - size)) :][:size]
            numbers = [k if k >= run[at] else None for k in taken]
            batches.append(_Batch(own_recipe(recipe, taken[0]), numbers, [prompts[k] for k in taken]))
    return batches


def _again(recipe: Recipe, batch: Mapping[str, Any]) -> _Batch:
    """The batch in which a picture was made, of which it alone is written."""
    numbers = [0 if i == batch["index"] else None for i in range(batch["size"])]
    return _Batch(whole_recipe(recipe, dict(batch)), numbers, batch.get("prompts"))


def _best_of(
    make: Callable[[Recipe], np.ndarray],
    batch: _Batch,
    clip: Clip | None,
    count: int | None,  # candidates of each picture, made in as many rounds; None = the first is taken
    stride: int,  # as many as pictures are asked for, so that no seed is drawn twice
) -> tuple[np.ndarray, list[Recipe], np.ndarray | None]:
    """At each place of the batch the picture nearest its prompt, the recipe of its round, and how near it is.

    Candidate j of a picture is what the same command makes without candidates, from a seed j * stride further.
    """
    images = make(batch.recipe)
    recipes = [batch.recipe] * len(images)
    if count is None:
        return images, recipes, None
    prompts = batch.prompts or [batch.recipe.prompt]
    images, scores = np.array(images), np.array(clip.scores(images, prompts))
    for number in range(1, count):
        recipe = dataclasses.replace(own_recipe(batch.recipe, number * stride), batch_size=batch.recipe.batch_size)
        candidates = make(recipe)
        found = clip.scores(candidates, prompts)
        for i in np.flatnonzero(found > scores):
            images[i], recipes[i], scores[i] = candidates[i], recipe, found[i]
    return images, recipes, scores


def _shape_of(pipe: Pipeline, recipe: Recipe, prompt: str) -> tuple[int, int, bool]:
    """What of a prompt compiles anew: tokens, parts, and whether it is one part of weight 1."""
    calls = samplers.sampler_named(recipe.sampler).calls * recipe.steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the job gives them
        encoded = encode_prompts([prompt], pipe.tokenizer, _nothing, pipe.positions, calls, recipe.prompt_syntax)
    return encoded.contexts.shape[1], encoded.parts, encoded.is_single


def _nothing(ids) -> Conditioning:
    return Conditioning(np.zeros((*ids.shape, 1), np.float32))


# -- How it is made --------------------------------------------------------------------------------------------------


def _resolved(pipe: Pipeline, recipe: Recipe, job: str, size: tuple[int, int]) -> Recipe:
    """With what the job took where the recipe has None. size: width and height of what came out.

    An inpainted picture keeps None, for it is as large as the one that it was made from.
    """
    strengths = {module.__name__.split(".")[-1]: module.STRENGTH for module in (image_to_image, inpaint, hires_fix)}
    changes = {"strength": strengths[job]} if job in strengths and recipe.strength is None else {}
    if job == "upscale":
        took = upscale.defaults(pipe.spec)
        changes |= {name: default for name, default in took.items() if getattr(recipe, name) is None}
    if job == "hires_fix":
        height, width = latent_size(pipe.spec, recipe)
        size = width * pipe.spec.vae.downscale, height * pipe.spec.vae.downscale
    if job != "inpaint":
        changes |= dict(zip(("width", "height"), size, strict=True))
    return dataclasses.replace(recipe, **changes)


class _Progress:
    """The callback of every job of an order: a bar of steps, and previews if they are asked for."""

    def __init__(self, pipe: Pipeline, steps: int, order: Order):
        self._bar = tqdm(total=steps, unit="step", dynamic_ncols=True)
        self._preview = LatentPreview(pipe) if order.previews else None
        self._path, self._last = order.out / "preview.png", -SECONDS_BETWEEN_PREVIEWS

    def __call__(self, step: int, x: jax.Array, denoised: jax.Array) -> None:
        jax.block_until_ready(x)  # what the step before this one made: the device is never idle, nor far ahead
        self._bar.update(1)
        if self._preview is not None and time.monotonic() - self._last >= SECONDS_BETWEEN_PREVIEWS:
            media.write_png(self._path, media.contact_sheet(self._preview(denoised)), {})
            self._last = time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()
