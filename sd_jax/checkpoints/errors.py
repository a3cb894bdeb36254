"""The one error of this room."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; one line that names the file or key and, where there is one, the mend."""


def listing(problems: list[str], limit: int = 10) -> str:
    """`a; b; c and 12 more`."""
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + more


def shown(name: str, limit: int = 200) -> str:
    """A name out of a file, for a message: on one line and not too long, whatever it holds."""
    name = name if len(name) <= limit else name[:limit] + "..."
    return name if name.isprintable() else repr(name)
