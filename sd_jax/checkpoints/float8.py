"""Weights in eight bits: a storage, not a type to compute in.

Without a dtype asked for they become float16, which holds every number of both types. Files of ComfyUI's "scaled fp8"
have a factor beside each tensor, and an empty mark:

    W = X.weight * X.scale_weight,     scaled_fp8: which of the two types; X.scale_input is for fp8 hardware
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.tensors import Tensor

FLOAT8 = tuple(np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2))


def unscaled(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """With the factors multiplied in, float32, and without them. Raises CheckpointError for a factor of nothing."""
    scales = {name: t for name, t in tensors.items() if name.endswith(".scale_weight")}
    beside = (".scale_weight", ".scale_input", "scaled_fp8")
    kept = {name: t for name, t in tensors.items() if not name.endswith(beside)}
    for name, scale in scales.items():
        weight = name.removesuffix("scale_weight") + "weight"
        if weight not in kept or scale.shape not in ((), (1,)):
            raise CheckpointError(f"{where}: {name} is the factor of {weight}, which is missing, or not a number")
        kept[weight] = _scaled(kept[weight], scale)
    return kept


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    def read() -> np.ndarray:
        return np.asarray(weight).astype(np.float32) * np.asarray(scale).astype(np.float32).reshape(())

    return Tensor(weight.shape, np.dtype(np.float32), read)


def widened(tensor: Tensor, dtype: np.dtype | None, name: str) -> Tensor:
    """As `Tensor.cast`, but eight bits become float16 where `dtype` is None."""
    return tensor.cast(np.dtype(np.float16) if dtype is None and tensor.dtype in FLOAT8 else dtype, name)
