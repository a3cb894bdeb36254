import importlib.util
import re

import pytest

from sd_jax.checkpoints import CheckpointError
from sd_jax.config import training_defaults
from sd_jax.models.families import SDXL
from sd_jax.training import plan
from sd_jax.training.plan import Topology
from tests.training import doors

GIB = 2**30


# --- Names of topologies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "chip", "devices"),
    [("v5e:4x4", "v5e", 16), ("v5p:2x2x2", "v5p", 8), ("v5e:16x16*2", "v5e", 512), ("cpu:8", "cpu", 8)],
)
def test_topology_of_a_name(text, chip, devices):
    topology = Topology.parse(text)
    assert (topology.chip, topology.num_devices, str(topology)) == (chip, devices, text)


@pytest.mark.parametrize(
    "text", ["v5e", "v5e:4", "v5p:4x4", "v9:2x2", "cpu:2x4", "cpu:8*2", "v5e:4x0", "v5e:4x4*0", ""]
)
def test_unknown_topology_is_refused_with_the_forms_that_there_are(text):
    with pytest.raises(ValueError, match=r"--plan=.*: give v5e:4x4, .*cpu:8") as refused:
        Topology.parse(text)
    assert "\n" not in str(refused.value)


def test_missing_compiler_is_one_line_that_names_the_install(monkeypatch):
    monkeypatch.setattr(plan.jax.config, "update", lambda *_: None)  # of the process that runs the tests
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "jax\[tpu\]"') as refused:
        plan.plan(training_defaults("full"), "v5e:4x4")
    assert "\n" not in str(refused.value)


# --- The model -------------------------------------------------------------------------------------------------------


def test_the_name_of_a_family_stands_for_a_checkpoint_that_is_not_there(tmp_path, monkeypatch):
    config = training_defaults("lora")
    config.init = "sdxl"
    monkeypatch.chdir(tmp_path)
    assert plan._spec(config) == SDXL
    (tmp_path / "sdxl").mkdir()
    with pytest.raises(CheckpointError, match="sdxl"):
        plan._spec(config)


# --- What the compiler says when it gives up -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "temporaries"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (183.20G) "
            "exceeds available HBM (15.75G).",
            183.2 * GIB,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 28.50G of 15.75G hbm. Exceeded hbm "
            "capacity by 12.75G.",
            26.5 * GIB,
        ),
        ("INTERNAL: Mosaic failed", None),
    ],
)
def test_temporaries_of_a_program_that_is_too_large(message, temporaries):
    found = plan._temporaries_in(message, 2.0 * GIB)
    assert found == (None if temporaries is None else pytest.approx(temporaries))


# --- The door --------------------------------------------------------------------------------------------------------


def _plan(*flags):
    return doors.run("train.py", *flags, check=False)


def _number(text, line):
    return float(re.search(rf"^ *{line} +([\d.e+-]+)", text, re.MULTILINE)[1])


def test_plan_for_this_cpu_prints_what_the_step_takes():
    done = _plan(
        "--config=configs/demo.py:text_to_image,runlocal",
        "--config.optimizer.name=adamw",
        "--config.mesh.fsdp=2",
        "--config.batch_size=16",
        "--plan=cpu:8",
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "8 x cpu, mesh: data 4, fsdp 2" in said
    assert "16 images = 2 x 8 devices x 1 micro-batches, of 32x32" in said
    # The average is as large as the parameters, AdamW's two moments twice as large
    parameters = _number(said, "trained parameters")
    assert _number(said, "averages") == parameters > 0
    assert _number(said, "optimiser") == pytest.approx(2 * parameters, rel=0.01)
    assert "frozen parts" not in said  # the autoencoder has done its work before the first step
    trained, frozen = re.search(r"^trained: ([\d,]+) parameters, beside ([\d,]+) that", said, re.MULTILINE).groups()
    count = int(trained.replace(",", ""))
    assert 4e-6 * count / 2 <= parameters < 4e-6 * count and frozen == "0"  # small arrays are whole on each device
    assert _number(said, "a step") == pytest.approx(16 * _number(said, "an image"), rel=1e-3)
    # A gradient of the parameters' size at least goes to the other copies
    assert _number(said, "all-reduce") > 0 and _number(said, "all-gather") > 0
    assert said.splitlines()[-1].startswith("fits: ")


def test_batch_that_is_too_large_ends_with_what_to_change():
    images = 8 * 2**17
    done = _plan(*doors.TINY, f"--config.batch_size={images}", "--plan=cpu:8")
    assert done.returncode == 1, done.stderr
    verdict = done.stdout.splitlines()[-1]
    assert verdict.startswith("does not fit: ") and "config." in verdict
    advised = re.search(r"^  config\.batch_size=(\d+): about", done.stdout, re.MULTILINE)
    assert advised and 0 < int(advised[1]) < images
    assert "config.grad_accumulation=" in done.stdout


# --- TPUs that are not there -----------------------------------------------------------------------------------------

with_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@with_compiler
@pytest.mark.parametrize(
    ("wanted", "mesh", "stand_in"),
    [
        ("v5e:4x4", {"data": -1, "fsdp": 4}, None),
        ("v5e:16x16", {"data": -1, "fsdp": 4}, "v5e:2x4"),
        ("v5e:16x16*2", {"slice": 2, "data": -1, "fsdp": 16}, "v5e:4x8"),
        ("v5p:4x4x4", {"data": -1}, "v5p:2x2x1"),
        ("v5e:8x8", {"data": 1, "fsdp": 64}, None),
    ],
)
def test_larger_slice_is_planned_on_a_smaller_one(wanted, mesh, stand_in, monkeypatch):
    monkeypatch.setattr(plan.jax.config, "update", lambda *_: None)  # of the process that runs the tests
    for name in plan.ENVIRONMENT:
        monkeypatch.setenv(name, "")  # and so they are put back
    wanted = Topology.parse(wanted)
    plan.prepare(wanted)
    whole = plan.sharding.make_mesh(mesh, plan._devices(wanted))
    found, small = plan._stand_in(wanted, whole)
    assert str(found) == (stand_in or str(wanted))
    assert small.shape["fsdp"] == whole.shape["fsdp"] and small.size == found.num_devices


@with_compiler
@pytest.mark.slow
def test_plan_for_a_tpu_that_is_not_there():
    done = _plan(*doors.TINY, "--config.batch_size=4096", "--plan=v5e:16x16")
    assert done.returncode == 0, done.stderr
    assert "compiled for v5e:2x2 with as many images a device, and scaled" in done.stdout
    assert "256 x TPU v5 lite" in done.stdout and "197 TFLOP/s a chip" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("fits: ")
