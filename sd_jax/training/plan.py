"""A run seen before it is launched: `python train.py --config=... --plan=v5e:16x16`.

The step that training would take is compiled for chips that are not there (or for simulated devices of this machine's
CPU), and what the compiler says is held against what the chip has. Neither data nor weights are opened; where there is
no checkpoint, its family's name in models/families.py will do: `--config.init=sdxl`.

    v5e:4x4      a slice of 16 chips; v5p:2x2x2 and v6e:4x4 likewise
    v5e:16x16*2  two slices of 256, joined by the data centre's network
    cpu:8        this machine's CPU as eight devices

A slice of more than SMALL chips is not compiled itself where a smaller one tells the same: along the mesh's axes
`slice` and `data` every device does the same with its own images, so memory and arithmetic of one device are exact, and
what it sends over these axes follows from their size (`collectives.py`). With buckets the largest size is compiled.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd_jax import hardware, sharding, trees
from sd_jax.checkpoints.load import open_checkpoint
from sd_jax.data import buckets
from sd_jax.models.families import FAMILIES
from sd_jax.models.networks import Networks
from sd_jax.models.presets import ModelSpec
from sd_jax.training import advice, setup
from sd_jax.training.collectives import sent_bytes
from sd_jax.training.context import Context, EmptyPrompt
from sd_jax.training.methods import method_of
from sd_jax.training.start import with_beside

SMALL = 16
USABLE = 0.95  # of a device's memory; the rest is for batches that wait, held-out losses and what falls between
UTILISATION = 0.4  # of the peak, for the prediction; MLPerf v4.1 and others reached 0.28 (A100) to 0.45 (v5p) with SD 2
# Bytes a device that a CPU's kernels take for themselves and XLA does not tell of: 3 to 50 million were measured
CPU_KERNELS = 25e6
# Of 2 and 3 axes, as clouds offer them, by size
SLICES = {
    2: ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)),
}
# What the compiler for TPUs reads where there is none
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # else it asks Google's metadata server, and waits
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans may be made at a time: no chip is held
    "TPU_ACCELERATOR_TYPE": "",  # `prepare` knows it
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
STEP = ("temporaries", "kernels")  # what is there while a step runs
KINDS = ("trained parameters", "frozen parts", "averages", "optimiser", "batch", "layouts", *STEP, "program")


class Topology(NamedTuple):
    chip: str  # a name in hardware.CHIPS, or "cpu"
    shape: tuple[int, ...]
    slices: int = 1

    @staticmethod
    def parse(text: str) -> "Topology":
        """Raises ValueError with the forms that there are."""
        found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", text)
        chip, sizes, slices = found.groups() if found else ("", "", None)
        made = Topology(chip, tuple(int(n) for n in sizes.split("x") if n), int(slices or 1))
        axes = 1 if chip == "cpu" else hardware.CHIPS[chip].axes if chip in hardware.CHIPS else None
        if len(made.shape) != axes or made.num_devices < 1 or (chip == "cpu" and slices):
            raise ValueError(f"--plan={text}: give v5e:4x4, v6e:4x4, v5p:2x2x2, v5e:16x16*2 (slices) or cpu:8")
        return made

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape) * self.slices

    def __str__(self) -> str:
        return f"{self.chip}:{'x'.join(map(str, self.shape))}" + (f"*{self.slices}" if self.slices > 1 else "")


def plan(config: ConfigDict, topology: str, price: float | None = None) -> int:
    """Prints what the run would take on this topology. Returns 0 where it fits into the devices' memory, else 1.

    price: dollars for an hour of one chip; None = the list price. To be called before anything touches a device.
    Raises ValueError, naming the key or flag and the mend, CheckpointError where config.init alone describes the model.
    """
    wanted = Topology.parse(topology)
    prepare(wanted)
    with hardware.target("cpu" if wanted.chip == "cpu" else "tpu"):
        return _plan(config.copy_and_resolve_references(), wanted, price)


def prepare(topology: Topology) -> None:
    """Environment and settings of jax under which the topology can be compiled for; touches no device.

    Raises ValueError where the compiler for TPUs is not installed.
    """
    jax.config.update("jax_platforms", "cpu")  # no TPU is looked for
    jax.config.update("jax_enable_compilation_cache", False)  # the time that is told is that of a first start
    if topology.chip == "cpu":
        jax.config.update("jax_num_cpu_devices", topology.num_devices)
        return
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f'--plan={topology} needs the compiler for TPUs, which is not here: pip install "jax[tpu]"')
    chip = hardware.CHIPS[topology.chip]
    accelerator = f"{chip.accelerator}-{math.prod(topology.shape) * chip.cores}"
    os.environ.update(ENVIRONMENT, TPU_ACCELERATOR_TYPE=accelerator)
    # Compiles in a tenth of the time; memory is a little more than the usual effort would need
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    jax.config.update("jax_memory_fitting_effort", -1.0)


def _plan(config: ConfigDict, wanted: Topology, price: float | None) -> int:
    config.parallelism = "jit"  # 'pmap' keeps the same arrays on every device
    networks = Networks.of(_spec(config), config.dtype, config.remat)
    mesh = sharding.make_mesh(config.mesh.to_dict(), _devices(wanted))
    setup.check_batch(config, mesh)
    shard = mesh.size // mesh.shape["tensor"]  # devices over which a batch is split

    compiled_for, small_mesh = _stand_in(wanted, mesh)
    small = config.copy_and_resolve_references()
    small.batch_size = config.batch_size // shard * (small_mesh.size // small_mesh.shape["tensor"])
    sizes = buckets.make_sizes(config.data)
    size = max(sizes, key=math.prod)
    program = _compile(small, networks, small_mesh, size)

    chip = hardware.CHIPS.get(wanted.chip)
    memory = chip.memory if chip else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / wanted.num_devices
    images = config.total_steps * config.batch_size
    micro = config.batch_size // shard // config.grad_accumulation
    axes = ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "one device"

    print(f"plan of {config.method} on {wanted}: {wanted.num_devices} x {_device_name(mesh)}, mesh: {axes}")
    print(
        f"batch: {config.batch_size} images = {micro} x {shard} devices x {config.grad_accumulation} micro-batches, of "
        f"{size[0]}x{size[1]}" + (f", the largest of {len(sizes)} sizes with a program each" if len(sizes) > 1 else "")
    )
    how = "compiled" if small_mesh is mesh else f"compiled for {compiled_for} with as many images a device, and scaled"
    print(f"{how}, in {program.seconds:.0f} s" + ("" if chip is None else ", at the least effort of the compiler"))
    print(f"trained: {program.trained:,} parameters, beside {program.frozen:,} that the step reads")

    print("\nmemory of a device")
    for kind in KINDS:
        if program.memory.get(kind):
            print(f"  {kind:20}{_gb(program.memory[kind]):>12}")
    held = sum(program.memory.values())
    print(f"  {'together':20}{_gb(held):>12}  of {_gb(USABLE * memory)} ({USABLE:.0%} of {_gb(memory)})")

    if chip is None:
        added = wanted.num_devices * sum(program.memory.get(kind, 0.0) for kind in STEP)
        print(f"  {'the steps add':20}{_gb(added):>12}  on all devices to what is there before the first")

    print("\narithmetic")
    print(f"  an image            {program.flops_per_image / 1e12:12.4g} TFLOP, nothing counted twice")
    print(f"  a step              {program.flops_per_image * config.batch_size / 1e12:12.4g} TFLOP on all devices")
    if program.compiled_flops:
        print(f"  as compiled         {program.compiled_flops / 1e12:12.4g} TFLOP a device and step, each loop once")

    if program.hlo is not None and mesh.size > 1:
        copies = lambda shape: shape["slice"] * shape["data"]  # noqa: E731
        times = copies(mesh.shape) / copies(small_mesh.shape)  # what goes over `data` goes over slices too
        sent = sent_bytes(program.hlo, dict(small_mesh.shape), {"data": times})
        print("\na device sends in a step")
        for kind, num_bytes in sorted(sent.items(), key=lambda item: -item[1]):
            print(f"  {kind:20}{_gb(num_bytes):>12}")

    if chip:
        peak = hardware.peak_flops(chip.device_kind)
        rate = wanted.num_devices * peak * UTILISATION / program.flops_per_image
        days = images / rate / 86400
        hourly = chip.dollars_per_hour if price is None else price
        dollars = days * 24 * wanted.num_devices * hourly
        whose = "the list price of sd_jax/hardware.py; --price=... says another" if price is None else "--price"
        print(f"\nat {UTILISATION:.0%} of the peak of {peak / 1e12:.4g} TFLOP/s a chip")
        print(
            f"  {rate:,.1f} images/s, {rate / wanted.num_devices:.1f} a chip; {config.batch_size / rate:.3g} s a step"
        )
        print(f"  {images:,} images: {days:,.2f} days, ${dollars:,.0f} at ${hourly:.2f} a chip and hour ({whose})")

    print()
    if held <= USABLE * memory:
        print(f"fits: {_gb(held)} of {_gb(USABLE * memory)} a device")
        return 0
    ways = advice.ways_to_fit(config, mesh, program.memory, USABLE * memory, program.gathered)
    for way in ways:
        print(f"  {way.change}: about {_gb(way.memory)} a device")
    mend = f"try {ways[0].change}" if ways else "take a larger slice or chips with more memory"
    print(f"does not fit: {_gb(held)} of {_gb(USABLE * memory)} a device; {mend}")
    return 1


# Shapes and devices


def _spec(config: ConfigDict) -> ModelSpec:
    if config.model:
        return with_beside(config, ModelSpec.from_dict(config.model.to_dict()))[0]
    if not config.init:
        raise ValueError("config.model and config.init are both empty: name a checkpoint or describe a model")
    if config.init in FAMILIES and not os.path.exists(config.init):
        spec = FAMILIES[config.init]
    else:
        spec = open_checkpoint(config.init, prediction_type=config.prediction_type or None).spec
    return with_beside(config, method_of(config).begin(spec, {})[0])[0]


def _devices(topology: Topology) -> list:
    if topology.chip == "cpu":
        return jax.devices("cpu")
    from jax.experimental import topologies

    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    name = f"{topology.chip}:{'x'.join(map(str, topology.shape))}"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **slices).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--plan={topology}: the compiler for TPUs refuses it: {error}") from None


def _device_name(mesh: Mesh) -> str:
    return mesh.devices.flat[0].device_kind


def _stand_in(wanted: Topology, mesh: Mesh) -> tuple[Topology, Mesh]:
    """The smallest slice with the same `fsdp` and `tensor`, and with at least two devices along `data`."""
    fixed = mesh.shape["fsdp"] * mesh.shape["tensor"]
    if wanted.chip == "cpu" or wanted.num_devices <= SMALL:
        return wanted, mesh
    for shape in SLICES[hardware.CHIPS[wanted.chip].axes]:
        devices = math.prod(shape)
        if devices % fixed == 0 and 2 * fixed <= devices < wanted.num_devices:
            found = Topology(wanted.chip, shape)
            sizes = {"data": -1, "fsdp": mesh.shape["fsdp"], "tensor": mesh.shape["tensor"]}
            return found, sharding.make_mesh(sizes, _devices(found))
    return wanted, mesh


# The program


@dataclasses.dataclass
class Program:
    """What the compiler says, of one device where nothing else is said."""

    seconds: float  # to compile it
    trained: int  # parameters, over all devices
    frozen: int
    memory: dict[str, float]  # bytes by KINDS
    gathered: float  # bytes of the temporaries that do not depend on the batch: whole parameters and gradients
    flops_per_image: float
    compiled_flops: float | None  # as XLA counts them; None where it did not get so far
    hlo: str | None


def _compile(config: ConfigDict, networks: Networks, mesh: Mesh, size: tuple[int, int]) -> Program:
    method = method_of(config)
    method.check(config, networks.spec)
    shapes = setup.batch_shapes(config, method, networks, size)
    loaded = setup.frozen_shapes(config, method, networks)
    abstract = jax.eval_shape(functools.partial(setup.initial_state, config, method, networks), loaded)
    context = Context(networks, config, empty_prompt(shapes))
    flops_per_image = setup.flops_per_image(method, context, abstract, shapes)
    step = setup.make_step(method, context, mesh, abstract)
    state = step.abstract_state
    over = sharding.batch_sharding(mesh)
    memory = {
        "trained parameters": _bytes(state.params),
        "frozen parts": _bytes(state.frozen),
        "averages": _bytes(state.averages),
        "optimiser": _bytes(state.opt_state),
        "batch": sum(math.prod(over.shard_shape(x.shape)) * x.dtype.itemsize for x in shapes.values()),
    }
    used = _whole_bytes(state.params)
    start = time.monotonic()
    try:
        compiled = step.compile(shapes)
    except jax.errors.JaxRuntimeError as error:
        temporaries = _temporaries_in(str(error), sum(memory.values()))
        if temporaries is None:
            raise
        memory["temporaries"], flops, hlo = temporaries, None, None
    else:
        told = compiled.memory_analysis()
        memory["layouts"] = max(told.argument_size_in_bytes - sum(memory.values()), 0)  # padding to the chip's tiles
        memory["temporaries"] = told.temp_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes
        memory["program"] = told.generated_code_size_in_bytes
        memory["kernels"] = CPU_KERNELS if mesh.devices.flat[0].platform == "cpu" else 0.0
        flops, hlo = compiled.cost_analysis().get("flops"), compiled.as_text()
    split = mesh.shape["fsdp"] > 1
    gathered = used * np.dtype(config.dtype).itemsize / 4 + memory["trained parameters"] if split else used
    counts = trees.count(state.params), trees.count(state.frozen)
    return Program(time.monotonic() - start, *counts, memory, gathered, flops_per_image, flops, hlo)


def empty_prompt(shapes: setup.Shapes) -> EmptyPrompt | None:
    """Zeros in the place of the empty prompt: a plan has no tokenizer."""
    zeros = {name: np.zeros(x.shape[1:], x.dtype) for name, x in shapes.items()}
    if "input_ids" in zeros:
        return EmptyPrompt(zeros["input_ids"])
    return EmptyPrompt(None, (zeros["context"], zeros.get("pooled"))) if "context" in zeros else None


def _bytes(tree) -> float:
    """On one device, as the shardings say."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


def _whole_bytes(tree) -> float:
    return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _temporaries_in(message: str, arguments: float) -> float | None:
    """What the compiler for TPUs needed where it gave up for want of memory; None for another error."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    number = r"(\d+(?:\.\d+)?)([KMGT]?)"
    found = re.search(rf"HLO temporaries \({number}\)", message)
    if found:
        return float(found[1]) * units[found[2]]
    found = re.search(rf"Used {number} of", message)
    return None if found is None else max(float(found[1]) * units[found[2]] - arguments, 0.0)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 5e6 else f"{num_bytes / 1e6:.3f} MB"
