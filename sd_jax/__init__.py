"""Stable Diffusion in JAX and Flax: `load` a model, make pictures; train.py trains one."""

from typing import TYPE_CHECKING

from sd_jax.types import Conditioning, Recipe

if TYPE_CHECKING:
    from sd_jax.sampling.pipeline import Pipeline, load

__version__ = "0.1.0"
__all__ = ["Conditioning", "Pipeline", "Recipe", "load"]


def __getattr__(name: str):
    # The pipeline pulls in every network: `import sd_jax` alone stays quick
    if name in ("Pipeline", "load"):
        from sd_jax.sampling import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'sd_jax' has no attribute {name!r}")
