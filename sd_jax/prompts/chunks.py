"""Weighted text of any length to chunks of as many tokens as a text encoder reads at once.

A chunk is start, at most `positions - 2` tokens (75 of CLIP's 77), end, padding. Start, end and padding weigh 1.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float32, Int32

from sd_jax.prompts.tokenize import Tokenizer
from sd_jax.prompts.weights import BREAK, Piece

COMMA_BACKTRACK = 20  # a comma among so many last tokens of a full chunk: what follows it moves on (A1111's default)
LONG_SEGMENT = 8  # tokens; weighted segments shorter than this are never cut in two (ComfyUI)

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
    if positions < 3:
        raise ValueError(f"a text encoder of {positions} positions reads no words: start, end and a word take 3")
    cut = _CHUNKINGS[chunking]
    return _framed(cut(pieces, tokenizer, positions - 2), tokenizer, positions)


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
    chunks: list[list[Token]] = []
    chunk: list[Token] = []
    comma = None  # where the last one of this chunk is; one that overflows into the next chunk does not count there
    for piece in pieces:
        if piece == BREAK:
            chunks.append(chunk)
            chunk, comma = [], None
            continue
        for token in tokenizer.token_ids(piece.text):
            is_comma = token == tokenizer.comma_token_id
            if len(chunk) == length:
                near = comma is not None and not is_comma and length - comma <= COMMA_BACKTRACK
                keep = comma + 1 if near else length
                chunks.append(chunk[:keep])
                chunk, comma = chunk[keep:], None
            elif is_comma:
                comma = len(chunk)
            chunk.append((token, piece.weight))
    if chunk or not chunks:
        chunks.append(chunk)
    return chunks


def _cut_at_segments(pieces: Iterable[Piece], tokenizer: Tokenizer, length: int) -> list[list[Token]]:
    """ComfyUI's: a segment that does not fit goes to the next chunk whole if it is short, else it is cut."""
    chunks: list[list[Token]] = [[]]
    for piece in pieces:
        tokens = [(token, piece.weight) for token in tokenizer.token_ids(piece.text)]
        long = len(tokens) >= min(LONG_SEGMENT, length + 1)
        while len(chunks[-1]) + len(tokens) > length:
            room = length - len(chunks[-1]) if long else 0
            chunks[-1] += tokens[:room]
            tokens = tokens[room:]
            chunks.append([])
        chunks[-1] += tokens
    return chunks


_CHUNKINGS = {"commas": _cut_at_commas, "segments": _cut_at_segments}
