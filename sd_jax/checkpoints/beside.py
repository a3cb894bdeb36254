"""What is trained beside a text-to-image model (`presets.BESIDE`) -> its description, parameters and tokenizer.

clip           a workdir of ours, or any CLIP that `checkpoints/clip.py` opens
image_encoder  its vision tower alone, of all these or of what `clip.open_vision` opens besides
perceptual     a workdir of method "features", or two files joined by a comma, torchvision's VGG16 and LPIPS' weights
aesthetic      a workdir of ours, or a file of LAION's layout
upscaler       a workdir of ours, or a file of ESRGAN's or Real-ESRGAN's layouts
others         a workdir of ours
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sd_jax.checkpoints import aesthetic, clip, detect, judges, native, tokenizer_files, upscaler
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.models.presets import FeaturesConfig, ModelSpec
from sd_jax.types import Params


class Beside(NamedTuple):
    config: Any  # a CLIPConfig, FeaturesConfig, ...
    params: Params
    tokenizer: str | None = None  # its folder


def open_beside(part: str, path: str | os.PathLike, weights: str = "ema") -> Beside:
    """Raises FileNotFoundError, and CheckpointError where the part is not there."""
    if part == "perceptual" and "," in str(path):
        vgg16, lins = str(path).split(",", 1)
        return Beside(FeaturesConfig(), judges.load_lpips(vgg16.strip(), lins.strip()))
    if detect.native_location(Path(path)) is not None:
        if part == "image_encoder":
            found = _native("clip", path, weights)
            return Beside(found.config, clip.vision_of(found.params))
        return _perceptual(path, weights) if part == "perceptual" else _native(part, path, weights)
    if part == "clip":
        opened = clip.open_clip(path)
        return Beside(opened.config, opened.params, None if opened.tokenizer is None else str(opened.tokenizer))
    if part == "image_encoder":
        opened = clip.open_vision(path)
        return Beside(opened.config, opened.params)
    if part == "aesthetic":
        config, variables = aesthetic.load(path)
        return Beside(config, variables["params"])
    if part == "upscaler":
        opened = upscaler.open_upscaler(path)
        return Beside(opened.config, opened.params)
    raise CheckpointError(f"{path}: no workdir of ours, and nothing else holds a {part}")


def _native(part: str, path: str | os.PathLike, weights: str) -> Beside:
    folder, step = detect.native_location(Path(path))
    params, meta, step, _ = native.read_params(folder, step, weights, np.dtype("float32"))
    spec = ModelSpec.from_dict(meta["spec"])
    if part not in params:
        raise CheckpointError(
            f"{path}: no {part} in it, only {', '.join(params)}: give the workdir of a run that has one"
        )
    tokenizer = folder.parent / (meta.get("tokenizer") or "tokenizer")
    return Beside(
        getattr(spec, part), params[part], str(tokenizer) if tokenizer_files.is_tokenizer(tokenizer) else None
    )


def _perceptual(path: str | os.PathLike, weights: str) -> Beside:
    """The trunk that a run of method "features" trained, every channel of it counting alike."""
    found = _native("features", path, weights)
    trunk = {name: tree for name, tree in found.params.items() if name != "words"}
    ones = {
        f"lin{i}": {"model_1": {"kernel": np.ones((1, 1, width, 1), np.float32)}}
        for i, width in enumerate(found.config.widths)
    }
    return Beside(found.config, jax.tree.map(np.asarray, trunk) | ones)
