"""Prompts to what the U-Net is told of them: weighted, chunked, scheduled and composed conditioning.

A text of n chunks (`chunks.py`) becomes n * positions states z. Weights w, one a token, apply behind the encoder:

    a1111   z' = w z, then z' * mean(z) / mean(z'), the means over all numbers of one chunk                  (1)
    comfy   z' = z_empty + w (z - z_empty), z_empty the states of the empty prompt                           (2)

A1111 takes the means of Eq. 1 over all texts of a schedule at once; here each chunk has its own, so that a text has one
encoding whatever else is encoded. Where mean(z) is nothing but rounding, z' = w z. Where the states of several encoders
are joined (SDXL), each has means of its own.

Texts of unequal length get one number of tokens, in four ways that A1111 and ComfyUI have:
- `encode_texts`, and the texts of one schedule: empty prompts follow (comfy: see the last);
- the parts of `a AND b`: the last state is repeated;
- prompts of one batch, and prompt against negative prompt (`match_tokens`): the whole is repeated until lengths agree.
  Attention over a repeated context is that over the context, so each is guided as if it were alone. (Only networks
  that also pool the context, addition_embed_type="text", see a slight difference.)

What the sampling loop does with an `EncodedPrompt`, for parts p of weights w_p, in each call of the denoiser:

    D = D_uncond + scale * sum_p w_p (D_p - D_uncond)                                                        (3)

    positive = encode_prompts(prompts, ..., calls=calls).repeat(batch_size)
    negative = encode_prompts([negative_prompt], ..., calls=calls, negative=True).repeat(batch)
    positive, negative = match_tokens(positive, negative)
    # inside the jitted loop, `call` a traced int:
    contexts[index[:, :, call]]    # [batch, parts, tokens, width]; see `sampling.conditioning`
    weights                        # [batch, parts]; 0 for a part that this prompt has not

The encodings of all texts are one table, and the batch holds rows of it for each call: another prompt, schedule or
order of prompts compiles nothing anew, while the table's length (a power of 2, at least TABLE_ROWS), `parts` and the
number of tokens stay the same.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from sd_jax.prompts import schedule, tags
from sd_jax.prompts.chunks import to_chunks
from sd_jax.prompts.tokenize import Tokenizer
from sd_jax.prompts.weights import parse, syntax_named
from sd_jax.types import AnyArray, Conditioning, TokenIds

TABLE_ROWS = 8  # so a prompt of up to as many texts compiles nothing that a simple prompt has not
MOST_REPEATS = 6  # of the longest context, to meet the others; beyond, last states are repeated instead
MEANINGLESS = 1e-5  # a mean of less than so much of the root mean square is rounding, not a mean

Encode = Callable[[TokenIds], Conditioning]  # ids [n, positions] -> context [n, positions, width]; always called n = 1


@flax.struct.dataclass
class EncodedPrompt:
    """Prompts of a batch, each of one or more parts, each of which may change from call to call.

    contexts: every text that occurs, end to end with padding rows; pooled: the same, None where the family has none.
    index: which text, for each picture, part and call of the denoiser. weights: of the parts, as in Eq. 3.
    """

    contexts: Float[AnyArray, "texts tokens width"]
    pooled: Float[AnyArray, "texts width"] | None
    index: Int[AnyArray, "batch parts calls"]
    weights: Float[AnyArray, "batch parts"]

    @property
    def parts(self) -> int:
        return self.index.shape[1]

    @property
    def is_single(self) -> bool:
        """One part of weight 1: without guidance (scale 1), Eq. 3 is then its denoiser alone. Not under jit."""
        return self.parts == 1 and bool((np.asarray(self.weights) == 1).all())

    def zeros(self) -> "EncodedPrompt":
        """One prompt for all calls, all zeros, of as many tokens: the empty negative prompt of SDXL."""
        rows = lambda x: None if x is None else np.zeros((TABLE_ROWS, *x.shape[1:]), x.dtype)  # noqa: E731
        index = np.zeros((1, 1, self.index.shape[-1]), np.int32)
        return EncodedPrompt(rows(self.contexts), rows(self.pooled), index, np.ones((1, 1), np.float32))

    def repeat(self, times: int) -> "EncodedPrompt":
        """Each prompt `times` times in a row."""
        index, weights = (np.repeat(np.asarray(x), times, axis=0) for x in (self.index, self.weights))
        return self.replace(index=index, weights=weights)


def encode_prompts(
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    encode: Encode,
    positions: int,  # tokens that the text encoder reads at once (77 for CLIP)
    calls: int = 1,  # of the denoiser: the steps, or twice them where the sampler is of second order
    syntax: str = "a1111",  # or "comfy", "plain"
    negative: bool = False,  # negative prompts are not split at AND, and their tags are text (A1111)
    base_calls: int | None = None,  # of the first pass, where this is the second one of hires fix
    widths: Sequence[int] = (),  # of the states of several encoders, in the order in which they are joined
) -> EncodedPrompt:
    """All that a syntax knows. Arrays are NumPy's, of the encoder's dtype.

    `<lora:...>` tags are left out with a warning: who applies them takes them out beforehand, with `tags.extract`.
    Raises ValueError for an unknown syntax, naming the nearest, and for less than one call.
    """
    if not prompts:
        raise ValueError("there are no prompts to encode; no words are the prompt ''")
    reader = _Reader(tokenizer, encode, positions, syntax, widths)
    edits = reader.rules.edits
    compositions = {}  # prompt -> its parts: (weight, schedule)
    for prompt in dict.fromkeys(prompts):
        text = _without_tags(prompt) if edits and not negative else prompt
        parts = schedule.split_and(text) if edits and not negative else [(text, 1.0)]
        compositions[prompt] = [
            (weight, schedule.schedule(part, calls, base_calls) if edits else [(calls, part)]) for part, weight in parts
        ]
    states = {prompt: _encode_parts(parts, reader) for prompt, parts in compositions.items()}
    tokens = _common_length({len(z) for parts in states.values() for part in parts for z, _ in part})

    table: list[tuple[np.ndarray, np.ndarray | None]] = []
    rows = {}  # prompt -> index [parts, calls]
    for prompt, parts in compositions.items():
        index = []
        for (_, entries), encoded in zip(parts, states[prompt], strict=True):
            place = {}
            for (_, text), (z, pooled) in zip(entries, encoded, strict=True):
                if text not in place:
                    place[text] = len(table)
                    table.append((_lengthened(z, tokens), pooled))
            reads = schedule.index_of_calls([end for end, _ in entries], calls)
            index.append([place[entries[i][1]] for i in reads])
        rows[prompt] = index

    most = max(len(parts) for parts in compositions.values())
    return EncodedPrompt(
        *_stacked(table),
        index=np.asarray([rows[p] + rows[p][:1] * (most - len(rows[p])) for p in prompts], np.int32),
        weights=np.asarray(
            [[w for w, _ in compositions[p]] + [0.0] * (most - len(rows[p])) for p in prompts], np.float32
        ),
    )


def encode_texts(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    encode: Encode,
    positions: int,
    syntax: str = "a1111",
    widths: Sequence[int] = (),
) -> Conditioning:
    """Weights and chunks alone: AND, schedules and tags are text. pooled: of the first chunk.

    Raises ValueError for an unknown syntax, naming the nearest.
    """
    reader = _Reader(tokenizer, encode, positions, syntax, widths)
    encoded = reader.read_all(texts)
    pooled = None if encoded[0][1] is None else jnp.asarray(np.stack([p for _, p in encoded]))
    return Conditioning(jnp.asarray(np.stack([z for z, _ in encoded])), pooled)


def match_tokens(*encoded: EncodedPrompt) -> tuple[EncodedPrompt, ...]:
    """The same with one number of tokens, as one batched call of a network takes them."""
    tokens = _common_length({each.contexts.shape[1] for each in encoded})
    return tuple(
        each.replace(contexts=np.stack([_lengthened(z, tokens) for z in np.asarray(each.contexts)])) for each in encoded
    )


# -- One text --------------------------------------------------------------------------------------------------------


class _Reader:
    """Texts -> weighted states, in NumPy. One chunk at a time goes through the encoder: its shape never changes."""

    def __init__(self, tokenizer: Tokenizer, encode: Encode, positions: int, syntax: str, widths: Sequence[int]):
        self.tokenizer, self.encode, self.positions = tokenizer, encode, positions
        self.syntax, self.rules = syntax, syntax_named(syntax)
        self._ends = np.cumsum(widths, dtype=int)[:-1]  # of each encoder's states but the last one's
        self._seen: dict[bytes, tuple[np.ndarray, np.ndarray | None]] = {}

    def read_all(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """(states [tokens, width], pooled [width]) of each text, of one number of tokens."""
        read = {text: self._read(text) for text in dict.fromkeys(texts)}
        tokens = _common_length({len(z) for z, _ in read.values()})
        most = max(len(z) for z, _ in read.values())
        if self.rules.emphasis == "empty":
            return [(_lengthened(read[text][0], tokens), read[text][1]) for text in texts]
        return [(self._followed_by_empty(read[text][0], most), read[text][1]) for text in texts]

    def _read(self, text: str) -> tuple[np.ndarray, np.ndarray | None]:
        pieces = parse(text, self.syntax)
        ids, weights = to_chunks(pieces, self.tokenizer, self.positions, self.rules.chunking)
        encoded = [self._states(row) for row in ids]
        weighted = [self._weighted(z, w) for (z, _), w in zip(encoded, weights, strict=True)]
        return np.concatenate(weighted), encoded[0][1]

    def _states(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        key = ids.tobytes()
        if key not in self._seen:
            out = self.encode(ids[None])
            self._seen[key] = np.asarray(out.context)[0], None if out.pooled is None else np.asarray(out.pooled)[0]
        return self._seen[key]

    def _empty(self) -> np.ndarray:
        ids, _ = to_chunks([], self.tokenizer, self.positions)
        return self._states(ids[0])[0]

    def _weighted(self, z: np.ndarray, w: np.ndarray) -> np.ndarray:
        if (w == 1).all():
            return z
        dtype, z, w = z.dtype, z.astype(np.float32), w[:, None]
        if self.rules.emphasis == "empty":
            empty = self._empty().astype(np.float32)
            return (empty + w * (z - empty)).astype(dtype)  # (Eq. 2)
        parts = np.split(z, self._ends, axis=-1)
        return np.concatenate([w * part * _restoring(part, w) for part in parts], axis=-1).astype(dtype)  # (Eq. 1)

    def _followed_by_empty(self, z: np.ndarray, tokens: int) -> np.ndarray:
        return np.concatenate([z, *[self._empty()] * ((tokens - len(z)) // self.positions)])


def _restoring(z: np.ndarray, w: np.ndarray) -> np.float32:
    """mean(z) / mean(w z), or 1 where the mean is rounding: that of a last layer norm which has no offset."""
    old, new = z.mean(dtype=np.float64), (w * z).mean(dtype=np.float64)
    if abs(old) < MEANINGLESS * math.sqrt(np.square(z, dtype=np.float64).mean()) or new == 0:
        return np.float32(1)
    return np.float32(old / new)


# -- Several ---------------------------------------------------------------------------------------------------------


def _encode_parts(parts, reader: _Reader) -> list[list[tuple[np.ndarray, np.ndarray | None]]]:
    """For each part, the states of its schedule's texts, all of one length."""
    encoded = [reader.read_all([text for _, text in entries]) for _, entries in parts]
    most = max(len(z) for part in encoded for z, _ in part)
    return [[(_with_last_repeated(z, most), pooled) for z, pooled in part] for part in encoded]


