"""Where arrays lie, what a step sends, and compilations that outlive a process."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from sd_jax import sharding
from sd_jax.models.families import FAMILIES
from sd_jax.models.networks import Networks
from tests.environment import with_devices


def mesh_of(**sizes):
    """A mesh of devices that are not there."""
    shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))


def shapes_of(family, part):
    networks = Networks.of(FAMILIES[family])
    return jax.eval_shape(lambda: networks.init(part, jax.random.key(0)))


def named(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


# --- Rules ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unets():
    return {family: shapes_of(family, "unet") for family in ("sd15", "sd2_v", "sdxl")}


FSDP, BOTH, MANY = {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 64}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [(family, sizes) for family in ("sd15", "sd2_v", "sdxl") for sizes in (FSDP, BOTH)] + [("sd15", MANY)],
    ids=str,
)
def test_the_state_of_a_true_unet_is_split(unets, family, sizes):
    params = {"unet": unets[family]}
    opt_state = jax.eval_shape(optax.adamw(1e-4).init, params)
    state = {"params": params, "averages": {"0.9999": params}, "opt_state": opt_state}
    mesh = mesh_of(**sizes)
    shapes, shardings = named(state), named(sharding.state_shardings(state, mesh))
    size = {name: math.prod(leaf.shape) for name, leaf in shapes.items()}
    held = {name: math.prod(shardings[name].shard_shape(leaf.shape)) for name, leaf in shapes.items()}
    whole = {name: size[name] for name in shapes if held[name] == size[name]}
    largest = max(whole, key=whole.get)
    assert sum(whole.values()) < 0.005 * sum(size.values()), largest
    assert whole[largest] < sharding.SMALL, largest
    ways = sizes["fsdp"] * sizes.get("tensor", 1)
    assert sum(held.values()) < 1.05 * sum(size.values()) / ways  # nothing is split over one of the axes alone
    for name in named(params):
        places = {shardings[other].spec for other in shapes if other.endswith("/" + name)}
        assert len(places) == 1, name  # parameters, average and both moments


def test_every_rule_is_of_some_parameter_and_every_large_array_has_one(unets):
    parts = {"unet": unets["sdxl"], **{part: shapes_of("sd15", part) for part in ("vae", "text_encoder")}}
    used = set()
    for name, leaf in named(parts).items():
        rule = sharding.rule_of(name)
        used.add(rule)
        assert rule is not None or leaf.ndim == 1, name
    assert used - {None} == set(sharding.RULES)


@pytest.mark.parametrize(
    ("path", "shape", "lies", "in_use"),
    [
        ("unet/attn1/to_q/kernel", (320, 640), ("fsdp", "tensor"), (None, "tensor")),
        ("opt_state/0/mu/unet/attn1/to_out_0/kernel", (640, 320), ("tensor", "fsdp"), ("tensor", None)),
        ("resnets_0/conv2/kernel", (3, 3, 64, 64), (None, None, "tensor", "fsdp"), (None, None, "tensor", None)),
        ("ff/net_0/proj/kernel", (320, 2560), (("fsdp", "tensor"), None), (None, None)),
        # What the rule cannot have goes elsewhere
        ("attn1/to_q/kernel", (322, 640), (None, ("tensor", "fsdp")), (None, "tensor")),
        ("attn1/to_q/kernel", (640, 321), (("fsdp", "tensor"), None), (None, None)),
        ("conv_in/kernel", (3, 3, 6, 1024), (None, None, "tensor", "fsdp"), (None,) * 4),
        ("no/rule/for_it", (100, 1000), ("tensor", "fsdp"), (None, None)),
        ("attn1/to_q/kernel", (321, 643), (None, None), (None, None)),
        # Whole
        ("attn1/to_out_0/bias", (2**20,), (), ()),
        ("resnets_0/conv1/kernel", (3, 3, 4, 4), (), ()),
    ],
)
def test_where_an_array_lies_and_how_it_is_used(path, shape, lies, in_use):
    mesh = mesh_of(fsdp=4, tensor=2)
    leaf = {path: jax.ShapeDtypeStruct(shape, np.float32)}
    assert sharding.state_shardings(leaf, mesh)[path].spec == PartitionSpec(*lies)
    assert sharding.gathered_shardings(leaf, mesh)[path].spec == PartitionSpec(*in_use)
    assert sharding.gathered_shardings(leaf, mesh_of(tensor=2))[path].spec == PartitionSpec(*in_use)  # the same
    assert sharding.parameter_spec(path, shape, mesh_of(slice=2, data=4)) == PartitionSpec()


# --- Mesh -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, order=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def devices_of(slices, processes, platform="tpu"):
    """Slices of 2 x 2 chips, in the wrong order, as the runtime may list them."""
    found = []
    for at in range(slices):
        for x, y in ((1, 1), (0, 0), (1, 0), (0, 1)):
            process = at * processes + (2 * x + y) * processes // 4
            found.append(Device(len(found), process, at, platform, coords=(x, y, 0)))
    return found[::-1]


def test_the_slices_are_the_outermost_axis():
    devices = devices_of(slices=2, processes=1)
    mesh = sharding.make_mesh({"slice": -1, "data": -1, "fsdp": 2}, devices)
    assert dict(mesh.shape) == {"slice": 2, "data": 2, "fsdp": 2, "tensor": 1}
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    one = sharding.make_mesh({"data": 2, "tensor": 2}, devices_of(slices=1, processes=1))
    assert {device.id for device in one.devices.flat} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("sizes", "devices", "said"),
    [
        ({"model": 2}, devices_of(1, 1), "unknown axis 'model': the axes are slice, data, fsdp, tensor"),
        ({"data": -1, "fsdp": -1}, devices_of(1, 1), "at most one axis may be -1"),
        ({"data": 3}, devices_of(1, 1), "does not fit 4 devices"),
        ({"data": 2}, devices_of(1, 1), "needs 2 devices, there are 4"),
        ({"data": -1}, devices_of(2, 1), "the devices are 2 slices: set it to 2 or -1"),
        ({"tensor": 4}, devices_of(1, 2), "config.mesh.tensor=4 reaches beyond the devices of one process"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, devices, said):
    with pytest.raises(ValueError, match=said):
        sharding.make_mesh(sizes, devices)


def test_other_devices_keep_their_order():
    devices = sorted(devices_of(slices=2, processes=1, platform="gpu"))
    mesh = sharding.make_mesh({"slice": 4, "data": -1}, devices)  # more slices than the devices tell of
    assert list(mesh.devices.flat) == devices and mesh.shape["data"] == 2


# --- What a step sends ------------------------------------------------------------------------------------------------

STEP = """
import json, re, sys
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
from sd_jax import sharding
from sd_jax.models import presets
from sd_jax.models.attention import SpatialTransformer
from sd_jax.models.networks import Networks
from sd_jax.models.resnet import ResnetBlock
from sd_jax.types import Conditioning

