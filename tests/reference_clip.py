"""OpenCLIP's CLIP, imported without what no test needs: its package's own __init__ asks for torchvision and ftfy."""

import importlib
import importlib.machinery
import importlib.util
import sys
import types

import numpy as np
import pytest

from sd_jax.checkpoints import clip_config
from sd_jax.models.presets import CLIPConfig


def open_clip(config: CLIPConfig):
    """A torch.nn.Module in evaluation with random weights, none of them constant; OpenAI's is the same with quick_gelu.

    The test is skipped where torch or open_clip is not installed.
    """
    torch = pytest.importorskip("torch")
    model = _network()(**clip_config.to_open_clip(config, "the test")["model_cfg"]).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = ".ln_" in f".{name}" and name.endswith("weight")
            parameter.copy_(torch.tensor(rng.normal(float(scale), 0.1, parameter.shape)))
    return model.requires_grad_(False)


def _network():
    if "open_clip.model" not in sys.modules:
        spec = importlib.util.find_spec("open_clip")
        if spec is None:
            pytest.skip("open_clip is not installed")
        package = types.ModuleType("open_clip")
        package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
        stubs = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc")}
        stubs["torchvision.ops.misc"].FrozenBatchNorm2d = None
        hidden = {name: sys.modules.pop(name, None) for name in stubs}
        sys.modules |= {"open_clip": package, **stubs}
        try:
            importlib.import_module("open_clip.model")
        finally:  # else others would take them for the real ones
            for name, module in hidden.items():
                del sys.modules[name]
                if module is not None:
                    sys.modules[name] = module
    return sys.modules["open_clip.model"].CLIP
