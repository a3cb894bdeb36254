"""The shape of the tree: known rooms on two levels, short files with a docstring, names that say something."""

import ast
from pathlib import Path

import pytest

from tests.test_floors import FLOORS

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES = 600
MOST_LINES_OF_A_DOOR = 80
EMPTY_NAMES = {"utils", "util", "common", "misc", "core", "helpers"}
WITHOUT_CODE = {"assets"}

PACKAGE = sorted((ROOT / "sd_jax").rglob("*.py"))
BESIDE = [path for room in ("configs", "benchmarks", "tests") for path in (ROOT / room).rglob("*.py")]
ALL = sorted([*PACKAGE, *ROOT.glob("*.py"), *BESIDE])


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", ALL, ids=_name)
def test_file_is_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    door = path.parent == ROOT and path.name in ("train.py", "sample.py")
    most = MOST_LINES_OF_A_DOOR if door else MOST_LINES
    assert lines <= most, f"{_name(path)} has {lines} lines, more than {most}"


@pytest.mark.parametrize("path", PACKAGE, ids=_name)
def test_module_says_what_it_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring and docstring.strip(), f"{_name(path)} has no module docstring"


def test_names_say_something():
    nameless = [_name(p) for p in ALL if EMPTY_NAMES & {part.removesuffix(".py") for part in p.relative_to(ROOT).parts}]
    assert not nameless, f"names that say nothing of what the file holds: {nameless}"


def test_rooms_are_known_and_hold_code():
    package = ROOT / "sd_jax"
    rooms = {p.name for p in package.iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    files = {p.stem for p in package.glob("*.py")} - {"__init__"}
    assert rooms <= set(FLOORS), f"rooms without a floor: {sorted(rooms - set(FLOORS))}"
    assert files <= set(FLOORS), f"files at the top of the package without a floor: {sorted(files - set(FLOORS))}"
    assert not rooms & WITHOUT_CODE, f"rooms that hold no code: {sorted(rooms & WITHOUT_CODE)}"
    for room in sorted(rooms):
        names = {p.name for p in (package / room).glob("*.py")}
        assert "__init__.py" in names, f"sd_jax/{room} has no __init__.py"
        assert names - {"__init__.py"}, f"sd_jax/{room} is empty: only rooms that hold code exist"


def test_two_levels():
    deep = [_name(p) for p in PACKAGE if len(p.relative_to(ROOT / "sd_jax").parts) > 2]
    assert not deep, f"deeper than sd_jax/room/file.py: {deep}"
