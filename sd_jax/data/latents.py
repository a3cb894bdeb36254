"""Latents made once: the autoencoder's moments (mean and log-variance) of every picture, kept on disk.

A cache is used only where all that decides it is unchanged: the records, the resolution, the weights of the
autoencoder, what else the model is told of a picture, and the code between file and moments. Otherwise it is made
again, with a line in the log.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from logging import getLogger

import jax
import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from sd_jax.data import fingerprints
from sd_jax.data.loader import BadFiles
from sd_jax.data.sources import Config, Source, Subset
from sd_jax.data.transforms import fit, time_ids
from sd_jax.media import BadImage
from sd_jax.types import Params

Encode = Callable[[UInt8[np.ndarray, "batch height width 3"]], Float[np.ndarray, "batch h w moments"]]

_BATCH = 32  # pictures encoded at once, at most
_CODE = ("media.py", "data/headers.py", "data/transforms.py", "data/latents.py")

logger = getLogger(__name__)


class CachedMoments:
    """The records of a source with "moments", float32 [h, w, 2 channels], in place of "pixels".

    Where the model reads them, with "time_ids" as well.
    """

    def __init__(
        self,
        source: Source,
        moments: np.ndarray,
        time_ids: np.ndarray | None,  # [records, numbers]
        bad: dict[int, tuple[str, str]],
        key: str,
    ):
        self._source, self._moments, self._time_ids, self._bad, self._key = source, moments, time_ids, bad, key
        self._texts: dict[int, tuple[str, ...]] = {}  # as read; shapes world would draw the picture to say its caption

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        index = int(index)
        if index in self._bad:
            raise BadImage(*self._bad[index])
        texts = self.texts(index)
        place = int(self._source.positions[index]) if isinstance(self._source, Subset) else index
        record = {"moments": np.array(self._moments[index]), "caption": texts[0] if texts else "", "index": place}
        if self._time_ids is not None:
            record["time_ids"] = np.array(self._time_ids[index])
        return {**record, "captions": texts} if len(texts) > 1 else record

    def texts(self, index: int) -> tuple[str, ...]:
        if index not in self._texts:
            self._texts[index] = self._source.texts(index)
        return self._texts[index]

    def full_size(self, index: int) -> tuple[int, int] | None:
        return self._source.full_size(index)

    def fingerprint(self) -> str:
        return self._key


def cache_moments(
    source: Source,
    name: str,  # of the cache: folder/name.npy, folder/name.json and, where the model reads any, name.time_ids.npy
    encode: Encode,  # pixels uint8 [batch, r, r, 3] -> moments; always called with batches of one size
    weights: Params,  # of the encoder; a cache made with others is stale
    folder: pathlib.Path,
    config: Config,
    num_time_ids: int = 0,  # how many the model reads
) -> Source:
    """Encodes every record of `source` once, or finds that done; pictures are cropped in the middle.

    Records that cannot be read stay bad records of the result. Raises DataError where most are, ValueError where the
    config asks for what cannot be cached, OSError where the disk is full.
    """
    if config.data.random_flip:
        raise ValueError("data.random_flip and data.cache_latents exclude each other: set one of them to False")
    if not len(source):
        return source
    resolution = config.data.resolution
    key = fingerprints.digest(
        source.fingerprint(), str(resolution), hash_weights(weights), str(num_time_ids), fingerprints.code_of(*_CODE)
    )
    moments, about = folder / f"{name}.npy", folder / f"{name}.json"
    files = [moments, about, *([_beside(moments)] if num_time_ids else [])]
    old = json.loads(about.read_text()) if all(file.exists() for file in files) else None
    if old is None or old["key"] != key:
        if old is not None:
            logger.warning("%s is stale (other data, weights or code): encoding again", moments)
        folder.mkdir(parents=True, exist_ok=True)
        about.unlink(missing_ok=True)
        batch_size = min(config.batch_size, _BATCH)
        ids = np.zeros((len(source), num_time_ids), np.float32)
        pictures = _pictures(source, resolution, batch_size, max(config.data.num_workers, 1), ids)
        bad = _write(moments, pictures, encode, name, ids)
        aside = about.with_suffix(f".{os.getpid()}.tmp")
        aside.write_text(json.dumps({"key": key, "records": len(source), "bad": bad}) + "\n")
        aside.replace(about)  # last: without it the cache does not exist
        old = json.loads(about.read_text())
    bad = {int(index): tuple(why) for index, why in old["bad"].items()}
    ids = np.load(_beside(moments), mmap_mode="r") if num_time_ids else None
    return CachedMoments(source, np.load(moments, mmap_mode="r"), ids, bad, key)


def hash_weights(tree: Params) -> str:
    """A hash of every name, shape and value of a tree of arrays."""
    seen = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.asarray(leaf)
        seen.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        seen.update(array.tobytes())
    return seen.hexdigest()


def _pictures(
    source: Source,
    resolution: int,
    batch_size: int,
    num_threads: int,
    ids: np.ndarray,  # [records, numbers]: filled with their time_ids, where there are any
) -> Iterator[tuple[np.ndarray, dict[int, BadImage]]]:
    """(pixels of `batch_size` records, black where there is none; what was bad), read one batch ahead."""

    def read(index: int) -> np.ndarray | BadImage:
        try:
            pixels = source[index]["pixels"]
        except BadImage as error:
            return error
        fitted = fit(pixels, resolution)
        if ids.size:
            size = source.full_size(index) or pixels.shape[:2]
            ids[index] = time_ids(size, fitted.crop, resolution, ids.shape[1])
        return fitted.pixels

    with ThreadPoolExecutor(num_threads) as pool:
        starts = range(0, len(source), batch_size)
        submit = lambda at: [pool.submit(read, i) for i in range(at, min(at + batch_size, len(source)))]  # noqa: E731
        ahead = submit(0)
        for at in starts:
            futures, ahead = ahead, submit(at + batch_size)
            pixels = np.zeros((batch_size, resolution, resolution, 3), np.uint8)
            bad = {}
            for slot, future in enumerate(futures):
                result = future.result()
                if isinstance(result, BadImage):
                    bad[at + slot] = result
                else:
                    pixels[slot] = result
            yield pixels, bad


def _beside(moments: pathlib.Path) -> pathlib.Path:
    """The file of the time_ids."""
    return moments.with_suffix(".time_ids.npy")


def _write(path: pathlib.Path, pictures, encode: Encode, name: str, ids: np.ndarray) -> dict[int, tuple[str, str]]:
    """Encodes and writes record by record into a .npy file, aside, then renames it; then `ids`. Returns what was bad.

    Written as a file and not as a memory map: on a full disk a map kills the process, a file says so.
    """
    aside, count = path.with_suffix(f".{os.getpid()}.tmp"), len(ids)
    counter, bad_records, written = BadFiles(count), {}, 0
    try:
        with aside.open("wb") as file, tqdm(total=count, unit="image", desc=f"encoding {name}") as bar:
            for pixels, bad in pictures:
                moments = np.asarray(encode(pixels), np.float32)
                kept = min(len(pixels), count - written)
                if written == 0:
                    header = {"descr": "<f4", "fortran_order": False, "shape": (count, *moments.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                for slot in range(kept):
                    if written + slot in bad:
                        error = bad[written + slot]
                        bad_records[written + slot] = (error.name, error.reason)
                        counter.bad(error)
                    else:
                        counter.good()
                file.write(np.ascontiguousarray(moments[:kept], "<f4").tobytes())
                written += kept
                bar.update(kept)
        aside.replace(path)
        if ids.size:  # filled by now
            with aside.open("wb") as file:
                np.save(file, ids)
            aside.replace(_beside(path))
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}; the latents of {count} pictures could not be written", str(path)
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    return bad_records
