"""Pictures -> what the figures are taken of: resized as clean-fid does, through a network, rows gathered.

Judging needs no word between devices: each process maps its own pictures over its own devices, at its own pace, and
only the results meet (`gathered`). So processes may have different numbers of pictures.
"""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sd_jax import sharding
from sd_jax.models.inception import SIDE, InceptionV3
from sd_jax.types import Params


def resized(
    pixels: UInt8[np.ndarray, "pictures height width 3"],
    side: int = SIDE,
) -> Float[np.ndarray, "pictures side side 3"]:
    """clean-fid's resize (Parmar et al. 2022): each channel in float32 by Pillow's bicubic filter, antialiased.

    Not rounded, clipped to [0, 255]. A picture of this size stays as it is.
    """
    out = np.empty((len(pixels), side, side, 3), np.float32)
    for picture, levels in zip(pixels, out, strict=True):
        for channel in range(3):
            plane = Image.fromarray(picture[..., channel].astype(np.float32))
            levels[..., channel] = plane.resize((side, side), Image.Resampling.BICUBIC)
    return out.clip(0.0, 255.0, out=out)


def mapped(
    function: Callable[..., jax.Array],  # (params, *arrays [batch, ...]) -> [batch, ...]: a row for each example
    params: Params,
    batch_size: int,  # of this process, over its devices; rounded up to a multiple of their number
) -> Callable[..., np.ndarray]:
    """-> function of arrays [n, ...], split over this process' devices -> the rows, as NumPy.

    The last batch is filled up, so that all compile once. With no examples there are no rows: ValueError.
    """
    devices = jax.local_devices()
    mesh = sharding.make_mesh({"data": len(devices)}, devices)
    over, size = sharding.batch_sharding(mesh), -(-batch_size // len(devices)) * len(devices)
    placed = jax.device_put(params, sharding.replicated(mesh))
    compiled = sharding.jit(function)

    def run(*arrays: np.ndarray) -> np.ndarray:
        if not len(arrays[0]):
            raise ValueError("there are no pictures to judge")
        rows = []
        for at in range(0, len(arrays[0]), size):
            batch = [array[at : at + size] for array in arrays]
            count = len(batch[0])
            filled = [np.concatenate([part, np.repeat(part[:1], size - count, axis=0)]) for part in batch]
            rows.append(np.asarray(compiled(placed, *jax.device_put(filled, over)))[:count])
        return np.concatenate(rows)

    return run


def inception_features(
    params: Params,  # of checkpoints.judges.load_inception
    batch_size: int = 32,
) -> Callable[[np.ndarray], np.ndarray]:
    """-> function: uint8 pixels [n, height, width, 3] of any size -> float32 features [n, 2048], as clean-fid has them.

    Pictures are resized a batch at a time, so they take little memory besides their own.
    """
    extract = mapped(lambda params, levels: InceptionV3().apply({"params": params}, levels), params, batch_size)

    def run(pixels: np.ndarray) -> np.ndarray:
        parts = [pixels[at : at + batch_size] for at in range(0, max(len(pixels), 1), batch_size)]
        return np.concatenate([extract(resized(part)) for part in parts])

    return run


def gathered(array: np.ndarray) -> list[np.ndarray]:
    """An array of each process, in their order; the first axis may differ in length, even be empty. Each calls it.

    The bits stay as they are: JAX without 64-bit types would round float64 to float32.
    """
    if jax.process_count() == 1:
        return [array]
    from jax.experimental import multihost_utils

    counts = np.asarray(multihost_utils.process_allgather(np.array([len(array)], np.int32))).reshape(-1)
    if not counts.max():
        return [array] * len(counts)
    filled = np.zeros((int(counts.max()), *array.shape[1:]), array.dtype)
    filled[: len(array)] = array
    everyone = np.asarray(multihost_utils.process_allgather(filled.reshape(-1).view(np.uint8)))
    shape = (len(counts), *filled.shape)
    every = everyone.reshape(-1).view(array.dtype).reshape(shape)
    return [rows[:count] for rows, count in zip(every, counts, strict=True)]


def gathered_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of all processes, one behind the other, the same in each of them. Each process calls it."""
    return np.concatenate(gathered(rows))
