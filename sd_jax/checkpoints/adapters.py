"""Files of the LoRA family, in and out, and the command that makes new ones of them.

    kohya        by the names of kohya-ss/sd-scripts and LyCORIS (see `keys_kohya`): all of the family
    diffusers    by those of diffusers and PEFT (see `keys_peft`): LoRA, LoCon and DoRA. For diffusers itself, where
                 alpha differs from layer to layer: it misreads kohya's files of that kind (as of 0.42)

Which of the two a file is, its tensors say. It is read strictly: each of them belongs to a layer of the model and fits
it. What an adapter is, `sd_jax.adapters.deltas` says: {part: {path of a layer: its arrays}}, as the file has them, but
that `alpha` is added where a file has none, and that a linear's arrays which are written as a 1x1 convolution's, or the
reverse, are reshaped.

A file's header has modelspec.* (as `save_single_file`, its architecture followed by "/lora") and in the kohya layout
ss_network_* and sshs_model_hash, which A1111 knows a file by: sha256 of all tensors' bytes, in the order of the file.

    python -m sd_jax.checkpoints.adapters extract --base=A --tuned=B --rank=8 --out=FILE
    python -m sd_jax.checkpoints.adapters resize --adapter=FILE --base=A --rank=4 --out=FILE
    python -m sd_jax.checkpoints.adapters merge --adapter=FILE:0.8 --adapter=FILE:0.5 --base=A --out=FILE
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from sd_jax.adapters import algebra
from sd_jax.adapters.deltas import Entry, Layers, is_low_rank, rank_of, to_torch
from sd_jax.checkpoints import (
    adapter_entries,
    detect,
    keys_compvis,
    keys_kohya,
    keys_peft,
    layout,
    save_single_file,
)
from sd_jax.checkpoints.aside import aside
from sd_jax.checkpoints.errors import CheckpointError, listing, shown
from sd_jax.checkpoints.files import open_any
from sd_jax.checkpoints.folders import read_json
from sd_jax.checkpoints.keys_peft import Layer
from sd_jax.checkpoints.load import open_checkpoint
from sd_jax.checkpoints.read_safetensors import Contents, write
from sd_jax.checkpoints.tensors import Tensor, all_finite, dtype_of, is_float, lazy
from sd_jax.models.presets import ModelSpec
from sd_jax.types import Params

FORMATS = ("kohya", "diffusers")
IN_FOLDERS = (  # ours, diffusers', PEFT's
    "adapter.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
_PEFT_CONFIG = "adapter_config.json"
_KEYS = {"kohya": keys_kohya, "diffusers": keys_peft}


class OpenedAdapter(NamedTuple):
    layers: dict[str, dict[str, dict[str, np.ndarray]]]  # {part: {path: entry}}, each array in the file's dtype
    metadata: dict[str, str]  # of the file's header
    format: str  # one of FORMATS
    notes: tuple[str, ...]  # what was found: a line each


# Reading


def open_adapter(path: str | os.PathLike, spec: ModelSpec) -> OpenedAdapter:
    """An adapter for this model: a .safetensors file or one of torch.save, or a folder that holds one.

    Raises FileNotFoundError, and CheckpointError in one line that names what is not of this model, with what the file
    looks like; a layer whose arrays are incomplete or of other shapes; numbers that are not finite; an algorithm that
    is not read (IA3, GLoRA, OFT, BOFT).
    """
    path = _file_in(Path(path))
    contents, where = open_any(path), str(path)
    format = detect_format(contents.tensors, where)
    found, modules, problems = {}, {}, []
    for name, (layer, module, what) in _places(contents, spec, format, where).items():
        entry = found.setdefault(layer, {})
        if what in entry:
            problems.append(f"{shown(name)} says again what another tensor says")
        modules[layer] = module
        entry[what] = _read(contents.tensors[name], what, layer, format, f"{where}: {shown(name)}")
    for layer, entry in found.items():
        problems += [f"{modules[layer]}: {problem}" for problem in adapter_entries.problems(entry, layer)]
    if problems:
        raise CheckpointError(f"{where}: {_mismatch(contents, spec)}does not fit the model: {listing(problems)}")
    settings = _settings(path, contents) if format == "diffusers" else None
    layers: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for part in ("unet", *spec.text_encoders):
        for layer, entry in found.items():
            if layer.part == part:
                entry = _with_alpha(entry, layer, modules[layer], settings, where)
                layers.setdefault(part, {})[layer.path] = entry
    return OpenedAdapter(layers, contents.metadata, format, (_note(layers, format),))


def _places(contents: Contents, spec: ModelSpec, format: str, where: str) -> dict[str, tuple[Layer, str, str]]:
    """{name of a tensor: (its layer, that layer's name in the file, what it is in an entry)}, of all of them."""
    names, split = _KEYS[format].read_names(spec), _KEYS[format].split
    places, unknown = {}, []
    for name in contents.tensors:
        module, what = split(name) or (None, None)
        if module in names:
            places[name] = (names[module], module, what)
        else:
            unknown.append(shown(name))
    if unknown:
        what = f"{len(unknown)} of its {len(contents.tensors)} tensors have no place in the model"
        raise CheckpointError(f"{where}: {_mismatch(contents, spec)}{what}: {listing(unknown)}")
    return places


def detect_format(tensors: Mapping[str, Tensor], where: str) -> str:
    """ "kohya" or "diffusers", by the names of tensors. Raises CheckpointError where they are those of no adapter."""
    for fragment, algorithm in _NOT_READ.items():
        name = next((name for name in tensors if fragment in name), None)
        if name is not None:
            raise CheckpointError(
                f"{where}: an adapter by {algorithm} ({shown(name)}), which is not read: LoRA, LoCon, LoHa, LoKr, DoRA "
                "and whole differences are"
            )
    if any(name.startswith(keys_kohya.MARKS) for name in tensors):
        return "kohya"
    if any(keys_peft.split(name) for name in tensors):
        return "diffusers"
    looks = detect.describe(tensors)
    raise CheckpointError(
        f"{where}: no adapter of the LoRA family by kohya's or diffusers' names: it looks like {looks}"
    )


_NOT_READ = {  # what is in the names of their tensors
    ".on_input": "IA3",
    ".ia3_l": "IA3",
    ".a1.weight": "GLoRA",
    ".a2.weight": "GLoRA",
    ".boft_": "BOFT",
    ".oft_": "OFT or BOFT",
}


def _file_in(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = next((path / name for name in IN_FOLDERS if (path / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{path}: no adapter in it ({', '.join(IN_FOLDERS[:3])}): give the file itself")
    return found


def _read(tensor: Tensor, what: str, layer: Layer, format: str, where: str) -> np.ndarray:
    array = tensor.read()
    if what == "alpha" and array.size == 1:
        array = array.reshape(())
        array = array if is_float(array.dtype) else array.astype(np.float32)  # LyCORIS has whole ones
    if not is_float(array.dtype):
        raise CheckpointError(f"{where} is of {array.dtype}, and an adapter is of floats")
    if not all_finite(array):
        raise CheckpointError(f"{where} has numbers that are not finite: the file is damaged, or its training failed")
    return _like(keys_peft.from_peft(what, array) if format == "diffusers" else array, what, layer)


def _like(array: np.ndarray, what: str, layer: Layer) -> np.ndarray:
    """A linear's array that is written as a 1x1 convolution's, or the reverse -> as the layer is."""
    if what in ("lora_down", "lora_up", "lokr_w2", "diff", "dora_scale"):
        if array.ndim == 4 and len(layer.shape) == 2 and array.shape[2:] == (1, 1):
            return array.reshape(array.shape[:2])
        if array.ndim == 2 and len(layer.shape) == 4:
            return array.reshape(*array.shape, 1, 1)
    return array


def _settings(path: Path, contents: Contents) -> dict[str, Any]:
    """PEFT's config: in the header, or in the file beside."""
    settings, beside = keys_peft.settings_in(contents.metadata, str(path)), path.parent / _PEFT_CONFIG
    if not settings and path.name.startswith("adapter_model.") and beside.is_file():
        settings = read_json(beside)
        if settings.get("peft_type") != "LORA":
            kind = shown(repr(settings.get("peft_type")))
            raise CheckpointError(f"{beside}: an adapter by {kind} of PEFT, of which only LORA is read")
    return settings


def _with_alpha(
    entry: dict[str, np.ndarray],
    layer: Layer,
    module: str,
    settings: dict[str, Any] | None,  # PEFT's; None: kohya's file, where a missing alpha, or 0, is the rank
    where: str,
) -> dict[str, np.ndarray]:
    if adapter_entries.algorithm(entry) is None or float(entry.get("alpha", 0)) != 0:
        return entry
    rank = rank_of(entry) or 1
    alpha = rank if settings is None else keys_peft.alpha_of(layer, module, rank, settings, where)
    return {**entry, "alpha": np.asarray(alpha, np.float32)}


_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl_refiner"}  # of what cross-attention reads
_SAID = {"sdxl_base": "sdxl", "sd_v2": "sd2", "sd_v1": "sd1"}  # how ss_base_model_version begins


def _mismatch(contents: Contents, spec: ModelSpec) -> str:
    """For a message: which family's model an adapter looks to be for, where that is not this one's."""
    model = keys_compvis.TITLES[keys_compvis.kind_of(spec)]
    looks = _looks_like(contents)
    return "" if looks in (None, model) else f"it is an adapter for {looks}, and the model is {model}: "


def _looks_like(contents: Contents) -> str | None:
    names = list(contents.tensors)
    if any("double_blocks" in name or "single_" in name or name.startswith("transformer.") for name in names):
        return "Flux or Stable Diffusion 3"
    if any(name.startswith(("lora_te2_", "text_encoder_2.", "lora_unet_input_blocks")) for name in names):
        return keys_compvis.TITLES["sdxl"]
    for name, tensor in contents.tensors.items():
        reads_text = "attn2" in name and "to_k" in name and any(end in name for end in ("lora_A", "down.weight"))
        if reads_text and tensor.ndim > 1 and tensor.shape[1] in _WIDTHS:
            return keys_compvis.TITLES[_WIDTHS[tensor.shape[1]]]
    said = contents.metadata.get("ss_base_model_version", "")
    return next((keys_compvis.TITLES[kind] for start, kind in _SAID.items() if said.startswith(start)), None)


def _note(layers: Layers, format: str) -> str:
    counts = [f"{len(entries)} of the {layout.NAMES[part]}" for part, entries in layers.items()]
    kinds = Counter(adapter_entries.title(entry) for entries in layers.values() for entry in entries.values())
    return f"{' and '.join(kinds)} by the names of {format}; layers: {', '.join(counts)}"


# Writing


def save_adapter(
    path: str | os.PathLike,
    layers: Layers,  # NumPy or JAX arrays
    spec: ModelSpec,
    format: str = "kohya",  # one of FORMATS
    metadata: Mapping[str, str] | None = None,  # for the header; what the tensors say themselves is not taken from it
    dtype: Any = None,  # of floats but alpha: "float32", "float16", "bfloat16"; None = as they are
    overwrite: bool = False,  # True: replace a file at `path`, once the new one is complete
) -> None:
    """Writes an adapter of this model as *.safetensors, whole or not at all.

    Raises FileExistsError where something is at `path`, CheckpointError for what does not fit the model or has no names
    in the format (diffusers' are for LoRA and DoRA alone), ValueError for an unknown format or another ending.
    """
    path, dtype, where = Path(path), dtype_of(dtype), f"cannot write {path}"
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not one of {', '.join(FORMATS)}")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a file of an adapter is called *.safetensors")
    named = _named(layers, spec, format, where)
    try:
        tensors = _tensors(named, format, dtype)
        told = _told(named, spec, format)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    stale = (keys_peft.METADATA, "sshs_model_hash", "sshs_legacy_hash")
    given = {name: text for name, text in (metadata or {}).items() if name not in stale}
    header = {**save_single_file.modelspec(spec, path.stem), **given, **told}
    with aside(path, overwrite) as work:
        write(work, tensors, header)
        digest = _digest(work)
        write(work, tensors, {**header, "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"})


def _named(layers: Layers, spec: ModelSpec, format: str, where: str) -> dict[str, Entry]:
    """{the file's name of a layer: its entry in NumPy}, of all of them."""
    known = {(layer.part, layer.path): (name, layer) for name, layer in _KEYS[format].names(spec).items()}
    named, problems = {}, []
    for part, entries in layers.items():
        for path, entry in entries.items():
            if (part, path) not in known:
                problems.append(f"{part}/{path} is no layer of the model")
                continue
            name, layer = known[part, path]
            named[name] = {what: np.asarray(array) for what, array in entry.items()}
            found = adapter_entries.problems(named[name], layer)
            if adapter_entries.algorithm(entry) is not None and "alpha" not in entry:
                found.append("alpha is missing")
            problems += [f"{part}/{path}: {problem}" for problem in found]
    if problems or not named:
        raise CheckpointError(f"{where}: {listing(problems or ['an adapter of no layers'])}")
    return named


def _tensors(named: Mapping[str, Entry], format: str, dtype: np.dtype | None) -> dict[str, Tensor]:
    tensors = {}
    for module, entry in named.items():
        if format == "diffusers":
            tensors |= keys_peft.to_peft(module, entry)
        else:
            tensors |= {keys_kohya.joined(module, what): array for what, array in entry.items()}
    return {
        name: lazy(array) if name.endswith(".alpha") else lazy(array).cast(dtype, name)
        for name, array in tensors.items()
    }


def _told(named: Mapping[str, Entry], spec: ModelSpec, format: str) -> dict[str, str]:
    """What the header says of the tensors and their model."""
    kind = keys_compvis.kind_of(spec)
    told = {"modelspec.architecture": f"{save_single_file.architecture(spec)}/lora"}
    if format == "diffusers" or not kind.startswith("sdxl"):
        told["modelspec.implementation"] = "diffusers"
    if format == "diffusers":
        parts: dict[str, dict[str, Entry]] = {}
        for name, entry in named.items():
            parts.setdefault(name.partition(".")[0], {})[name] = entry
        settings = {k: v for part, there in parts.items() for k, v in keys_peft.settings_of(part, there).items()}
        return {**told, keys_peft.METADATA: json.dumps(settings, sort_keys=True)}
    return told | _ss_network(named) | _ss_base(spec)


def _ss_network(named: Mapping[str, Entry]) -> dict[str, str]:
    """As kohya's and LyCORIS's training writes it; "Dynamic", as their tools do, where layers differ."""
    kinds = {adapter_entries.algorithm(entry) for entry in named.values()}
    plain = all(is_low_rank(entry) for entry in named.values())
    told = {"ss_network_module": "networks.lora" if plain else "lycoris.kohya"}
    if not plain:
        algorithms = {"lora": "lora", "hada": "loha", "lokr": "lokr", None: "full"}
        arguments = {"algo": ", ".join(sorted(algorithms[kind] for kind in kinds))}
        if any("dora_scale" in entry for entry in named.values()):
            arguments["dora_wd"] = "True"
        told["ss_network_args"] = json.dumps(arguments)
    ranks = {rank_of(entry) for entry in named.values()} - {None}
    alphas = {float(entry["alpha"]) for entry in named.values() if "alpha" in entry}
    for name, values in (("ss_network_dim", ranks), ("ss_network_alpha", alphas)):
        if values:
            told[name] = str(values.pop()) if len(values) == 1 else "Dynamic"
    return told


def _ss_base(spec: ModelSpec) -> dict[str, str]:
    versions = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
    kind = keys_compvis.kind_of(spec)
    if kind not in versions:
        return {}
    predicts_v = kind != "sdxl" and spec.noise_schedule.prediction_type == "v_prediction"
    return {"ss_base_model_version": versions[kind] + "_v" * predicts_v}


def _digest(file: Path) -> str:
    """Of a safetensors file, all behind its header."""
    with file.open("rb") as opened:
        opened.seek(8 + int.from_bytes(opened.read(8), "little"))
        return hashlib.file_digest(opened, "sha256").hexdigest()


# The command


def extract(
    base: str | os.PathLike,
    tuned: str | os.PathLike,
    rank: int,
    conv_rank: int | None = None,  # of convolutions larger than 1x1; None = they are left out
    weights: str = "ema",  # of both, where they have averages
) -> tuple[Layers, ModelSpec]:
    """What `tuned` learned beyond `base`, as a LoRA: of each layer that differs, its best approximation of this rank.

    Biases and norms are left out. The checkpoints are read layer by layer. Raises as `open_checkpoint` does,
    CheckpointError where the two are of different architectures, and ValueError where they are alike.
    """
    first, second = open_checkpoint(base, weights), open_checkpoint(tuned, weights)
    if keys_peft.names(first.spec) != keys_peft.names(second.spec):
        raise CheckpointError(f"{tuned} is of another architecture than {base}: a LoRA is what two of one differ by")
    parts = [part for part in ("unet", *first.spec.text_encoders) if part in first.params and part in second.params]
    ours, theirs = ({part: _Weights(opened.params[part]) for part in parts} for opened in (first, second))
    return algebra.extract(ours, theirs, rank, conv_rank), first.spec


class _Weights(Mapping[str, np.ndarray]):
    """{path: weight in torch's layout} of linears and convolutions, each read when it is asked for."""

    def __init__(self, params: Params):
        flat = traverse_util.flatten_dict(params, sep="/")
        self._kernels = {name.removesuffix("/kernel"): t for name, t in flat.items() if name.endswith("/kernel")}

    def __getitem__(self, path: str) -> np.ndarray:
        return to_torch(np.asarray(self._kernels[path]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._kernels)

    def __len__(self) -> int:
        return len(self._kernels)


def resize(
    adapter: str | os.PathLike,
    base: str | os.PathLike,  # a checkpoint of the model that it is for
    rank: int | None = None,  # at most this
    share: float | None = None,  # or the least that keeps this share of the squared singular values' sum
) -> tuple[Layers, ModelSpec]:
    """An adapter with LoRAs of a lower rank. Raises as `open_adapter` and `algebra.resize` do."""
    spec = open_checkpoint(base).spec
    return algebra.resize(open_adapter(adapter, spec).layers, keys_peft.shapes_of(spec), rank, share), spec


def merge(
    adapters: Sequence[tuple[str | os.PathLike, float]],  # files and their strengths
    base: str | os.PathLike,
    rank: int | None = None,  # None = the sum of their ranks, which loses nothing
) -> tuple[Layers, ModelSpec]:
    """One adapter that does what these do together. Raises as `open_adapter` does."""
    spec = open_checkpoint(base).spec
    sources = [(open_adapter(path, spec).layers, strength) for path, strength in adapters]
    return algebra.merge(sources, keys_peft.shapes_of(spec), rank), spec


def _with_strength(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH."""
    path, _, strength = text.rpartition(":")
    try:
        return (path, float(strength)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sd_jax.checkpoints.adapters", description="Makes LoRAs of checkpoints and of other LoRAs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("extract", help="what one checkpoint learned beyond another, as a LoRA")
    command.add_argument("--base", required=True, help="a checkpoint: a workdir, a diffusers folder or a single file")
    command.add_argument("--tuned", required=True, help="one of the same architecture, trained on from it")
    command.add_argument("--rank", type=int, required=True, help="of linears and 1x1 convolutions")
    command.add_argument("--conv_rank", type=int, help="of larger convolutions; default: they are left out")
    command.add_argument("--weights", default="ema", help="averages, or raw: the last step's; of both")
    command = commands.add_parser("resize", help="a LoRA of a lower rank")
    command.add_argument("--adapter", required=True, metavar="FILE", help="of the LoRA family")
    either = command.add_mutually_exclusive_group(required=True)
    either.add_argument("--rank", type=int, help="at most")
    either.add_argument("--share", type=float, help="of the squared singular values to keep, such as 0.95")
    command = commands.add_parser("merge", help="one LoRA that does what several do together")
    command.add_argument(
        "--adapter",
        action="append",
        required=True,
        type=_with_strength,
        dest="adapters",
        metavar="FILE[:STRENGTH]",
        help="of the LoRA family; once for each; default strength: 1",
    )
    command.add_argument("--rank", type=int, help="default: the sum of their ranks, which loses nothing")
    for name, command in commands.choices.items():
        if name != "extract":
            command.add_argument("--base", required=True, help="a checkpoint of the model that it is for")
        command.add_argument("--out", required=True, metavar="FILE", help="what to write: *.safetensors")
        command.add_argument("--format", choices=FORMATS, default="kohya", help="whose names; default: kohya")
        command.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: as computed")
        command.add_argument("--overwrite", action="store_true", help="replace a file at --out, once the new is whole")
    options = vars(parser.parse_args(argv))
    make = {"extract": extract, "resize": resize, "merge": merge}[options.pop("command")]
    target = options.pop("out")
    saving = {name: options.pop(name) for name in ("format", "dtype", "overwrite")}
    started = time.perf_counter()
    try:
        layers, spec = make(**options)
        save_adapter(target, layers, spec, **saving)
    except (ValueError, OSError) as error:  # CheckpointError and FileNotFoundError among them
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{_note(layers, saving['format'])} -> {target} in {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
