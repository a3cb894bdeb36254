"""What is computed once, before training, and read while training: moments of pictures, states of captions.

    FOLDER/NAME/index.json            what the cache was made from, thing by thing, and the list of its shards
    FOLDER/NAME/00000.safetensors     see `cache_shards`

The index is written first and a shard appears whole, so encoding that was interrupted goes on where it stopped. A cache
that was made from anything else is refused by name: it may have cost days, and is the user's to remove.
"""

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from logging import getLogger

import jax
import numpy as np
from jaxtyping import Int64

from sd_jax import distributed
from sd_jax.checkpoints.aside import aside
from sd_jax.data import DataError, fingerprints
from sd_jax.data.buckets import Assignment
from sd_jax.data.cache_shards import Encode, OpenShard, Shard, Size, cut, drawn_captions, make, place_of
from sd_jax.data.sources import Config, Source
from sd_jax.media import BadImage
from sd_jax.types import Params

# Source files between a record and what is kept of it
_CODE = {
    "picture_code": ("media.py", "data/headers.py", "data/transforms.py", "models/vae.py", "models/vae_tiny.py"),
    "text_code": ("prompts/tokenize.py", "prompts/chunks.py", "models/clip_text.py", "models/networks.py"),
}

# Config keys that explain why sizes or captions are others
_SETTINGS = {
    "sizes": ("data.resolution", "data.buckets", "data.upscale", "batch_size", "prior.share"),
    "masks": ("diffusion.masked_loss",),
    "captions": (
        *(
            "data.cache_captions",
            "data.caption_key",
            "data.prompt",
            "data.caption_weights",
            "data.tag_separator",
            "data.keep_tags",
        ),
        *("data.shuffle_tags", "data.tag_dropout", "diffusion.text_chunks", "diffusion.clip_skip", "seed"),
    ),
    "dtype": ("dtype",),
}
_SAID = {
    "records": "other pictures (some were added, removed or changed)",
    "sizes": "other sizes of its pictures",
    "time_ids": "another model (it reads other numbers of sizes and crops)",
    "masks": "masks or without",
    "captions": "other captions",
    "dtype": "another type of numbers",
    "picture_code": "another version of sd_jax (what it does to pictures has changed)",
    "text_code": "another version of sd_jax (what it does to captions has changed)",
}

_MEND = "remove the folder to encode again, or set config.data.cache_dir to another"
_PATIENCE = 60.0  # seconds

logger = getLogger(__name__)


class Cached:
    """The records of a source with "moments", float32 [h, w, 2 channels], in place of "pixels", and "time_ids" where
    the model reads them; where masks are read "mask", uint8 [h, w], the share of each moment that counts; where text is
    cached "contexts" [k, tokens, width] and "pooleds" [k, width] as well.

    With both cached there are no "fields". A record of a damaged shard raises BadImage with the shard's name.
    """

    def __init__(self, source: Source, shards: Sequence[Shard], key: str):
        self._source, self._shards, self._key = source, shards, key
        self._opened: dict[int, OpenShard | BadImage] = {}
        self._where = np.full((len(source), 2), -1, np.int32)  # shard and row of each record
        for number, shard in enumerate(shards):
            self._where[shard.records, 0] = number
            self._where[shard.records, 1] = np.arange(len(shard.records))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        index = int(index)
        number, row = self._where[index]
        if number < 0:
            raise BadImage(f"record {place_of(self._source, index)}", "it was given no size, and is not in the cache")
        arrays = self._open(int(number)).read(int(row))
        if "moments" not in arrays:
            return {**self._source[index], **arrays}
        fields = {} if "contexts" in arrays else {"fields": self._source.fields(index)}
        return {"index": place_of(self._source, index), **fields, **arrays}

    def fields(self, index: int) -> tuple[tuple[str, ...], ...]:
        return self._source.fields(index)

    def sizes(self) -> Int64[np.ndarray, "records 2"]:
        return self._source.sizes()

    def full_size(self, index: int) -> tuple[int, int] | None:
        return self._source.full_size(index)

    def fingerprint(self) -> str:
        return self._key

    def _open(self, number: int) -> OpenShard:
        if number not in self._opened:  # two threads may both open it, which does no harm
            try:
                self._opened[number] = OpenShard(self._shards[number], self._key)
            except BadImage as error:
                self._opened[number] = error
        opened = self._opened[number]
        if isinstance(opened, BadImage):
            raise BadImage(opened.name, opened.reason)
        return opened


