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

_NEEDED = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
_OPTIONAL = ("tokenizer.json", "added_tokens.json")
_DEFAULTS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}


def is_tokenizer(folder: str | os.PathLike) -> bool:
    return any((Path(folder) / name).is_file() for name in ("vocab.json", "tokenizer.json"))


def special_ids(folder: str | os.PathLike) -> dict[str, int]:
    """{"bos_token", "eos_token", "pad_token": id}, those that its vocabulary has; nothing says padding = end."""
    vocabulary, names = _vocabulary(Path(folder)), _names(Path(folder))
    return {kind: vocabulary[name] for kind, name in names.items() if name in vocabulary}


def save_tokenizer(tokenizer: Any, folder: Path, max_length: int) -> None:
    """A folder, or a Tokenizer of `prompts` -> a folder that transformers 4 and 5 open.

    max_length: the text encoder's positions; a tokenizer that says more would have diffusers pad beyond them.
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
    config = _json(folder / "tokenizer_config.json")
    if config.get("model_max_length", math.inf) > max_length:
        config["model_max_length"] = max_length
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _vocabulary(folder: Path) -> dict[str, int]:
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
