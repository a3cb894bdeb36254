"""What to change in a config whose step does not fit into a device's memory, estimated from what the step holds.

Of the temporaries some do not depend on the batch (whole parameters and gradients); the rest are taken to grow as the
images that a device sees at once.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

LIGHTER = "blocks"  # the name in models/remat.py that keeps least
LIGHTER_KEEPS = 0.4  # of what "none" keeps for the backward pass; models/remat.py measured 0.23, this is cautious
SPLIT = ("trained parameters", "frozen parts", "averages", "optimiser", "layouts")  # what `fsdp` splits


class Way(NamedTuple):
    change: str
    memory: float  # bytes a device then holds


def ways_to_fit(
    config: ConfigDict,
    mesh: Mesh | AbstractMesh,  # of the whole run
    memory: Mapping[str, float],  # bytes of one device, by kind
    usable: float,  # bytes of one device
    gathered: float,  # bytes of the temporaries that do not depend on the batch
) -> list[Way]:
    """Single changes that suffice, those that leave the recipe alone first; where none does, all of them together."""
    shape = mesh.shape
    shards = mesh.size // shape["tensor"]
    micro = config.batch_size // shards // config.grad_accumulation
    temporaries = memory["temporaries"]
    fixed = min(gathered, temporaries)
    others = sum(size for kind, size in memory.items() if kind not in ("batch", "temporaries", *SPLIT))

    def held(images: int = micro, fsdp: int = shape["fsdp"], remat: str = config.remat, fewer: float = 1.0) -> float:
        state = sum(memory.get(kind, 0.0) for kind in SPLIT) * shape["fsdp"] / fsdp
        keeps = LIGHTER_KEEPS if remat != config.remat else 1.0
        return others + fewer * memory["batch"] + state + fixed + (temporaries - fixed) * keeps * images / micro

    def wider() -> list[int]:
        room = mesh.size // shape["slice"] // shape["tensor"]
        return [n for n in range(shape["fsdp"] + 1, room + 1) if room % n == 0]

    def divisors() -> list[int]:
        return [n for n in range(micro - 1, 0, -1) if micro % n == 0]

    fsdp = [(f"config.mesh.fsdp={n}", {"fsdp": n}) for n in wider()]
    remat = [(f"config.remat={LIGHTER!r}", {"remat": LIGHTER})] if config.remat == "none" else []
    parts = [(f"config.grad_accumulation={config.grad_accumulation * micro // n}", {"images": n}) for n in divisors()]
    smaller = [
        (f"config.batch_size={n * shards * config.grad_accumulation}", {"images": n, "fewer": n / micro})
        for n in range(micro - 1, 0, -1)
    ]
    found = []
    for choices in (fsdp, remat, parts, smaller):
        ways = (Way(change, held(**changed)) for change, changed in choices)
        found += itertools.islice((way for way in ways if way.memory <= usable), 1)
    if found:
        return found
    together = fsdp[-1:] + remat + parts[-1:]
    changed = {key: value for _, changes in together for key, value in changes.items()}
    if not changed or held(**changed) > usable:
        return []
    return [Way(" ".join(f"--{change}" for change, _ in together), held(**changed))]
