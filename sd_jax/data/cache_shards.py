"""The shards of a cache: files of about 64 MB, each of records whose pictures have one size.

    "moments"    float32 [n, h, w, 2 channels]   the autoencoder's mean and log-variance, where latents are cached
    "time_ids"   float32 [n, numbers]            where the model reads them
    "mask"       uint8 [n, h, w]                 the share of each of the above that counts, where masks are read
    "contexts"   [n, k, tokens, width]           the text encoders' states of k captions, where text is cached
    "pooleds"    [n, k, width]                   where they have any
    "records"    int64 [n]                       places in the source
    "checksums"  uint32 [n]                      CRC-32 of a record's bytes in the above, array by array, by their names

in the safetensors format, with two texts in the header: the cache's "key", and "bad", which records could not be read.

A record is read by its offset, and checked each time, which costs about as much. Why not a map of the file: it counts
as memory of the process, and ends it without a word where the disk fails or the file has been cut.
"""

import dataclasses
import json
import math
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8, UInt32
from tqdm import tqdm

from sd_jax.checkpoints.aside import aside
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.read_safetensors import open_file, write
from sd_jax.data import captions
from sd_jax.data.loader import BadFiles
from sd_jax.data.sources import Config, Source, Subset
from sd_jax.data.transforms import Fitted, draws, fit, time_ids
from sd_jax.media import BadImage

_SHARD_BYTES = 2**26
_MOST_RECORDS = 1024  # of a shard, however small: what an interruption can cost
_BATCH = 32  # pictures or captions encoded at once on a device, at most,
_BATCH_PIXELS = 2**21  # and fewer of large ones: 8 of 512x512

Size = tuple[int, int] | None  # height and width of pictures; None = they are not encoded

_NAMES = ("moments", "time_ids", "mask", "contexts", "pooleds")


@dataclasses.dataclass(frozen=True)
class Encode:
    """What is computed once. Both may return arrays of JAX, still being computed."""

    pictures: Callable[[np.ndarray], Any] | None = None  # uint8 [batch, h, w, 3] -> moments; None = pixels are kept
    captions: Callable[[list[str]], tuple[Any, Any]] | None = None  # -> context, pooled (or None); None = text is kept


@dataclasses.dataclass(frozen=True)
class Shard:
    path: pathlib.Path
    size: Size
    records: np.ndarray  # places in the source


def place_of(source: Source, index: int) -> int:
    """The place of a record in the whole that its source is a part of."""
    return int(source.positions[index]) if isinstance(source, Subset) else int(index)


def drawn_captions(source: Source, index: int, config: Config) -> list[str]:
    """The captions of a record that are encoded; the first without any chance in it."""
    fields, place = source.fields(index), place_of(source, index)
    rngs = (draws(config.seed, place, draw) if draw else None for draw in range(config.data.cache_captions))
    return [captions.choose(fields, config.data, rng) for rng in rngs]


# -- Writing ---------------------------------------------------------------------------------------------------------


def cut(groups: Sequence[tuple[Size, int]], encode: Encode, config: Config) -> list[tuple[Size, int]]:
    """(size of the pictures, number of records) of each group -> the same of each shard.

    What a record takes is found by encoding black pictures of the first size, and the empty prompt.
    """
    per_pixel, per_text = 0.0, 0.0
    if encode.pictures is not None and groups:
        size = groups[0][0]
        moments = encode.pictures(np.zeros((_batch_size(config, size), *size, 3), np.uint8))
        per_pixel = 4 * math.prod(moments.shape[1:]) / math.prod(size)
    if encode.captions is not None and groups:
        states = _states(encode, [""], config).values()
        per_text = config.data.cache_captions * sum(array.nbytes for array in states)
    shards = []
    for size, count in groups:
        num_bytes = per_text + (0 if size is None else per_pixel * math.prod(size))
        most, batch = max(min(int(_SHARD_BYTES / num_bytes), _MOST_RECORDS), 1), _batch_size(config, size)
        most = most // batch * batch or most  # where there are several, their batches are full
        shards += [(size, min(most, count - begin)) for begin in range(0, count, most)]
    return shards


