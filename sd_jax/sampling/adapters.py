"""The adapters that a pipeline has on: which, how strongly, and when while a picture is made.

A strength may change on the way: `[(0, 0.0), (0.4, 1.0)]` is 0 at first and 1 from two fifths of the steps on.
"""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from logging import getLogger
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sd_jax.adapters import ip_adapter
from sd_jax.adapters.hooks import Adapter, hooked, merge, parts_of
from sd_jax.adapters.hypernetwork import Hypernetwork, check_fits
from sd_jax.adapters.ip_adapter import IPAdapter
from sd_jax.adapters.textual_inversion import Embedding, with_embeddings
from sd_jax.checkpoints import embeddings, files, hypernetworks, ip_adapters
from sd_jax.checkpoints.adapters import IN_FOLDERS, file_in, hash_of_adapter, open_adapter
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.models.networks import Networks
from sd_jax.models.presets import KUNetConfig
from sd_jax.names import hint
from sd_jax.prompts import tags
from sd_jax.sampling.image_prompt import ImageEncoder, encoder_for
from sd_jax.sampling.recipe import hash_of_file
from sd_jax.types import AnyArray

if TYPE_CHECKING:
    from sd_jax.sampling.pipeline import Pipeline

HYPERNETWORK, IP_ADAPTER = "hypernetwork.pt", "ip_adapter.safetensors"  # what runs leave in their workdir
SUFFIXES = (".safetensors", ".pt", ".bin")

logger = getLogger(__name__)

Schedule = float | Sequence[tuple[float, float]]  # a strength, or (share of the steps from which on, strength) pairs


class Worn(NamedTuple):
    """An adapter that a pipeline has on."""

    adapter: Adapter  # on the device
    strength: Schedule  # in the U-Net
    text_strength: float  # in the text encoders
    source: str  # where it came from, for messages
    encoder: ImageEncoder | None = None  # of an IP-Adapter


class On(NamedTuple):
    """What a compiled function is handed of them: only shapes compile anew."""

    adapters: tuple[Adapter, ...]
    strengths: Float[AnyArray, "adapters calls"]


def of_unet(worn: Sequence[Worn], calls: int) -> On | None:
    """What changes the U-Net, with its strength at each of its calls; None = nothing does."""
    here = [(_only(w.adapter, ("unet",)), at_calls(w.strength, calls)) for w in worn if "unet" in parts_of(w.adapter)]
    return On(tuple(a for a, _ in here), np.stack([t for _, t in here])) if here else None


def of_text_encoders(worn: Sequence[Worn]) -> On | None:
    """What changes the text encoders."""
    parts = ("text_encoder", "text_encoder_2")
    here = [(_only(w.adapter, parts), w.text_strength) for w in worn if set(parts) & set(parts_of(w.adapter))]
    return On(tuple(a for a, _ in here), np.array([[t] for _, t in here], np.float32)) if here else None


def has_ip_adapter(worn: Sequence[Worn]) -> bool:
    return any(isinstance(each.adapter, IPAdapter) for each in worn)


def wearing(
    networks: Networks,
    on: On | None,
    call: Int[Array, ""] | int = 0,
    pictures: Sequence[Float[Array, "rows _ width"]] = (),  # what the IP-Adapters show, one after the other
) -> Networks:
    """The networks with them on at call number `call`; beyond the last one, as at the last one."""
    if on is None:
        return networks
    tokens = iter(pictures)
    shown = [a.replace(tokens=next(tokens, None)) if isinstance(a, IPAdapter) else a for a in on.adapters]
    strengths = jnp.asarray(on.strengths)
    at = strengths[:, jnp.minimum(call, strengths.shape[1] - 1)]
    return hooked(networks, [(adapter, at[i]) for i, adapter in enumerate(shown)])


def at_calls(schedule: Schedule, calls: int) -> Float[np.ndarray, " calls"]:
    """The strength at each call. Raises ValueError for what is no schedule."""
    try:
        starts, values = np.array([(0, schedule)] if isinstance(schedule, Real) else schedule, np.float32).T
        wrong = starts[0] != 0 or np.any(np.diff(starts) <= 0) or starts[-1] > 1
        wrong = wrong or not np.isfinite([starts, values]).all()
    except (TypeError, ValueError):
        wrong = True
    if wrong:
        raise ValueError(
            f"strength={schedule!r}: give a number, or (share of the steps, strength) pairs, the first share 0 and "
            "each larger than the one before"
        )
    shares = np.arange(calls, dtype=np.float32) / np.float32(calls)
    return values[np.searchsorted(starts, shares, side="right") - 1]


def _only(adapter: Adapter, parts: Sequence[str]) -> Adapter:
    if not isinstance(adapter, Mapping):
        return adapter
    return {part: adapter[part] for part in parts if part in adapter}


