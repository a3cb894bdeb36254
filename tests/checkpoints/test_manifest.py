"""Damaged checkpoints: whatever happens to whichever file, what is restored is right, or the one before is."""

import logging
import shutil

import jax
import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, manifest
from sd_jax.checkpoints.native import Checkpoints
from tests.checkpoints.test_native import abstract, assert_states_equal, make_state


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": _flip,
    "missing": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Steps 1 and 2, each with its own values; the numbers do not compress."""
    directory = tmp_path_factory.mktemp("written")
    checkpoints = Checkpoints(directory)
    for step in (1, 2):
        checkpoints.save(step, state_of(step), {"images": step, "num_records": 9}, metrics={"held_out_loss": step})
    checkpoints.close()
    return directory


def state_of(step):
    noise = np.random.default_rng(step).random((40, 40), np.float32)
    return {**make_state(step), "noise": jax.numpy.asarray(noise)}


@pytest.fixture
def directory(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def restore(directory):
    checkpoints = Checkpoints(directory)
    state, data = checkpoints.restore(like=abstract(state_of(0)))
    assert_states_equal(state, state_of(data["images"]))
    assert checkpoints.latest_step() == data["images"]
    checkpoints.close()
    return data["images"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_any_file_damaged(written, tmp_path, damage):
    files = sorted(path.relative_to(written / "2") for path in (written / "2").rglob("*") if path.is_file())
    fell_back = []
    for i, name in enumerate(files):
        directory = shutil.copytree(written, tmp_path / str(i))
        DAMAGE[damage](directory / "2" / name)
        if restore(directory) == 1:
            fell_back.append(str(name))
            assert (directory / "2.damaged").is_dir() and not (directory / "2").exists()
    # Orbax's own two notes at the top are read by nobody
    assert {str(name) for name in files} - set(fell_back) == {"_CHECKPOINT_METADATA", "commit_success.txt"}
    assert len(fell_back) > 10


def test_the_warning_names_it_and_its_step_can_be_written_again(directory, caplog):
    _flip(directory / "2" / "data" / "metadata")
    shutil.copytree(directory / "1", directory / "2.damaged")  # from an earlier time
    checkpoints = Checkpoints(directory, best="held_out_loss")
    with caplog.at_level(logging.WARNING):
        checkpoints.restore(like=abstract(state_of(0)))
    assert [record.getMessage() for record in caplog.records] == [
        "the checkpoint of step 2 is damaged (data/metadata is not what was written): going on from step 1",
        f"the damaged checkpoint is kept as {directory / '2.damaged-2'}: remove it when you like",
    ]
    assert checkpoints.best_step() == 1
    assert checkpoints.save(2, state_of(2), {"images": 2, "num_records": 9})
    checkpoints.close()
    assert restore(directory) == 2


def test_all_damaged(directory):
    for step in (1, 2):
        (directory / str(step) / manifest.NAME).unlink()
    checkpoints = Checkpoints(directory)
    for _ in range(2):  # nothing is moved: the next start must not begin anew
        with pytest.raises(CheckpointError, match="every checkpoint is damaged.*2: its manifest.json cannot .*; 1: "):
            checkpoints.restore(like=abstract(state_of(0)))
        assert checkpoints.all_steps() == [1, 2]
    checkpoints.close()


def test_another_config_is_no_damage(directory):
    checkpoints = Checkpoints(directory)
    with pytest.raises(CheckpointError, match="2: not the state of this config"):
        checkpoints.restore(like=abstract({"params": {"a": jax.numpy.zeros(3)}}))
    assert checkpoints.all_steps() == [1, 2]
    checkpoints.close()


def test_a_share_of_the_files(directory):
    """Several processes look at each file once, together."""
    _flip(directory / "2" / "data" / "metadata")
    said = [manifest.damage(directory / "2", part, 3) for part in range(3)]
    assert sorted(map(str, said)) == ["None", "None", "data/metadata is not what was written"]
    assert manifest.damage(directory / "1") is None