def _common_length(lengths: set[int]) -> int:
    """The length that repeated contexts of these lengths have in common."""
    common, longest = math.lcm(*lengths), max(lengths)
    return common if common <= MOST_REPEATS * longest else longest


def _lengthened(z: np.ndarray, tokens: int) -> np.ndarray:
    return _with_last_repeated(np.tile(z, (tokens // len(z), 1)), tokens)


def _with_last_repeated(z: np.ndarray, tokens: int) -> np.ndarray:
    return np.concatenate([z, np.repeat(z[-1:], tokens - len(z), axis=0)])


def _stacked(table) -> tuple[np.ndarray, np.ndarray | None]:
    """The table with rows of zeros up to its length."""
    length = max(TABLE_ROWS, 1 << (len(table) - 1).bit_length())
    stack = lambda rows: np.stack(list(rows) + [np.zeros_like(rows[0])] * (length - len(rows)))  # noqa: E731
    pooled = [p for _, p in table]
    return stack([z for z, _ in table]), None if pooled[0] is None else stack(pooled)


def _without_tags(prompt: str) -> str:
    text, found = tags.extract(prompt)
    if found:
        sources = " ".join(tag.source for tag in found)
        warnings.warn(f"left out of the prompt, since nothing applied it: {sources}", UserWarning, stacklevel=3)
    return text
