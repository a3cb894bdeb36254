"""Pictures -> rows: clean-fid's resize, batches over devices, rows of several processes."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.evals import features
from tests.training import processes

# Each process has its own part of 7 samples, in batches over two devices
SCRIPT = """
import json, sys
import numpy as np
import jax
from sd_jax import distributed
distributed.initialize()
from sd_jax.evals.features import gathered_rows, mapped
from sd_jax.evals.fid import Moments

samples = np.random.RandomState(0).normal(1e3, 1.0, (7, 70)).astype(np.float32)
own = samples[:2] if jax.process_index() == 0 else samples[2:]
rows = mapped(lambda shift, x: x + shift, np.float32(1), 3)(own)
moments = Moments.of(rows).gathered()
np.savez(f"{sys.argv[1]}/{jax.process_index()}.npz", rows=gathered_rows(rows), mean=moments.mean,
         scatter=moments.scatter, count=moments.count, empty=gathered_rows(np.zeros((0, 2))))
print(json.dumps([jax.process_count(), jax.local_device_count(), len(own)]))
"""


def random_pixels(seed, *size):
    return np.random.RandomState(seed).randint(0, 256, (*size, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("seed", "size", "mean", "at_7_11", "at_298_0"),
    [  # of clean-fid 0.1.35, build_resizer("clean"), Pillow 12.3: enlarged, and made smaller
        (
            1,
            (24, 20),
            126.8265609741211,
            (42.275753021, 232.432708740, 138.674270630),
            (7.2224479, 17.038307, 109.61047),
        ),
        (
            2,
            (400, 350),
            127.4672088623,
            (212.699539185, 68.662467957, 129.445953369),
            (42.802608, 124.01978, 146.69647),
        ),
    ],
)
def test_resize_is_that_of_clean_fid(seed, size, mean, at_7_11, at_298_0):
    levels = features.resized(random_pixels(seed, *size)[None])
    assert levels.shape == (1, 299, 299, 3) and levels.dtype == np.float32
    assert levels.mean() == pytest.approx(mean, rel=1e-6)
    np.testing.assert_allclose(levels[0, 7, 11], at_7_11, rtol=1e-6)
    np.testing.assert_allclose(levels[0, 298, 0], at_298_0, rtol=1e-6)
    assert levels.min() == 0.0 and levels.max() == 255.0  # bicubic overshoots, and is clipped


def test_pictures_of_the_right_size_stay_as_they_are():
    pixels = random_pixels(0, 2, 12, 12)
    np.testing.assert_array_equal(features.resized(pixels, side=12), pixels)


def test_a_row_for_each_example_whatever_the_batch():
    sizes = []

    def function(params, a, b):
        sizes.append(len(a))
        return params["scale"] * a.sum(1, keepdims=True) - b

    a, b = np.arange(14, dtype=np.float32).reshape(7, 2), np.arange(7, dtype=np.float32)[:, None]
    run = features.mapped(function, {"scale": jnp.float32(2)}, 3)
    np.testing.assert_array_equal(run(a, b), 2 * a.sum(1, keepdims=True) - b)
    np.testing.assert_array_equal(run(a[:2], b[:2]), 2 * a[:2].sum(1, keepdims=True) - b[:2])
    assert len(sizes) == 1  # compiled once
    with pytest.raises(ValueError, match="there are no pictures to judge"):
        run(a[:0], b[:0])


def test_features_are_of_resized_levels(monkeypatch):
    class Network:
        def apply(self, variables, levels):
            return levels.mean(axis=(1, 2)) * variables["params"][None]

    monkeypatch.setattr(features, "InceptionV3", Network)
    pixels = random_pixels(3, 5, 20, 30)
    found = features.inception_features(jnp.array([1.0, 2.0, 3.0]), batch_size=2)(pixels)
    np.testing.assert_allclose(found, features.resized(pixels).mean(axis=(1, 2)) * [1, 2, 3], rtol=1e-5)


def test_rows_and_moments_of_two_processes(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = processes.finish(processes.start(command, 2, devices_each=2))
    for code, _, err in done:
        assert code == 0, err[-3000:]
    assert sorted(json.loads(out.splitlines()[-1]) for _, out, _ in done) == [[2, 2, 2], [2, 2, 5]]
    samples = np.random.RandomState(0).normal(1e3, 1.0, (7, 70)).astype(np.float32) + np.float32(1)
    for process in range(2):
        with np.load(tmp_path / f"{process}.npz") as found:
            np.testing.assert_array_equal(found["rows"], samples)
            assert found["count"] == 7 and found["empty"].shape == (0, 2)
            exact = samples.astype(np.float64)
            np.testing.assert_allclose(found["mean"], exact.mean(0), rtol=1e-15)  # no float32 on the way
            np.testing.assert_allclose(found["scatter"] / 6, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)
