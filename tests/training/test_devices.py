"""The same losses on one device and on several, whatever the mesh."""

import pytest

from tests.training import doors

FLAGS = ("--config.total_steps=20", "--config.data.num_examples=200", "--config.checkpoint_steps=0")


def run(workdir, *flags, devices):
    doors.run("train.py", *doors.TINY, f"--workdir={workdir}", *FLAGS, *flags, devices=devices)
    return doors.losses(workdir)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), devices=1)


@pytest.mark.parametrize(
    ("devices", "flags"),
    [
        (4, ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.grad_accumulation=2")),
        (8, ("--config.parallelism=pmap",)),
        pytest.param(8, ("--config.mesh.data=8",), marks=pytest.mark.slow),
        pytest.param(1, ("--config.grad_accumulation=4",), marks=pytest.mark.slow),
    ],
    ids=["data=2,fsdp=2,accumulated", "pmap", "data=8", "accumulated"],
)
def test_many_devices_and_micro_batches_give_the_losses_of_one(tmp_path, one_device, devices, flags):
    many = run(tmp_path, *flags, devices=devices)
    assert many.keys() == one_device.keys() and len(many) == 20
    assert max(abs(many[step] - one_device[step]) for step in many) < 1e-5
