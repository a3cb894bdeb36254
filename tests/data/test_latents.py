import errno
import json
import os

import numpy as np
import pytest

from sd_jax.data import DataError, latents
from sd_jax.data.latents import cache_moments, hash_weights
from sd_jax.data.loader import fixed_batches, make_loader
from sd_jax.data.sources import open_source, split_held_out
from sd_jax.media import BadImage

from .conftest import jpeg

WEIGHTS = {"encoder": {"kernel": np.ones((2, 2), np.float32)}}


class Encoder:
    """Moments [b, 2, 2, 8] that tell the picture's grey; counts what it is asked for."""

    def __init__(self):
        self.shapes = []

    def __call__(self, pixels):
        self.shapes.append(pixels.shape)
        return np.broadcast_to(pixels.mean((1, 2, 3), keepdims=True), (len(pixels), 2, 2, 8)).astype(np.float32)


@pytest.fixture
def cached(config, photos, tmp_path):
    """() -> (the cached source, the encoder that was handed in), on twelve photographs."""
    config.data.path = str(photos)

    def cache(weights=WEIGHTS, source=None, num_time_ids=0):
        encoder = Encoder()
        source = open_source(config) if source is None else source
        folder = tmp_path / "latents"
        return cache_moments(source, "train", encoder, weights, folder, config, num_time_ids), encoder

    return cache


def test_moments_stand_for_pixels(cached):
    source, encoder = cached()
    assert encoder.shapes == [(4, 16, 16, 3)] * 3 and len(source) == 12
    for i in range(12):
        record = source[i]
        assert set(record) == {"moments", "caption", "index"} and record["index"] == i
        assert record["caption"] == f"picture {i}" and source.texts(i) == (f"picture {i}",)
        assert record["moments"].shape == (2, 2, 8) and record["moments"].dtype == np.float32
        np.testing.assert_allclose(record["moments"], 10 * i, atol=1)


def test_a_last_batch_is_filled_up(cached, config):
    config.batch_size = 5
    source, encoder = cached()
    assert encoder.shapes == [(5, 16, 16, 3)] * 3
    np.testing.assert_allclose(source[11]["moments"], 110, atol=1)


def test_what_is_unchanged_is_not_encoded_again(cached, photos, tmp_path):
    cached()
    (photos / "03.txt").write_text("another caption")
    source, encoder = cached()
    assert encoder.shapes == [] and source.texts(3) == ("another caption",)
    assert sorted(os.listdir(tmp_path / "latents")) == ["train.json", "train.npy"]


@pytest.mark.parametrize("change", ["weights", "picture", "resolution", "number", "code", "crash"])
def test_what_has_changed_is_encoded_again(cached, config, photos, tmp_path, monkeypatch, caplog, change):
    first, _ = cached()
    weights = WEIGHTS
    if change == "weights":
        weights = {"encoder": {"kernel": np.full((2, 2), 1.0000001, np.float32)}}
    elif change == "picture":
        (photos / "03.jpg").write_bytes(jpeg(20))
    elif change == "resolution":
        config.data.resolution = 24
    elif change == "number":
        (photos / "03.jpg").unlink()
    elif change == "code":
        monkeypatch.setattr(latents.fingerprints, "code_of", lambda *files: "other code")
    elif change == "crash":  # between the moments and the file that vouches for them
        (tmp_path / "latents" / "train.json").unlink()
    again, encoder = cached(weights)
    assert len(encoder.shapes) == 3 and again.fingerprint() != first.fingerprint() or change == "crash"
    assert ("stale" in caplog.text) == (change != "crash")
    if change == "picture":
        np.testing.assert_allclose(again[3]["moments"], 200, atol=1)
        np.testing.assert_allclose(first[3]["moments"], 30, atol=1)  # who reads the old one still can


def test_hash_of_weights():
    a = {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)}
    others = [{"a": a["b"], "b": a["a"]}, {"a": a["a"], "c": a["b"]}, {**a, "b": np.zeros(3, np.float16)}]
    others.append({**a, "b": np.array([0, 0, -0.0], np.float32)})
    assert hash_weights(dict(a)) == hash_weights(a)
    assert len({hash_weights(tree) for tree in [a, *others]}) == 5


