"""A single file in the layout of the model's kind (see `keys_compvis`), with the header that other programs read.

modelspec.*      Stability AI's ModelSpec 1.0.0, as kohya-ss/sd-scripts writes it (`library/sai_model_spec.py`);
                 architectures that it does not know are named as SwarmUI does
sd_jax.spec      our own config: what shapes do not say
v_pred, ztsnr    empty tensors, of which the names say "v-prediction" and "zero terminal signal-to-noise ratio" to
                 ComfyUI, A1111 and Forge. SD 2 has no v_pred: there v-prediction is known by the weights
"""

import datetime
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sd_jax.checkpoints import infer, keys_compvis
from sd_jax.checkpoints.read_safetensors import write
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.models.presets import ModelSpec

_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
_NO_HASH = "0x" + 64 * "0"  # until the tensors have gone by


def save(work: Path, path: Path, spec: ModelSpec, theirs: Mapping[str, Mapping[str, Tensor]], tokenizer: Any) -> None:
    """Writes at `work` what will be called `path`: {part: {diffusers' name: Tensor}}, of the parts that there are."""
    kind, tensors = keys_compvis.kind_of(spec), {}
    for part, named in theirs.items():
        tensors |= keys_compvis.from_diffusers(part, named, getattr(spec, part), kind)
    tensors |= {mark: Tensor((0,), np.dtype(np.float32), _nothing) for mark in marks(spec)}
    digest = hashlib.sha256()
    hashed = {name: _hashed(tensor, digest) for name, tensor in tensors.items()}  # in the order of the file
    write(work, hashed, {**modelspec(spec, path.stem), infer.SPEC_KEY: json.dumps(spec.to_dict())})
    _put_hash(work, digest.hexdigest())


def marks(spec: ModelSpec) -> list[str]:
    schedule = spec.noise_schedule
    is_said = schedule.prediction_type == "v_prediction" and keys_compvis.kind_of(spec) != "sd2"
    return ["v_pred"] * is_said + ["ztsnr"] * schedule.rescale_betas_zero_snr


def modelspec(spec: ModelSpec, title: str) -> dict[str, str]:
    prediction = spec.noise_schedule.prediction_type
    size = spec.unet.sample_size * spec.vae.downscale
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture(spec),
        "modelspec.implementation": _IMPLEMENTATION,
        "modelspec.title": title,
        "modelspec.date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
        "modelspec.hash_sha256": _NO_HASH,
    }


def architecture(spec: ModelSpec) -> str:
    kind, latent = keys_compvis.kind_of(spec), spec.vae.latent_channels
    inpaints = spec.unet.in_channels == 2 * latent + 1
    if spec.unet.num_class_embeds is not None:
        return "stable-diffusion-x4-upscaler"
    if kind == "sd2":
        special = {2 * latent + 1: "inpainting", latent + 1: "depth"}.get(spec.unet.in_channels)
        usual = "768-v" if spec.noise_schedule.prediction_type == "v_prediction" else "512"
        return f"stable-diffusion-v2-{special or usual}"
    names = {"sd1": "v1", "sdxl": "xl-v1-base", "sdxl_refiner": "xl-v1-refiner"}
    return f"stable-diffusion-{names[kind]}{'/inpaint' if inpaints else ''}"


# The hash of all tensors' bytes stands before them: they are hashed as they are written, then it is put in its place


def _hashed(tensor: Tensor, digest: Any) -> Tensor:
    return Tensor(tensor.shape, tensor.dtype, functools.partial(_read_hashed, tensor, digest))


def _read_hashed(tensor: Tensor, digest: Any) -> np.ndarray:
    array = np.ascontiguousarray(tensor.read())
    digest.update(array.reshape(-1).view(np.uint8).data)
    return array


def _put_hash(file: Path, digest: str) -> None:
    with file.open("r+b") as opened:
        header = opened.read(8)
        header += opened.read(int.from_bytes(header, "little"))
        opened.seek(header.index(_NO_HASH.encode()))
        opened.write(b"0x" + digest.encode())


def _nothing() -> np.ndarray:
    return np.zeros(0, np.float32)
