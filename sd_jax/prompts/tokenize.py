"""CLIP's tokenizer: captions to token ids, from a folder, the hub, or trained here from captions.

Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019) in CLIP's form: text is lower-cased and
NFC-normalised, words end in `</w>`, sequences are `<|startoftext|> ... <|endoftext|>`. Ids 0-255 are the bytes, 256-511
the bytes that end a word, then one id per merge, and the two marks come last.

Words may be added, each of one id or several (textual inversion). Wherever one stands in a text, in capitals or not, it
is its ids and is not split; a word of letters or digits is not found within a longer one. In files the first id has the
word's name and the others `word_1`, `word_2`, ..., as diffusers has them.
"""

import copy
import json
import os
import pathlib
import re
import shutil
import socket
import tempfile
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from sd_jax.models.presets import CLIPTextConfig, FeaturesConfig

START, END = "<|startoftext|>", "<|endoftext|>"
DEFAULT = "openai/clip-vit-large-patch14"  # the tokenizer of Stable Diffusion 1.x
CONTEXT = 77  # tokens that CLIP reads; the length where a tokenizer does not say
LEAST_VOCABULARY = 257  # every byte and something besides: less cannot spell every text

_PROBE = "a photo of 2 red cats, and a dog's naïve 猫."  # no "!": where that pads, decoding drops it
_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_MEND = "name a folder that holds vocab.json and merges.txt with --tokenizer=DIR (in a config: config.tokenizer)"


