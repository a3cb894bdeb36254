"""LoRAs made of weights and of one another, against what the whole matrices say."""

import numpy as np
import pytest

from sd_jax.adapters import algebra, deltas
from sd_jax.checkpoints import adapter_entries, keys_peft
from tests.checkpoints.tiny import SPEC
from tests.checkpoints.tiny_adapters import random_layers

SHAPES = keys_peft.shapes_of(SPEC)
ONE = {"unet": {"a": (10, 12)}}
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def delta_of(entry, shape):
    return np.asarray(deltas.delta(entry, shape))


def test_extraction_finds_the_lora_that_was_merged():
    base = {"unet": {"a": normal(12, 20), "b": normal(8, 6, 3, 3), "same": normal(4, 4)}}
    low = {"a": normal(12, 3) @ normal(3, 20), "b": (normal(8, 2) @ normal(2, 54)).reshape(8, 6, 3, 3)}
    tuned = {"unet": {name: weight + low.get(name, 0) for name, weight in base["unet"].items()}}
    layers = algebra.extract(base, tuned, rank=3, conv_rank=2)
    assert set(layers["unet"]) == {"a", "b"}
    assert layers["unet"]["b"]["lora_down"].shape == (2, 6, 3, 3) and layers["unet"]["b"]["lora_up"].shape == (
        8,
        2,
        1,
        1,
    )
    for name, entry in layers["unet"].items():
        np.testing.assert_allclose(delta_of(entry, low[name].shape), low[name], atol=1e-4)
        assert float(entry["alpha"]) == deltas.rank_of(entry)
    assert set(algebra.extract(base, tuned, rank=3)["unet"]) == {
        "a"
    }  # without a rank for them, larger kernels are left
    worse = algebra.extract(base, tuned, rank=1)["unet"]["a"]
    singular = np.linalg.svd(low["a"], compute_uv=False)
    error = np.linalg.norm(delta_of(worse, (12, 20)) - low["a"])
    np.testing.assert_allclose(error, np.linalg.norm(singular[1:]), rtol=1e-4)  # (Eq. 1) is the best there is
    with pytest.raises(ValueError, match="the two models have the same weights"):
        algebra.extract(base, base, rank=3)
    with pytest.raises(ValueError, match="rank=0: at least 1 is needed"):
        algebra.extract(base, tuned, rank=0)


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
def test_resizing_keeps_the_largest_singular_values(algorithm):
    layers = random_layers(SPEC, algorithm)
    resized = algebra.resize(layers, SHAPES, rank=2)
    checked = 0
    for part, entries in layers.items():
        for path, entry in entries.items():
            made = resized[part][path]
            if deltas.rank_of(entry) is None:
                assert made is entry
                continue
            shape = SHAPES[part][path]
            whole, after = delta_of(entry, shape), delta_of(made, shape)
            singular = np.linalg.svd(whole.reshape(shape[0], -1), compute_uv=False)
            np.testing.assert_allclose(
                np.linalg.norm(after - whole), np.linalg.norm(singular[2:]), rtol=1e-3, atol=1e-4 * singular[0]
            )
            assert adapter_entries.algorithm(made) == "lora" and deltas.rank_of(made) <= 2
            checked += 1
    assert checked > 5


def test_resizing_by_a_share_takes_as_many_as_hold_it():
    u, _ = np.linalg.qr(normal(10, 4))
    v, _ = np.linalg.qr(normal(12, 4))
    values = np.array([4.0, 2.0, 1.0, 0.5], np.float32)  # squares: 16, 4, 1, 0.25 of 21.25
    entry = {"lora_up": (u * values).astype(np.float32), "lora_down": v.T.astype(np.float32), "alpha": np.float32(4)}
    ranks = [
        deltas.rank_of(algebra.resize({"unet": {"a": entry}}, ONE, share=share)["unet"]["a"])
        for share in (0.7, 0.9, 0.95, 1.0)
    ]
    assert ranks == [1, 2, 3, 4]
    for arguments in ({}, {"rank": 2, "share": 0.5}):
        with pytest.raises(ValueError, match="give a rank or a share, one of the two"):
            algebra.resize({"unet": {"a": entry}}, ONE, **arguments)
    with pytest.raises(ValueError, match="share=1.5: more than 0 and at most 1"):
        algebra.resize({"unet": {"a": entry}}, ONE, share=1.5)


@pytest.mark.parametrize("second", ["lora", "loha", "lokr"])
def test_a_merged_one_does_what_both_do(second):
    first, other = random_layers(SPEC, "lora"), random_layers(SPEC, second)
    merged = algebra.merge([(first, 0.7), (other, -0.4)], SHAPES)
    checked = 0
    for part in first:
        for path in set(first[part]) | set(other.get(part, {})):
            entries = [(a[part][path], t) for a, t in ((first, 0.7), (other, -0.4)) if path in a.get(part, {})]
            if any(deltas.rank_of(entry) is None for entry, _ in entries):
                continue
            shape = SHAPES[part][path]
            wanted = sum(t * delta_of(entry, shape) for entry, t in entries)
            np.testing.assert_allclose(delta_of(merged[part][path], shape), wanted, atol=1e-4 * np.abs(wanted).max())
            checked += 1
    assert checked > 5
    if second == "lora":
        entry = next(iter(merged["unet"].values()))
        assert adapter_entries.algorithm(entry) == "lora"
    low = algebra.merge([(first, 0.7), (other, -0.4)], SHAPES, rank=1)
    ranks = {deltas.rank_of(e) for entries in low.values() for e in entries.values()}
    assert ranks <= {1, None} and 1 in ranks


def test_dora_is_refused():
    entry = {"lora_down": normal(2, 6), "lora_up": normal(4, 2), "alpha": np.float32(2), "dora_scale": normal(4, 1)}
    for function in (
        lambda: algebra.resize({"unet": {"a": entry}}, ONE, rank=1),
        lambda: algebra.merge([({"unet": {"a": entry}}, 1.0)], ONE),
    ):
        with pytest.raises(ValueError, match="merge it into a model, then extract"):
            function()
