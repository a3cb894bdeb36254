"""Stable Diffusion in JAX and Flax: `load` a model, make pictures; train.py trains one."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sd_jax.sampling.clip import load_clip
    from sd_jax.sampling.control import load_control
    from sd_jax.sampling.pipeline import Pipeline, load
    from sd_jax.types import Conditioning, Recipe
    from sd_jax.upscalers.esrgan import load_upscaler

__version__ = "0.1.0"
__all__ = ["Conditioning", "Pipeline", "Recipe", "load", "load_clip", "load_control", "load_upscaler"]

# Asked for, not imported at once: the pipeline pulls in every network, and processes that decode pictures need no JAX
_WHERE = {"Conditioning": "types", "Recipe": "types"}
_WHERE |= {"load_clip": "sampling.clip", "load_control": "sampling.control", "load_upscaler": "upscalers.esrgan"}
_WHERE |= dict.fromkeys(("Pipeline", "load"), "sampling.pipeline")


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'sd_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sd_jax.{_WHERE[name]}"), name)
