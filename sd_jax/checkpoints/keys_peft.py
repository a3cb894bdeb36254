"""Names of the LoRA family's tensors as diffusers and PEFT have them <-> our layers, and where they keep the scales.

    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight                 lora_down
    text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight       lora_down
    ....lora_B.weight, ....lora_linear_layer.up.weight                                            lora_up
    ....lora_magnitude_vector.weight (out,), of convolutions (1, out, 1, 1)                       dora_scale

A text encoder's names are those of diffusers' own training: it opens no file in which they are all PEFT's (lora_A).

The scale of a layer, alpha / r (with rsLoRA alpha / sqrt(r)), is not in the tensors: PEFT's config says it. diffusers
puts it into the header of a file (`lora_adapter_metadata`, JSON of "unet.lora_alpha" and so on), PEFT itself into the
adapter_config.json beside it. Where neither is, alpha is r.

Read besides, never written: either naming in any network, names with the adapter's own in them
(`lora_A.default.weight`), `lora_magnitude_vector` alone, PEFT's `base_model.model.`, names without a part in front (of
one network's file), text encoders without the `text_model.` level, and what diffusers wrote before
(`to_q.lora.down.weight`, `processor.to_q_lora.down.weight`).

Sources: diffusers `loaders/{lora_base,peft}.py`, `utils/{state_dict_utils,peft_utils}.py`; PEFT `tuners/lora/{layer,
dora,config}.py`, `utils/other.py` (`get_pattern_key`).
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sd_jax.checkpoints import keys_diffusers, layout
from sd_jax.checkpoints.errors import CheckpointError, shown
from sd_jax.models.presets import ModelSpec

METADATA = "lora_adapter_metadata"
_MOST_PATTERNS = 10_000  # SDXL has a thousand layers
_LARGEST = 1e30  # of alphas
_TEXT = "text_model."  # a level that text encoders have, or have not, by the version of transformers


class Layer(NamedTuple):
    """A layer of a model that an adapter may change."""

    part: str  # "unet", "text_encoder" or "text_encoder_2"
    path: str  # ours: "down_blocks_0/attentions_0/proj_in"
    kind: str  # "kernel", "scale" of a norm or "embedding": what we call its weight
    shape: tuple[int, ...]  # of its weight, in torch's layout
    has_bias: bool


def names(spec: ModelSpec) -> dict[str, Layer]:
    """{"unet.down_blocks.0.attentions.0.proj_in": its layer}, of all layers of the U-Net and the text encoders."""
    table = {}
    for part in ("unet", *spec.text_encoders):
        shapes = layout.LAYOUTS[part](getattr(spec, part))
        for name, shape in shapes.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "weight":
                path, _, kind = keys_diffusers.our_name(name, len(shape)).rpartition("/")
                table[f"{part}.{module}"] = Layer(part, path, kind, shape, f"{module}.bias" in shapes)
    return table


def shapes_of(spec: ModelSpec) -> dict[str, dict[str, tuple[int, ...]]]:
    """Of every linear and convolution that an adapter may change, by part and path, as torch has them."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {part: {} for part in ("unet", *spec.text_encoders)}
    for layer in names(spec).values():
        if layer.kind == "kernel":
            shapes[layer.part][layer.path] = layer.shape
    return shapes


def read_names(spec: ModelSpec) -> dict[str, Layer]:
    """`names`, and those that are only read. Without a part in front, a text encoder's are read where there is one."""
    table = {}
    for name, layer in names(spec).items():
        bare = name.removeprefix(f"{layer.part}.")
        spellings = {bare, bare.removeprefix(_TEXT)} if layer.part != "unet" else {bare}
        table |= {f"{layer.part}.{spelling}": layer for spelling in spellings}
        if layer.part == "unet" or len(spec.text_encoders) == 1:
            table |= {spelling: layer for spelling in spellings}
    return table


# Names of tensors


