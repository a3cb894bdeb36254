"""Foreign code that the parity tests compare with, imported without what it does not need here."""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from pathlib import Path

import pytest


def k_diffusion() -> types.SimpleNamespace:
    """`sampling` and `external` of k-diffusion; the test is skipped where torch or k-diffusion is not installed.

    Its package imports its whole training stack (wandb, torchvision, clip, ...), and the two modules import three
    packages that no function under test uses. So the package's own __init__ does not run, and the three are stubs
    while the modules load.
    """
    pytest.importorskip("torch")
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k-diffusion is not installed")
    if "k_diffusion" not in sys.modules:
        package = types.ModuleType("k_diffusion")
        package.__spec__ = spec
        package.__path__ = [str(Path(spec.origin).parent)]
        sys.modules["k_diffusion"] = package
    names = {
        "torchvision": {},
        "torchvision.transforms": {"functional": None},
        "torchdiffeq": {"odeint": None},
        "torchsde": {},
    }
    stubs = {name: _stub(name, contents) for name, contents in names.items() if name not in sys.modules}
    sys.modules.update(stubs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sampling = importlib.import_module("k_diffusion.sampling")
            external = importlib.import_module("k_diffusion.external")
    finally:
        for name in stubs:  # else others would take them for the real ones
            sys.modules.pop(name, None)
    return types.SimpleNamespace(sampling=sampling, external=external)


def spandrel(architecture: str) -> types.ModuleType:
    """One of spandrel's architectures, "ESRGAN" or "Compact"; the test is skipped where it or torch is not installed.

    Its package's own __init__ imports all of them, torchvision with some, and does not run.
    """
    pytest.importorskip("torch")
    spec = importlib.util.find_spec("spandrel")
    if spec is None:
        pytest.skip("spandrel is not installed")
    if "spandrel" not in sys.modules:
        package = types.ModuleType("spandrel")
        package.__spec__ = spec
        package.__path__ = [str(Path(spec.origin).parent)]
        sys.modules["spandrel"] = package
    return importlib.import_module(f"spandrel.architectures.{architecture}")


def diffusers() -> types.ModuleType:
    """diffusers; the test is skipped where it or torch is not installed."""
    pytest.importorskip("torch")
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("diffusers")


def _stub(name: str, contents: dict) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    vars(module).update(contents)
    return module
