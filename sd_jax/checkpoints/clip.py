"""A whole CLIP, in and out.

    transformers' folder    config.json, model.safetensors or pytorch_model.bin (or shards), preprocessor_config.json
    OpenCLIP's folder       open_clip_config.json, open_clip_model.safetensors or open_clip_pytorch_model.bin
    a single file           by OpenAI's names (OpenCLIP's are the same): .safetensors, a state dict of torch.save, or
                            the TorchScript archives that OpenAI published, whose code is not run

What a single file of ours is, its header says in the words of open_clip_config.json. So does a `.pt`, beside its
`state_dict`, as OpenCLIP's training writes them; but where it is OpenAI's kind (quick_gelu, heads of 64) it is written
as theirs, which tells itself. A file of others is what the config beside it says, or `clip_config.from_shapes` finds.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from sd_jax.checkpoints import clip_config, folders, keys_clip, keys_openai_clip, tokenizer_files, write_torch
from sd_jax.checkpoints.aside import aside
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.files import open_any
from sd_jax.checkpoints.folders import read_json
from sd_jax.checkpoints.place import place
from sd_jax.checkpoints.read_safetensors import write
from sd_jax.checkpoints.tensors import Tensor, dtype_of, lazy
from sd_jax.models.presets import CLIPConfig
from sd_jax.types import Params

FORMATS = ("transformers", "open_clip", "single_file")
_OPEN_CONFIG = "open_clip_config.json"
_OPEN_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.safetensors")
_PICKLED = (".pt", ".pth", ".bin")
_VISION_TYPE = "clip_vision_model"  # of transformers' config.json


class OpenedCLIP(NamedTuple):
    config: CLIPConfig
    params: Params  # of Tensors, which are read when they are asked for
    tokenizer: Path | None  # its folder, where the checkpoint has one


def load_clip(
    path: str | os.PathLike,
    dtype: Any = "float32",  # of floats: "float32", "float16", "bfloat16"; None = as they are in the file
    config: CLIPConfig | None = None,
) -> tuple[CLIPConfig, Params]:
    """`open_clip`, with the parameters as JAX arrays. Raises as it does, and CheckpointError for damaged values."""
    opened = open_clip(path, config)
    return opened.config, place(opened.params, dtype, where=path)


def open_clip(
    path: str | os.PathLike,
    config: CLIPConfig | None = None,  # of a single file that does not tell it; None = what it tells, else LAION's kind
) -> OpenedCLIP:
    """A CLIP in any of the forms above. Where a folder is both transformers' and OpenCLIP's, transformers' is read.

    Raises FileNotFoundError, and CheckpointError that names the file, what is wrong with it, and the mend.
    """
    path = Path(path)
    if path.is_dir():
        found, tensors, where = _open_folder(path)
    else:
        found, tensors, where = _open_file(path, config)
    ours = keys_clip.from_transformers(tensors, found, where)
    folder = path if path.is_dir() and tokenizer_files.is_tokenizer(path) else None
    return OpenedCLIP(found, traverse_util.unflatten_dict(ours, sep="/"), folder)


def open_vision(path: str | os.PathLike) -> OpenedCLIP:
    """The vision tower and its projection alone: of a CLIP in any of the forms above, or of a folder of transformers'
    CLIPVisionModelWithProjection, which `image_encoder` folders are. Raises as `open_clip` does.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file() or read_json(folder / "config.json").get("model_type") != _VISION_TYPE:
        opened = open_clip(path)
        return opened._replace(params=vision_of(opened.params), tokenizer=None)
    config = _config_in(folder, clip_config.vision_from_transformers)
    weights = folder / _weights_in(folder)
    ours = keys_clip.from_transformers(_open_weights(weights), config, str(weights), vision_alone=True)
    return OpenedCLIP(config, traverse_util.unflatten_dict(ours, sep="/"), None)


def vision_of(params: Params) -> Params:
    """What of a CLIP's parameters `open_vision` gives."""
    return {name: params[name] for name in ("vision_model", "visual_projection")}


def save_clip(
    path: str | os.PathLike,
    config: CLIPConfig,
    params: Params,  # NumPy or JAX arrays, or Tensors
    format: str = "transformers",  # one of FORMATS; a single file is *.safetensors, or torch's: *.pt, *.pth, *.bin
    tokenizer: Any = None,  # for a transformers folder: a folder, or a Tokenizer with `save(folder)`; None = without
    dtype: Any = None,  # of floats: "float32", "float16", "bfloat16"; None = as they are
    overwrite: bool = False,  # True: replace what is at `path`, once the new one is complete
) -> None:
    """Writes a CLIP, whole or not at all; one tensor in memory at a time besides `params`.

    Raises FileExistsError where something is at `path`, CheckpointError where the parameters do not fit the config or
    the format cannot say what it says, ValueError for an unknown format or ending.
    """
    path, dtype, where = Path(path), dtype_of(dtype), f"cannot write {path}"
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not one of {', '.join(FORMATS)}")
    if format == "single_file" and path.suffix not in (".safetensors", *_PICKLED):
        raise ValueError(f"{path}: a single file is called *.safetensors, or {', '.join('*' + s for s in _PICKLED)}")
    if tokenizer is not None and format != "transformers":
        raise ValueError(f"{path}: only a transformers folder carries a tokenizer")
    flat = traverse_util.flatten_dict(params, sep="/")
    cast = {name: lazy(leaf).cast(dtype, name) for name, leaf in flat.items()}
    theirs = keys_clip.to_transformers(cast, config, where)
    if format == "transformers":
        with aside(path, overwrite) as work:
            _write_folder(work, config, theirs, tokenizer)
        return
    said = clip_config.to_open_clip(config, where)
    named = keys_openai_clip.from_transformers(theirs, config)
    with aside(path, overwrite) as work:
        if format == "open_clip":
            work.mkdir()
            _write_json(work / _OPEN_CONFIG, said)
            write(work / _OPEN_WEIGHTS[0], named, {"format": "pt"})
        elif path.suffix == ".safetensors":
            write(work, named, {"format": "pt", "open_clip_config": json.dumps(said)})
        else:
            _write_pickled(work, config, named, said)