# -- What a pipeline does with them ----------------------------------------------------------------------------------


def put_on(
    pipe: "Pipeline",
    path: Any,
    strength: Schedule,
    text_strength: float | None,
    blocks: Mapping[str, float] | None,
    image_encoder: Any = None,
) -> "Pipeline":
    """`Pipeline.with_adapter`, whose docstring says what the arguments are."""
    if isinstance(pipe.spec.unet, KUNetConfig):
        raise ValueError("adapters are not for the x2 latent upscaler: put them on the model before it")
    at_calls(strength, 1)
    if text_strength is None:
        if not isinstance(strength, Real):
            raise ValueError("a strength that changes on the way is the U-Net's alone: give text_strength= as well")
        text_strength = strength
    if not all(isinstance(t, Real) and math.isfinite(t) for t in (text_strength, *(blocks or {}).values())):
        raise ValueError(f"text_strength={text_strength!r}, blocks={blocks!r}: give finite numbers")
    adapter = path if isinstance(path, Mapping | Hypernetwork | IPAdapter) else open_any(path, pipe)
    source = _file_in(path) if isinstance(path, str | pathlib.Path) else "an adapter"
    if isinstance(adapter, list):
        tokenizer, params = pipe.tokenizer, pipe.params
        spec, params, tokenizer = with_embeddings(pipe.spec, params, tokenizer, adapter)
        return pipe.changed(spec=spec, networks=Networks.of(spec, pipe.dtype), _params=params, _tokenizer=tokenizer)
    if blocks:
        adapter = _weighed(adapter, blocks)
    if isinstance(adapter, Hypernetwork):
        try:
            check_fits(adapter, pipe.spec)
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from None
    encoder = None
    if isinstance(adapter, IPAdapter):
        try:
            ip_adapter.check_fits(adapter, pipe.spec.unet)
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from None
        known = [worn.encoder for worn in pipe.adapters if worn.encoder is not None]
        encoder = encoder_for(adapter, source, image_encoder, known, pipe.dtype)
        alike = {
            path: {"strength": 1.0, **entry} for path, entry in adapter.layers.items()
        }  # so blocks compile nothing
        adapter = adapter.replace(layers=alike)
    adapter = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), adapter)
    return pipe.changed(adapters=(*pipe.adapters, Worn(adapter, strength, float(text_strength), source, encoder)))


def open_any(path: str | pathlib.Path, pipe: "Pipeline") -> Adapter | list[Embedding]:
    """What a file holds, told by its content; of a run's workdir what it left, of another folder the embeddings in it.

    Raises FileNotFoundError or CheckpointError.
    """
    path = pathlib.Path(_file_in(path))
    if path.is_dir():
        return open_adapter(path, pipe.spec).layers if _holds_adapter(path) else _open_words(path)
    tensors = files.open_any(path).tensors
    if hypernetworks.is_hypernetwork(tensors):
        return hypernetworks.load(path)
    if embeddings.is_embedding(tensors):
        return [embeddings.load(path)]
    if ip_adapters.is_ip_adapter(tensors):
        return ip_adapters.load(path, pipe.spec.unet)
    opened = open_adapter(path, pipe.spec)
    for note in opened.notes:
        logger.info("%s: %s", path, note)
    return opened.layers


def hashes(path: str | pathlib.Path, name: str = "") -> dict[str, str]:
    """{"lora:ink": "0123456789ab"}, {"hypernet:ink": ...}, or {"embed:zorp": ...} of every word: what a tag calls that
    which `open_any` opens, and the 12 digits that A1111 knows it by. Nothing of an IP-Adapter, which no tag calls.

    name: what it is called; "" = as the file is, or the run that left it. Digits are those of `hash_of_adapter`, but of
    hypernetworks and words the first of the file's SHA-256 (A1111 1.10, modules/textual_inversion). Raises
    FileNotFoundError or CheckpointError.
    """
    path = pathlib.Path(path).absolute()
    if words := _words_in(path):
        return {f"embed:{embeddings.load(file).token}": hash_of_file(file)[:12] for file in words}
    file = file_in(_file_in(path))
    named = file.parent.name if file.name in (HYPERNETWORK, *IN_FOLDERS) else file.stem
    name = name or re.sub("[:<>]", "", named)
    tensors = files.open_any(file).tensors
    if ip_adapters.is_ip_adapter(tensors):
        return {}
    if hypernetworks.is_hypernetwork(tensors):
        return {f"hypernet:{name}": hash_of_file(file)[:12]}
    return {f"lora:{name}": hash_of_adapter(file)}


def _file_in(path: str | pathlib.Path) -> str:
    """What a run of ours left in its workdir; another path as it is."""
    left = (pathlib.Path(path) / name for name in (HYPERNETWORK, IP_ADAPTER))
    return str(next(filter(pathlib.Path.is_file, left), path))


