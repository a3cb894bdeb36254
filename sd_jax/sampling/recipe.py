"""Pictures that carry their recipe: what is written into each, and how it is read again.

A picture has two texts (`media.write_picture` says where in the file). One is A1111's infotext, for other programs. The
other is ours, JSON: the fields of its Recipe, those of its Origin, and

    batch     {"size", "index"}: where it was in a batch that was made at once; null where it was made alone. Images of
              a batch do not depend on each other, but matrix products of another shape round otherwise: to get the same
              bits, the whole batch is made again. "prompts": those of the batch, where they are not all the same
    chosen    {"candidates", "score", "clip_hash"}: how well a CLIP found it to fit, the best of so many
    best_of   of a sheet or grid: of how many candidates each picture was chosen
    prompts   of a sheet of several prompts: all of them
    grid      of a grid: its axes, [{"field", "values"}, ...]
"""

import dataclasses
import hashlib
import json
import pathlib
import platform
import re
import sys
import types as python_types
import typing
from collections.abc import Mapping
from logging import getLogger
from typing import Any

from sd_jax import media
from sd_jax.sampling import infotext
from sd_jax.types import Recipe

logger = getLogger(__name__)

FIELDS = tuple(field.name for field in dataclasses.fields(Recipe))


# -- Values as text --------------------------------------------------------------------------------------------------


def kind_of(field: str) -> tuple[type, bool]:
    """The type of a Recipe's field (str, int, float, bool or tuple), and whether it may be None."""
    hint = typing.get_type_hints(Recipe)[field]
    options = typing.get_args(hint) if isinstance(hint, python_types.UnionType) else (hint,)
    kind = next(option for option in options if option is not python_types.NoneType)
    return typing.get_origin(kind) or kind, python_types.NoneType in options


def wanted(field: str) -> str:
    """What a person may type for it, in words."""
    kind, optional = kind_of(field)
    if field == "tile_prompts":
        return "text || text || ... or none"
    return (",".join(_NUMBERS[field]) if kind is tuple else _WANTED[kind]) + (" or none" if optional else "")


_WANTED = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_NUMBERS = {  # of fields of several: which they are
    "extend": ("left", "top", "right", "bottom"),
    "original_size": ("height", "width"),
    "target_size": ("height", "width"),
    "crops_coords_top_left": ("top", "left"),
}


def read_value(field: str, text: str) -> Any:
    """The value of a Recipe's field as a person types it; "none" is None. Raises ValueError, naming the field."""
    kind, optional = kind_of(field)
    if optional and text.strip().lower() == "none":
        return None
    if field == "tile_prompts":
        return tuple(prompt.strip() for prompt in text.split("||"))
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]
        if kind is tuple:
            numbers = tuple(map(int, text.strip(" ()").split(",")))
            return {len(_NUMBERS[field]): numbers}[len(numbers)]
        return kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"{field}={text!r}: {wanted(field)} is needed") from None


# -- What is written -------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    import jax
    import jaxlib

    ours = sys.modules[__name__.split(".")[0]].__version__
    return {
        "sd_jax": ours,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
    }


def platform_name() -> str:
    """What computes, e.g. "cpu x86_64" or "gpu NVIDIA H100"."""
    import jax

    device = jax.devices()[0]
    return f"{device.platform} {platform.machine() if device.platform == 'cpu' else device.device_kind}"


