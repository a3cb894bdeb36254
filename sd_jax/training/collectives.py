"""What a compiled program sends between devices, read from its HLO text.

A device that takes part in a collective over n devices sends, with an algorithm that wastes nothing (B: bytes of the
whole result of a gather, of the input otherwise):

    all-gather, reduce-scatter, all-to-all   B (n - 1) / n                                                     (Eq. 1)
    all-reduce                             2 B (n - 1) / n                                                     (Eq. 2)
    collective-permute                       B
"""

import math
import re
from collections.abc import Mapping

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s4": 4, "u4": 4, "c64": 64}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(rf"^\s+(?:ROOT )?%?[\w.\-]+ = (.+?) (while|{'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?(%?[\w.\-%, ]+)")
_SHAPE = re.compile(r"\b([a-z]+\d*)(?:e\d+m\d+\w*)?\[([\d,]*)\]")


def sent_bytes(
    hlo: str,
    axes: Mapping[str, int],  # of the mesh that the program was compiled for, in their order
    scaled: Mapping[str, float | int] | None = None,  # axes -> times as many devices, on a larger mesh
) -> dict[str, float]:
    """Bytes that one device sends in one run of the program, by kind of collective.

    What a loop does counts as often as it runs where its count is a constant, else once.
    """
    programs, entry = _computations(hlo)
    totals: dict[str, float] = {}

    def add(name: str, times: float) -> None:
        for line in programs.get(name, ()):
            found = _OPERATION.match(line)
            if found and found[2] == "while":
                body, condition = (re.search(rf"{part}=%?([\w.\-]+)", line)[1] for part in ("body", "condition"))
                add(body, times * _trips(line, programs.get(condition, [])))
                continue
            if found:
                # On a TPU a fusion of this name reduces and keeps a part
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else found[2]
                share = _bytes(kind, found[2], found[1], bool(found[3]), _group(line, axes, scaled or {}))
                totals[kind] = totals.get(kind, 0.0) + times * share
            for names in _CALLED.findall(line):
                for called in re.findall(r"[\w.\-]+", names):
                    add(called, times)

    add(entry, 1.0)
    return totals


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    programs: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in hlo.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            lines = programs.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return programs, entry


def _trips(line: str, condition: list[str]) -> int:
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    bounds = [int(found[1]) for found in re.finditer(r"= s32\[\]\S* constant\((\d+)\)", "\n".join(condition))]
    return max(bounds, default=1)


def _bytes(kind: str, operation: str, result: str, started: bool, devices: float) -> float:
    sizes = [_size(*shape) for shape in _SHAPE.findall(result)]
    if started and operation in ("all-gather", "collective-permute"):
        sizes = sizes[1:2]  # (operand, result, ...)
    size = sum(sizes)
    if operation == "collective-permute":
        return size
    if operation == "reduce-scatter":
        size *= devices  # the result is a part
    return size * (2 if kind == "all-reduce" else 1) * (devices - 1) / devices


def _size(dtype: str, dims: str) -> float:
    bits = BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)  # s32, u8, f8
    return bits / 8 * math.prod(int(dim) for dim in dims.split(",") if dim)


def _group(line: str, axes: Mapping[str, int], scaled: Mapping[str, float | int]) -> float:
    """How many devices take part together, on the larger mesh where there is one."""
    members = _members(line, math.prod(axes.values()))
    places = np.unravel_index(members, tuple(axes.values()))
    extent = [len(np.unique(place)) for place in places]
    return float(len(members)) * math.prod(scaled.get(axis, 1) for axis, n in zip(axes, extent, strict=True) if n > 1)


def _members(line: str, devices: int) -> np.ndarray:
    """One of the groups. Three ways to write them; where there is none all devices take part."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return np.array([int(i) for i in listed[1].split(",")])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\)\S*)?)\))? \{([^}]*)\}", line)
    if named:
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = _iota(named[2], devices).reshape(tuple(sizes.values()))
        over = re.findall(r"'(\w+)'", named[3])
        first = tuple(slice(None) if axis in over else 0 for axis in sizes)
        return ids[first].reshape(-1)
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line)
    if counted:
        return _iota(counted[2], devices).reshape([int(n) for n in counted[1].split(",")])[0]
    return np.arange(devices)


def _iota(text: str | None, devices: int) -> np.ndarray:
    """`[4,2]T(1,0)`: 0, 1, ... in that shape, then transposed; flat."""
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text or "")
    if not found:
        return np.arange(devices)
    shape = [int(n) for n in found[1].split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose([int(n) for n in found[2].split(",")]) if found[2] else ids).reshape(-1)
