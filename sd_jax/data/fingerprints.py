"""Hashes that tell whether data, or the code that makes it, has changed."""

import ast
import functools
import hashlib
import pathlib
from collections.abc import Iterable


def digest(*parts: str) -> str:
    """One short hash of several texts."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", errors="surrogateescape")).hexdigest()[:32]


@functools.cache
def code_of(*files: str) -> str:
    """A hash of what source files of the package do, e.g. "data/shapes.py": comments and docstrings do not count."""
    package = pathlib.Path(__file__).parents[1]
    return digest(*(_code((package / name).read_text(encoding="utf-8")) for name in files))


def _code(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


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