@dataclasses.dataclass(frozen=True)
class Origin:
    """All that decides a picture besides its recipe."""

    job: str = "text_to_image"
    checkpoint: str | None = None  # as it was named; None = the bundled model
    checkpoint_hash: str | None = None  # of `hash_of_weights`
    dtype: str = "float32"  # this and what follows: as given to `load`
    tokenizer: str | None = None
    vae: str | None = None
    vae_hash: str | None = None
    weights: str = "ema"
    config: str | None = None
    prediction_type: str | None = None
    text_encoder: str | None = None
    text_encoder_hash: str | None = None
    refiner: str | None = None  # another checkpoint, which walked the last steps
    refiner_hash: str | None = None
    clip: str | None = None  # which guided
    clip_hash: str | None = None
    enlarger: str | None = None  # which made pictures larger on the way
    enlarger_hash: str | None = None
    embeddings: str | None = None  # a file of textual inversion, or a folder of them
    adapter_folder: str | None = None  # where the tags of prompts found their files
    adapters: list = dataclasses.field(default_factory=list)  # {"path", "strength", "text_strength", "sha256", "tag"}
    # of each; the tag is what asks for it in a prompt, "" for words and IP-Adapters, which none does
    image_prompts: list = dataclasses.field(default_factory=list)  # {"path", "sha256"} of what IP-Adapters showed
    image_encoder: str | None = None  # the CLIP that they saw through; None = that beside their file
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)  # of adapters and words, see `adapters.hashes`
    control: list = dataclasses.field(default_factory=list)  # {"path", "image", "sha256", "strength", "start", "end"}
    # of each hint; sha256 of its image
    image: dict[str, str] | None = None  # {"path", "sha256"} of what it was made from, and of the mask
    mask: dict[str, str] | None = None
    depth: dict[str, str] | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=versions)
    platform: str = dataclasses.field(default_factory=platform_name)


def own_recipe(recipe: Recipe, index: int, prompt: str | None = None) -> Recipe:
    """That of one picture of a batch, made alone. prompt: its own, None = the recipe's."""
    moved = "variation_seed" if recipe.variation_strength > 0 else "seed"
    moved = {moved: getattr(recipe, moved) + index}
    return dataclasses.replace(recipe, batch_size=1, prompt=recipe.prompt if prompt is None else prompt, **moved)


def whole_recipe(recipe: Recipe, batch: dict[str, Any]) -> Recipe:
    """That of the batch in which a picture was made: `own_recipe` undone."""
    whole = own_recipe(recipe, -batch["index"])
    return whole if "prompts" in batch else dataclasses.replace(whole, batch_size=batch["size"])


def texts(recipe: Recipe, origin: Origin, size: tuple[int, int], **more: Any) -> dict[str, str]:
    """What a picture carries. size: its width and height; more: batch, chosen, best_of, prompts or grid."""
    from sd_jax.sampling.pipeline import BUNDLED

    scale = None if origin.job == "upscale" else recipe.scale  # which A1111 has of hires fix alone,
    width, height = size if scale is None else (None, None)  # with the size of the first pass
    prompt = " ".join(filter(None, [recipe.prompt, *(each.get("tag") for each in origin.adapters)]))  # its only way
    sides = {"width": recipe.width or width, "height": recipe.height or height}
    sized = dataclasses.replace(recipe, prompt=prompt, scale=scale, **sides)
    parameters = infotext.write(
        sized,
        _name(origin.checkpoint or str(BUNDLED)),
        origin.checkpoint_hash,
        None if origin.vae is None else _name(origin.vae),
        origin.vae_hash,
        f"sd_jax {origin.versions['sd_jax']}",
        None if origin.refiner is None else f"{_name(origin.refiner)} [{origin.refiner_hash}]",
        more["chosen"]["score"] if "chosen" in more else None,
        asked_for(origin.hashes, f"{prompt}\n{recipe.negative_prompt}"),
        [{**each, "path": _name(each["path"])} for each in origin.control],
    )
    record = {**dataclasses.asdict(recipe), **dataclasses.asdict(origin), "batch": None, **more}
    return {media.PARAMETERS: parameters, media.RECIPE: json.dumps(record)}


def asked_for(hashes: Mapping[str, str], prompt: str) -> dict[str, str]:
    """Of hashes as `adapters.hashes` has them, those whose tag or word a prompt has."""

    def is_in(name: str) -> bool:
        kind, name = name.split(":", 1)
        if kind == "embed":
            return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", prompt, re.IGNORECASE) is not None
        return re.search(rf"<(lora|lyco|hypernet):{re.escape(name)}[:>]", prompt) is not None

    return {name: digits for name, digits in hashes.items() if is_in(name)}