def _holds_adapter(folder: pathlib.Path) -> bool:
    return any((folder / name).is_file() for name in (HYPERNETWORK, IP_ADAPTER, *IN_FOLDERS))


def _words_in(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder without an adapter, which are embeddings; a file that is one is its own."""
    if path.is_dir():
        return [] if _holds_adapter(path) else [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
    return [path] if embeddings.is_embedding(files.open_any(path).tensors) else []


def _open_words(folder: pathlib.Path) -> list[Embedding]:
    found = _words_in(folder)
    if not found:
        raise CheckpointError(f"{folder}: no adapter and no embeddings in it ({', '.join(SUFFIXES)}): give a file")
    try:
        return [embeddings.load(file) for file in found]
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {folder} is read as embeddings: remove this file from it") from error


def put_on_tagged(pipe: "Pipeline", prompt: str | Sequence[str]) -> tuple["Pipeline", str | Sequence[str]]:
    """(the pipeline with what the prompt's `<lora:name:0.8>` and `<hypernet:name>` tags name, the prompt without them).

    Files are those of `Pipeline.with_tags`' folder; without one, nothing is done. Raises ValueError for a name that no
    file or several have, and for prompts of one batch that ask for different ones.
    """
    if pipe.tag_folder is None:
        return pipe, prompt
    texts, found = zip(*map(tags.extract, [prompt] if isinstance(prompt, str) else prompt), strict=True)
    asked = [[tag for tag in tags_ if tag.kind in tags.WEIGHED] for tags_ in found]
    if any(tags_ != asked[0] for tags_ in asked):
        raise ValueError("prompts of one batch ask for different adapters: give them one by one, with batch_size=1")
    for tag in asked[0]:
        pipe = pipe.with_adapter(_file_of(tag, pipe.tag_folder), tag.unet_weight, tag.text_weight)
    return pipe, texts[0] if isinstance(prompt, str) else list(texts)


def hashes_of_tags(prompt: str, folder: str | pathlib.Path) -> dict[str, str]:
    """`hashes` of what the tags of a prompt name in a folder. Raises as `put_on_tagged` does."""
    found: dict[str, str] = {}
    for tag in tags.extract(prompt)[1]:
        if tag.kind in tags.WEIGHED:
            found |= hashes(_file_of(tag, pathlib.Path(folder)), tag.name)
    return found


def _file_of(tag: tags.Tag, folder: pathlib.Path) -> pathlib.Path:
    files = [file for file in sorted(folder.rglob("*")) if file.suffix in SUFFIXES]
    same = [file for file in files if tag.name in (file.stem, file.relative_to(folder).with_suffix("").as_posix())]
    if len(same) == 1:
        return same[0]
    if same:
        raise ValueError(f"{tag.source}: {' and '.join(map(str, same))} are called so: say which by its folder")
    raise ValueError(f"{tag.source}: {folder} has no such file: {hint(tag.name, [file.stem for file in files])}")


def merge_into(pipe: "Pipeline") -> "Pipeline":
    """`Pipeline.merge_adapters`."""
    params, stay = dict(pipe.params), []
    for worn in pipe.adapters:
        if not isinstance(worn.adapter, Mapping):
            stay.append(worn)
            continue
        if not isinstance(worn.strength, Real):
            raise ValueError(f"{worn.source}: a strength that changes on the way cannot be merged into weights")
        strengths = {part: worn.strength if part == "unet" else worn.text_strength for part in worn.adapter}
        params = merge(params, worn.adapter, strengths)
    return pipe.changed(_params=params, adapters=tuple(stay))


def _weighed(layers: Adapter, blocks: Mapping[str, float]) -> Adapter:
    """With a strength of its own at each layer that a pattern finds, the first one that does."""
    if isinstance(layers, Hypernetwork):
        raise ValueError("blocks= is for the LoRA family and IP-Adapters: a hypernetwork has no layers of its own")
    if isinstance(layers, IPAdapter):
        return layers.replace(layers=_weighed({"unet": layers.layers}, blocks)["unet"])
    found: set[str] = set()

    def entry(part, path, arrays):
        pattern = next((pattern for pattern in blocks if re.search(pattern, f"{part}/{path}")), None)
        if pattern is None:
            return arrays
        found.add(pattern)
        return {**arrays, "strength": np.float32(blocks[pattern]) * np.float32(arrays.get("strength", 1.0))}

    weighed = {
        part: {path: entry(part, path, arrays) for path, arrays in entries.items()} for part, entries in layers.items()
    }
    for pattern in blocks:
        if pattern not in found:
            example = next(f"{part}/{path}" for part, entries in layers.items() for path in entries)
            raise ValueError(f"blocks={pattern!r} finds no layer of this adapter, such as {example}")
    return weighed