def make(
    shards: Sequence[Shard],  # that are not there yet
    key: str,
    source: Source,
    encode: Encode,
    config: Config,
    num_time_ids: int,
    name: str,  # for the progress bar
) -> None:
    """Encodes and writes shard by shard; pictures are read one batch ahead. What is written depends on nothing else.

    Raises DataError where most pictures cannot be read, OSError where a shard cannot be written.
    """

    def read(index: int, size: Size) -> tuple[Fitted, np.ndarray] | BadImage:
        try:
            record = source[index]
        except BadImage as error:
            return error
        fitted = fit(record["pixels"], size, mask=record.get("mask"))
        if not num_time_ids:
            return fitted, np.zeros(0, np.float32)
        whole = source.full_size(index) or record["pixels"].shape[:2]
        return fitted, time_ids(whole, fitted.crop, size, num_time_ids)

    total = sum(len(shard.records) for shard in shards)
    counter = BadFiles(total)
    with (
        ThreadPoolExecutor(max(config.data.num_workers, 1)) as pool,
        tqdm(total=total, unit="image", desc=f"encoding {name}") as bar,
    ):
        read_shards = [shard for shard in shards if shard.size is not None]
        tasks = (
            [pool.submit(read, int(index), shard.size) for index in batch]
            for shard in read_shards
            for batch in _batches_of(shard.records, _batch_size(config, shard.size))
        )
        results = _one_ahead(tasks)
        for shard in shards:
            arrays, bad = {"records": shard.records}, {}
            if shard.size is not None:
                pictures, bad = _encode_pictures(shard, results, encode, config, num_time_ids, counter, bar)
                arrays |= pictures
            if encode.captions is not None:
                texts = [text for index in shard.records for text in drawn_captions(source, int(index), config)]
                of_each = (len(shard.records), config.data.cache_captions)
                states = _states(encode, texts, config)
                arrays |= {name: array.reshape(*of_each, *array.shape[1:]) for name, array in states.items()}
            if shard.size is None:
                bar.update(len(shard.records))
            arrays["checksums"] = checksums(arrays)
            with aside(shard.path, overwrite=True) as work:
                write(work, arrays, {"key": key, "bad": json.dumps(bad)})


def _encode_pictures(shard, results, encode, config, num_time_ids, counter, bar) -> tuple[dict, dict]:
    """(the shard's moments, time_ids and masks, zeros where a picture is bad; {row: (name, reason)} of those)."""
    moments, masks, ids, bad = [], [], np.zeros((len(shard.records), num_time_ids), np.float32), {}
    size = _batch_size(config, shard.size)
    for at in range(0, len(shard.records), size):
        batch, pixels = next(results), np.zeros((size, *shard.size, 3), np.uint8)
        mask = np.full((len(batch), *shard.size), 255, np.uint8)
        for slot, result in enumerate(batch):
            if not isinstance(result, BadImage):
                fitted, ids[at + slot] = result
                pixels[slot] = fitted.pixels
                mask[slot] = 255 if fitted.mask is None else fitted.mask
        encoded = np.array(np.asarray(encode.pictures(pixels))[: len(batch)], np.float32)
        for slot, result in enumerate(batch):
            if not np.isfinite(encoded[slot]).all():
                result = BadImage(f"record {shard.records[at + slot]}", f"its latents in {config.dtype} are not finite")
            if isinstance(result, BadImage):
                bad[at + slot], encoded[slot] = (result.name, result.reason), 0.0
                counter.bad(result)
            else:
                counter.good()
        moments.append(encoded)
        masks.append(_shares(mask, encoded.shape[1:3]))
        bar.update(len(batch))
    arrays = {"moments": np.concatenate(moments), **({"time_ids": ids} if num_time_ids else {})}
    return {**arrays, **({"mask": np.concatenate(masks)} if config.diffusion.masked_loss else {})}, bad


