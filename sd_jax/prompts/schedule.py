"""Prompts that change while sampling, and prompts made of several: `[from:to:when]`, `[a|b]`, AND.

`[from:to:when]` reads `from` until `when`, then `to`; `[to:when]` adds, `[from::when]` takes away; `[a|b|c]` takes
turns, call by call; all nest. `when` with a point is a fraction of the calls, without one a number of calls; in the
second pass of hires fix both count on from the first (1.5 is its middle). `a AND b:1.2` guides by a and, 1.2 times, b.

What cannot be one of these is text: brackets that weigh stay for `weights`. A `|` outside of `[a|b]`, or a backslash
at the end of a line, makes A1111's grammar refuse the whole prompt, which then has no schedule here either.

Calls are those of the denoiser: a sampler of second order makes two a step. As in A1111, call number n (from 0) reads
the first text whose end is >= n, so `[a:b:3]` reads `a` four times and `[a|b]` begins a, a, b, a, b.
Semantics: A1111, modules/prompt_parser.py (use_old_scheduling off).
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Iterator, Sequence

_TOKEN = re.compile(r"\\.|[\[\]():|\\]|[^\[\]():|\\]+")
_NUMBER = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"\s*([-+]?(?:\d+\.?|\d*\.\d+))\s*")


@dataclasses.dataclass
class _Change:
    """`[before:after:when]`."""

    before: list
    after: list
    when: str


@dataclasses.dataclass
class _Turns:
    """`[a|b]`."""

    options: list[list]


@dataclasses.dataclass
class _Open:
    """A bracket that is not closed yet: what it holds, cut at `:` and `|`."""

    bracket: str
    parts: list[list] = dataclasses.field(default_factory=lambda: [[]])
    cuts: list[str] = dataclasses.field(default_factory=list)

    def closed(self, bracket: str) -> list | None:
        """The nodes of the whole group; None where it is none."""
        if self.bracket + bracket == "()" and self.cuts in ([], [":"]):
            return ["(", *self.as_typed()[1:], ")"]
        if self.bracket + bracket != "[]":
            return None
        if not self.cuts:
            return ["[", *self.parts[0], "]"]
        if set(self.cuts) == {"|"}:
            return [_Turns(self.parts)]
        *texts, when = self.parts
        number = _NUMBER.fullmatch("".join(when)) if all(isinstance(node, str) for node in when) else None
        if set(self.cuts) == {":"} and len(texts) <= 2 and number:
            return [_Change(texts[0] if len(texts) == 2 else [], texts[-1], number[1])]
        return None

    def as_typed(self) -> list:
        """The opening bracket and all behind it, cuts as text."""
        nodes = [self.bracket, *self.parts[0]]
        for cut, part in zip(self.cuts, self.parts[1:], strict=True):
            nodes += [cut, *part]
        return nodes


def schedule(
    text: str,
    calls: int,  # of the denoiser, in this pass
    base_calls: int | None = None,  # those of the first pass, where this is the second one of hires fix
) -> list[tuple[int, str]]:
    """(end, text) by rising end: the text for calls up to number `end`. The last end is `calls`.

    Raises ValueError for less than one call.
    """
    if calls < 1:
        raise ValueError(f"a prompt is scheduled over at least 1 call of the denoiser, not {calls}")
    nodes, parsed = _parse(text)
    changes = list(_changes(nodes))
    if not parsed and changes:
        message = "prompt used without its schedule ('|' outside of [a|b], or a backslash that escapes nothing)"
        warnings.warn(f"{message}: {text!r}", UserWarning, stacklevel=2)
    if not parsed or not changes:
        return [(calls, text)]
    ends = {calls}
    for node in changes:
        ends |= set(range(1, calls + 1)) if isinstance(node, _Turns) else {_end(node.when, calls, base_calls)}
    return [(end, _read(nodes, end, calls, base_calls)) for end in sorted(ends) if end >= 1]


def index_of_calls(ends: Sequence[int], calls: int) -> list[int]:
    """For each call, from number 0, which of the texts of a schedule with these ends it reads."""
    return [next(i for i, end in enumerate(ends) if number <= end) for number in range(calls)]


def split_and(prompt: str) -> list[tuple[str, float]]:
    """`a AND b:1.2` -> its parts and their weights; a prompt without AND is one part.

    As in A1111, a number at the end weighs such a prompt too; this is said in a warning, since `16:9` seldom means it.
    """
    parts = [_part(part) for part in _AND.split(prompt)]
    if len(parts) == 1 and parts[0][1] != 1:
        message = (
            f"the end of the prompt weighs all of it by {parts[0][1]:g}, as in A1111 (add a comma to keep it text)"
        )
        warnings.warn(f"{message}: {prompt!r}", UserWarning, stacklevel=2)
    return parts


def _part(text: str) -> tuple[str, float]:
    before, colon, after = text.rpartition(":")
    number = _WEIGHT.fullmatch(after) if colon else None
    if number and math.isfinite(float(number[1])):
        return before.rstrip(), float(number[1])
    return text.rstrip(), 1.0


# -- Parsing ---------------------------------------------------------------------------------------------------------


def _parse(text: str) -> tuple[list, bool]:
    """The prompt as a list of texts, changes and turns, and whether A1111's grammar takes it.

    One pass: whatever cannot be inside a group makes text of all the brackets that are open.
    """
    top: list = []
    opened: list[_Open] = []
    parsed = True
    for token in _TOKEN.findall(text):
        here = opened[-1].parts[-1] if opened else top
        if token in ("(", "["):
            opened.append(_Open(token))
        elif token in (":", "|") and opened:
            opened[-1].cuts.append(token)
            opened[-1].parts.append([])
        elif token not in (")", "]"):
            parsed = parsed and token not in ("|", "\\")
            here.append(token)
        elif opened and (group := opened[-1].closed(token)) is not None:
            opened.pop()
            (opened[-1].parts[-1] if opened else top).extend(group)
        else:
            parsed = _all_is_text(opened, top) and parsed
            top.append(token)
    return top, _all_is_text(opened, top) and parsed


def _all_is_text(opened: list[_Open], top: list) -> bool:
    """Gives the open brackets up; whether A1111's grammar takes that, which knows no `|` outside of a group."""
    bars = any("|" in group.cuts for group in opened)
    for group in opened:
        top.extend(group.as_typed())
    opened.clear()
    return not bars


def _changes(nodes: list) -> Iterator[_Change | _Turns]:
    """All of them, nested ones too."""
    left = [nodes]
    while left:
        for node in left.pop():
            if isinstance(node, _Change):
                left += [node.before, node.after]
            elif isinstance(node, _Turns):
                left += node.options
            else:
                continue
            yield node


# -- Reading ---------------------------------------------------------------------------------------------------------


def _end(when: str, calls: int, base_calls: int | None) -> int:
    """The last call that reads what is before `when`; below 1 where none does."""
    value = float(when)
    if "." in when:
        value = (value - (0.0 if base_calls is None else 1.0)) * calls
    else:
        value -= base_calls or 0
    return int(max(min(value, calls), -1))


def _read(nodes: list, end: int, calls: int, base_calls: int | None) -> str:
    """The text that is read up to call `end`."""
    texts: list[str] = []
    left = nodes[::-1]
    while left:
        node = left.pop()
        if isinstance(node, str):
            texts.append(node)
        elif isinstance(node, _Turns):
            left += node.options[(end - 1) % len(node.options)][::-1]
        else:
            left += (node.before if end <= _end(node.when, calls, base_calls) else node.after)[::-1]
    return "".join(texts)