sharding.SMALL = 256
draw = np.random.default_rng(0).standard_normal
x, time = draw((8, 8, 8, 4 if sys.argv[1] == "unet" else 16), np.float32), np.linspace(1, 900, 8, dtype=np.float32)
context = draw((8, 5, presets.TINY_SHAPES.unet.cross_attention_dim), np.float32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, time, context):
        h = ResnetBlock(32, 8, name="resnets_0")(x, jnp.broadcast_to(time[:, None], (8, 64)))
        return SpatialTransformer(4, 8, name="attentions_0")(h, context)


if sys.argv[1] == "unet":
    unet = Networks.of(presets.TINY_SHAPES).unet
    apply = lambda params, x, time, context: unet.apply({"params": params}, x, time, Conditioning(context))
    shapes = jax.eval_shape(lambda: Networks.of(presets.TINY_SHAPES).init("unet", jax.random.key(0)))
else:
    apply = lambda params, *args: Block().apply({"params": params}, *args)
    shapes = jax.eval_shape(lambda: Block().init(jax.random.key(0), x, time, context))["params"]
params = jax.tree.map(lambda leaf: 0.2 * draw(leaf.shape, np.float32), shapes)
batch = {"x": x, "time": time, "context": context}


def compiled(gather, **kwargs):
    def step(params, batch):
        loss = lambda params: jnp.mean(apply(gather(params), batch["x"], batch["time"], batch["context"]) ** 2)
        return jax.value_and_grad(loss)(params)

    return sharding.jit(step, once=True, **kwargs).lower(params, batch).compile()


mesh = sharding.make_mesh(json.loads(sys.argv[2]))
lies, used = sharding.state_shardings(params, mesh), sharding.gathered_shardings(params, mesh)
program = compiled(
    lambda params: jax.lax.with_sharding_constraint(params, used),
    in_shardings=(lies, sharding.batch_sharding(mesh)),
    out_shardings=(sharding.replicated(mesh), lies),
)
text = program.as_text()
sent = ("all-gather", "all-to-all", "collective-permute")
row = {name: len(re.findall(rf"= .*? {name}(-start)?[(]", text)) for name in sent}
row["split"] = sum(not where.is_fully_replicated for where in jax.tree.leaves(lies))
row["split in use"] = sum(not where.is_fully_replicated for where in jax.tree.leaves(used))
if sys.argv[1] != "unet":
    whole = compiled(lambda params: params)(params, batch)
    split = program(jax.device_put(params, lies), sharding.place_batch(batch, mesh))
    error = lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(a)).max())
    row["error"] = max(jax.tree.leaves(jax.tree.map(error, whole, split)))
print(json.dumps(row))
"""


@pytest.mark.parametrize(
    ("what", "sizes", "split_in_use"),
    [("unet", {"slice": 2, "data": 2, "fsdp": 2}, 0), ("block", {"fsdp": 4, "tensor": 2}, 3 + 8)],
    ids=["unet", "block"],
)
def test_a_split_step_gathers_parameters_and_sends_no_activations(what, sizes, split_in_use):
    environment = {**os.environ, "XLA_FLAGS": with_devices(8), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", STEP, what, json.dumps(sizes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["all-to-all"] == row["collective-permute"] == 0, row
    assert 0 < row["split"] <= row["all-gather"], row
    assert row["split in use"] == split_in_use, row
    assert row.get("error", 0.0) < 1e-4, row


# --- Compilations -----------------------------------------------------------------------------------------------------

JOB = """
import collections, json, jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rsplit("/", 1)[-1]]))
jax.numpy.ones(3) + 1  # compiled before the cache is there
import sd_jax
sd_jax.load().text_to_image("a red circle", steps=2)
print(json.dumps({"folder": jax.config.jax_compilation_cache_dir, **events}))
"""


def start(tmp_path, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_COMP", "JAX_PERS"))}
    clean |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.getcwd(), **environment}
    done = subprocess.run([sys.executable, "-c", JOB], env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_second_start_of_a_job_compiles_nothing(tmp_path):
    first = start(tmp_path)
    assert first["folder"] == str(tmp_path / "sd_jax" / "compiled") and first["cache_misses"] > 3
    second = start(tmp_path)
    assert "cache_misses" not in second and second["cache_hits"] == first["cache_misses"]
    elsewhere = start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert elsewhere["folder"] == str(tmp_path / "mine")
