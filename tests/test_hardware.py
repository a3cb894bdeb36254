import threading

import jax
import pytest

from sd_jax import hardware


def test_backend_is_that_of_the_target_within_it_and_nowhere_else():
    seen = []
    with hardware.target("tpu"):
        with hardware.target("gpu"):
            assert hardware.backend() == "gpu"
        assert hardware.backend() == "tpu"
        other = threading.Thread(target=lambda: seen.append(hardware.backend()))  # such as the data loader's
        other.start()
        other.join()
    assert hardware.backend() == seen[0] == jax.default_backend()


def test_target_ends_with_an_error_too():
    with pytest.raises(KeyError), hardware.target("tpu"):
        raise KeyError
    assert hardware.backend() == jax.default_backend()


def test_peak_of_a_chip_under_each_of_its_names():
    assert hardware.peak_flops("TPU v5 lite") == hardware.peak_flops("TPU v5e") == 197e12
    assert hardware.peak_flops("TPU v5") == hardware.peak_flops("TPU v5p") == 459e12
    assert hardware.peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert hardware.peak_flops("cpu") is None


@pytest.mark.parametrize("name", hardware.CHIPS)
def test_chip_that_can_be_planned_for_has_a_known_peak(name):
    assert hardware.peak_flops(hardware.CHIPS[name].device_kind) > 1e14


def test_free_memory_is_that_of_the_device():
    free = hardware.free_memory()
    assert free is None or free > 2**20
