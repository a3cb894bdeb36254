"""The networks that judge, opened from files, each with the name of its weights: what a figure is worth hangs on them.

Any file in the layout will do, one of random numbers too, so a report says beside each figure which it was. Weights
that papers use are told by the SHA-256 of their file.
"""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sd_jax.checkpoints.beside import open_beside
from sd_jax.checkpoints.judges import load_inception
from sd_jax.checkpoints.place import place
from sd_jax.data.clip_pixels import square
from sd_jax.evals.features import inception_features, mapped
from sd_jax.models.aesthetic import AestheticHead
from sd_jax.models.clip import CLIP
from sd_jax.models.presets import FeaturesConfig
from sd_jax.models.vae import to_image
from sd_jax.prompts.tokenize import load_tokenizer
from sd_jax.sampling.recipe import hash_of_weights
from sd_jax.types import Params

# First digits of the SHA-256 of published files
PUBLISHED = {
    "6726825d": "FID's Inception of pytorch-fid and torch-fidelity",
    "397923af": "VGG16 of torchvision",
    "a78928a0af": "LPIPS 0.1 of the lpips package",
    "40d3657159": "OpenAI's CLIP ViT-B/32",
    "5806e77cd8": "OpenAI's CLIP ViT-B/16",
    "b8cca3fd41": "OpenAI's CLIP ViT-L/14",
    "3035c92b35": "OpenAI's CLIP ViT-L/14@336",
}


class Network(NamedTuple):
    name: str  # of `name_of`
    run: Callable[..., np.ndarray]  # a row for each example


class TextAndPictures(NamedTuple):
    """A CLIP. Its features are of length 1."""

    name: str
    pictures: Callable[[np.ndarray], np.ndarray]  # uint8 pixels of any one size -> [pictures, width]
    texts: Callable[[Sequence[str]], np.ndarray]  # -> [texts, width]


def name_of(path: str | os.PathLike) -> str:
    """What weights are called in a report: their file, or several joined by a comma, the first ten digits of the
    SHA-256, and which published ones they are, of PUBLISHED."""
    names = []
    for part in str(path).split(","):
        digits = hash_of_weights(part.strip())
        known = next((name for start, name in PUBLISHED.items() if digits.startswith(start)), "not known as published")
        names.append(f"{os.path.basename(part.strip().rstrip('/'))} (sha256 {digits}, {known})")
    return " and ".join(names)


def open_inception(path: str, batch_size: int) -> Network:
    """uint8 pixels of any size -> float32 features, as clean-fid has them. Raises as `load_inception`."""
    return Network(f"Inception {name_of(path)}", inception_features(load_inception(path), batch_size))


def open_clip(path: str, batch_size: int, tokenizer: str = "") -> TextAndPictures:
    """`path`: as `checkpoints.beside` takes it. `tokenizer`: "" = the CLIP's own, else SD 1.x's.

    Raises FileNotFoundError, CheckpointError, and ValueError where CLIP and tokenizer do not belong together.
    """
    opened = open_beside("clip", path)
    config, network = opened.config, CLIP.of(opened.config)
    params = place(opened.params, "float32", where=path)
    look = mapped(lambda params, squares: network.encode_picture(params, to_image(squares)), params, batch_size)
    read, words = mapped(network.encode_text, params, batch_size), None

    def pictures(pixels: np.ndarray) -> np.ndarray:
        return look(np.stack([square(picture, config.vision_config.image_size) for picture in pixels]))

    def texts(captions: Sequence[str]) -> np.ndarray:
        nonlocal words
        if words is None:
            words = load_tokenizer(tokenizer or opened.tokenizer)
            words.check(config.text_config)
            words.pad_as(config.text_config)
        return read(words(captions, config.text_config.max_position_embeddings))

    return TextAndPictures(f"CLIP {name_of(path)}", pictures, texts)


def open_aesthetic(path: str, batch_size: int) -> Network:
    """A CLIP's features of pictures -> scores. `path`: LAION's files, or a run of method "aesthetic"."""
    config, params, _ = open_beside("aesthetic", path)
    head = AestheticHead(config)
    run = mapped(lambda params, features: head.apply({"params": params}, features), params, batch_size)
    return Network(f"aesthetic head {name_of(path)}", run)


def open_lpips(path: str) -> tuple[str, tuple[FeaturesConfig, Params]]:
    """-> (name, what `Reconstructions` takes). `path`: vgg16.pth,vgg.pth or a run of method "features"."""
    opened = open_beside("perceptual", path)
    return f"LPIPS {name_of(path)}", (opened.config, place(opened.params, jnp.float32, where=path))
