"""Brackets that weigh words: a prompt to pieces of text with a weight each, in the three syntaxes of SYNTAXES.

a1111   `(x)` 1.1, `[x]` 1 / 1.1, `(x:1.3)` 1.3; nesting multiplies; a bracket left open weighs to the end.
        `\\(` `\\)` `\\[` `\\]` `\\\\` are those characters; a backslash before anything else is dropped.
        BREAK, a word by itself, ends the chunk; in a weighted group it is a word like others (A1111's behaviour).
comfy   `(x)` 1.1 times what surrounds it, `(x:1.3)` 1.3 whatever surrounds it; `[x]` is text; `\\(` and `\\)`.
        A bracket left open is text, and so is all that follows one closed too often.
plain   text as it is typed.

Semantics: A1111 stable-diffusion-webui 1.6 and later, modules/prompt_parser.py; ComfyUI, comfy/sd1_clip.py.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

from sd_jax import names

ROUND, SQUARE = 1.1, 1 / 1.1  # what a pair of brackets without a number multiplies by


class Piece(NamedTuple):
    """Text of which every token has one weight."""

    text: str
    weight: float


BREAK = Piece("BREAK", -1.0)  # A1111's own mark, which is why BREAK in a group of another weight is only a word


@dataclasses.dataclass(frozen=True)
class Syntax:
    """What a prompt means: everything in which the three differ."""

    parse: Callable[[str], list[Piece]]  # raises ValueError where it cannot
    edits: bool  # knows `<lora:name:1>`, AND, `[from:to:when]` and `[a|b]`
    chunking: str  # "commas": full chunks, cut behind a comma near; "segments": a short weighted segment stays whole
    emphasis: str  # "mean": weights multiply, the mean is restored; "empty": weights lead away from the empty prompt


def parse(text: str, syntax: str = "a1111") -> list[Piece]:
    """At least one piece. Text that does not parse is used as it is typed, with a warning.

    Raises ValueError for an unknown syntax, naming the nearest.
    """
    rules = syntax_named(syntax)
    try:
        pieces = rules.parse(text)
        if all(math.isfinite(piece.weight) for piece in pieces):
            return pieces or [Piece("", 1.0)]
        reason = "a weight is not finite"
    except ValueError as error:
        reason = str(error)
    warnings.warn(f"prompt used as it is typed, brackets and all ({reason}): {text!r}", UserWarning, stacklevel=2)
    return [Piece(text, 1.0)]


def syntax_named(name: str) -> Syntax:
    if name not in SYNTAXES:
        raise ValueError(f"prompt_syntax={name!r} is unknown: {names.hint(name, SYNTAXES)}")
    return SYNTAXES[name]


# -- A1111 -----------------------------------------------------------------------------------------------------------

_A1111 = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|(?P<stray>\\)"
    r"|(?P<open>[(\[])"
    r"|:\s*(?P<number>[+-]?[.\d]+)\s*\)"
    r"|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|:)"
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


def _parse_a1111(text: str) -> list[Piece]:
    texts: list[str] = []
    weights: list[float] = []
    begun: dict[str, list[int]] = {"(": [], "[": []}  # the first piece inside each bracket that is still open
    for token in _A1111.finditer(text):
        kind, whole = token.lastgroup, token.group()
        if kind in ("escaped", "stray"):
            texts.append(token["escaped"] or "")
        elif kind == "open":
            begun[whole].append(len(texts))
        elif kind == "number" and begun["("]:
            _weigh(weights, begun["("].pop(), float(token["number"]))
        elif whole == ")" and begun["("]:
            _weigh(weights, begun["("].pop(), ROUND)
        elif whole == "]" and begun["["]:
            _weigh(weights, begun["["].pop(), SQUARE)
        else:  # text, or brackets that close nothing
            first, *others = _BREAK.split(whole)
            texts.append(first)
            for other in others:
                weights += [1.0] * (len(texts) - len(weights)) + [BREAK.weight]
                texts += [BREAK.text, other]
        weights += [1.0] * (len(texts) - len(weights))
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        for start in begun[bracket]:
            _weigh(weights, start, factor)
    return _merged(map(Piece, texts, weights))


def _weigh(weights: list[float], start: int, factor: float) -> None:
    for i in range(start, len(weights)):
        weights[i] *= factor


def _merged(pieces) -> list[Piece]:
    """Neighbours of one weight are one piece: their words are tokenised together."""
    merged: list[tuple[list[str], float]] = []
    for piece in pieces:
        if merged and merged[-1][1] == piece.weight:
            merged[-1][0].append(piece.text)
        else:
            merged.append(([piece.text], piece.weight))
    return [Piece("".join(texts), weight) for texts, weight in merged]


# -- ComfyUI ---------------------------------------------------------------------------------------------------------

_COMFY = re.compile(r"\\[()]|.", re.DOTALL)  # an escaped bracket is one token of two characters, and no bracket


def _parse_comfy(text: str) -> list[Piece]:
    pieces: list[Piece] = []
    left: list[tuple[list[str], float, bool]] = [(_COMFY.findall(text), 1.0, True)]  # tokens, weight, still to be split
    while left:
        tokens, weight, to_split = left.pop()
        if to_split:
            left.extend((item, weight, False) for item in reversed(_top_level(tokens)))
        elif len(tokens) >= 2 and tokens[0] == "(" and tokens[-1] == ")":
            left.append((*_comfy_group(tokens[1:-1], weight), True))
        else:
            pieces.append(Piece("".join(token[-1] for token in tokens), weight))
    return pieces


def _top_level(tokens: list[str]) -> list[list[str]]:
    """Cut before and behind each outermost pair. One closed too often keeps the depth wrong from there, as there."""
    items: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        if token == "(":
            if depth == 0:
                items.append([])
            depth += 1
        items[-1].append(token)
        if token == ")":
            depth -= 1
            if depth == 0:
                items.append([])
    return [item for item in items if item]


def _comfy_group(tokens: list[str], surrounding: float) -> tuple[list[str], float]:
    """What a pair of brackets holds, and its weight: the number behind the last colon, or 1.1 times the surrounding."""
    colon = len(tokens) - 1 - tokens[::-1].index(":") if ":" in tokens else 0
    if colon > 0:
        try:
            return tokens[:colon], float("".join(tokens[colon + 1 :]))
        except ValueError:
            pass
    return tokens, surrounding * ROUND


# -- The table -------------------------------------------------------------------------------------------------------

SYNTAXES = {
    "a1111": Syntax(_parse_a1111, edits=True, chunking="commas", emphasis="mean"),
    "comfy": Syntax(_parse_comfy, edits=False, chunking="segments", emphasis="empty"),
    "plain": Syntax(lambda text: [Piece(text, 1.0)], edits=False, chunking="commas", emphasis="mean"),
}
