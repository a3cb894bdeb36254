"""A tokenizer's folder as a checkpoint carries it: which ids it gives, and copying it whole.

How words become ids is the business of `prompts`.
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.models.presets import CLIPTextConfig

_NEEDED = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
_OPTIONAL = ("tokenizer.json", "added_tokens.json")
_DEFAULTS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}


def is_tokenizer(folder: str | os.PathLike) -> bool:
    return any((Path(folder) / name).is_file() for name in ("vocab.json", "tokenizer.json"))


def special_ids(folder: str | os.PathLike) -> dict[str, int]:
    """{"bos_token", "eos_token", "pad_token": id}, those that its vocabulary has; nothing says padding = end."""
    ids, names = vocabulary(folder), _names(Path(folder))
    return {kind: ids[name] for kind, name in names.items() if name in ids}


def save_tokenizer(tokenizer: Any, folder: Path, config: CLIPTextConfig) -> None:
    """A folder, or a Tokenizer of `prompts` -> a folder that transformers 4 and 5 open, for this text encoder.

    It pads with the token that the text encoder was trained with (OpenCLIP's 0, CLIP's end), and to its positions: a
    tokenizer that says more would have diffusers pad beyond them.
    Raises CheckpointError where the folder holds no vocabulary.
    """
    if hasattr(tokenizer, "save"):
        tokenizer.save(folder)
    elif not is_tokenizer(tokenizer):
        raise CheckpointError(f"{tokenizer}: no tokenizer: neither vocab.json nor tokenizer.json is in it")
    elif all((Path(tokenizer) / name).is_file() for name in _NEEDED):
        folder.mkdir(parents=True)
        for name in _NEEDED + _OPTIONAL:
            if (Path(tokenizer) / name).is_file():
                shutil.copyfile(Path(tokenizer) / name, folder / name)
    else:  # transformers 5 writes tokenizer.json alone, which older readers do not know
        from sd_jax.prompts.tokenize import load_tokenizer

        load_tokenizer(Path(tokenizer)).save(folder)
    settings = _json(folder / "tokenizer_config.json")
    if settings.get("model_max_length", math.inf) > config.max_position_embeddings:
        _write(folder / "tokenizer_config.json", {**settings, "model_max_length": config.max_position_embeddings})
    _pad_with(folder, config.pad_token_id)


def _pad_with(folder: Path, pad_token_id: int) -> None:
    """Nothing changes where it does so already, or where its vocabulary has no such token."""
    names = {number: name for name, number in vocabulary(folder).items()}
    if special_ids(folder).get("pad_token") == pad_token_id or pad_token_id not in names:
        return
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        _write(folder / file, {**_json(folder / file), "pad_token": names[pad_token_id]})


def vocabulary(folder: str | os.PathLike) -> dict[str, int]:
    """{token: id}, added ones included."""
    folder = Path(folder)
    if (folder / "vocab.json").is_file():
        added = _json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
        return {**_json(folder / "vocab.json"), **added}
    whole = _json(folder / "tokenizer.json")
    added = {token["content"]: token["id"] for token in whole.get("added_tokens", [])}
    return {**whole.get("model", {}).get("vocab", {}), **added}


def _names(folder: Path) -> dict[str, str]:
    """What the special tokens are called: the config's word, then the map's, then CLIP's."""
    said = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            said |= {key: value for key, value in _json(folder / file).items() if value is not None}
    names = dict(_DEFAULTS)
    for kind in ("bos_token", "eos_token", "pad_token"):
        value = said.get(kind, names.get(kind, names["eos_token"]))
        names[kind] = value["content"] if isinstance(value, dict) else value
    return names


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
