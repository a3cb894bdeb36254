"""The upscalers of ESRGAN and its successors: four layouts of names <-> our parameters, by one table each, both ways.

    esrgan       model.0, model.1.sub.N.RDB1.conv1.0, model.1.sub.BLOCKS, model.3, ...
                 ESRGAN's first files, and most of the community's. Layers of one list, activations and enlargements
                 counted: behind the trunk a convolution at every third number, one for each doubling, and two more
    bsrgan       conv_first, RRDB_trunk.N.RDB1.conv1, trunk_conv, upconv1, ..., HRconv, conv_last
    real_esrgan  conv_first, body.N.rdb1.conv1, conv_body, conv_up1, ..., conv_hr, conv_last
    compact      body.0, body.1 (the PReLU of it), body.2, ...; Real-ESRGAN's SRVGGNetCompact

What a network is, its tensors say: how many blocks and doublings there are, how wide they are, and how many channels
the first one reads: 3, or 12 or 48 where squares of 2 or 4 pixels become channels. Sources: xinntao/ESRGAN
(RRDBNet_arch.py, old and new), XPixelGroup/BasicSR (rrdbnet_arch.py, srvgg_arch.py).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from sd_jax.checkpoints.errors import CheckpointError, shown
from sd_jax.checkpoints.layout import check_shapes
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.models.presets import RRDBConfig, SRVGGConfig, UpscalerConfig
from sd_jax.models.rrdb import DENSE_BLOCKS, DENSE_CONVOLUTIONS


class _Names(NamedTuple):
    """Of an RRDBNet's convolutions; `n` counts blocks, `i` and `k` what is in them, `stage` doublings from 1 on."""

    first: str
    dense: str
    trunk: str
    up: str
    hr: str
    last: str


_RRDB = {
    "esrgan": _Names(
        first="model.0",
        dense="model.1.sub.{n}.RDB{i}.conv{k}.0",
        trunk="model.1.sub.{blocks}",
        up="model.{up}",
        hr="model.{hr}",
        last="model.{last}",
    ),
    "bsrgan": _Names(
        "conv_first", "RRDB_trunk.{n}.RDB{i}.conv{k}", "trunk_conv", "upconv{stage}", "HRconv", "conv_last"
    ),
    "real_esrgan": _Names(
        "conv_first", "body.{n}.rdb{i}.conv{k}", "conv_body", "conv_up{stage}", "conv_hr", "conv_last"
    ),
}
_OURS = _Names("conv_first", "body_{n}/rdb{i}/conv{k}", "conv_body", "conv_up{stage}", "conv_hr", "conv_last")
LAYOUTS = (*_RRDB, "compact")

_UNSHUFFLE = {3: 1, 12: 2, 48: 4}  # channels that the first convolution reads -> pixels a side

_Table = dict[str, tuple[str, tuple[int, ...]]]  # {their tensor: (our parameter, their shape)}


def from_theirs(tensors: Mapping[str, Tensor], where: str) -> tuple[UpscalerConfig, str, dict[str, Tensor]]:
    """-> the config, which of LAYOUTS it is, and the tensors by our names ("a/b/kernel"), in our layout.

    Raises CheckpointError for what is none of these, and listing what is missing, unexpected or of another shape.
    """
    layout = _layout_of(tensors, where)
    try:
        config = (_compact_config if layout == "compact" else _rrdb_config)(tensors, layout)
    except (ValueError, LookupError) as error:
        raise CheckpointError(f"{where}: an upscaler of the layout {layout!r}, damaged or unknown: {error}") from error
    table = _table(config, layout)
    check_shapes({name: shape for name, (_, shape) in table.items()}, tensors, "the upscaler of its config", where)
    return config, layout, {ours: _turned(tensors[name], 2, 3, 1, 0) for name, (ours, _) in table.items()}


def to_theirs(tensors: Mapping[str, Tensor], config: UpscalerConfig, layout: str, where: str) -> dict[str, Tensor]:
    """The inverse, as strict. Raises ValueError for a layout that the network has not."""
    there = layouts_of(config)
    if layout not in there:
        raise ValueError(f"layout={layout!r}: a network of this kind has {' or '.join(there)}")
    table = _table(config, layout)
    names = {ours: name for name, (ours, _) in table.items()}
    theirs = {names.get(ours, ours): _turned(tensor, 3, 2, 0, 1) for ours, tensor in tensors.items()}
    check_shapes({name: shape for name, (_, shape) in table.items()}, theirs, "the upscaler of its config", where)
    return {name: theirs[name] for name in table}


def layouts_of(config: UpscalerConfig) -> tuple[str, ...]:
    """That its files can have."""
    return ("compact",) if isinstance(config, SRVGGConfig) else tuple(_RRDB)


# What a file is


