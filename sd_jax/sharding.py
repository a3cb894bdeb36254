"""Devices as a mesh: which axes there are, where each array lies, and how one step is mapped over them.

    slice   devices joined by a slower network than those within it (a TPU pod's slices, over DCN); a batch is split
    data    a batch is split
    fsdp    a batch is split, and so are parameters, moments and averages (ZeRO stage 3, Rajbhandari et al. 2020):
            for use a step gathers a layer's parameters, see `gathered_shardings`
    tensor  the insides of a layer are split (Shoeybi et al. 2019): it must divide the number of attention heads

One of data, fsdp and tensor may be -1: it takes the devices that the others leave.
"""

import functools
import math
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sd_jax import hardware

AXES = ("slice", "data", "fsdp", "tensor")
BATCH_AXES = ("slice", "data", "fsdp")
SMALL = 2**14  # numbers: an array with fewer is whole on every device

# --- Rules ------------------------------------------------------------------------------------------------------------

# How the last two axes of a kernel (features in, features out) are split. A layer in COLUMNS computes a part of its
# features, which a layer in ROWS reads: between the two nothing is sent, after them one sum. STORED is whole in use.
COLUMNS = (("fsdp",), ("tensor",))
ROWS = (("tensor",), ("fsdp",))
STORED = (("fsdp", "tensor"), ())

# By the end of a parameter's path, the first that fits; its moments and averages have the same end. Vectors are whole.
RULES: tuple[tuple[str, tuple], ...] = (
    # U-Net and autoencoder: the heads of a transformer; what lies between two convolutions, the time's share included
    (r"attn\d/to_[qkv]/kernel", COLUMNS),
    (r"attn\d/to_out_0/kernel", ROWS),
    (r"resnets_\d+/(conv1|time_emb_proj)/kernel", COLUMNS),
    (r"resnets_\d+/conv2/kernel", ROWS),
    (r"(time|add)_embedding/linear_1/kernel", COLUMNS),
    (r"(time|add)_embedding/linear_2/kernel", ROWS),
    # Text encoders
    (r"self_attn/[qkv]_proj/kernel", COLUMNS),
    (r"self_attn/out_proj/kernel", ROWS),
    (r"mlp/fc1/kernel", COLUMNS),
    (r"mlp/fc2/kernel", ROWS),
    (r"embedding", COLUMNS),
    # What is left stands alone, reads what was joined of two (conv_shortcut), or is multiplied half by half (GEGLU:
    # cut in two, one device would hold all of one half): splitting it would send activations about
    (r"kernel", STORED),
)


@functools.cache
def rule_of(path: str) -> tuple[str, tuple] | None:
    """The row of RULES for a parameter; None = there is none."""
    return next((row for row in RULES if re.search(rf"(^|/)({row[0]})$", path)), None)


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Where an array of parameters, moments or averages lies: by RULES, where the sizes divide.

    path: ends like "attn1/to_q/kernel". What does not divide where the rule has it, or has no rule, is split along
    another axis, the longest that is not split yet. Small arrays and vectors are whole.
    """
    sizes = {name: mesh.shape[name] for name in ("fsdp", "tensor") if mesh.shape[name] > 1}
    if len(shape) < 2 or math.prod(shape) < SMALL or not sizes:
        return PartitionSpec()
    axes: list[tuple[str, ...]] = [()] * len(shape)
    _, rule = rule_of(path) or ("", ((), ()))
    wanted = [*[()] * (len(shape) - 2), *rule]

    def put(name: str, axis: int) -> bool:
        fits = shape[axis] % math.prod(sizes[n] for n in (*axes[axis], name)) == 0
        if fits:
            axes[axis] = (*axes[axis], name)
        return fits

    left = dict(sizes)
    for axis, names in enumerate(wanted):
        for name in names:
            if name in left and put(name, axis):
                del left[name]
    for name in left:
        for axis in sorted(range(len(shape)), key=lambda axis: (len(axes[axis]), -shape[axis])):
            if put(name, axis):
                break
    return PartitionSpec(*[names[0] if len(names) == 1 else names or None for names in axes])


def _in_use(path: str, spec: PartitionSpec) -> PartitionSpec:
    """What is left of a spec: "tensor" where the rule has it; of ("tensor", "fsdp") as well, whose parts are whole."""
    _, rule = rule_of(path) or ("", STORED)
    firsts = [names[0] if isinstance(names, tuple) else names for names in spec]
    wanted = [*[()] * (len(firsts) - 2), *rule]
    kept = [first == "tensor" and names == ("tensor",) for first, names in zip(firsts, wanted, strict=False)]
    return PartitionSpec(*["tensor" if keep else None for keep in kept])


def state_shardings(abstract_state, mesh: Mesh | AbstractMesh):
    """A tree of NamedSharding for a tree of shapes (`jax.eval_shape` of the state's initialiser)."""
    return _of_leaves(lambda path, leaf: parameter_spec(path, leaf.shape, mesh), abstract_state, mesh)


def gathered_shardings(params, mesh: Mesh | AbstractMesh):
    """The same for parameters in use: together again, but for what COLUMNS and ROWS split over `tensor`."""
    return _of_leaves(lambda path, leaf: _in_use(path, parameter_spec(path, leaf.shape, mesh)), params, mesh)


def _of_leaves(spec: Callable[[str, Any], PartitionSpec], tree, mesh: Mesh | AbstractMesh):
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, spec(name(path), leaf)), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """A batch is split along its first axis over BATCH_AXES."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process' images [b, ...] -> its part of the global batch, on its devices."""
    over = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(over, array) for name, array in batch.items()}


