"""LAION's aesthetic predictors as files, torch's or safetensors <-> our parameters, by one rule, both ways.

    V2  layers.{0,2,4,6,7}.{weight,bias}    ->  layers_N/{kernel,bias}   "mlp", sac+logos+ava1-l14-linearMSE.pth
        layers.{0,3,6,9,11}.{weight,bias}   ->  layers_N/{kernel,bias}   "mlp_relu", ava+logos-l14-reluMSE.pth
    V1  weight (1, width), bias             ->  kernel, bias             "linear", sa_0_4_vit_l_14_linear.pth

Which it is, its tensors' names say; the width is the first layer's.
"""

import os
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sd_jax.checkpoints import keys_diffusers, read_safetensors
from sd_jax.checkpoints.aside import aside
from sd_jax.checkpoints.errors import CheckpointError, shown
from sd_jax.checkpoints.files import open_any
from sd_jax.checkpoints.layout import check_shapes
from sd_jax.checkpoints.tensors import Tensor, lazy
from sd_jax.models.aesthetic import KINDS, NUMBERS, WIDTHS
from sd_jax.models.presets import AestheticConfig
from sd_jax.types import Params


def load(path: str | os.PathLike) -> tuple[AestheticConfig, Params]:
    """One file -> the head's config and its parameters {"params": ...}, float32, for `AestheticHead`.

    Raises FileNotFoundError, and CheckpointError listing what is missing, unexpected or of another shape.
    """
    tensors = open_any(path).tensors
    config = detect(tensors, str(path))
    params = {}
    for name, tensor in tensors.items():
        key, kernel = _our_name(name)
        array = np.asarray(tensor, np.float32)
        params[key] = np.ascontiguousarray(array.T) if kernel else array
    return config, {"params": unflatten_dict(params)}


def save(path: str | os.PathLike, config: AestheticConfig, params: Params, overwrite: bool = False) -> None:
    """The inverse, as safetensors with LAION's names: torch loads them into the published modules.

    Raises FileExistsError, and CheckpointError where the parameters are not those of `config`.
    """
    tensors = {}
    for key, array in flatten_dict(params["params"]).items():
        tensor = lazy(array)
        kernel = key[-1] == "kernel"
        tensors[_their_name(key)] = tensor.transpose(1, 0) if kernel and tensor.ndim == 2 else tensor
    _check(tensors, config, path)
    with aside(path, overwrite) as work:
        read_safetensors.write(work, tensors, {"format": "pt"})


def detect(tensors: Mapping[str, Tensor], where: str) -> AestheticConfig:
    """The config of a file's tensors. Raises CheckpointError where they are not exactly those of one."""
    best = max(KINDS, key=lambda kind: len(tensors.keys() & _shapes(AestheticConfig(kind, 1)).keys()))
    first = tensors.get("weight" if best == "linear" else "layers.0.weight")
    if first is None or first.ndim != 2 or not first.shape[1]:
        found = ", ".join(shown(name) for name in list(tensors)[:5])
        raise CheckpointError(f"{where}: no aesthetic predictor of LAION's, its tensors are {found or 'none'}")
    config = AestheticConfig(best, first.shape[1])
    _check(tensors, config, where)
    return config


def _check(tensors: Mapping[str, Tensor], config: AestheticConfig, where: str | os.PathLike) -> None:
    check_shapes(_shapes(config), tensors, f"the {config.kind!r} head of width {config.width}", where)


def _shapes(config: AestheticConfig) -> dict[str, tuple[int, ...]]:
    """Of all tensors, by LAION's names."""
    if config.kind == "linear":
        return {"weight": (1, config.width), "bias": (1,)}
    shapes, inner = {}, config.width
    for number, width in zip(NUMBERS[config.kind], WIDTHS, strict=True):
        shapes |= {f"layers.{number}.weight": (width, inner), f"layers.{number}.bias": (width,)}
        inner = width
    return shapes


def _our_name(name: str) -> tuple[tuple[str, ...], bool]:
    """-> (the path of the parameter, whether it is a kernel)."""
    kernel = name.endswith("weight")
    ours = "kernel" if name == "weight" else keys_diffusers.our_name(name, 2 if kernel else 1)
    return tuple(ours.split("/")), kernel


def _their_name(key: tuple[str, ...]) -> str:
    return keys_diffusers.their_name("/".join(key))