# Reading


def _open_folder(path: Path) -> tuple[CLIPConfig, dict[str, Tensor], str]:
    names = [p.name for p in path.iterdir() if p.is_file()]
    chosen = folders.choose_weights(names, "text_encoder", "ema") if "config.json" in names else None
    if chosen is not None:
        weights = path / chosen
        return _config_in(path), _open_weights(weights), str(weights)
    if _OPEN_CONFIG in names:
        weights = next((name for name in _OPEN_WEIGHTS if name in names), None)
        if weights is None:
            raise CheckpointError(f"{path}: no {_OPEN_WEIGHTS[0]} in it: download it too")
        return _open_file(path / weights, None)
    missing = "no model.safetensors" if "config.json" in names else f"neither config.json nor {_OPEN_CONFIG}"
    raise CheckpointError(f"{path}: {missing} in it: no folder of a CLIP, of transformers or OpenCLIP")


def _weights_in(folder: Path) -> str:
    found = folders.choose_weights([p.name for p in folder.iterdir() if p.is_file()], "text_encoder", "ema")
    if found is None:
        raise CheckpointError(f"{folder}: no model.safetensors in it: download it too")
    return found


def _config_in(folder: Path, read: Callable = clip_config.from_transformers) -> CLIPConfig:
    file = folder / "preprocessor_config.json"
    pixels = read_json(file) if file.is_file() else None
    return read(read_json(folder / "config.json"), pixels, str(folder))


def _open_weights(file: Path) -> dict[str, Tensor]:
    return folders.open_shards(file) if file.suffix == ".json" else open_any(file).tensors


def _open_file(path: Path, config: CLIPConfig | None) -> tuple[CLIPConfig, dict[str, Tensor], str]:
    contents, where = open_any(path), str(path)
    if any(name.startswith("vision_model.") for name in contents.tensors):
        if config is None:
            if not (path.parent / "config.json").is_file():
                raise CheckpointError(f"{path}: by transformers' names, without its config.json: give config=, or both")
            config = _config_in(path.parent)
        return config, contents.tensors, where
    tensors = keys_openai_clip.modern(contents.tensors)
    if not any(name.startswith("visual.") for name in tensors):
        raise CheckpointError(f"{path}: no whole CLIP: a vision tower (visual.* or vision_model.*) is not in it")
    beside = path.parent / _OPEN_CONFIG
    if config is None:
        if "open_clip_config" in contents.metadata:
            config = clip_config.from_open_clip(_parsed(contents.metadata["open_clip_config"], where), where)
        elif beside.is_file() and path.name in _OPEN_WEIGHTS:
            config = clip_config.from_open_clip(read_json(beside), str(beside))
        else:
            config = clip_config.from_shapes(tensors, contents.tensors, where)
    return config, keys_openai_clip.to_transformers(tensors, config, where), where


def _parsed(text: str, where: str) -> Mapping[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: its open_clip_config is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: its open_clip_config is not a table of settings")
    return data


# Writing


def _write_folder(work: Path, config: CLIPConfig, theirs: Mapping[str, Tensor], tokenizer: Any) -> None:
    if tokenizer is None:
        work.mkdir()
    else:
        tokenizer_files.save_tokenizer(tokenizer, work, config.text_config)
    dtype = str(theirs["visual_projection.weight"].dtype)
    for name, data in zip(
        ("config.json", "preprocessor_config.json"), clip_config.to_transformers(config, dtype), strict=True
    ):
        _write_json(work / name, data)
    write(work / "model.safetensors", theirs, {"format": "pt"})


def _write_pickled(work: Path, config: CLIPConfig, named: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    """As OpenAI's where its shapes tell the rest; the three numbers are what marks it."""
    text, vision = config.text_config, config.vision_config
    counts = (vision.image_size, text.max_position_embeddings, text.vocab_size)
    numbers = {
        name: lazy(np.asarray(count, np.int64))
        for name, count in zip(keys_openai_clip.OPENAI_NUMBERS, counts, strict=True)
    }
    marked = {**named, **numbers}
    try:
        told = clip_config.from_shapes(named, marked, str(work))
    except CheckpointError:
        told = None
    if told is not None and clip_config.to_open_clip(told, "") == said:
        write_torch.write(work, marked)
    else:
        write_torch.write(work, named, {"open_clip_config": json.dumps(said)})


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
