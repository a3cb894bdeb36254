"""A tokenizer's folder as a checkpoint carries it: which ids it gives, and copying it whole.

transformers 5 writes `tokenizer.json` only; older readers want `vocab.json` and `merges.txt`, which are in it. Both are
written. How words become ids is the business of `prompts`.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from sd_jax.checkpoints.errors import CheckpointError

FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_DEFAULTS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}


def is_tokenizer(folder: str | os.PathLike) -> bool:
    return any((Path(folder) / name).is_file() for name in ("vocab.json", "tokenizer.json"))


def special_ids(folder: str | os.PathLike) -> dict[str, int]:
    """{"bos_token", "eos_token", "pad_token": id}, those that its vocabulary has; nothing says padding = end."""
    vocabulary, names = _vocabulary(Path(folder)), _names(Path(folder))
    return {kind: vocabulary[name] for kind, name in names.items() if name in vocabulary}


def save_tokenizer(tokenizer: Any, folder: Path, max_length: int) -> None:
    """A folder, or a Tokenizer that can `save` itself -> a folder that transformers of any version opens.

    Raises CheckpointError where the folder holds no vocabulary.
    """
    folder.mkdir(parents=True)
    if hasattr(tokenizer, "save"):
        tokenizer.save(folder)
    else:
        if not is_tokenizer(tokenizer):
            raise CheckpointError(f"{tokenizer}: no tokenizer: neither vocab.json nor tokenizer.json is in it")
        for name in FILES:
            if (Path(tokenizer) / name).is_file():
                shutil.copyfile(Path(tokenizer) / name, folder / name)
    _complete(folder, max_length)


def _complete(folder: Path, max_length: int) -> None:
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        model = _json(folder / "tokenizer.json").get("model", {})
        if "vocab" not in model or "merges" not in model:
            raise CheckpointError(f"{folder}: neither vocab.json with merges.txt nor a byte-level BPE in tokenizer.json")
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        _write(folder / "vocab.json", _vocabulary(folder))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")
    names = _names(folder)
    if not (folder / "tokenizer_config.json").is_file():
        own = {**names, "unk_token": names["eos_token"], "model_max_length": max_length}
        _write(folder / "tokenizer_config.json", {**own, "tokenizer_class": "CLIPTokenizer"})
    if not (folder / "special_tokens_map.json").is_file():
        _write(folder / "special_tokens_map.json", {**names, "unk_token": names["eos_token"]})


def _vocabulary(folder: Path) -> dict[str, int]:
    if (folder / "vocab.json").is_file():
        vocabulary = _json(folder / "vocab.json")
    else:
        whole = _json(folder / "tokenizer.json")
        added = {token["content"]: token["id"] for token in whole.get("added_tokens", [])}
        vocabulary = {**whole.get("model", {}).get("vocab", {}), **added}
    return dict(sorted(vocabulary.items(), key=lambda item: item[1]))


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