def _name(path: str) -> str:
    """As A1111 shows a model: the name of its file or folder."""
    name = pathlib.Path(path).absolute().name
    stem, dot, ending = name.rpartition(".")
    return stem if dot + ending in _ENDINGS else name


_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


# -- What is read ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    """What a picture says of itself."""

    recipe: Recipe
    origin: Origin | None = None  # None: not made by us
    batch: dict[str, Any] | None = None  # see above, as the next four
    chosen: dict[str, Any] | None = None
    best_of: int | None = None
    prompts: list[str] | None = None
    grid: list[dict[str, Any]] | None = None
    model: str | None = None  # of a picture not made by us: the name of the model, and the short hash of its file
    model_hash: str | None = None
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)  # likewise: of adapters and words, as an Origin's


def read_recipe(path: str | pathlib.Path) -> Recipe:
    """The recipe of a picture: a PNG, JPEG or WebP of ours, or of A1111 and its kin. Raises as `read_record` does."""
    return read_record(path).recipe


def read_record(path: str | pathlib.Path) -> Record:
    """All that a picture says of itself; a warning is logged for what is not understood.

    Raises media.BadImage where the file is no picture, or carries no recipe.
    """
    text = media.read_text(path)
    ours = _json(text.get(media.RECIPE))
    if ours is not None:
        return _read_ours(ours, path)
    if media.PARAMETERS not in text:
        raise media.BadImage(str(path), "carries no recipe: neither ours nor A1111's parameters are in it")
    try:
        found = infotext.parse(text[media.PARAMETERS])
    except ValueError as error:
        raise media.BadImage(str(path), str(error)) from error
    if found.ignored:
        logger.warning("%s: not understood and left out: %s", path, "; ".join(found.ignored))
    return Record(found.recipe, model=found.model, model_hash=found.model_hash, hashes=found.hashes)


def _json(text: str | None) -> dict[str, Any] | None:
    """Our record; other programs' descriptions of pictures stand in the same place."""
    try:
        record = json.loads(text or "")
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"prompt", "versions", "job"} <= set(record) else None


def _read_ours(record: dict[str, Any], path: str | pathlib.Path) -> Record:
    of_origin = tuple(field.name for field in dataclasses.fields(Origin))
    more = ("batch", "chosen", "best_of", "prompts", "grid")
    if unknown := sorted(set(record) - {*FIELDS, *of_origin, *more}):
        logger.warning("%s: not understood and left out: %s", path, ", ".join(unknown))
    fields = {name: record[name] for name in FIELDS if name in record}
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    origin = Origin(**{name: record[name] for name in of_origin if name in record})
    return Record(Recipe(**fields), origin, **{name: record.get(name) for name in more})


# -- Hashes ----------------------------------------------------------------------------------------------------------


def hash_of_weights(path: str | pathlib.Path) -> str:
    """The first ten digits of a SHA-256, as A1111 names models.

    Of a single file: its own. Of a diffusers folder, or a name on the hub: of the names and hashes of its networks'
    safetensors (or, where there are none, .bin); of a workdir of ours: of the same of its latest checkpoint, or of the
    one that the path names.
    """
    from sd_jax.checkpoints import detect, hub
    from sd_jax.models.presets import PARTS

    path = hub.local(path)
    if path.is_file():
        return hash_of_file(path)[:10]
    if (location := detect.native_location(path)) is not None:
        folder, step = location
        steps = (int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / "state").is_dir())
        root = folder / str(max(steps) if step is None else step) / "state"
        files = [file for file in root.rglob("*") if file.is_file()]
    else:
        root, folders = path, [path / part for part in PARTS if (path / part).is_dir()] or [path]
        kinds = ([file for folder in folders for file in folder.rglob(f"*{kind}")] for kind in (".safetensors", ".bin"))
        files = next(filter(None, kinds), [])
    lines = sorted(f"{file.relative_to(root).as_posix()} {hash_of_file(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:10]


def hash_of_file(path: str | pathlib.Path) -> str:
    """SHA-256 of what is in it, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