def check(config: Config) -> None:
    """Raises ValueError where the config asks for latents that cannot be computed once."""
    data = config.data
    for key in ("cache_latents", "cache_text"):
        if data[key] and "diffusion" not in config:
            raise ValueError(f"config.data.{key} is for methods that train on latents: set it to False")
    mends = {"crop": "centre", "random_flip": False}
    for key, mend in mends.items() if data.cache_latents else ():
        if data[key] != mend:
            raise ValueError(
                f"config.data.cache_latents and config.data.{key}={data[key]!r} exclude each other: "
                f"set config.data.{key}={mend!r} or config.data.cache_latents=False"
            )


def cached(
    source: Source,
    name: str,
    folder: pathlib.Path,
    config: Config,
    assignment: Assignment,
    encode: Encode,  # pictures and captions are each called with one batch size (of a picture size): the rest is filled
    keys: dict[str, str],  # hashes of the weights, {"vae": ..., "text_encoder": ...}; see `hash_weights`
    num_time_ids: int = 0,  # how many the model reads
    process_index: int | None = None,  # None = as jax counts
    process_count: int | None = None,
) -> Source:
    """Encodes what is not yet in folder/name, every process its share of the shards, and opens it.

    Records that cannot be read stay bad records of the result. Raises DataError where the cache was made from something
    else (saying from what) or most records are bad, ValueError as `check`, OSError where the disk is full.
    """
    check(config)
    if not len(source) or encode == Encode():
        return source
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    root = folder / name
    groups = _groups(source, assignment, encode)
    made_from = _made_from(source, assignment, config, encode, keys, num_time_ids)
    settings = {cause: {key: _setting(config, key) for key in _SETTINGS[cause]} for cause in _SETTINGS}
    if index == 0 and not (root / "index.json").exists():
        if any(root.glob("*.safetensors")):
            raise DataError(f"{root}: holds shards and no index.json: {_MEND}")
        sized = cut([(size, len(records)) for size, records in groups], encode, config)
        rows = [{"file": f"{n:05d}.safetensors", "size": s, "records": c} for n, (s, c) in enumerate(sized)]
        about = {"made_from": made_from, "settings": settings, "shards": rows}
        with aside(root / "index.json", overwrite=True) as work:
            work.write_text(json.dumps(about, indent=1) + "\n")
    distributed.barrier(f"cache {name}: index")
    _appear(root, ["index.json"])
    try:
        about = json.loads((root / "index.json").read_text())
        changes = _changes(about["made_from"], made_from, about["settings"], settings)
        shards = [] if changes else list(_shards(root, about["shards"], groups))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{root / 'index.json'}: damaged ({error}): {_MEND}") from error
    if changes:
        raise DataError(f"{root}: was made with {', '.join(changes)}: {_MEND}")

    key = fingerprints.digest(json.dumps(made_from, sort_keys=True))
    there = set(os.listdir(root))
    mine = [shard for shard in shards[index::count] if shard.path.name not in there]
    if mine:
        begun, records = time.monotonic(), sum(len(shard.records) for shard in mine)
        make(mine, key, source, encode, config, num_time_ids, name)
        seconds = time.monotonic() - begun
        logger.info("%s: encoded %d records in %.0f s, %.1f images/s", root, records, seconds, records / seconds)
    distributed.barrier(f"cache {name}: shards")
    _appear(root, [shard.path.name for shard in shards])
    return Cached(source, shards, key)


def hash_weights(tree: Params) -> str:
    """A hash of every name, shape and value of a tree of arrays."""
    seen = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.asarray(leaf)
        seen.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        seen.update(array.tobytes())
    return seen.hexdigest()


