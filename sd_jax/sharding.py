"""Devices as a mesh: which axes there are, where each array lies, and how one step is mapped over them.

Axes: `data` (a batch is split), `fsdp` (a batch is split, parameters too), `tensor` (the insides of a layer are split).
One of the sizes may be -1: it takes the devices that the others leave.
"""

import functools
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")


def make_mesh(sizes: dict[str, int], devices=None) -> Mesh:
    """A mesh with the axes of AXES; axes that `sizes` leaves out have size 1.

    Raises ValueError where the product of the sizes is not the number of devices, or an axis is unknown.
    """
    devices = jax.devices() if devices is None else devices
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise ValueError(f"config.mesh has the unknown axis {sorted(unknown)[0]!r}: the axes are {', '.join(AXES)}")
    shape = [sizes.get(axis, 1) for axis in AXES]
    known = int(np.prod([size for size in shape if size != -1]))
    if shape.count(-1) > 1 or len(devices) % known:
        raise ValueError(f"config.mesh {dict(sizes)} does not fit {len(devices)} devices: at most one axis may be -1")
    shape = [len(devices) // known if size == -1 else size for size in shape]
    if int(np.prod(shape)) != len(devices):
        raise ValueError(f"config.mesh {dict(sizes)} needs {int(np.prod(shape))} devices, there are {len(devices)}")
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """A batch is split along its first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def parameter_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where one array of parameters, moments or averages lies.

    The last axis (features out) is split over `tensor`, the largest other axis over `fsdp`, where they divide; small
    arrays stay whole on every device.
    """
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    axes: list[str | None] = [None] * len(shape)
    if int(np.prod(shape)) < 2**14:
        return PartitionSpec()
    if tensor > 1 and shape[-1] % tensor == 0:
        axes[-1] = "tensor"
    for axis in sorted(range(len(shape)), key=lambda i: -shape[i]):
        if fsdp > 1 and axes[axis] is None and shape[axis] % fsdp == 0:
            axes[axis] = "fsdp"
            break
    return PartitionSpec(*axes)


def state_shardings(abstract_state, mesh: Mesh):
    """A tree of NamedSharding for a tree of shapes (`jax.eval_shape` of the state's initialiser)."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, parameter_spec(leaf.shape, mesh)), abstract_state)


@functools.cache
def compiler_options() -> dict[str, str]:
    """What XLA is told beyond its defaults.

    On CPU, jaxlib 0.10 gives convolutions, matrix products and reductions to YNNPACK. It is fast for the latter two
    and takes up to twice Eigen's time for convolutions, which are therefore left off its list. A jaxlib that does not
    know the option is left alone.
    """
    if jax.default_backend() != "cpu":
        return {}
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
