"""Embeddings of textual inversion as files <-> `Embedding`, in the three forms that people exchange, to the bit.

    a1111      .pt: string_to_param {"*": (n, width)}, string_to_token, name, step, ...
    diffusers  .bin, .safetensors: {"<word>": (width,) or (n, width)}
    sdxl       .safetensors: {"clip_l": (n, width), "clip_g": (n, width)}

In a diffusers file the tensor's name is the word, in the others the file's name is; so it is where the tensor has one
of A1111's own names, "emb_params" or "*". The first two forms have vectors for one text encoder. Which model they are
for, the widths say: 768 is SD 1, 1024 SD 2, 768 and 1280 SDXL. Files of 2022 hold a torch.nn.ParameterDict, which is
read too. Embeddings within pictures are not read.

Formats: A1111 stable-diffusion-webui, modules/textual_inversion/textual_inversion.py; diffusers,
loaders/textual_inversion.py
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sd_jax.adapters.textual_inversion import Embedding
from sd_jax.checkpoints import read_safetensors, write_torch
from sd_jax.checkpoints.aside import aside
from sd_jax.checkpoints.errors import CheckpointError, listing, shown
from sd_jax.checkpoints.files import open_any
from sd_jax.checkpoints.tensors import Tensor, all_finite, is_float

FORMATS = ("a1111", "diffusers", "sdxl")
_PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_PARAM, _TOKEN = "string_to_param.", "string_to_token."  # the latter holds tensors in the oldest files
_ENDINGS = {"a1111": (".pt",), "diffusers": (".bin", ".safetensors"), "sdxl": (".safetensors",)}
_UNNAMED = ("emb_params", "*", "tensor")  # the last is what a file of nothing but a tensor is read as


def load(path: str | os.PathLike) -> Embedding:
    """One file of any of the forms. Raises FileNotFoundError, and CheckpointError for what is no embedding."""
    path = Path(path)
    tensors = open_any(path).tensors
    if not is_embedding(tensors):
        raise CheckpointError(f"{path}: no embedding of textual inversion, its tensors are {_few(tensors)}")
    if _PARTS.keys() & tensors.keys():
        vectors = {part: _vectors(path, name, tensors[name]) for name, part in _PARTS.items() if name in tensors}
        if len({len(rows) for rows in vectors.values()}) > 1:
            raise CheckpointError(f"{path}: clip_l and clip_g are of {_counted(vectors)} vectors: one word has as many")
        return Embedding(path.stem, vectors)
    names = [name for name in tensors if name.startswith(_PARAM)] or list(tensors)
    if len(names) > 1:
        raise CheckpointError(f"{path}: {len(names)} embeddings ({_few(names)}): save each in a file of its own")
    (name,) = names
    unnamed = name.startswith(_PARAM) or name in _UNNAMED
    return Embedding(path.stem if unnamed else name, {"text_encoder": _vectors(path, name, tensors[name])})


def is_embedding(tensors: dict[str, Tensor]) -> bool:
    """Whether these are, by their names and shapes, the tensors of such a file."""
    if any(name.startswith(_PARAM) for name in tensors):
        return all(name.startswith((_PARAM, _TOKEN)) for name in tensors)
    if _PARTS.keys() & tensors.keys():
        return tensors.keys() <= _PARTS.keys()
    flat = len(tensors) == 1 or not any("." in name for name in tensors)
    widths = {tensor.shape[-1:] for tensor in tensors.values()}
    return flat and len(widths) == 1 and all(tensor.ndim in (1, 2) for tensor in tensors.values())


def save(
    path: str | os.PathLike,
    embedding: Embedding,
    format: str = "diffusers",  # of FORMATS
    step: int | None = None,  # at which training stopped, for a1111; None = unknown
    overwrite: bool = False,
) -> None:
    """Writes one file. Where its name is the word's, `path` must have it.

    Raises FileExistsError, and ValueError for a format that cannot say this embedding, or another ending or name than
    it has.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not one of {', '.join(FORMATS)}")
    if path.suffix not in _ENDINGS[format]:
        raise ValueError(f"{path}: embeddings of {format} are called {' or '.join('*' + e for e in _ENDINGS[format])}")
    if format != "diffusers" and path.stem != embedding.token:
        raise ValueError(f"{path}: the file's name is the word: call it {embedding.token}{path.suffix}")
    two = "text_encoder_2" in embedding.vectors
    if two != (format == "sdxl"):
        other = "sdxl" if two else "a1111 or diffusers"
        raise ValueError(
            f"{path}: embedding {embedding.token!r} is for {', '.join(embedding.vectors)}: save as {other}"
        )
    arrays = {part: np.asarray(rows) for part, rows in embedding.vectors.items()}
    with aside(path, overwrite) as work:
        if format == "a1111":
            write_torch.write_object(work, _a1111(embedding.token, arrays["text_encoder"], step))
        elif format == "sdxl":
            read_safetensors.write(work, {name: arrays[part] for name, part in _PARTS.items() if part in arrays})
        elif path.suffix == ".bin":
            write_torch.write(work, {embedding.token: arrays["text_encoder"]})
        else:
            read_safetensors.write(work, {embedding.token: arrays["text_encoder"]}, {"format": "pt"})


def _a1111(token: str, rows: np.ndarray, step: int | None) -> dict[str, Any]:
    facts = {"name": token, "step": step, "sd_checkpoint": None, "sd_checkpoint_name": None}
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, **facts}  # 265: CLIP's id of "*"


def _vectors(path: Path, name: str, tensor: Tensor) -> np.ndarray:
    where = f"{path}: {shown(name)}"
    rows = np.atleast_2d(np.asarray(tensor))
    if rows.ndim != 2 or not rows.size or not is_float(rows.dtype):
        raise CheckpointError(f"{where} is {tensor.dtype} {tensor.shape}, no vectors of words")
    if not all_finite(rows):
        raise CheckpointError(f"{where} holds numbers that are not finite: take an earlier one")
    return rows


def _counted(vectors: dict[str, np.ndarray]) -> str:
    return " and ".join(str(len(rows)) for rows in vectors.values())


def _few(names: Iterable[str]) -> str:
    return listing([shown(name, 50) for name in names], 5)
