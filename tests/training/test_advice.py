import pytest
from jax.sharding import AbstractMesh

from sd_jax import sharding
from sd_jax.config import training_defaults
from sd_jax.training.advice import ways_to_fit

MEMORY = {"trained parameters": 2.0, "averages": 2.0, "optimiser": 4.0, "batch": 0.5, "temporaries": 12.0}
GATHERED = 4.0  # of the temporaries: so a device's eight images take one each


def _ways(usable, data=8, fsdp=1, images=8, **changes):
    config = training_defaults("full")
    config.batch_size = images * data * fsdp
    config.update(changes)
    mesh = AbstractMesh((1, data, fsdp, 1), sharding.AXES)
    return {way.change: way.memory for way in ways_to_fit(config, mesh, MEMORY, usable, GATHERED)}


def test_each_change_alone_is_the_least_that_suffices():
    assert _ways(17.0) == {
        "config.mesh.fsdp=2": 16.5,  # half of the state's 8
        "config.remat='blocks'": pytest.approx(12.5 + 0.4 * 8),
        "config.grad_accumulation=2": 16.5,  # four images at a time
        "config.batch_size=32": 16.25,  # and half of the batch
    }


def test_what_cannot_suffice_alone_is_not_advised():
    assert list(_ways(14.0)) == ["config.mesh.fsdp=8", "config.grad_accumulation=8", "config.batch_size=8"]
    # All devices split the state already, and one image at a time takes 13.5
    assert list(_ways(13.0, data=1, fsdp=8)) == ["--config.remat='blocks' --config.grad_accumulation=8"]


def test_all_together_where_none_suffices():
    (change,) = _ways(7.0)
    assert change == "--config.mesh.fsdp=8 --config.remat='blocks' --config.grad_accumulation=8"
    assert _ways(7.0)[change] == pytest.approx(0.5 + 8 / 8 + 4 + 0.4 * 1)


def test_nothing_helps_a_state_that_is_too_large():
    assert _ways(4.0) == {}


def test_remat_that_is_on_is_not_advised_again_and_micro_batches_multiply():
    ways = _ways(17.0, remat="blocks", grad_accumulation=2)
    assert "config.remat='blocks'" not in ways
    assert "config.grad_accumulation=4" in ways
