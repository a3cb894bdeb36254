"""Hashes that tell whether data, or the code that makes it, has changed."""

import functools
import hashlib
import pathlib
from collections.abc import Iterable


def digest(*parts: str) -> str:
    """One short hash of several texts."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", errors="surrogateescape")).hexdigest()[:32]


@functools.cache
def code_of(*files: str) -> str:
    """A hash of source files of the package, e.g. "data/shapes.py"."""
    package = pathlib.Path(__file__).parents[1]
    return hashlib.sha256(b"\0".join((package / name).read_bytes() for name in files)).hexdigest()


def of_files(paths: Iterable[pathlib.Path]) -> str:
    """A hash of names, sizes and times of change; a missing file counts as such."""
    seen = hashlib.sha256()
    for path in paths:
        try:
            stat = path.stat()
            state = f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:
            state = "missing"
        seen.update(f"{path}\0{state}\0".encode("utf-8", errors="surrogateescape"))
    return seen.hexdigest()