# --- Mesh -------------------------------------------------------------------------------------------------------------


def make_mesh(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes of AXES; axes that `sizes` leaves out have size 1. slice=-1: as many as the devices tell.

    Raises ValueError where the product of the sizes is not the number of devices, an axis is unknown, or the sizes do
    not fit how the devices are joined.
    """
    devices = jax.devices() if devices is None else list(devices)
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise ValueError(f"config.mesh has the unknown axis {sorted(unknown)[0]!r}: the axes are {', '.join(AXES)}")
    shape = [sizes.get(axis, 1) for axis in AXES]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] == -1:
        shape[0] = slices
    known = math.prod(size for size in shape if size != -1)
    if shape.count(-1) > 1 or known < 1 or len(devices) % known:
        raise ValueError(f"config.mesh {dict(sizes)} does not fit {len(devices)} devices: at most one axis may be -1")
    shape = [len(devices) // known if size == -1 else size for size in shape]
    if math.prod(shape) != len(devices):
        raise ValueError(f"config.mesh {dict(sizes)} needs {math.prod(shape)} devices, there are {len(devices)}")
    mesh = Mesh(_arranged(shape, slices, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    for row in mesh.devices.reshape(-1, shape[-1]):
        if len({device.process_index for device in row}) > 1:
            raise ValueError(
                f"config.mesh.tensor={shape[-1]} reaches beyond the devices of one process, which reads a batch of its "
                "own: choose a smaller one"
            )
    return mesh


def _arranged(shape: list[int], slices: int, devices: Sequence[Any]) -> np.ndarray:
    """TPUs by their places in the torus, so that the inner axes have the short ways; others in their order."""
    if devices[0].platform != "tpu":
        return np.asarray(devices, object).reshape(shape)
    if shape[0] != slices:
        raise ValueError(f"config.mesh.slice={shape[0]}, but the devices are {slices} slices: set it to {slices} or -1")
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    inner, outer = [1, *shape[1:]], [slices, 1, 1, 1]
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


# --- Programs ---------------------------------------------------------------------------------------------------------


def compiler_options() -> dict[str, str]:
    """What XLA is told beyond its defaults, for the platform that is compiled for.

    On CPU, jaxlib 0.10 gives convolutions, matrix products and reductions to YNNPACK. It is fast for the latter two
    and takes up to twice Eigen's time for convolutions, which are therefore left off its list. A jaxlib that does not
    know the option is left alone.
    """
    return _options_on_cpu() if hardware.backend() == "cpu" else {}


@functools.cache
def _options_on_cpu() -> dict[str, str]:
    fusions = ("LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT", "LIBRARY_FUSION_TYPE_REDUCE")
    options = {"xla_cpu_experimental_ynn_fusion_type": ",".join(fusions)}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(jnp.zeros((), jnp.int32))
    except Exception as error:  # the class of this error differs between versions of jaxlib
        if "xla_cpu_experimental_ynn_fusion_type" not in str(error):
            raise
        return {}
    return options


def jit(function: Callable | None = None, *, once: bool = False, **kwargs):
    """`jax.jit` with `compiler_options()`, decided at the first call (nothing touches a device at import).

    once: the function runs a single time, so on CPU it is compiled quickly rather than well (initialising a U-Net,
    which is hundreds of small draws, then takes half as long).
    """
    if function is None:
        return functools.partial(jit, once=once, **kwargs)

    @functools.cache
    def jitted():
        options = compiler_options()
        if once and options:
            options = {**options, "xla_backend_optimization_level": 0}
        return jax.jit(function, compiler_options=options, **kwargs)

    @functools.wraps(function)
    def call(*args, **keywords):
        return jitted()(*args, **keywords)

    call.lower = lambda *args, **keywords: jitted().lower(*args, **keywords)
    return call


def keep_compilations() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next start of the same job compiles nothing.

    `sd_jax.load` and training call it. A folder of the user's own (JAX_COMPILATION_CACHE_DIR, or jax.config) stays, and
    JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(cache) / "sd_jax" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # else half of the programs are left out
    compilation_cache.reset_cache()  # what was compiled before in this process has switched it off
