"""CLIP as the model stage: how well a picture and its caption fit, and how much people like it, as LAION's columns say.

    similarity   the cosine of the features of both (laion2B-en: by ViT-B/32); None without a caption
    aesthetic    the head's score (LAION's V2: by ViT-L/14)

They stand before what a data set says itself: `filters` reads the first of several names, and these are the first.
"""

import functools
import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sd_jax import sharding
from sd_jax.checkpoints.beside import open_beside
from sd_jax.checkpoints.place import place
from sd_jax.data.cache import hash_weights
from sd_jax.data.clip_pixels import square
from sd_jax.data.stages import Scorer
from sd_jax.models.aesthetic import AestheticHead
from sd_jax.models.clip import CLIP
from sd_jax.prompts.tokenize import load_tokenizer
from sd_jax.types import Params


def clip_scorer(
    clip: str,  # a path that `checkpoints.beside` takes for a CLIP: a folder, a file, a workdir of method "clip"
    aesthetic: str = "",  # a predictor in LAION's layout, or a workdir of method "aesthetic"; "" = without
    tokenizer: str = "",  # "" = the CLIP's own, or SD 1.x's
    batch_size: int = 64,  # pictures at once on all devices here; rounded up to a multiple of their number
    dtype: str = "float32",  # of the CLIP's computation
) -> Scorer:
    """Raises FileNotFoundError, CheckpointError, or ValueError where head, tokenizer and CLIP do not go together."""
    opened = open_beside("clip", clip)
    network = CLIP.of(opened.config, dtype)
    words = load_tokenizer(tokenizer or opened.tokenizer)
    words.check(opened.config.text_config)
    words.pad_as(opened.config.text_config)
    params = {"clip": place(opened.params, jnp.float32, where=clip)}
    head = None
    if aesthetic:
        config, params["aesthetic"], _ = open_beside("aesthetic", aesthetic)
        if config.width != opened.config.projection_dim:
            raise ValueError(
                f"--aesthetic={aesthetic} reads features of {config.width} numbers, those of --clip={clip} have "
                f"{opened.config.projection_dim}: they do not belong together"
            )
        head = AestheticHead(config)
    name = hashlib.sha256(f"{hash_weights(params)} {opened.config} {dtype}".encode()).hexdigest()[:16]
    size = opened.config.vision_config.image_size
    score = _on_devices(functools.partial(_scores, network, head), params, batch_size)
    length = opened.config.text_config.max_position_embeddings

    def columns_of(columns: dict[str, Any]) -> dict[str, list]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "prompt too long")  # so are many captions of the web
            ids = words(columns["caption"], length)
        found = {key: values.tolist() for key, values in score(columns["inputs"], ids).items()}
        said = zip(columns["caption"], found["similarity"], strict=True)
        return found | {"similarity": [value if caption else None for caption, value in said]}

    return Scorer(f"clip {name}", columns_of, functools.partial(square, size=size))


def _scores(network: CLIP, head: AestheticHead | None, params: Params, squares, ids) -> dict[str, jax.Array]:
    config = network.config
    mean, std = (np.asarray(x, np.float32)[None, None, None] for x in (config.image_mean, config.image_std))
    features = network.encode_image(params["clip"], (squares.astype(jnp.float32) / np.float32(255) - mean) / std)
    found = {"similarity": (features * network.encode_text(params["clip"], ids)).sum(-1)}
    if head is not None:
        found["aesthetic"] = head.apply({"params": params["aesthetic"]}, features)
    return found


def _on_devices(function: Callable, params: Params, batch_size: int) -> Callable[..., dict[str, np.ndarray]]:
    """-> function of arrays of at most `batch_size` rows, which are split over the devices here; compiled once."""
    devices = jax.local_devices()
    mesh = sharding.make_mesh({"data": len(devices)}, devices)
    over, size = sharding.batch_sharding(mesh), -(-batch_size // len(devices)) * len(devices)
    placed, compiled = jax.device_put(params, sharding.replicated(mesh)), sharding.jit(function)

    def run(*arrays: np.ndarray) -> dict[str, np.ndarray]:
        count = len(arrays[0])
        filled = [np.concatenate([array, np.repeat(array[:1], size - count, axis=0)]) for array in arrays]
        return {key: np.asarray(rows)[:count] for key, rows in compiled(placed, *jax.device_put(filled, over)).items()}

    return run