_ENDS = (
    (re.compile(r"\.lora_A(\.[^.]+)?\.weight$|\.lora(_linear_layer)?\.down\.weight$"), "lora_down"),
    (re.compile(r"\.lora_B(\.[^.]+)?\.weight$|\.lora(_linear_layer)?\.up\.weight$"), "lora_up"),
    (re.compile(r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?$"), "dora_scale"),
    (re.compile(r"(?<=_lora)\.down\.weight$"), "lora_down"),
    (re.compile(r"(?<=_lora)\.up\.weight$"), "lora_up"),
)
_OLD = re.compile(r"\.(?:processor\.)?to_(q|k|v|out)_lora$")


def split(name: str) -> tuple[str, str] | None:
    """A tensor's name -> (its module's, as `read_names` has it; what it is in an entry); None for one of no LoRA."""
    for pattern, what in _ENDS:
        found = pattern.search(name)
        if found:
            return _modern(name[: found.start()]), what
    return None


def _modern(module: str) -> str:
    module = module.replace("base_model.model.", "", 1)
    old = _OLD.search(module)
    if not old:
        return module.replace(".processor.", ".")
    text, which = ".self_attn" in module, old[1]
    now = (f"{which}_proj" if text else f"to_{which}") + (".0" if which == "out" and not text else "")
    return f"{module[: old.start()]}.{now}"


def from_peft(what: str, array: np.ndarray) -> np.ndarray:
    """A tensor of theirs as an entry has it."""
    return array.reshape(-1, 1) if what == "dora_scale" else array


def to_peft(module: str, entry: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An entry of a LoRA as they have it, by the name of its module as `names` has it.

    Raises CheckpointError where they have no such thing.
    """
    foreign = sorted(entry.keys() - {"lora_down", "lora_up", "alpha", "dora_scale"})
    if foreign:
        what = ", ".join(foreign)
        raise CheckpointError(f"{module}: diffusers has no names for {what}: write it with format='kohya'")
    down, up = (
        ("lora_A", "lora_B") if module.startswith("unet.") else ("lora_linear_layer.down", "lora_linear_layer.up")
    )
    tensors = {f"{module}.{down}.weight": entry["lora_down"], f"{module}.{up}.weight": entry["lora_up"]}
    if "dora_scale" in entry:
        scale = entry["dora_scale"]
        if scale.shape[0] != entry["lora_up"].shape[0]:
            raise CheckpointError(f"{module}: diffusers has no DoRA by rows of inputs: write it with format='kohya'")
        shape = (-1,) if scale.ndim == 2 else (1, -1, 1, 1)
        tensors[f"{module}.lora_magnitude_vector.weight"] = scale.reshape(shape)
    return tensors


# Scales


def settings_in(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """What a file's header says of PEFT's configs. Raises CheckpointError where that is no table."""
    try:
        settings = json.loads(metadata.get(METADATA) or "{}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: its {METADATA} is not JSON ({shown(str(error))})") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where}: its {METADATA} is not a table of settings")
    return settings


def alpha_of(layer: Layer, module: str, rank: int, settings: Mapping[str, Any], where: str) -> float:
    """What is divided by the rank: PEFT's alpha, or with rsLoRA alpha sqrt(r), so that alpha / r is the scale.

    module: its name, with or without its part in front. Raises CheckpointError where the settings make no sense.
    """

    def setting(name: str, default: Any) -> Any:
        found = settings.get(f"{layer.part}.{name}", settings.get(name))
        return default if found is None else found

    alpha, patterns = setting("lora_alpha", rank), setting("alpha_pattern", {})
    if not isinstance(patterns, dict) or len(patterns) > _MOST_PATTERNS:
        raise CheckpointError(f"{where}: its alpha_pattern is not a table of layers")
    bare = module.removeprefix(f"{layer.part}.").removeprefix(_TEXT)
    spellings = (bare, _TEXT + bare) if layer.part != "unet" else (bare,)
    for pattern, value in patterns.items():
        if any(_matches(pattern, spelling, where) for spelling in spellings):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not -_LARGEST <= alpha <= _LARGEST:
        raise CheckpointError(f"{where}: its alpha of {module} is no number but {shown(repr(alpha))}")
    return alpha * math.sqrt(rank) if setting("use_rslora", False) else float(alpha)


def _matches(pattern: str, module: str, where: str) -> bool:
    """As PEFT: a pattern is a name, an end of one, or a regular expression of one; here one that cannot take long."""
    plain = pattern.removeprefix("^").replace("\\.", ".")
    if re.fullmatch(r"[\w.]*", plain):
        return module == plain or (not pattern.startswith("^") and module.endswith(f".{plain}"))
    try:
        if len(pattern) > 200 or re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 2:
            raise CheckpointError(f"{where}: its alpha_pattern {shown(pattern)} is not read: name the modules")
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as error:
        raise CheckpointError(f"{where}: its alpha_pattern {shown(pattern)} is no regular expression") from error


def settings_of(part: str, entries: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """The settings with which diffusers scales the layers of a part as these entries do, by their modules' names.

    Raises CheckpointError where some are DoRAs and some are not, which PEFT cannot say.
    """
    doras = {module for module, entry in entries.items() if "dora_scale" in entry}
    if doras and len(doras) < len(entries):
        raise CheckpointError(
            f"{min(entries.keys() - doras)}: no DoRA, while {min(doras)} is one: PEFT takes all or none of a network, "
            "so write it with format='kohya'"
        )
    # Names without `text_model.` fit models with and without that level
    bare = {module.removeprefix(f"{part}.").removeprefix(_TEXT): entry for module, entry in entries.items()}
    ranks = {module: entry["lora_down"].shape[0] for module, entry in bare.items()}
    alphas = {module: _number(entry["alpha"]) for module, entry in bare.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    settings = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "target_modules": sorted(bare),
        "use_dora": bool(doras),
    }
    return {f"{part}.{name}": value for name, value in settings.items()}


def _number(alpha: np.ndarray) -> int | float:
    value = float(np.asarray(alpha, np.float32))
    return int(value) if value.is_integer() else value
