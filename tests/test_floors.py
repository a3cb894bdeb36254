"""Imports only go down: a file may import lower floors and its own room, at any depth of its code.

The walk reads the syntax trees, imports inside functions included, so nothing has to be imported to be judged.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sd_jax"

# A room is a folder of the package, or one of the single files at its top. Rooms on one floor are strangers.
FLOORS = {
    "types": 0,
    "names": 0,
    "hardware": 0,
    "config": 1,
    "trees": 1,
    "media": 1,
    "tiles": 1,
    "sharding": 1,
    "distributed": 1,
    "flops": 1,
    "models": 2,
    "diffusion": 2,
    "prompts": 3,
    "adapters": 3,
    "checkpoints": 4,
    "data": 5,
    "preprocessors": 5,
    "upscalers": 5,
    "sampling": 6,
    "evals": 7,
    "training": 8,
    "apps": 9,
}
FORBIDDEN = ("torch", "diffusers", "tensorflow", "cv2")  # nowhere in the package
HEAVY = ("transformers", "datasets", "orbax", "tensorboardX")  # seconds to import: only inside functions
PURE = ("prompts/weights.py", "prompts/schedule.py", "prompts/tags.py")  # parsing of prompts: text in, text out
ARRAYS = ("jax", "jaxlib", "flax", "optax")


def breaches(path: str, source: str) -> list[str]:
    """What the file at `path` (relative to the package) may not import, one line each."""
    found = []
    room = _room(path)
    for line, name, at_import in _imports(path, ast.parse(source)):
        where = f"{PACKAGE}/{path}:{line}"
        top = name.split(".")[0]
        if top in FORBIDDEN:
            found.append(f"{where}: {top} is never imported")
        elif top in HEAVY and at_import:
            found.append(f"{where}: {top} is heavy: import it inside the function that needs it")
        elif top in ARRAYS and path in PURE:
            found.append(f"{where}: parsing of prompts does without {top}")
        elif top == PACKAGE and path != "__init__.py":
            target = (name.split(".") + [""])[1]
            if target not in FLOORS:
                found.append(f"{where}: {name} is the public door: import the room itself")
            elif target != room and FLOORS[target] >= FLOORS[room]:
                found.append(f"{where}: {room} (floor {FLOORS[room]}) imports {target} (floor {FLOORS[target]})")
    return found


def _room(path: str) -> str:
    return Path(path).parts[0].removesuffix(".py")


def _imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """(line, absolute dotted name, whether it happens when the module is imported)."""
    package = [PACKAGE, *Path(path).parent.parts]
    stack: list[tuple[ast.AST, bool]] = [(tree, True)]
    while stack:
        node, at_import = stack.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, at_import
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}", at_import
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value), at_import
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_import = False
        if isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING":
            at_import = False
        stack.extend((child, at_import) for child in ast.iter_child_nodes(node))


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _files() -> list[str]:
    package = ROOT / PACKAGE
    return sorted(str(path.relative_to(package)) for path in package.rglob("*.py"))


def test_imports_only_go_down():
    found = [line for path in _files() for line in breaches(path, (ROOT / PACKAGE / path).read_text(encoding="utf-8"))]
    assert not found, "\n".join(["imports that DESIGN's floors forbid:", *found])


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("models/unet.py", "from sd_jax.training.loop import train", "models (floor 2) imports training (floor 8)"),
        ("models/unet.py", "def f():\n    import sd_jax.sampling.pipeline", "models (floor 2) imports sampling"),
        ("models/unet.py", "class A:\n    def f(self):\n        from ..diffusion import noise", "imports diffusion"),
        ("diffusion/losses.py", "from sd_jax import models", "diffusion (floor 2) imports models (floor 2)"),
        ("trees.py", "from .config import freeze", "trees (floor 1) imports config (floor 1)"),
        ("types.py", "from . import trees", "types (floor 0) imports trees (floor 1)"),
        ("training/loop.py", "import sd_jax", "sd_jax is the public door"),
        ("training/loop.py", "from sd_jax import load", "sd_jax.load is the public door"),
        ("evals/fid.py", "import sd_jax.apps.webui", "evals (floor 7) imports apps (floor 9)"),
        ("checkpoints/load.py", "def f():\n    import torch.nn", "torch is never imported"),
        ("checkpoints/load.py", "def f():\n    importlib.import_module('diffusers.models')", "diffusers is never"),
        ("media.py", "try:\n    import cv2\nexcept ImportError:\n    cv2 = None", "cv2 is never imported"),
        ("prompts/tokenize.py", "if True:\n    from transformers import CLIPTokenizer", "transformers is heavy"),
        ("prompts/weights.py", "def f():\n    import jax.numpy as jnp", "does without jax"),
        ("__init__.py", "import orbax.checkpoint", "orbax is heavy"),
    ],
)
def test_planted_breach_is_caught(path, source, said):
    found = breaches(path, source)
    assert len(found) == 1 and said in found[0], found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("training/loop.py", "from sd_jax.models.unet import UNet\nfrom sd_jax import types, trees\nimport jax"),
        ("models/unet.py", "from sd_jax.models import layers\nfrom . import attention\nfrom .resnet import Resnet"),
        ("prompts/tokenize.py", "def f():\n    from transformers import CLIPTokenizer"),
        ("data/loader.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import datasets"),
        ("data/sources.py", "import datasets_like_name, torchless"),
        ("__init__.py", "from sd_jax.sampling.pipeline import load"),
    ],
)
def test_lawful_imports_pass(path, source):
    assert breaches(path, source) == []
