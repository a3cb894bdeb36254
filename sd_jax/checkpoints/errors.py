"""The one error of this room."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; one line that names the file or key and, where there is one, the mend."""


def listing(problems: list[str], limit: int = 10) -> str:
    """`a; b; c and 12 more`."""
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + more
