"""What is known of the chips, and which of them a program is being made for.

Peaks are the makers' figures for dense bfloat16 products with float32 sums; memory is that of the data sheets.
Prices are Google's on-demand list prices for an hour of one chip in US regions, as they stood in 2025, written down
without looking them up again: whoever pays knows better, and says so (`--price`).
"""

import contextlib
import contextvars
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax

_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def backend() -> str:
    """The platform that the program being traced will run on: "cpu", "gpu" or "tpu".

    Code that has one formulation for a CPU and another for an accelerator asks this, and not `jax.default_backend()`:
    a plan compiles for a TPU on a machine whose default backend is its CPU.
    """
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def target(platform: str) -> Iterator[None]:
    """Within it `backend()` is `platform`."""
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)


def free_memory() -> int | None:
    """Bytes that the first device has left, or the machine where that is a CPU; None = unknown."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        known = "bytes_limit" in stats and "bytes_in_use" in stats
        return stats["bytes_limit"] - stats["bytes_in_use"] if known else None
    try:
        lines = pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


# Peak FLOP/s by `jax.Device.device_kind`. jax calls v5e "TPU v5 lite" and v5p "TPU v5"
_V4, _V5E, _V5P, _V6E = 275e12, 197e12, 459e12, 918e12
_A100, _H100 = 312e12, 989.4e12
PEAK_FLOPS = {
    "TPU v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": _H100,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Of one device, in FLOP/s; None for a device that is not in the table, such as a CPU."""
    return PEAK_FLOPS.get(device_kind)


class Chip(NamedTuple):
    """A chip that programs can be compiled for without having one."""

    device_kind: str
    memory: float  # bytes of high-bandwidth memory
    dollars_per_hour: float
    accelerator: str  # TPU_ACCELERATOR_TYPE without its number, which counts
    cores: int  # of each chip
    axes: int  # of its network: 2 = a torus such as 4x4, 3 = one such as 2x2x2


GIB = 2**30
CHIPS = {
    "v5e": Chip("TPU v5 lite", 16 * GIB, 1.20, "v5litepod", 1, 2),
    "v5p": Chip("TPU v5", 95 * GIB, 4.20, "v5p", 2, 3),
    "v6e": Chip("TPU v6 lite", 32 * GIB, 2.70, "v6e", 1, 2),
}
