"""Pictures as prompts: what IP-Adapters that a pipeline has on are told of them, row by row; and image variation, in
which a picture is all that a model is told: one token of CLIP features in place of a prompt, zeros in place of none, as
in lambdalabs/sd-image-variations-diffusers.

The vision tower that an adapter was trained with is in no file of it. It is given, or lies beside the file in a folder
`image_encoder`, as h94/IP-Adapter has it (models/ip-adapter_sd15.bin and models/image_encoder/; sdxl_models/ with
towers of its own and those of models/).
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from sd_jax import sharding
from sd_jax.adapters.ip_adapter import IPAdapter, project
from sd_jax.checkpoints.beside import open_beside
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.place import place
from sd_jax.data.clip_pixels import preprocess
from sd_jax.models.clip_vision import CLIPVision
from sd_jax.models.presets import CLIPConfig
from sd_jax.sampling import canvas
from sd_jax.sampling.conditioning import Told
from sd_jax.types import Conditioning, Params, Recipe

if TYPE_CHECKING:
    from sd_jax.sampling.adapters import Worn

FOLDER = "image_encoder"  # beside an adapter's file
_BESIDE = (FOLDER, f"../models/{FOLDER}", f"../sdxl_models/{FOLDER}")


class ImageEncoder:
    """A CLIP's vision tower on the device."""

    def __init__(self, config: CLIPConfig, params: Params, dtype: str = "float32", source: str = "the image encoder"):
        self.config, self.params, self.source = config, params, source
        self.network = CLIPVision(config.vision_config, jnp.dtype(dtype))

    def width_for(self, kind: str) -> int:
        """Of what an IP-Adapter of this kind reads of it."""
        vision = self.config.vision_config
        return vision.hidden_size if kind == "plus" else vision.projection_dim

    def tokens(
        self, adapter: IPAdapter, pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]
    ) -> Float[Array, "pictures_plus_1 tokens width"]:
        """What the adapter makes of each picture, and at last of none; float32."""
        squares = preprocess(pictures, self.config, cut="transformers")
        return _tokens(self.network, self.params, adapter, squares)

    def features(self, pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Float[Array, "pictures width"]:
        """Those behind the projection, not normalised; float32."""
        return _features(self.network, self.params, preprocess(pictures, self.config, cut="transformers"))


@functools.partial(sharding.jit, static_argnums=0)
def _features(network, params, squares):
    return features_of(network, params, "base", squares)[:-1]


@functools.partial(sharding.jit, static_argnums=0)
def _tokens(network, params, adapter, squares):
    return project(adapter.projection, features_of(network, params, adapter.kind, squares))


def features_of(
    network: CLIPVision,
    params: Params,
    kind: str,  # of the IP-Adapter that reads them
    squares: Float[Array, "pictures size size 3"],  # as the network reads them
) -> Float[Array, "pictures_plus_1 width"] | Float[Array, "pictures_plus_1 states width"]:
    """f or h of adapters/ip_adapter.py, of each picture and at last of none; float32."""
    if kind == "plus":
        squares = jnp.concatenate([squares, jnp.zeros_like(squares[:1])])
        return network.apply({"params": params}, squares).before_last.astype(jnp.float32)
    features = network.apply({"params": params}, squares).pooled.astype(jnp.float32)
    return jnp.concatenate([features, jnp.zeros_like(features[:1])])


def encoder_for(
    adapter: IPAdapter,
    source: str,  # of the adapter: its file
    given: Any,  # an ImageEncoder, or a path of an "image_encoder" (`open_beside`); None = one beside the file
    known: Sequence[ImageEncoder],  # that are loaded already
    dtype: str,
) -> ImageEncoder:
    """Raises FileNotFoundError or CheckpointError, naming the mend, where there is none that the adapter can read."""
    if isinstance(given, ImageEncoder):
        return _fitting(adapter, given, source)
    path = _beside(adapter, source) if given is None else pathlib.Path(given)
    for encoder in known:
        if encoder.source == str(path):
            return _fitting(adapter, encoder, source)
    opened = open_beside("image_encoder", path)
    params = place(opened.params, dtype, where=path)
    return _fitting(adapter, ImageEncoder(opened.config, params, dtype, str(path)), source)


def _beside(adapter: IPAdapter, source: str) -> pathlib.Path:
    """The first folder beside the file whose tower is as wide as the adapter reads."""
    file = pathlib.Path(source)
    beside = [file.parent / name for name in _BESIDE] if file.is_file() else []
    there = [path for path in beside if (path / "config.json").is_file()]
    for path in there:
        if ImageEncoder(open_beside("image_encoder", path).config, {}).width_for(adapter.kind) == adapter.width_in:
            return path
    found = f"{', '.join(map(str, there))} is not as wide" if there else f"no folder {FOLDER} is beside it"
    raise CheckpointError(
        f"{source}: reads CLIP features {adapter.width_in} wide, and {found}: give the CLIP that it was trained with, "
        f"as image_encoder= (--image_encoder=)"
    )


def _fitting(adapter: IPAdapter, encoder: ImageEncoder, source: str) -> ImageEncoder:
    if encoder.width_for(adapter.kind) != adapter.width_in:
        raise CheckpointError(
            f"{source}: reads CLIP features {adapter.width_in} wide, and those of {encoder.source} are "
            f"{encoder.width_for(adapter.kind)}: give the CLIP that it was trained with, as image_encoder="
        )
    return encoder


# -- What a job is told ----------------------------------------------------------------------------------------------


def show(told: Told, worn: "Sequence[Worn]", image_prompt: Any) -> Told:
    """With the tokens of the pictures in every row; the negative rows have those of none.

    image_prompt: as the jobs of a Pipeline take it. Raises ValueError where an adapter lacks its picture, or a picture
    its adapter.
    """
    shown = [each for each in worn if isinstance(each.adapter, IPAdapter)]
    if not shown:
        return told
    if image_prompt is None:
        raise ValueError(f"{shown[0].source} is an IP-Adapter and has no picture to show: give image_prompt=")
    prompts = [image_prompt] if len(shown) == 1 else image_prompt
    if not isinstance(prompts, list | tuple) or len(prompts) != len(shown):
        raise ValueError(f"image_prompt= is for {len(shown)} IP-Adapters: give a list, for each what it shows")
    each = [_tokens_of(worn, prompt, told.batch) for worn, prompt in zip(shown, prompts, strict=True)]
    positive, negative = zip(*each, strict=True)
    parts = len(told.positive.texts) // told.batch
    rows = told.positive._replace(pictures=tuple(np.repeat(tokens, parts, axis=0) for tokens in positive))
    return told._replace(positive=rows, negative=told.negative and told.negative._replace(pictures=negative))


def in_place_of_text(
    pipe: "Pipeline",
    prompts: Sequence[str],
    recipe: Recipe,
    image_prompt: Any,  # as the jobs of a Pipeline take it
) -> Conditioning:
    """What a model that `sees_pictures` is told. Raises ValueError where there are words, or no picture."""
    if any(prompts) or recipe.negative_prompt:
        raise ValueError("this model reads pictures and no prompts: leave them empty, and give image_prompt=")
    if image_prompt is None:
        raise ValueError("this model is told a picture in place of a prompt: give image_prompt=")
    groups = _groups(image_prompt)
    context = pipe.encode_pictures([picture for group in groups for picture in group]).context
    batch = max(len(prompts), *(len(group) for group in groups))
    return Conditioning(jnp.asarray(_at_once(np.asarray(context), groups, batch).repeat(recipe.batch_size, axis=0)))


def _tokens_of(worn: "Worn", prompt: Any, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """[batch, tokens, width] of a picture or of several at once, and of none in place of each."""
    groups = _groups(prompt)
    *tokens, none = np.asarray(worn.encoder.tokens(worn.adapter, [picture for group in groups for picture in group]))
    return _at_once(np.stack(tokens), groups, batch), np.tile(none, (batch, len(groups), 1))


def _groups(prompt: Any) -> list[UInt8[np.ndarray, "_ _ _ 3"]]:
    """Those that are shown at once."""
    groups = [canvas.read_pixels(picture) for picture in (prompt if isinstance(prompt, list | tuple) else [prompt])]
    if not groups:
        raise ValueError("image_prompt= holds no picture: give at least one")
    return groups


def _at_once(tokens: np.ndarray, groups: Sequence[UInt8[np.ndarray, "_ _ _ 3"]], batch: int) -> np.ndarray:
    """Tokens of all pictures -> [batch, tokens, width], those of each group behind each other."""
    for group in groups:
        if len(group) not in (1, batch):
            raise ValueError(f"image_prompt holds {len(group)} pictures, the prompts ask for {batch}")
    ends = np.cumsum([len(group) for group in groups])[:-1]
    of_all = [np.broadcast_to(own, (batch, *own.shape[1:])) for own in np.split(tokens, ends)]
    return np.concatenate(of_all, axis=1)
