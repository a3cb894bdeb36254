"""`config.method="textual_inversion"`: new words, of one or several vectors each, learn what pictures show (Gal et al.
2022, arXiv 2208.01618). All else stays as it is.

`config.textual_inversion.tokens` names each word, how many vectors it has, and the words that it starts as. Captions
say the word. With `keep_norm` every vector keeps the length that it had at first: lengths else grow without bound, and
a word that is longer than others drowns them. The run leaves a file for each word, `<word>.safetensors`, in diffusers'
form, for SDXL in that of its two encoders; `word` without the marks that no file's name may have.
"""

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sd_jax.adapters import textual_inversion
from sd_jax.adapters.textual_inversion import Embedding
from sd_jax.checkpoints import embeddings
from sd_jax.checkpoints.place import gather
from sd_jax.models.networks import Networks
from sd_jax.models.presets import ModelSpec
from sd_jax.training import full
from sd_jax.training.adapting import method_of
from sd_jax.training.context import Context, Keys
from sd_jax.training.method import Adapting, Batch
from sd_jax.types import Params

_TABLE = ("text_model", "embeddings", "token_embedding", "embedding")


def _prepare(config: ConfigDict, spec: ModelSpec, params: Params, tokenizer: Any):
    """The model with the words in it, at their first vectors. Raises ValueError for a word that is there already."""
    tokenizer.with_tokens({token: count for token, count, _ in config.textual_inversion.tokens})  # which refuses early
    texts = gather({part: params[part] for part in spec.text_encoders}, where=config.init)
    made = [
        textual_inversion.init(spec, texts, tokenizer, token, count, words)
        for token, count, words in config.textual_inversion.tokens
    ]
    spec, texts, tokenizer = textual_inversion.with_embeddings(spec, texts, tokenizer, made)
    for part, tree in texts.items():  # rows beyond the words are no one's
        texts[part] = _put(tree, _TABLE, _table(tree)[: tokenizer.vocab_size])
        spec = spec.with_vocabulary(part, vocab_size=tokenizer.vocab_size)
    return spec, {**params, **texts}, tokenizer


def _count(config: ConfigDict) -> int:
    return sum(count for _, count, _ in config.textual_inversion.tokens)


def _init(config: ConfigDict, networks: Networks, key: Any, loaded: Params) -> Params:
    """{text encoder: the new words' vectors [words, width]}, which are the last of its table."""
    rows = {part: _table(loaded[part])[-_count(config) :] for part in networks.spec.text_encoders}
    return jax.tree.map(lambda x: x.astype(jnp.float32), rows)  # small updates do not fit into half precision


def _wear(context: Context, params: Params, batch: Batch, keys: Keys | None) -> tuple[Context, Params]:
    return context, _with_rows(params, params["adapter"])


def _with_rows(params: Params, rows: Params) -> Params:
    changed = dict(params)
    for part, vectors in rows.items():
        table = _table(params[part])
        table = jnp.concatenate([table[: -len(vectors)], vectors.astype(table.dtype)])
        changed[part] = _put(params[part], _TABLE, table)
    return changed


def _put_on(config: ConfigDict, pipe: Any, rows: Params) -> Any:
    return pipe.changed(_params=_with_rows(pipe.params, rows))


def _save(config: ConfigDict, model: Any, rows: Params, workdir: pathlib.Path) -> None:
    rows, begin = jax.device_get(rows), 0
    for token, count, _ in config.textual_inversion.tokens:
        vectors = {part: table[begin : begin + count] for part, table in rows.items()}
        begin += count
        name = re.sub(r"[^\w.-]+", "", token) or "word"
        format = "sdxl" if len(vectors) > 1 else "diffusers"
        embeddings.save(workdir / f"{name}.safetensors", Embedding(token, vectors), format, overwrite=True)


def check(config: ConfigDict, spec: ModelSpec) -> None:
    """Raises ValueError, naming key and mend."""
    full.check(config, spec)
    tokens = config.textual_inversion.tokens
    if not tokens or not all(map(_is_token, tokens)):
        raise ValueError(
            f"config.textual_inversion.tokens={tuple(tokens)}: give a (word, vectors, words that it starts as) triple "
            "for each, e.g. (('<sks>', 2, 'star'),)"
        )
    if config.data.cache_text:
        raise ValueError("config.data.cache_text keeps what words say, and these learn: set it to False")


def _is_token(row: Any) -> bool:
    word, count, like = row if len(row) == 3 else ("", 0, "")
    return isinstance(count, int) and count > 0 and bool(word.strip() and like.strip())


def _table(params: Params) -> Any:
    for name in _TABLE:
        params = params[name]
    return params


def _put(tree: Params, path: tuple[str, ...], leaf: Any) -> Params:
    return {**tree, path[0]: leaf if len(path) == 1 else _put(tree[path[0]], path[1:], leaf)}


TEXTUAL_INVERSION = method_of(Adapting(_prepare, _init, _wear, _put_on, _save), check)
