"""`<lora:name:weight>` and its kin: what a prompt asks of adapters, taken out of the text.

`<lora:name>` 1, `<lora:name:0.8>` both parts at 0.8, `<lora:name:0.8:0.5>` the text encoder at 0.8 and the U-Net at
0.5; `te=` and `unet=` name them. `<lyco:...>` is the same; `<hypernet:name:0.8>`; any other `<word:...>` is taken out
too and left to the caller. A number that is none leaves its tag in the text, with a warning. Semantics: A1111,
modules/extra_networks.py and extensions-builtin/Lora.
"""

import dataclasses
import math
import re
import warnings

_TAG = re.compile(r"<(\w+):([^>]+)>")
_SAME = {"lyco": "lora"}  # kinds by another name
WEIGHED = ("lora", "hypernet")  # kinds of which the numbers are weights


@dataclasses.dataclass(frozen=True)
class Tag:
    """One tag of a prompt."""

    kind: str  # "lora" (or lyco), "hypernet", or the word that was typed
    name: str
    text_weight: float = 1.0  # strength in the text encoder
    unet_weight: float = 1.0
    arguments: tuple[str, ...] = ()  # all that follows the name, as typed
    source: str = ""  # the tag as typed


def extract(prompt: str) -> tuple[str, list[Tag]]:
    """The prompt without its tags, and the tags in their order."""
    tags: list[Tag] = []
    kept, end = [], 0
    for match in _TAG.finditer(prompt):
        try:
            tags.append(_read(match))
        except ValueError as error:
            warnings.warn(f"{match.group()} stays in the prompt as text: {error}", UserWarning, stacklevel=2)
            continue
        kept.append(prompt[end : match.start()])
        end = match.end()
    return "".join(kept) + prompt[end:], tags


def written(kind: str, name: str, text_weight: float, unet_weight: float) -> str:
    """The tag that says this. A hypernetwork's has the U-Net's weight alone."""
    weights = [unet_weight] if kind == "hypernet" or text_weight == unet_weight else [text_weight, unet_weight]
    return f"<{kind}:{name}:{':'.join(f'{weight:.9g}' for weight in weights)}>"


def _read(match: re.Match) -> Tag:
    name, *arguments = match[2].split(":")
    kind = _SAME.get(match[1], match[1])
    weights = _weights(arguments) if kind in WEIGHED else (1.0, 1.0)
    return Tag(kind, name, *weights, arguments=tuple(arguments), source=match.group())


def _weights(arguments: list[str]) -> tuple[float, float]:
    named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    numbers = [argument for argument in arguments if "=" not in argument]
    text = named.get("te", numbers[0] if numbers else "1")
    unet = named.get("unet", numbers[1] if len(numbers) > 1 else text)
    return _number(text), _number(unet)


def _number(text: str) -> float:
    value = float(text)  # its message quotes the text
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value
