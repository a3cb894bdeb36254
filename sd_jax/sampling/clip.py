"""A loaded CLIP: what it finds in pictures and texts, which picture fits a text best, and a guide for sampling.

What `sd_jax.load_clip` returns. The jobs of a Pipeline, given `clip=`, go up the gradient of its similarity
(`diffusion/guidance.py`, Eq. 6), for which a CLIP of noised pictures is best (`training/contrastive.py`).
"""

import os
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from sd_jax import sharding
from sd_jax.checkpoints.beside import open_beside
from sd_jax.checkpoints.place import place
from sd_jax.data.clip_pixels import square
from sd_jax.models.clip import CLIP
from sd_jax.models.presets import CLIPConfig
from sd_jax.models.vae import to_image
from sd_jax.prompts.tokenize import Tokenizer, load_tokenizer
from sd_jax.types import Params


def load_clip(
    path: str | os.PathLike,  # a folder of transformers or OpenCLIP, a file of either or OpenAI, a run of method "clip"
    dtype: str = "float32",  # of computation
    tokenizer: str | None = None,  # a folder or hub name; None = the checkpoint's own, else CLIP's from the hub
) -> "Clip":
    """A state dict that is neither OpenAI's nor says what it is, is taken for LAION's (`checkpoints/clip_config.py`).

    Raises FileNotFoundError or CheckpointError, naming the file and the mend.
    """
    sharding.keep_compilations()
    opened = open_beside("clip", path)
    return Clip(opened.config, place(opened.params, jnp.float32, where=path), tokenizer or opened.tokenizer, dtype)


class Clip:
    """A CLIP on the device."""

    def __init__(
        self,
        config: CLIPConfig,
        params: Params,
        tokenizer: Tokenizer | str | None = None,  # None = CLIP's, from the hub or its cache
        dtype: str = "float32",
    ):
        self.config, self.params, self.network = config, params, CLIP.of(config, dtype)
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """Loaded at first use."""
        if not isinstance(self._tokenizer, Tokenizer):
            self._tokenizer = load_tokenizer(self._tokenizer)
            self._tokenizer.check(self.config.text_config)
            self._tokenizer.pad_as(self.config.text_config)
        return self._tokenizer

    def encode_images(self, images: UInt8[np.ndarray, "batch height width 3"]) -> Float[np.ndarray, "batch features"]:
        """Pictures of any one size -> features of length 1, after CLIP's own resizing and cutting on the host."""
        size = self.config.vision_config.image_size
        squares = np.stack([square(image, size=size) for image in images])
        return np.asarray(_encode_picture(self.network, self.params, to_image(squares)))

    def encode_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "texts features"]:
        """-> features of length 1. Warns of what is cut away."""
        ids = self.tokenizer(texts, self.config.text_config.max_position_embeddings)
        return np.asarray(_encode_text(self.network, self.params, ids))

    def scores(
        self,
        images: UInt8[np.ndarray, "batch height width 3"],
        texts: Sequence[str],  # one for all, or one for each
    ) -> Float[np.ndarray, " batch"]:
        """The cosine of each picture and its text."""
        return (self.encode_images(images) * self.encode_texts(texts)).sum(axis=-1)

    def best_of(
        self,
        images: UInt8[np.ndarray, "candidates height width 3"],
        text: str,
        keep: int = 1,
    ) -> Int[np.ndarray, " keep"]:
        """Which of the pictures are nearest the text, best first; of equals the first (Ramesh et al. 2021).

        Raises ValueError for a `keep` outside 1..candidates.
        """
        if not 1 <= keep <= len(images):
            raise ValueError(f"keep={keep} is not within 1..{len(images)}, the number of candidates")
        return np.argsort(-self.scores(images, [text]), kind="stable")[:keep]


_encode_picture = sharding.jit(lambda network, params, image: network.encode_picture(params, image), static_argnums=0)
_encode_text = sharding.jit(lambda network, params, ids: network.encode_text(params, ids), static_argnums=0)