class Tokenizer:
    """Texts -> ids. Safe to call from many threads at once."""

    def __init__(self, tokenizer, source: str):
        """`tokenizer` is transformers' CLIPTokenizer, `source` what errors call it. ValueError if it is degenerate."""
        self.source = source
        self._hf = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()  # we pad and cut ourselves: these settings are shared state, not an argument
        self._backend.no_truncation()
        # Words of several ids, which belong together: {first id: how many}
        self.counts: dict[int, int] = _ids_of_words(tokenizer.get_added_vocab())
        self.vocab_size: int = len(tokenizer)
        self.bos_token_id: int = tokenizer.bos_token_id
        self.eos_token_id: int = tokenizer.eos_token_id
        self.pad_token_id: int = tokenizer.pad_token_id
        self.comma_token_id: int | None = self._backend.token_to_id(",</w>")  # None: no token stands for a comma
        own = tokenizer.model_max_length
        self.max_length: int = int(own) if own < 1_000_000 else CONTEXT  # transformers says 1e30 for "unknown"
        self._check_vocabulary()

    def __call__(
        self,
        texts: Sequence[str],
        max_length: int | None = None,  # ids per text, start and end included; None = the tokenizer's own (77)
    ) -> Int32[np.ndarray, "batch tokens"]:
        """Ids of each text, padded and cut to `max_length`. Warns of what is cut away."""
        if isinstance(texts, str):
            raise TypeError("a tokenizer takes a list of texts, not one text")
        length = self.max_length if max_length is None else max_length
        ids = np.full((len(texts), length), self.pad_token_id, np.int32)
        for row, text in zip(ids, texts, strict=True):
            found = self._spread(self._backend.encode(text).ids)
            if len(found) > length:
                dropped = self.text_from(text, length - 2)
                warnings.warn(f"prompt too long, dropped: {dropped!r}", UserWarning, stacklevel=2)
                found = [*found[: length - 1], self.eos_token_id]
            row[: len(found)] = found
        return ids

    def token_ids(self, text: str) -> list[int]:
        """Ids of the words of one text: no start, no end, no padding, however many."""
        return self._spread(self._backend.encode(text, add_special_tokens=False).ids)

    def text_from(self, text: str, token: int) -> str:
        """The end of a text, from the token of that number (of `token_ids`) on; the word that it lies in is whole."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        words = encoding.word_ids
        token = [place for place, i in enumerate(encoding.ids) for _ in range(self.counts.get(i, 1))][token]
        while token > 0 and words[token] == words[token - 1]:
            token -= 1
        return text[encoding.offsets[token][0] :].strip()

    def with_tokens(self, words: Mapping[str, int]) -> "Tokenizer":
        """One that knows more words, each of so many ids; this one stays as it is. Ids go on from `vocab_size`.

        Raises ValueError, naming the word and the mend, for one that is a token already.
        """
        from tokenizers import AddedToken

        hf = copy.deepcopy(self._hf)
        for word, count in words.items():
            before, _, number = word.rpartition("_")
            if count < 1:
                raise ValueError(f"word {word!r} of {count} vectors: give it at least one")
            if not word.strip() or any(mark in word for mark in (START, END)):
                raise ValueError(f"{word!r} cannot be a word of its own: choose another name")
            if len(hf.backend_tokenizer.encode(word, add_special_tokens=False).ids) == 1:
                other = f"my-{word.strip('<>')}"
                raise ValueError(f"{word!r} is a token of {self.source} already: choose another name, such as {other}")
            if number.isdigit() and before in hf.get_added_vocab():
                raise ValueError(f"{word!r} would be a further vector of {before!r}: choose another name")
            # Else "cat" would be found in "catalog". Beside other signs than letters there is no such danger
            whole = re.match(r"\w", word) is not None or re.search(r"\w$", word) is not None
            names, first = [word, *(f"{word}_{n}" for n in range(1, count))], len(hf)
            hf.add_tokens([AddedToken(name, single_word=whole, normalized=True) for name in names])
            if hf.convert_tokens_to_ids(names) != list(range(first, first + count)):
                raise ValueError(f"one of {', '.join(names)} is a token already: choose another name than {word!r}")
        grown = Tokenizer(hf, self.source)
        grown.pad_token_id = self.pad_token_id
        return grown

    def check(self, config: CLIPTextConfig | FeaturesConfig) -> None:
        """Raises ValueError where an id has no row in what reads it, `config`."""
        highest = max(self._hf.get_vocab().values())
        if highest >= config.vocab_size:
            raise ValueError(
                f"tokenizer {self.source} gives ids up to {highest}, but the text encoder has vocab_size="
                f"{config.vocab_size}: they do not belong together; {_MEND}"
            )

    def pad_as(self, config: CLIPTextConfig | FeaturesConfig) -> None:
        """Pads as the text encoder wants it: CLIP's and OpenCLIP's tokenizers differ in nothing but their padding."""
        if config.pad_token_id < self.vocab_size:
            self.pad_token_id = config.pad_token_id

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes the four files that SD 1.x checkpoints have: vocab.json, merges.txt and two of settings.

        transformers of version 4 and 5, and so diffusers, read them and give the same ids.
        """
        model = json.loads(self._backend.to_str())["model"]
        added = {i: token for i, token in self._hf.added_tokens_decoder.items() if token.content not in model["vocab"]}
        marks = {name: getattr(self._hf, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        _write(pathlib.Path(folder), model["vocab"], merges, self.max_length, marks, added)

    def _spread(self, ids: Sequence[int]) -> list[int]:
        """With all ids of the words that were added, of which the library knows the first alone."""
        return [i + n for i in ids for n in range(self.counts.get(i, 1))]

    def _check_vocabulary(self) -> None:
        """transformers opens a folder without vocabulary as a tokenizer of two tokens, silently; so look."""
        if self.vocab_size < LEAST_VOCABULARY:
            raise ValueError(f"tokenizer {self.source} has a vocabulary of only {self.vocab_size} tokens: {_MEND}")
        ids = self._backend.encode(_PROBE).ids
        if ids[0] != self.bos_token_id or ids[-1] != self.eos_token_id:
            raise ValueError(f"tokenizer {self.source} does not frame text in {START} and {END}: {_MEND}")
        again = self._backend.decode(ids[1:-1]).replace("</w>", " ").lower()  # added words are as they were given
        if "".join(again.split()) != "".join(_PROBE.lower().split()):
            raise ValueError(f"tokenizer {self.source} turns {_PROBE!r} into {again!r}: {_MEND}")


def _ids_of_words(added: Mapping[str, int]) -> dict[int, int]:
    """{first id: number of ids} of the words that have several: word, word_1, word_2, ... with ids in a row."""
    counts = {}
    for word, first in added.items():
        count = 1
        while added.get(f"{word}_{count}") == first + count:
            count += 1
        if count > 1:
            counts[first] = count
    return counts


# -- Opening ---------------------------------------------------------------------------------------------------------


def load_tokenizer(path: str | pathlib.Path | None = None) -> Tokenizer:
    """Opens a folder (vocab.json and merges.txt, or tokenizer.json; or a diffusers folder around it) or a hub name.

    None = SD 1.x's own, `openai/clip-vit-large-patch14`, from the hub's cache on this machine or from the hub.
    Raises FileNotFoundError where there is none, ValueError where the vocabulary is degenerate; both name the mend.
    """
    name = str(path or DEFAULT)
    local = pathlib.Path(name)
    if local.is_dir():
        folder = _vocabulary_folder(local)
        if folder is None:
            raise FileNotFoundError(f"{name} holds no tokenizer (vocab.json and merges.txt): {_MEND}")
    elif local.exists() or isinstance(path, pathlib.Path) or not _may_be_hub_name(name):
        raise FileNotFoundError(f"tokenizer {name} is not a folder: {_MEND}")
    else:
        folder = _from_hub(name)
    try:
        tokenizer = _clip_tokenizer().from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise ValueError(f"tokenizer {name} cannot be read ({error}): {_MEND}") from error
    return Tokenizer(tokenizer, name)


def _clip_tokenizer():
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it misses torch aloud
    from transformers import CLIPTokenizer

    return CLIPTokenizer


def _vocabulary_folder(folder: pathlib.Path) -> pathlib.Path | None:
    for place in (folder, folder / "tokenizer"):
        if (place / "tokenizer.json").is_file():
            return place
        if (place / "vocab.json").is_file() and (place / "merges.txt").is_file():
            return place
    return None


def _may_be_hub_name(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def _from_hub(name: str) -> pathlib.Path:
    """The folder of the hub's cache that holds the tokenizer `name`, after a download where it is not there yet."""
    from huggingface_hub import snapshot_download

    patterns = [pattern for file in _FILES for pattern in (file, f"tokenizer/{file}")]
    reason = ""
    for offline in (True, False):
        try:
            if not offline:
                _check_hub_answers()
            folder = snapshot_download(name, allow_patterns=patterns, local_files_only=offline)
        except Exception as error:  # noqa: BLE001  of many kinds, from httpx, the hub and its cache
            reason = str(error).strip().split("\n")[0]
            continue
        found = _vocabulary_folder(pathlib.Path(folder))
        if found is not None:
            return found
        reason = "it holds no vocab.json and merges.txt"
    raise FileNotFoundError(
        f"tokenizer {name} is neither a folder nor in the hub's cache on this machine, and the hub gave none "
        f"({reason}): {_MEND}"
    )


def _check_hub_answers() -> None:
    """Raises OSError at once on a machine without network, where the hub's client would retry for minutes."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise OSError("HF_HUB_OFFLINE is set")
    if not urllib.request.getproxies():
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)


# -- Training --------------------------------------------------------------------------------------------------------


def train_tokenizer(
    captions: Iterable[str], folder: str | pathlib.Path, vocab_size: int, max_length: int = CONTEXT
) -> Tokenizer:
    """Learns merges from `captions` and writes the tokenizer into `folder`; the same captions give the same files.

    `max_length` is how many tokens the text encoder will read, start and end included.
    The vocabulary has `vocab_size` tokens, or fewer where the captions have no more pairs that occur twice.
    Raises ValueError for a `vocab_size` too small to spell every text (514).
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # CLIP's order: bytes that print as themselves, the others
    alphabet = letters + [letter + "</w>" for letter in letters]
    least = len(alphabet) + 2
    if vocab_size < least:
        raise ValueError(f"text_encoder.vocab_size={vocab_size} is too small: CLIP's alphabet alone takes {least}")
    like = _clip_tokenizer()().backend_tokenizer
    backend = Backend(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    backend.normalizer, backend.pre_tokenizer = like.normalizer, like.pre_tokenizer
    # Passed as special tokens, the alphabet has fixed ids, which break ties; else these hang on a hash map's order
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        special_tokens=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer=trainer)
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    merges = []
    for left, right in json.loads(backend.to_str())["model"]["merges"]:
        if len(vocabulary) == vocab_size - 2:
            break
        vocabulary.setdefault(left + right, len(vocabulary))
        merges.append((left, right))
    for mark in (START, END):
        vocabulary[mark] = len(vocabulary)
    marks = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    _write(pathlib.Path(folder), vocabulary, merges, max_length, marks, {})
    return load_tokenizer(pathlib.Path(folder))


def _write(
    folder: pathlib.Path,
    vocabulary: dict[str, int],
    merges: Sequence[Sequence[str]],
    max_length: int,
    marks: dict[str, str],
    added: Mapping[int, Any],  # tokenizers' AddedToken, by id
) -> None:
    """Writes aside, then renames, so that a crash leaves no half tokenizer."""
    config = {
        "add_prefix_space": False,
        **marks,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": max_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    if added:  # how they are found in a text; added_tokens.json says their ids alone
        flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        config["added_tokens_decoder"] = {
            str(i): {flag: getattr(token, flag) for flag in flags} for i, token in added.items()
        }
    ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    files = {
        "vocab.json": json.dumps(ordered, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges), ""]),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(marks, indent=2) + "\n",
    }
    if added:
        ids = {token.content: i for i, token in added.items()}
        files["added_tokens.json"] = json.dumps(ids, indent=2, ensure_ascii=False) + "\n"
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        aside.chmod(0o755)
        for name, text in files.items():
            (aside / name).write_text(text, encoding="utf-8")
        if not folder.exists():
            aside.rename(folder)
            return
        for name in _FILES:
            if name in files:
                (aside / name).replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)  # an older tokenizer's
    finally:
        shutil.rmtree(aside, ignore_errors=True)