def _layout_of(tensors: Mapping[str, Tensor], where: str) -> str:
    for layout, names in _RRDB.items():
        if f"{names.dense.format(n=0, i=1, k=1)}.weight" in tensors:
            return layout
    if "body.0.weight" in tensors:
        return "compact"
    found = ", ".join(shown(name) for name in list(tensors)[:5])
    raise CheckpointError(f"{where}: no upscaler of ESRGAN's or Real-ESRGAN's, its tensors are {found or 'none'}")


def _rrdb_config(tensors: Mapping[str, Tensor], layout: str) -> RRDBConfig:
    names = _RRDB[layout]
    first = _kernel(tensors, names.first)
    if first.shape[1] not in _UNSHUFFLE:
        raise ValueError(f"it reads {first.shape[1]} channels, and 3, 12 or 48 are known: pictures are RGB")
    unshuffle = _UNSHUFFLE[first.shape[1]]
    blocks = _count(tensors, names.dense.format(n="{n}", i=1, k=1))
    # Of the first layout's list all are counted: the first, the doublings, and the last two
    stages = _count(tensors, "model.{n}") - 3 if layout == "esrgan" else _count(tensors, names.up.format(stage="{n}"))
    growth = _kernel(tensors, names.dense.format(n=0, i=1, k=1)).shape[0]
    return RRDBConfig(2 ** max(stages, 0) // unshuffle, unshuffle, first.shape[0], blocks, growth)


def _compact_config(tensors: Mapping[str, Tensor], _: str) -> SRVGGConfig:
    layers = _count(tensors, "body.{n}")  # convolutions, and a PReLU behind each but the last
    last = _kernel(tensors, f"body.{layers - 1}").shape[0]
    scale = math.isqrt(last // 3)
    if last != 3 * scale**2:
        raise ValueError(f"its last convolution makes {last} channels, which are no squares of RGB pixels")
    return SRVGGConfig(scale, _kernel(tensors, "body.0").shape[0], (layers - 3) // 2)


def _count(tensors: Mapping[str, Tensor], template: str) -> int:
    """How many modules are called so, with a number in place of {n}."""
    begin, end = f"{template}.weight".split("{n}")
    return sum(
        name.startswith(begin) and name.endswith(end) and name[len(begin) : -len(end)].isdecimal() for name in tensors
    )


def _kernel(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    name = f"{module}.weight"
    if name not in tensors or tensors[name].ndim != 4:
        raise LookupError(f"{name} is {'no convolution' if name in tensors else 'missing'}")
    return tensors[name]


# What it must hold


def _table(config: UpscalerConfig, layout: str) -> _Table:
    return _compact_table(config) if isinstance(config, SRVGGConfig) else _rrdb_table(config, _RRDB[layout])


def _rrdb_table(config: RRDBConfig, names: _Names) -> _Table:
    width, growth, stages = config.features, config.growth, config.stages
    numbers = {"blocks": config.blocks, "hr": 3 * stages + 2, "last": 3 * stages + 4}
    table: _Table = {}

    def add(part: str, width_in: int, width_out: int, **at: int) -> None:
        ours, theirs = (getattr(kind, part).format(**at, **numbers) for kind in (_OURS, names))
        table.update(_convolution(ours, theirs, width_in, width_out))

    add("first", 3 * config.unshuffle**2, width)
    for n in range(config.blocks):
        for i in range(1, DENSE_BLOCKS + 1):
            for k in range(1, DENSE_CONVOLUTIONS + 1):
                made = width if k == DENSE_CONVOLUTIONS else growth
                add("dense", width + (k - 1) * growth, made, n=n, i=i, k=k)
    add("trunk", width, width)
    for stage in range(1, stages + 1):
        add("up", width, width, stage=stage, up=3 * stage)
    add("hr", width, width)
    add("last", width, 3)
    return table


def _compact_table(config: SRVGGConfig) -> _Table:
    width, table, last = config.features, {}, 2 * config.convolutions + 2
    for i in range(0, last, 2):
        table |= _convolution(f"body_{i}", f"body.{i}", width if i else 3, width)
        table[f"body.{i + 1}.weight"] = (f"body_{i + 1}/slope", (width,))
    return table | _convolution(f"body_{last}", f"body.{last}", width, 3 * config.scale**2)


def _convolution(ours: str, theirs: str, width_in: int, width_out: int) -> _Table:
    return {
        f"{theirs}.weight": (f"{ours}/kernel", (width_out, width_in, 3, 3)),
        f"{theirs}.bias": (f"{ours}/bias", (width_out,)),
    }


def _turned(tensor: Tensor, *axes: int) -> Tensor:
    """A kernel with its axes so; others as they are."""
    return tensor.transpose(*axes) if tensor.ndim == 4 else tensor
