"""The values of a config.json, read strictly: a feature in use that is not known, or a value of a wrong type, is an
error that names file and key; nothing is guessed but the library's own defaults.
"""

from collections.abc import Mapping
from typing import Any

from sd_jax.checkpoints.errors import CheckpointError

ANY = object()  # among the values that a key may have: it does not change what the network computes

# A list stands for one number per block, or per side
_LISTED = {"sample_size", "layers_per_block", "transformer_layers_per_block", "attention_head_dim"}
_LISTED |= {"cross_attention_dim", "only_cross_attention"}
_LIMITS = {"num_hidden_layers": 256, "layers_per_block": 256, "transformer_layers_per_block": 256}
_LIMITS |= {"num_encoder_blocks": 256, "num_decoder_blocks": 256, "num_train_timesteps": 1_000_000}
_MOST_BLOCKS = 16


def values_of(data: Mapping, class_name: str, read: Mapping, fixed: Mapping, where: str) -> dict[str, Any]:
    """The keys of `read`, with its defaults. Refuses values that are not in `fixed`, and unknown keys in use."""
    said = data.get("_class_name", class_name)
    if said != class_name:
        raise CheckpointError(f"{where}: _class_name={said!r} is not supported: only {class_name} is")
    for key, value in data.items():
        if key.startswith("_") or key in read:
            continue
        allowed = fixed.get(key, (None, False))
        if ANY not in allowed and value not in allowed:
            raise CheckpointError(f"{where}: {key}={value!r} is not supported: no model that is opened has it")
    return read_keys(data, read, where)


def read_keys(data: Mapping, read: Mapping, where: str) -> dict[str, Any]:
    """The keys of `read`, with its defaults (None: a number or nothing). Values must be of the default's type."""
    values = {key: default if data.get(key) is None else data[key] for key, default in read.items()}
    for key, value in values.items():
        default = read[key]
        entries = value if isinstance(value, list | tuple) else [value]
        if (entries is value) != isinstance(default, tuple) and not (entries is value and key in _LISTED):
            raise CheckpointError(f"{where}: {key}={value!r} is damaged")
        if not 1 <= len(entries) <= _MOST_BLOCKS or not all(_is_like(entry, default) for entry in entries):
            raise CheckpointError(f"{where}: {key}={value!r} is damaged")
        if key in _LIMITS and max(entries) > _LIMITS[key]:
            raise CheckpointError(f"{where}: {key}={value!r} is more than any network has")
    return values


def _is_like(value: Any, default: Any) -> bool:
    """Of the default's type; a float may be written as a whole number, and no number is negative."""
    default = default[0] if isinstance(default, tuple) else default
    if value is None or isinstance(default, bool | str):
        return default is None if value is None else type(value) is type(default)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return (whole or (isinstance(default, float) and isinstance(value, float))) and value >= 0


def blocks(values: Mapping[str, Any], key: str, kinds: Mapping[str, bool], where: str) -> tuple[bool, ...]:
    for kind in values[key]:
        if kind not in kinds:
            raise CheckpointError(f"{where}: {key} has {kind}, which is not supported: only {', '.join(kinds)}")
    return tuple(kinds[kind] for kind in values[key])


def one(values: Mapping[str, Any], key: str, where: str) -> int:
    """A number, also where it is written as a list of equal ones."""
    value = values[key]
    if not isinstance(value, list | tuple):
        return value
    if len(set(value)) != 1:
        raise CheckpointError(f"{where}: {key}={list(value)} is not supported: it must be one number for all blocks")
    return value[0]


def per_block(values: Mapping[str, Any], key: str, count: int, where: str) -> Any:
    """One value where all are equal, else a tuple with one for each block."""
    value = values[key]
    if not isinstance(value, list | tuple):
        return value
    if len(value) != count:
        raise CheckpointError(f"{where}: {key}={list(value)} has not one entry for each of {count} down blocks")
    return value[0] if len(set(value)) == 1 else tuple(value)


def divide(width: int, parts: int, key: str, where: str) -> None:
    """Raises CheckpointError unless `parts`, which is `key`, divides a width."""
    if not parts or width % parts:
        raise CheckpointError(f"{where}: {key}={parts} does not divide {width} channels")


def as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def in_order(first: Mapping[str, Any], **rest: Any) -> dict[str, Any]:
    """One dict, by name."""
    return dict(sorted({**first, **rest}.items()))