def _shares(mask: UInt8[np.ndarray, "n height width"], size: tuple[int, int]) -> UInt8[np.ndarray, "n h w"]:
    """Means over the pixels that each of `size`, (h, w), stands for."""
    (n, height, width), (h, w) = mask.shape, size
    return np.round(mask.reshape(n, h, height // h, w, width // w).mean((2, 4))).astype(np.uint8)


def _states(encode: Encode, texts: list[str], config: Config) -> dict[str, np.ndarray]:
    """contexts [texts, tokens, width] and, where there are any, pooleds [texts, width], in the config's dtype."""
    size, dtype = _batch_size(config), jnp.dtype(config.dtype)
    contexts, pooleds = [], []
    for batch in _batches_of(texts, size):
        context, pooled = encode.captions(list(batch) + [""] * (size - len(batch)))
        contexts.append(np.asarray(context)[: len(batch)].astype(dtype))
        if pooled is not None:
            pooleds.append(np.asarray(pooled)[: len(batch)].astype(dtype))
    return {name: np.concatenate(x) for name, x in (("contexts", contexts), ("pooleds", pooleds)) if x}


def _batch_size(config: Config, size: Size = None) -> int:
    """Pictures of `size`, or captions, that are encoded at once, on all devices of this process together."""
    most = _BATCH if size is None else min(_BATCH, _BATCH_PIXELS // (size[0] * size[1]))
    return max(min(config.batch_size, most), 1) * jax.local_device_count()


def _batches_of(items: list[str] | np.ndarray, size: int) -> Iterator:
    return (items[at : at + size] for at in range(0, len(items), size))


def _one_ahead(tasks: Iterable[list]) -> Iterator[list]:
    """The results of each list of futures, once the next list has been submitted."""
    waiting = None
    for futures in tasks:
        if waiting is not None:
            yield [future.result() for future in waiting]
        waiting = futures
    if waiting is not None:
        yield [future.result() for future in waiting]


def checksums(arrays: dict[str, np.ndarray]) -> UInt32[np.ndarray, " n"]:
    """Of each record of a shard."""
    kept = [arrays[name] for name in _NAMES if name in arrays]
    return np.array([_checksum(of_record) for of_record in zip(*kept, strict=True)], np.uint32)


def _checksum(arrays: Iterable[np.ndarray]) -> int:
    seen = 0
    for array in arrays:
        seen = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), seen)
    return seen


# -- Reading ---------------------------------------------------------------------------------------------------------


class OpenShard:
    """One shard, open to be read at random, from many threads. Raises BadImage, named after the file, if damaged."""

    def __init__(self, shard: Shard, key: str):
        self._path = shard.path
        try:
            contents = open_file(shard.path)
            if contents.metadata.get("key") != key:
                raise CheckpointError("it is another cache's")
            if not np.array_equal(contents.tensors["records"].read(), shard.records):
                raise CheckpointError("it holds other records")
            self._checksums = contents.tensors["checksums"].read()
            self._bad = {int(row): (str(n), str(why)) for row, (n, why) in json.loads(contents.metadata["bad"]).items()}
            self._tensors = {name: contents.tensors[name] for name in _NAMES if name in contents.tensors}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error

    def read(self, row: int) -> dict[str, np.ndarray]:
        """The arrays of its `row`-th record."""
        if row in self._bad:
            raise BadImage(*self._bad[row])
        try:
            arrays = {name: tensor.rows(row, row + 1).read()[0] for name, tensor in self._tensors.items()}
        except (OSError, CheckpointError) as error:
            raise self._damaged(error) from error
        if _checksum(arrays.values()) != self._checksums[row]:
            raise self._damaged(CheckpointError("its bytes are not those that were written"))
        return arrays

    def _damaged(self, error: Exception) -> BadImage:
        reason = str(error).removeprefix(f"{self._path}: ").split("\n")[0]
        if not self._path.exists():
            reason = "it is gone"
        return BadImage(str(self._path), f"{reason} (remove the file, and the next start encodes its records again)")