def test_bad_files_stay_bad(cached, photos, caplog, config):
    (photos / "05.jpg").write_bytes(b"words")
    for _ in range(2):  # made, and found
        source, _ = cached()
        with pytest.raises(BadImage, match=r"05\.jpg: not a picture"):
            source[5]
        np.testing.assert_allclose(source[6]["moments"], 60, atol=1)
    loader = make_loader(source, None, config)
    seen = np.concatenate([next(loader)["index"] for _ in range(11)])
    loader.close()
    assert sorted(set(seen)) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11] and len(loader.bad_files.names) == 1


def test_mostly_bad_files_end_the_run(cached, photos, tmp_path):
    for i in range(12):
        (photos / f"{i:02d}.jpg").write_bytes(b"words")
    with pytest.raises(DataError, match="not one of 12 pictures"):
        cached()
    assert os.listdir(tmp_path / "latents") == []


def test_batches_of_moments(cached, config):
    loader = make_loader(cached()[0], lambda captions: np.zeros((len(captions), 3), np.int32), config)
    batch = next(loader)
    loader.close()
    assert {name: x.shape for name, x in batch.items()} == {
        "moments": (4, 2, 2, 8),
        "input_ids": (4, 3),
        "index": (4,),
    }
    np.testing.assert_allclose(batch["moments"][:, 0, 0, 0], 10 * batch["index"], atol=1)
    assert next(fixed_batches(cached()[0], None, config))["moments"].shape == (4, 2, 2, 8)


def test_moments_keep_what_a_model_is_told_of_them(cached, config, photos, tmp_path):
    (photos / "04.jpg").write_bytes(jpeg(4, 64, 32))
    (photos / "05.jpg").write_bytes(b"words")
    source, encoder = cached(num_time_ids=6)
    assert len(encoder.shapes) == 3
    np.testing.assert_array_equal(source[0]["time_ids"], np.array([40, 48, 0, 2, 16, 16], np.float32), strict=True)
    np.testing.assert_array_equal(source[4]["time_ids"], [64, 32, 8, 0, 16, 16])
    assert sorted(os.listdir(tmp_path / "latents")) == ["train.json", "train.npy", "train.time_ids.npy"]
    loader = make_loader(source, None, config, num_time_ids=6)
    batch = next(loader)
    loader.close()
    np.testing.assert_array_equal(batch["time_ids"], [source[int(i)]["time_ids"] for i in batch["index"]])
    again, encoder = cached(num_time_ids=6)
    assert encoder.shapes == []
    np.testing.assert_array_equal(again[4]["time_ids"], source[4]["time_ids"])
    (tmp_path / "latents" / "train.time_ids.npy").unlink()
    assert len(cached(num_time_ids=6)[1].shapes) == 3
    refiner, encoder = cached(num_time_ids=5)
    assert len(encoder.shapes) == 3 and refiner[4]["time_ids"].tolist() == [64, 32, 8, 0, 6]
    plain, encoder = cached()
    assert len(encoder.shapes) == 3 and "time_ids" not in plain[0]


def test_subsets_keep_the_places_of_their_records(cached, config):
    train, held_out = split_held_out(open_source(config), 4, seed=0)
    source, encoder = cached(source=held_out)
    assert len(source) == 4 and len(encoder.shapes) == 1
    for i in range(4):
        assert source[i]["index"] == held_out[i]["index"]
        np.testing.assert_allclose(source[i]["moments"], 10 * source[i]["index"], atol=1)
    assert cached(source=split_held_out(open_source(config), 0.0, seed=0)[1])[1].shapes == []


def test_shapes_world_is_drawn_once_for_its_captions(config, tmp_path):
    source = open_source(config)
    moments = cache_moments(source, "train", Encoder(), WEIGHTS, tmp_path, config)
    assert moments.texts(2) == source.texts(2) and moments[2]["caption"] == source[2]["caption"]


def test_flips_cannot_be_cached(cached, config):
    config.data.random_flip = True
    with pytest.raises(ValueError, match="data.random_flip and data.cache_latents exclude each other"):
        cached()


def test_a_full_disk_is_one_clear_error(cached, monkeypatch, tmp_path):
    cached()
    (tmp_path / "latents" / "train.json").write_text(json.dumps({"key": "old", "bad": {}}))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(OSError, match="No space left on device; the latents of 12 pictures.*train.npy"):
        cached()
    assert os.listdir(tmp_path / "latents") == ["train.npy"]  # the old one, and nothing that vouches for it
