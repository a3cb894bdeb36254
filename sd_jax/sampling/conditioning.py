"""What a U-Net is told in a walk: all texts as one table, of which each call reads its rows, and the numbers of SDXL.

SDXL (Podell et al. 2023, section 2.2) is told the sizes of the picture, `time_ids`, in pixels:

    base      original height, width, crop top, left, target height, width
    refiner   original height, width, crop top, left, aesthetic score

The negative prompt is told the same sizes, and a low score. Models distilled by LCM (Luo et al. 2023) are told the
guidance scale that they imitate, and need no second call on a negative prompt.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sd_jax.models.presets import ModelSpec
from sd_jax.prompts.encode import EncodedPrompt, encode_prompts, match_tokens
from sd_jax.types import AnyArray, Conditioning, Recipe

if TYPE_CHECKING:
    from sd_jax.sampling.pipeline import Pipeline

# Who reads what, by `num_time_ids`
TOLD_TO = {
    "original_size": (5, 6),
    "crops_coords_top_left": (5, 6),
    "target_size": (6,),
    "aesthetic_score": (5,),
    "negative_aesthetic_score": (5,),
}
_NAMES = {(5, 6): "SDXL and its refiner", (6,): "SDXL", (5,): "SDXL's refiner"}


class Rows(NamedTuple):
    """What each picture is told, or each part of its prompt (parts of a picture next to each other)."""

    texts: Int[AnyArray, "rows *tiles calls"]  # which of the table; of each tile, where tiles have prompts
    time_ids: Float[AnyArray, "rows numbers"] | None
    guidance_scale: Float[AnyArray, " rows"] | None
    class_labels: Int[AnyArray, " rows"] | None
    pictures: tuple[Float[AnyArray, "rows _ width"], ...] = ()  # what each IP-Adapter shows, see image_prompt.py


class Told(NamedTuple):
    """What one U-Net is told in all its calls. Traced: only shapes, and what is None, compile anew."""

    table: Conditioning  # context and pooled (None where it is not read) of every text
    positive: Rows
    negative: Rows | None  # None = without guidance
    weights: Float[AnyArray, "batch parts"] | None  # of the parts; None = one part of weight 1

    @property
    def batch(self) -> int:
        """Pictures."""
        return len(self.positive.texts if self.weights is None else self.weights)


def of_call(table: Conditioning, rows: Rows, call: Int[Array, ""]) -> Conditioning:
    """What call number `call` reads; beyond the last one, what the last one read."""
    at = jnp.asarray(rows.texts)[:, jnp.minimum(call, rows.texts.shape[1] - 1)]
    pooled = None if table.pooled is None else jnp.asarray(table.pooled)[at]
    return Conditioning(jnp.asarray(table.context)[at], pooled, rows.time_ids, rows.class_labels, rows.guidance_scale)


def of_tile(rows: Rows, number: Int[Array, ""] | int) -> Rows:
    """What tile number `number` is told."""
    texts = jnp.asarray(rows.texts)
    return rows if texts.ndim == 2 else rows._replace(texts=texts[:, number])


def tell(
    pipe: "Pipeline",
    prompts: Sequence[str],
    recipe: Recipe,
    calls: int,  # of the denoiser
    base_calls: int | None,  # of the first pass, in the second pass of hires fix
    size: tuple[int, int],  # height and width of the pictures, in pixels
    pictures: int | None,  # that are started from; None = from nothing
    conditioning: Conditioning | None = None,  # in place of prompts, and of time_ids where it has them
    negative_conditioning: Conditioning | None = None,
    class_label: int | None = None,  # the same for all
) -> Told:
    """Raises ValueError, naming the field, for what this model cannot be told."""
    encoded = functools.partial(_encoded, pipe, recipe, calls, base_calls)
    tiles = recipe.tile_prompts or ("",)  # all pictures of the first tile, then all of the second, ...
    positive = encoded([text or prompt for text in tiles for prompt in prompts], conditioning)
    if recipe.tile_prompts and (conditioning is not None or not positive.is_single):
        raise ValueError("tile_prompts= goes with neither conditioning= nor AND: leave one of them out")
    if conditioning is None:
        positive = positive.repeat(recipe.batch_size)
    if pictures is not None and len(positive.index) == len(tiles):
        positive = positive.repeat(pictures)
    batch = len(positive.index) // len(tiles)
    negative = None
    imitates = pipe.spec.unet.time_cond_proj_dim is not None  # guidance, and so needs none
    if (float(recipe.guidance_scale) != 1.0 and not imitates) or not positive.is_single:
        if negative_conditioning is None and pipe.spec.force_zeros_for_empty_prompt and not recipe.negative_prompt:
            negative = positive.zeros()
        else:
            negative = encoded([recipe.negative_prompt], negative_conditioning, negative=True)
        negative = negative.repeat(batch) if len(negative.index) == 1 else negative
        if len(negative.index) != batch:
            raise ValueError(f"negative_conditioning holds {len(negative.index)} prompts, the prompts are {batch}")
        positive, negative = match_tokens(positive, negative)

    # The table, and who reads what of it
    both = [positive] if negative is None else [positive, negative]
    table = Conditioning(
        np.concatenate([np.asarray(each.contexts) for each in both]),
        None if positive.pooled is None else np.concatenate([np.asarray(each.pooled) for each in both]),
    )
    ids = time_ids(pipe.spec, recipe, *size)
    ids = [_rows_of(own, given) for own, given in zip(ids, (conditioning, negative_conditioning), strict=True)]
    scale = recipe.guidance_scale if imitates else None
    rows = functools.partial(_rows, batch=batch, tiles=len(tiles) if recipe.tile_prompts else None)
    return Told(
        table,
        rows(positive, 0, ids[0], scale, class_label),
        None if negative is None else rows(negative, len(positive.contexts), ids[1], scale, class_label),
        None if positive.is_single else np.asarray(positive.weights),
    )


def time_ids(
    spec: ModelSpec, recipe: Recipe, height: int, width: int
) -> tuple[Float[np.ndarray, " numbers"] | None, Float[np.ndarray, " numbers"] | None]:
    """(of the prompt, of the negative prompt), None where the U-Net reads none. height, width: the picture's.

    Raises ValueError where a U-Net reads others than SDXL or its refiner.
    """
    count = spec.num_time_ids
    if count == 0:
        return None, None
    place = (*(recipe.original_size or (height, width)), *recipe.crops_coords_top_left)
    target = recipe.target_size or (height, width)
    if count == 6:
        both = (*place, *target), (*place, *target)
    elif count == 5:
        both = (*place, recipe.aesthetic_score), (*place, recipe.negative_aesthetic_score)
    else:
        raise ValueError(f"this U-Net reads {count} time_ids, which is neither SDXL (6) nor its refiner (5)")
    first, second = (np.asarray(numbers, np.float32) for numbers in both)
    return first, second


def refuse_untold(recipe: Recipe, specs: Sequence[ModelSpec]) -> None:
    """Raises ValueError for numbers that none of the models is told, unless they have their defaults."""
    counts = {spec.num_time_ids for spec in specs}
    for name, readers in TOLD_TO.items():
        value = getattr(recipe, name)
        if value != getattr(Recipe, name) and not counts & set(readers):
            raise ValueError(f"{name}={value!r} is for {_NAMES[readers]}, which this model is not: leave it out")


def _encoded(pipe, recipe, calls, base_calls, prompts, conditioning, negative=False) -> EncodedPrompt:
    """Prompts, or conditioning in their place: one row of the table for each picture, the same at every call."""
    pooled_is_read = pipe.spec.reads_pooled
    if conditioning is not None:
        if pooled_is_read and conditioning.pooled is None:
            raise ValueError("conditioning has no pooled state, which this model reads: see Pipeline.encode_prompts")
        batch = len(conditioning.context)
        index = np.broadcast_to(np.arange(batch, dtype=np.int32)[:, None, None], (batch, 1, calls))
        pooled = np.asarray(conditioning.pooled) if pooled_is_read else None
        return EncodedPrompt(np.asarray(conditioning.context), pooled, index, np.ones((batch, 1), np.float32))
    encode = functools.partial(pipe.encode_tokens, clip_skip=recipe.clip_skip)
    encoded = encode_prompts(
        prompts,
        pipe.tokenizer,
        encode,
        pipe.positions,
        calls,
        recipe.prompt_syntax,
        negative,
        base_calls,
        pipe.state_widths,
    )
    return encoded if pooled_is_read else encoded.replace(pooled=None)


def _rows(encoded: EncodedPrompt, offset: int, ids, scale, label, batch: int, tiles: int | None) -> Rows:
    index = np.asarray(encoded.index, np.int32)
    texts = index.reshape(-1, index.shape[-1]) + np.int32(offset)
    if tiles is not None:
        texts = texts.reshape(-1, batch, texts.shape[-1])  # the negative prompt is one for all tiles
        texts = np.broadcast_to(texts, (tiles, *texts.shape[1:])).swapaxes(0, 1)
    if ids is not None:
        ids = np.broadcast_to(ids, (batch, ids.shape[-1])).repeat(encoded.parts, axis=0)
    scale, label = (
        None if value is None else np.full(len(texts), value, dtype)
        for value, dtype in ((scale, np.float32), (label, np.int32))
    )
    return Rows(texts, ids, scale, label)


def _rows_of(own: Any, given: Conditioning | None) -> Any:
    """time_ids [1 or batch, numbers]: those of the given conditioning, if it has them."""
    if own is None:
        return None
    return own[None] if given is None or given.time_ids is None else np.asarray(given.time_ids, np.float32)