def _appear(root: pathlib.Path, names: Sequence[str]) -> None:
    """Waits until files of other processes are seen here; network disks tell of new files with a delay."""
    until = time.monotonic() + _PATIENCE
    while missing := set(names) - set(os.listdir(root) if root.exists() else []):
        if time.monotonic() > until:
            raise DataError(
                f"{root / min(missing)}: is not here, and should have been written by another process: "
                "config.data.cache_dir must be one folder for all"
            )
        time.sleep(_PATIENCE / 60)


# -- What decides a cache --------------------------------------------------------------------------------------------


def _made_from(source, assignment, config, encode, keys, num_time_ids) -> dict[str, str]:
    code = {cause: fingerprints.code_of("data/cache_shards.py", *files) for cause, files in _CODE.items()}
    made_from = {"records": source.fingerprint(), "dtype": str(config.dtype)}
    if encode.pictures is not None:
        of_record = hashlib.sha256(np.ascontiguousarray(assignment.of_record, "<i8"))
        made_from["sizes"] = fingerprints.digest(repr(assignment.sizes), of_record.hexdigest())
        made_from |= {"time_ids": str(num_time_ids), "vae": keys["vae"], "picture_code": code["picture_code"]}
        made_from |= {"masks": "kept"} if config.diffusion.masked_loss else {}
    if encode.captions is not None:
        seen = hashlib.sha256(repr((config.diffusion.text_chunks, config.diffusion.clip_skip)).encode())
        for index in range(len(source)):
            seen.update(repr(drawn_captions(source, index, config)).encode("utf-8", "surrogatepass"))
        made_from |= {"captions": seen.hexdigest(), "text_code": code["text_code"]}
        made_from |= {part: key for part, key in keys.items() if part != "vae"}
    return made_from


def _changes(old: dict, new: dict, old_settings: dict, new_settings: dict) -> list[str]:
    """All that has changed, in words."""
    said, compared = [], list({**old, **new})
    for cause, kept in (("sizes", "latents"), ("captions", "text")):
        if (cause in old) != (cause in new):
            said.append(kept if cause in old else f"no {kept}")
            compared = [cause for cause in old if cause in new]  # what comes and goes with them needs no words
    changed = [cause for cause in compared if old.get(cause) != new.get(cause)]
    for cause in changed:
        were, are = old_settings.get(cause, {}), new_settings.get(cause, {})
        why = "; ".join(f"config.{key} was {were.get(key)}, is {are[key]}" for key in are if were.get(key) != are[key])
        if cause in ("sizes", "captions") and "records" in changed and not why:
            continue  # they follow the records
        what = _SAID.get(cause, f"another {cause} (its weights have changed)")
        said.append(what + (f" ({why})" if why else ""))
    return said


def _setting(config: Config, key: str):
    """A value of the config as JSON has it."""
    value = config
    for part in key.split("."):
        value = value.get(part, {})  # not every method has every key
    value = value.to_dict() if hasattr(value, "to_dict") else value
    return json.loads(json.dumps(value, default=list))


# -- Shards ----------------------------------------------------------------------------------------------------------


def _groups(source: Source, assignment: Assignment, encode: Encode) -> list[tuple[Size, np.ndarray]]:
    """The records of each size that is in use, in their order."""
    if encode.pictures is None:
        return [(None, np.arange(len(source)))]
    groups = [(tuple(size), np.flatnonzero(assignment.of_record == b)) for b, size in enumerate(assignment.sizes)]
    return [(size, records) for size, records in groups if len(records)]


def _shards(root: pathlib.Path, rows: list[dict], groups: list[tuple[Size, np.ndarray]]) -> Iterator[Shard]:
    """Raises KeyError, TypeError or ValueError where `rows`, of the index, cannot be of these groups."""
    left = dict(groups)
    for row in rows:
        size = row["size"] and tuple(row["size"])
        records, left[size] = np.split(left[size], [row["records"]])
        yield Shard(root / row["file"], size, records)
    if any(map(len, left.values())):
        raise ValueError("too few shards")
