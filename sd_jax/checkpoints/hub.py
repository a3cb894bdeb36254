"""Names on the Hugging Face hub -> a folder of its cache on this machine, after a download where it is needed."""

import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from sd_jax.checkpoints.folders import choose_weights
from sd_jax.models.presets import ALL_PARTS, PARTS

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".yaml", ".json")  # whose names are no hub names
_SMALL = ("model_index.json", "*/config.json", "scheduler/*.json", "tokenizer/*", "tokenizer_2/*")


def local(path: str | os.PathLike, weights: str = "ema") -> Path:
    """A path here as it is; a name such as "owner/name", where nothing here is called so, as its folder in the cache.

    Of the repository's files only those are downloaded that opening it reads. For a path here, nothing is asked.
    Raises FileNotFoundError with the mend where it is neither here, nor in the cache, nor to be had.
    """
    if os.path.exists(path) or isinstance(path, Path) or not is_name(os.fspath(path)):
        return Path(path)
    from huggingface_hub import snapshot_download

    name, reason = os.fspath(path), ""
    try:
        _check_answers()
        patterns = _wanted(name, weights)
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # noqa: BLE001  of many kinds, from httpx, the hub and its cache
        reason = " ".join(str(error).split())[:200]
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:
        raise FileNotFoundError(
            f"no such checkpoint: {name} is neither a path here nor in the hub's cache on this machine, and the hub "
            f"gave none ({reason}): give the path of a folder or a file, or download it first: hf download {name}"
        ) from error


def is_name(path: str) -> bool:
    return bool(_NAME.fullmatch(path)) and not path.lower().endswith(_FILES)


def _wanted(name: str, weights: str) -> list[str]:
    """The files of one variant, and what is small."""
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(name)
    if "model_index.json" in files:
        return [*_SMALL, *wanted_weights(files, weights)]
    alone = [weights_of(files, part, weights) for part in PARTS]
    if "config.json" not in files or not any(alone):
        raise ValueError("it has neither model_index.json nor a network's config.json: give the path of a file of it")
    return ["config.json", *next(filter(None, alone))]


def wanted_weights(files: Iterable[str], weights: str) -> list[str]:
    """The weight files that `folders` would read, of a repository that has `files`; an index with all its shards."""
    files, wanted = list(files), []
    for part in PARTS if any(file.startswith("text_encoder") for file in files) else ALL_PARTS:
        there = [file.removeprefix(f"{part}/") for file in files if file.startswith(f"{part}/")]
        wanted += [f"{part}/{file}" for file in weights_of(there, part, weights)]
    return wanted


def weights_of(files: Iterable[str], part: str, weights: str) -> list[str]:
    """The same of one network's folder."""
    files = list(files)
    chosen = choose_weights(files, part, weights)
    if chosen is None:
        return []
    if not chosen.endswith(".json"):
        return [chosen]
    suffix = ".safetensors" if ".safetensors." in chosen else ".bin"
    return [chosen, *(file for file in files if file.endswith(suffix) and "-of-" in file and "/" not in file)]


def _check_answers() -> None:
    """Raises OSError at once on a machine without network, where the hub's client would retry for minutes."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise OSError("HF_HUB_OFFLINE is set")
    if not urllib.request.getproxies():
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
