"""Text of any length to chunks of as many tokens as a text encoder reads at once: prompts, and captions to train on.

A chunk is start, at most `positions - 2` tokens (75 of CLIP's 77), end, padding. Start, end and padding weigh 1. A word
of several tokens (textual inversion) that a chunk has no room for goes to the next one whole, unless it is longer than
a chunk; ComfyUI does so with words of less than 8 alone.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from logging import getLogger

import numpy as np
from jaxtyping import Float32, Int32

from sd_jax.prompts.tokenize import Tokenizer
from sd_jax.prompts.weights import BREAK, Piece

COMMA_BACKTRACK = 20  # a comma among so many last tokens of a full chunk: what follows it moves on (A1111's default)
LONG_SEGMENT = 8  # tokens; weighted segments shorter than this are never cut in two (ComfyUI)
_SHOWN = 5  # long captions that a training run is told of, word for word

logger = getLogger(__name__)

Token = tuple[int, float]  # id, weight


def to_chunks(
    pieces: Iterable[Piece],
    tokenizer: Tokenizer,
    positions: int,  # tokens that the text encoder reads at once, start and end included
    chunking: str = "commas",  # or "segments"; weights.Syntax says which syntax has which
) -> tuple[Int32[np.ndarray, "chunks positions"], Float32[np.ndarray, "chunks positions"]]:
    """Ids and weights of the tokens, at least one chunk.

    Raises ValueError for fewer positions than start, end and one token take.
    """
    _check_room(positions)
    cut = _CHUNKINGS[chunking]
    return _framed(cut(pieces, tokenizer, positions - 2), tokenizer, positions)


def _check_room(positions: int) -> None:
    if positions < 3:
        raise ValueError(f"a text encoder of {positions} positions reads no words: start, end and a word take 3")


def _framed(chunks: Sequence[Sequence[Token]], tokenizer: Tokenizer, positions: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full((len(chunks), positions), tokenizer.pad_token_id, np.int32)
    weights = np.ones((len(chunks), positions), np.float32)
    ids[:, 0] = tokenizer.bos_token_id
    for i, chunk in enumerate(chunks):
        end = 1 + len(chunk)
        ids[i, 1:end] = [token for token, _ in chunk]
        weights[i, 1:end] = [weight for _, weight in chunk]
        ids[i, end] = tokenizer.eos_token_id
    return ids, weights


def _cut_at_commas(pieces: Iterable[Piece], tokenizer: Tokenizer, length: int) -> list[list[Token]]:
    """A1111's: full chunks, but what follows a comma near the end of one goes to the next. BREAK ends a chunk."""
    parts: list[list[Token]] = [[]]
    for piece in pieces:
        if piece == BREAK:
            parts.append([])
        else:
            parts[-1] += [(token, piece.weight) for token in tokenizer.token_ids(piece.text)]
    if len(parts) > 1 and not parts[-1]:
        parts.pop()  # nothing after the last BREAK
    chunks = []
    for part in parts:
        ends = _ends_at_commas([token for token, _ in part], tokenizer, length)
        chunks += [part[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return chunks


def _ends_at_commas(tokens: Sequence[int], tokenizer: Tokenizer, length: int) -> list[int]:
    """Where the chunks of a text end; at least one, and the last one is `len(tokens)`."""
    comma, ends, start = tokenizer.comma_token_id, [], 0
    last = None  # comma of this chunk; one that overflows into the next chunk does not count there
    for i, token in enumerate(tokens):
        if i - start == length:
            near = last is not None and token != comma and i - last <= COMMA_BACKTRACK
            start, last = last + 1 if near else i, None
            ends.append(start)
        elif token == comma:
            last = i
        if start < i and i + tokenizer.counts.get(token, 1) > start + length:  # a word that would be cut in two
            start, last = i, None
            ends.append(start)
    return [*ends, len(tokens)]


def _cut_at_segments(pieces: Iterable[Piece], tokenizer: Tokenizer, length: int) -> list[list[Token]]:
    """ComfyUI's: a segment that does not fit goes to the next chunk whole if it is short, else it is cut."""
    chunks: list[list[Token]] = [[]]
    for piece in pieces:
        for ids, is_word in _segments(tokenizer.token_ids(piece.text), tokenizer):
            tokens = [(token, piece.weight) for token in ids]
            long = len(tokens) > length if is_word else len(tokens) >= min(LONG_SEGMENT, length + 1)
            while len(chunks[-1]) + len(tokens) > length:
                room = length - len(chunks[-1]) if long else 0
                chunks[-1] += tokens[:room]
                tokens = tokens[room:]
                chunks.append([])
            chunks[-1] += tokens
    return chunks


def _segments(tokens: Sequence[int], tokenizer: Tokenizer) -> Iterator[tuple[Sequence[int], bool]]:
    """(tokens, whether they are one word of several), in their order: such words, and what is between them."""
    begin = 0
    for i, token in enumerate(tokens):
        if token in tokenizer.counts:
            yield tokens[begin:i], False
            begin = i + tokenizer.counts[token]
            yield tokens[i:begin], True
    yield tokens[begin:], False


def _before_a_cut_word(tokens: Sequence[int], tokenizer: Tokenizer, begin: int, end: int) -> int:
    """`end`, or where a word of several tokens begins that would be cut in two there."""
    words = (i for i in range(begin + 1, end) if i + tokenizer.counts.get(tokens[i], 1) > end)
    return next(words, end)


_CHUNKINGS = {"commas": _cut_at_commas, "segments": _cut_at_segments}


# -- Captions --------------------------------------------------------------------------------------------------------


class CaptionTokenizer:
    """Captions -> ids of `chunks` chunks each, for data loaders. Safe to call from many threads at once.

    Chunks are cut as A1111 cuts a prompt, behind a comma near their end, and each has its own start and end, so that a
    caption says in training what it says in sampling; empty chunks follow a short one. (kohya's sd-scripts cut every 75
    tokens and keep, of the joined states, the first start and the last end alone: 227 of them for 3 chunks, not 231.)

    What does not fit into the last chunk is cut off; such captions are counted (`num_long`), and the first few shown in
    the log.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        positions: int,  # tokens that the text encoder reads at once, start and end included
        chunks: int = 1,
    ):
        _check_room(positions)
        self._tokenizer, self._length, self._chunks = tokenizer, positions - 2, chunks
        self._empty = _framed([[]] * chunks, tokenizer, positions)[0].reshape(-1)
        self._lock = threading.Lock()
        self.num_long = 0

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "batch tokens"]:
        """[batch, chunks * positions]."""
        ids = np.tile(self._empty, (len(texts), 1))
        for row, text in zip(ids.reshape(len(texts), self._chunks, -1), texts, strict=True):
            tokens, start = self._tokenizer.token_ids(text), 0
            for chunk, end in zip(row, self._ends(tokens), strict=False):
                chunk[1 : 1 + end - start] = tokens[start:end]
                chunk[1 + end - start] = self._tokenizer.eos_token_id
                start = end
            if start < len(tokens):
                self._count(text, start)
        return ids

    def _ends(self, tokens: Sequence[int]) -> list[int]:
        """Where each chunk ends, at most `chunks` of them. The last one is filled: nothing moves on from it."""
        if len(tokens) <= self._length:
            return [len(tokens)]
        ends = _ends_at_commas(tokens, self._tokenizer, self._length)
        if len(ends) <= self._chunks:
            return ends
        kept = ends[: self._chunks - 1]
        begin = kept[-1] if kept else 0
        return [*kept, _before_a_cut_word(tokens, self._tokenizer, begin, begin + self._length)]

    def _count(self, text: str, kept: int) -> None:
        with self._lock:
            self.num_long += 1
            number = self.num_long
        if number <= _SHOWN:
            dropped = self._tokenizer.text_from(text, kept)
            more = "; others are cut without being shown" if number == _SHOWN else ""
            logger.warning("caption too long, dropped %r of %r%s", dropped, text, more)
