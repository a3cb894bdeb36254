"""A file that holds an upscaler of ESRGAN's or Real-ESRGAN's, in and out: torch's `.pth` or `.safetensors`.

Its tensors lie at the top of the file, or as BasicSR writes them in "params_ema" (an average) or "params". Where there
are both, the average is read. Names and layouts: `keys_esrgan`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax import traverse_util

from sd_jax.checkpoints import keys_esrgan, read_safetensors, write_torch
from sd_jax.checkpoints.aside import aside
from sd_jax.checkpoints.files import open_any
from sd_jax.checkpoints.tensors import Tensor, dtype_of, lazy
from sd_jax.models.presets import UpscalerConfig
from sd_jax.types import Params

_PICKLED = (".pth", ".pt", ".ckpt", ".bin")
_WITHIN = ("params_ema", "params")  # of a torch file, first the one that is read where there are both
_WRITTEN = {"real_esrgan": "params_ema", "compact": "params"}  # as the published files of these layouts have it


class OpenedUpscaler(NamedTuple):
    config: UpscalerConfig
    params: Params  # of Tensors, which are read when they are asked for
    layout: str  # one of keys_esrgan.LAYOUTS


def open_upscaler(path: str | os.PathLike) -> OpenedUpscaler:
    """Raises FileNotFoundError, and CheckpointError that names the file and lists what does not fit."""
    config, layout, ours = keys_esrgan.from_theirs(_unwrapped(open_any(path).tensors), str(path))
    return OpenedUpscaler(config, traverse_util.unflatten_dict(ours, sep="/"), layout)


def save_upscaler(
    path: str | os.PathLike,  # *.safetensors, or torch's: *.pth, *.pt, *.ckpt, *.bin
    config: UpscalerConfig,
    params: Params,  # NumPy or JAX arrays, or Tensors
    layout: str | None = None,  # one of keys_esrgan.LAYOUTS; None = Real-ESRGAN's
    dtype: Any = None,  # of floats: "float32", "float16", "bfloat16"; None = as they are
    overwrite: bool = False,  # True: replace what is at `path`, once the new one is complete
) -> None:
    """The inverse: what was opened in this layout has the same tensors again, to the bit.

    Raises FileExistsError where something is at `path`, ValueError for an unknown ending or layout, CheckpointError
    where the parameters are not those of `config`.
    """
    path, dtype = Path(path), dtype_of(dtype)
    if path.suffix not in (".safetensors", *_PICKLED):
        raise ValueError(f"{path}: an upscaler is called *.safetensors, or {', '.join('*' + s for s in _PICKLED)}")
    layout = keys_esrgan.layouts_of(config)[-1] if layout is None else layout
    flat = traverse_util.flatten_dict(params, sep="/")
    cast = {name: lazy(leaf).cast(dtype, name) for name, leaf in flat.items()}
    theirs = keys_esrgan.to_theirs(cast, config, layout, f"cannot write {path}")
    with aside(path, overwrite) as work:
        if path.suffix == ".safetensors":
            read_safetensors.write(work, theirs, {"format": "pt"})
        else:
            write_torch.write_object(work, {_WRITTEN[layout]: theirs} if layout in _WRITTEN else theirs)


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the dict that they lie in; what lies in none of them stays, to be listed."""
    found = [within for within in _WITHIN if any(name.startswith(f"{within}.") for name in tensors)]
    for within in found[1:]:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{within}.")}
    return {name.removeprefix(f"{found[0]}.") if found else name: tensor for name, tensor in tensors.items()}
