"""The same losses on one device and on eight, whatever the mesh."""

import pytest

from tests.training import doors

FLAGS = ("--config.total_steps=20", "--config.data.num_examples=200", "--config.checkpoint_steps=0")


def run(workdir, *flags, devices=8):
    doors.run("train.py", *doors.TINY, f"--workdir={workdir}", *FLAGS, *flags, devices=devices)
    return doors.losses(workdir)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), devices=1)


@pytest.mark.parametrize(
    "flags",
    [
        ("--config.mesh.data=8",),
        ("--config.mesh.data=4", "--config.mesh.fsdp=2"),
        ("--config.parallelism=pmap",),
    ],
    ids=["data=8", "data=4,fsdp=2", "pmap"],
)
def test_eight_devices_give_the_losses_of_one(tmp_path, one_device, flags):
    eight = run(tmp_path, *flags)
    assert eight.keys() == one_device.keys() and len(eight) == 20
    assert max(abs(eight[step] - one_device[step]) for step in eight) < 1e-5


def test_accumulated_micro_batches_give_the_losses_of_one_batch(tmp_path, one_device):
    accumulated = run(tmp_path, "--config.grad_accumulation=4", devices=1)
    assert max(abs(accumulated[step] - one_device[step]) for step in accumulated) < 1e-5
