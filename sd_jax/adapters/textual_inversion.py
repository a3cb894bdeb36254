"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): new words, each of a few vectors where words have their own.

A word becomes as many ids as it has vectors, behind those that the tokenizer had, and the vectors become the rows of
these ids in the table of each text encoder. The model is otherwise as it was: without the word, a prompt means what it
meant before.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sd_jax.models.presets import ModelSpec
from sd_jax.types import AnyArray, Params

_TABLE = ("text_model", "embeddings", "token_embedding", "embedding")
_FAMILIES = {(768,): "SD 1", (1024,): "SD 2", (768, 1280): "SDXL", (1280,): "SDXL's refiner"}  # by width


@runtime_checkable
class Tokenizer(Protocol):
    """As much of `prompts.tokenize.Tokenizer` as is used here."""

    vocab_size: int

    def token_ids(self, text: str) -> list[int]: ...

    def with_tokens(self, words: Mapping[str, int]) -> "Tokenizer": ...


@flax.struct.dataclass
class Embedding:
    """A word and its vectors, by text encoder ("text_encoder", "text_encoder_2"); as many for each of them."""

    token: str = flax.struct.field(pytree_node=False)
    vectors: dict[str, Float[AnyArray, "vectors width"]]

    @property
    def count(self) -> int:
        """Vectors, and so ids, of the word."""
        return len(next(iter(self.vectors.values())))


def init(
    spec: ModelSpec,
    params: Mapping[str, Params],  # by part
    tokenizer: Tokenizer,
    token: str,
    count: int,  # vectors
    words: str,  # what it is like: the vectors start as those of these words
) -> Embedding:
    """An embedding to train, float32. Where there are more vectors than words have, each of theirs is there several
    times in a row; where fewer, some are left out (A1111's way).

    Raises ValueError for words that are none, and less than one vector.
    """
    table = rows_of(spec, params, tokenizer, words)
    found = len(next(iter(table.values())))
    if not found or count < 1:
        raise ValueError(f"an embedding of {count} vectors that starts as {words!r}: give at least one of each")
    chosen = np.arange(count) * found // count
    return Embedding(token, {part: rows[chosen].astype(jnp.float32) for part, rows in table.items()})


def rows_of(
    spec: ModelSpec, params: Mapping[str, Params], tokenizer: Tokenizer, text: str
) -> dict[str, Float[Array, "tokens width"]]:
    """The vectors of a text's tokens, by text encoder: those of words, or of an embedding that is in the model."""
    ids = np.asarray(tokenizer.token_ids(text), np.int32)
    return {part: jnp.asarray(_table(params[part]))[ids] for part in spec.text_encoders}


def with_embeddings(
    spec: ModelSpec,
    params: Mapping[str, Params],  # by part
    tokenizer: Tokenizer,
    embeddings: Sequence[Embedding],
) -> tuple[ModelSpec, dict[str, Params], Tokenizer]:
    """The model with new words in it; what was given stays as it is.

    Their ids are `tokenizer.vocab_size` and so on, in their order. Where a table has rows there, which no word had,
    these are replaced; it grows by what it lacks.
    Raises ValueError for an embedding of another family, for a word that the tokenizer has already, or twice here.
    """
    for embedding in embeddings:
        _check(embedding, spec)
    counts = {embedding.token: embedding.count for embedding in embeddings}
    if len(counts) < len(embeddings):
        tokens = [embedding.token for embedding in embeddings]
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise ValueError(f"two embeddings are called {twice!r}: rename one of them")
    grown, begin = tokenizer.with_tokens(counts), tokenizer.vocab_size
    changed = dict(params)
    for part in spec.text_encoders:
        table = jnp.asarray(_table(params[part]))
        new = [jnp.asarray(embedding.vectors[part], table.dtype) for embedding in embeddings]
        table = jnp.concatenate([table[:begin], *new, table[begin + sum(counts.values()) :]])
        changed[part] = _with_leaf(params[part], _TABLE, table)
        spec = spec.with_vocabulary(part, vocab_size=len(table))
    return spec, changed, grown


def _check(embedding: Embedding, spec: ModelSpec) -> None:
    """SDXL's refiner has the second of its text encoders alone, and takes SDXL's embeddings."""
    needed = {part: config.hidden_size for part, config in spec.text_encoders.items()}
    found = {part: rows.shape[-1] for part, rows in embedding.vectors.items()}
    if {**found, **needed} != found or "text_encoder_2" in found.keys() - needed.keys():
        raise ValueError(
            f"embedding {embedding.token!r} is for {_described(found)}, but this model is {_described(needed)}: "
            "take one that was made for it"
        )
    counts = {part: len(rows) for part, rows in embedding.vectors.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"embedding {embedding.token!r} has {counts} vectors: as many are needed for each")


def _described(widths: Mapping[str, int]) -> str:
    family = _FAMILIES.get(tuple(widths.values()), "of another kind")
    return f"{family} ({', '.join(f'{part} {width} wide' for part, width in widths.items())})"


def _table(params: Params) -> AnyArray:
    for name in _TABLE:
        params = params[name]
    return params


def _with_leaf(tree: Params, path: Sequence[str], leaf: Array) -> Params:
    if not path:
        return leaf
    return {**tree, path[0]: _with_leaf(tree[path[0]], path[1:], leaf)}
