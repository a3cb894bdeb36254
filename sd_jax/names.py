"""Names that people mistype: which of those that there are is meant. Imports nothing of ours, and nothing heavy."""

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """At most three of `names` that look like `name`, the most alike first; none where nothing does.

    Names as other programs spell them are read as ours: "DPM++ 2M" is dpmpp_2m, "SGM Uniform" is sgm_uniform.
    """
    plain = name.strip().lower().replace("+", "p").replace(" ", "_").replace("-", "_")
    return difflib.get_close_matches(plain, list(names), cutoff=0.5)


def hint(name: str, names: Iterable[str]) -> str:
    """The mend that an error about an unknown name ends in: the nearest names, or else all that there are."""
    names = list(names)
    near = nearest(name, names)
    return f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(names)}"
