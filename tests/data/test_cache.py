import errno
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from sd_jax.config import training_defaults
from sd_jax.data import DataError, cache, cache_shards, captions
from sd_jax.data.buckets import Assignment
from sd_jax.data.cache_shards import Encode
from sd_jax.data.loader import BadFiles, make_loader
from sd_jax.data.sources import open_source, split_held_out
from sd_jax.data.transforms import draws
from sd_jax.media import BadImage

from .conftest import jpeg

KEYS = {"vae": "v", "text_encoder": "t"}
SQUARE, WIDE = (16, 16), (16, 32)


class Pictures:
    """Grey pictures, of which record i has the grey 10 i; every third is wide; two columns of captions."""

    def __init__(self, count=12):
        self.version, self.words, self.broken = 0, "cat", set()
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        if index in self.broken:
            raise BadImage(f"{index:02d}.jpg", "not a picture")
        pixels = np.full((*self.full_size(index), 3), 10 * index, np.uint8)
        return {"pixels": pixels, "fields": self.fields(index), "index": index}

    def sizes(self):
        return np.array([self.full_size(i) for i in range(len(self))])

    def fields(self, index):
        return (f"{self.words} {index}", f"one {self.words}, {index}"), (f"photo of {index}",)

    def full_size(self, index):
        return (20, 40) if index % 3 == 0 else (24, 16)

    def fingerprint(self):
        return f"pictures {len(self)} {self.version}"


class Encoder:
    """Moments [b, h/8, w/8, 8] that tell a picture's grey, states [b, 3, 5] that tell a caption; counts its calls."""

    def __init__(self):
        self.shapes, self.texts = [], []

    def pictures(self, pixels):
        self.shapes.append(pixels.shape)
        grey = pixels[:, ::8, ::8, :1].astype(np.float32)
        return np.repeat(grey, 8, axis=3) + np.arange(8, dtype=np.float32) / 16

    def captions(self, texts):
        self.texts.append(list(texts))
        context = np.stack([states_of(text) for text in texts])
        return context, context[:, 0, :2]


def states_of(text):
    """The same for the same text, [3, 5]; exact in bfloat16."""
    return np.random.default_rng(list(text.encode())).integers(-64, 64, (3, 5)).astype(np.float32)


@pytest.fixture
def config(config):
    config.data.crop, config.data.cache_latents = "centre", True
    config.diffusion.train_text_encoder = False
    return config


@pytest.fixture
def cached(config, tmp_path):
    """() -> (the cached source, the encoder that was handed in)."""

    def make(source=None, latents=True, text=False, keys=KEYS, assignment=None, name="train", **kwargs):
        source, encoder = Pictures() if source is None else source, Encoder()
        encode = Encode(encoder.pictures if latents else None, encoder.captions if text else None)
        if assignment is None:
            assignment = Assignment(((config.data.resolution,) * 2,), np.zeros(len(source), np.int64))
        found = cache.cached(source, name, tmp_path / "cache", config, assignment, encode, keys, **kwargs)
        return found, encoder

    return make


def buckets(count=12):
    """Every third record is wide; record 5 is left out."""
    of_record = np.array([i % 3 == 0 for i in range(count)], np.int64)
    of_record[5] = -1
    return Assignment((SQUARE, WIDE), of_record)


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of two batches of four."""
    monkeypatch.setattr(cache_shards, "_MOST_RECORDS", 8)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# -- What is kept ----------------------------------------------------------------------------------------------------


def test_moments_stand_for_pixels(cached):
    source, encoder = cached()
    assert encoder.shapes == [(4, 16, 16, 3)] * 4  # one of them to see what a record takes
    assert len(source) == 12
    for i in range(12):
        record = source[i]
        assert set(record) == {"moments", "fields", "index"} and record["index"] == i
        assert record["fields"] == source.fields(i) == Pictures().fields(i)
        want = np.broadcast_to(np.float32(10 * i) + np.arange(8, dtype=np.float32) / 16, (2, 2, 8))
        np.testing.assert_array_equal(record["moments"], want, strict=True)
    assert source.full_size(3) == (20, 40) and source.sizes().shape == (12, 2)


def test_what_is_unchanged_is_not_encoded_again(cached):
    first, _ = cached()
    source = Pictures()
    source.words = "dog"  # captions are not in this cache
    again, encoder = cached(source)
    assert encoder.shapes == [] and again[3]["fields"][0][0] == "dog 3" and again.fingerprint() == first.fingerprint()
    np.testing.assert_array_equal(first[3]["moments"], again[3]["moments"])


def test_a_last_batch_is_filled_up(cached, config):
    config.batch_size = 5
    source, encoder = cached()
    assert encoder.shapes == [(5, 16, 16, 3)] * 4
    assert source[11]["moments"].max() == 110 + 7 / 16


def test_every_device_has_a_batch_and_large_pictures_a_smaller_one(cached, config, monkeypatch):
    config.batch_size = 100
    assert cached(name="most")[1].shapes == [(32, 16, 16, 3)] * 2
    monkeypatch.setattr(cache_shards, "_BATCH_PIXELS", 3 * 16 * 16)
    assert cached(name="large")[1].shapes == [(3, 16, 16, 3)] * 5
    monkeypatch.setattr(cache_shards.jax, "local_device_count", lambda: 2)
    assert cached(name="two")[1].shapes == [(6, 16, 16, 3)] * 3


def test_every_size_has_its_shards(cached, tmp_path, small_shards):
    source, encoder = cached(assignment=buckets(24), source=Pictures(24), num_time_ids=6)
    assert set(encoder.shapes) == {(4, *SQUARE, 3), (4, *WIDE, 3)}
    index = json.loads((tmp_path / "cache" / "train" / "index.json").read_text())
    assert [(s["size"], s["records"]) for s in index["shards"]] == [
        ([16, 16], 8),
        ([16, 16], 7),
        ([16, 32], 8),
    ]
    for i in [*range(5), *range(6, 24)]:
        record = source[i]
        assert record["moments"].shape == ((2, 4, 8) if i % 3 == 0 else (2, 2, 8))
        assert record["moments"].min() == 10 * i % 256
        told = (20, 40, 0, 0, 16, 32) if i % 3 == 0 else (24, 16, 4, 0, 16, 16)
        np.testing.assert_array_equal(record["time_ids"], np.array(told, np.float32), strict=True)
    with pytest.raises(BadImage, match="record 5: it was given no size"):
        source[5]


def test_shards_hold_no_more_bytes_than_they_may(cached, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_shards, "_SHARD_BYTES", 4 * (4 * 2 * 2 * 8) + 1)
    cached(assignment=buckets(), source=Pictures())
    index = json.loads((tmp_path / "cache" / "train" / "index.json").read_text())
    assert [s["records"] for s in index["shards"]] == [4, 3, 2, 2]  # wide ones take twice as much


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_of_several_captions(cached, config, dtype):
    config.data.cache_captions, config.dtype, config.seed = 3, dtype, 7
    config.data.tag_separator, config.data.shuffle_tags = ",", True
    source, encoder = cached(text=True)
    assert {len(batch) for batch in encoder.texts} == {4} and len(encoder.shapes) == 4
    pictures, firsts, others = Pictures(), set(), set()
    for i in range(12):
        record, fields = source[i], pictures.fields(i)
        assert set(record) == {"moments", "contexts", "pooleds", "index"}
        assert record["contexts"].shape == (3, 3, 5) and record["pooleds"].shape == (3, 2)
        assert record["contexts"].dtype == record["pooleds"].dtype == np.dtype(dtype)
        for draw in range(3):
            text = captions.choose(fields, config.data, draws(7, i, draw) if draw else None)
            (others if draw else firsts).add(text)
            np.testing.assert_array_equal(record["contexts"][draw].astype(np.float32), states_of(text))
            np.testing.assert_array_equal(record["pooleds"][draw].astype(np.float32), states_of(text)[0, :2])
    assert firsts == {f"cat {i}" for i in range(12)} and len(others) > 12
    assert np.dtype(ml_dtypes.bfloat16).itemsize == 2


def test_text_alone_keeps_pixels(cached, config):
    config.data.cache_latents, config.data.cache_text = False, True
    config.data.crop, config.data.random_flip = "random", True
    source, encoder = cached(latents=False, text=True)
    assert encoder.shapes == []
    record = source[4]
    assert record["fields"] == Pictures().fields(4)
    assert record["pixels"].shape == (24, 16, 3) and record["pixels"].max() == 40 and record["index"] == 4
    np.testing.assert_array_equal(record["contexts"][0], states_of("cat 4"))


def test_an_encoder_without_a_pooled_state(cached, config, tmp_path):
    one = Assignment((SQUARE,), np.zeros(12, np.int64))
    encode = Encode(captions=lambda texts: (np.stack([states_of(text) for text in texts]), None))
    record = cache.cached(Pictures(), "train", tmp_path, config, one, encode, KEYS)[4]
    assert "contexts" in record and "pooleds" not in record


def test_subsets_keep_the_places_of_their_records(cached, config):
    config.data.cache_captions = 2
    _, held_out = split_held_out(Pictures(), 4, seed=0)
    source, encoder = cached(held_out, text=True)
    assert len(source) == 4 and len(encoder.shapes) == 2
    for i in range(4):
        place = source[i]["index"]
        assert place == held_out[i]["index"] and source[i]["moments"].min() == 10 * place
        drawn = captions.choose(held_out.fields(i), config.data, draws(config.seed, place, 1))
        np.testing.assert_array_equal(source[i]["contexts"], [states_of(f"cat {place}"), states_of(drawn)])
    nothing = split_held_out(Pictures(), 0.0, seed=0)[1]
    assert cached(nothing, name="none")[0] is nothing


def test_hash_of_weights():
    a = {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)}
    others = [{"a": a["b"], "b": a["a"]}, {"a": a["a"], "c": a["b"]}, {**a, "b": np.zeros(3, np.float16)}]
    others.append({**a, "b": np.array([0, 0, -0.0], np.float32)})
    assert cache.hash_weights(dict(a)) == cache.hash_weights(a)
    assert len({cache.hash_weights(tree) for tree in [a, *others]}) == 5


# -- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("vae", r"another vae \(its weights have changed\)"),
        ("text_encoder", r"another text_encoder \(its weights have changed\)"),
        ("data.resolution", r"other sizes of its pictures \(config.data.resolution was 16, is 24\)"),
        ("batch_size", r"other sizes of its pictures \(config.batch_size was 4, is 8\)"),
        ("records", r"other pictures \(some were added, removed or changed\)"),
        ("more", r"other pictures \(some were added, removed or changed\)"),
        ("words", "other captions"),
        ("data.caption_weights", r"other captions \(config.data.caption_weights was \[\], is \[0.0, 1.0\]\)"),
        ("data.cache_captions", r"other captions \(config.data.cache_captions was 1, is 2\)"),
        ("diffusion.clip_skip", r"other captions \(config.diffusion.clip_skip was 0, is 2\)"),
        ("dtype", r"another type of numbers \(config.dtype was float32, is bfloat16\)"),
        ("transforms", r"another version of sd_jax \(what it does to pictures has changed\)"),
        ("clip_text", r"another version of sd_jax \(what it does to captions has changed\)"),
        ("text_encoder_2", r"another text_encoder_2 \(its weights have changed\)"),
        ("time_ids", r"another model \(it reads other numbers of sizes and crops\)"),
        ("no text", "text"),
        ("vae and dtype", r"another type of numbers \(config.dtype was .*\), another vae \(its weights have changed\)"),
    ],
)
def test_what_has_changed_is_refused_by_name(cached, config, tmp_path, monkeypatch, change, said):
    cached(text=True)
    before = contents(tmp_path / "cache" / "train")
    source, options = Pictures(), {"text": True, "keys": dict(KEYS)}
    for part in {"vae", "text_encoder", "text_encoder_2"} & set(change.split()):
        options["keys"][part] = "other"
    if change in ("records", "words"):
        source.version, source.words = (1, "cat") if change == "records" else (0, "dog")
    elif change == "more":
        source = Pictures(13)
    elif change == "batch_size":
        config.batch_size = 8
        options["assignment"] = Assignment((SQUARE, WIDE), np.arange(12) % 2)
    elif change in ("transforms", "clip_text"):
        code_of = cache.fingerprints.code_of
        other = lambda *files: code_of(*files) + change * any(change in file for file in files)  # noqa: E731
        monkeypatch.setattr(cache.fingerprints, "code_of", other)
    elif change == "time_ids":
        options["num_time_ids"] = 6
    elif change == "no text":
        options["text"] = False
    values = {"data.resolution": 24, "data.caption_weights": (0.0, 1.0), "data.cache_captions": 2}
    for key, value in {**values, "diffusion.clip_skip": 2, "dtype": "bfloat16"}.items():
        if key in change:
            *path, last = key.split(".")
            inner = config
            for part in path:
                inner = inner[part]
            inner[last] = value
    mend = "remove the folder to encode again, or set config.data.cache_dir to another"
    with pytest.raises(DataError, match=f"cache/train: was made with {said}: {mend}$"):
        cached(source, **options)
    assert contents(tmp_path / "cache" / "train") == before


def test_changes_that_do_not_matter(cached, config):
    cached()
    config.batch_size, config.data.caption_weights, config.seed = 2, (0.0, 1.0), 5
    config.data.cache_captions, config.diffusion.clip_skip = 3, 2
    assert cached(keys={**KEYS, "text_encoder": "other"})[1].shapes == []
    config.data.cache_latents, config.data.cache_captions = False, 1
    cached(latents=False, text=True, name="text")
    config.data.resolution, config.data.shuffle_tags, config.seed = 64, True, 6  # draw 0 has no chance in it
    assert cached(latents=False, text=True, name="text", keys={**KEYS, "vae": "other"})[1].texts == []


def test_a_cache_of_text_holds_no_latents(cached):
    cached(latents=False, text=True)
    with pytest.raises(DataError, match="was made with no latents: remove"):
        cached(text=True)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"made_from": {}}'])
def test_a_damaged_index_is_one_clear_error(cached, tmp_path, text):
    cached()
    (tmp_path / "cache" / "train" / "index.json").write_text(text)
    with pytest.raises(DataError, match=r"index.json: damaged .*: remove the folder"):
        cached()


def test_shards_of_nobody_are_not_written_over(cached, tmp_path):
    cached()
    (tmp_path / "cache" / "train" / "index.json").unlink()
    with pytest.raises(DataError, match=r"cache/train: holds shards and no index.json: remove the folder"):
        cached()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("crop", "random", r"config.data.cache_latents and config.data.crop='random' exclude .*crop='centre'"),
        ("random_flip", True, r"config.data.cache_latents and config.data.random_flip=True .*random_flip=False"),
    ],
)
def test_what_cannot_be_cached(cached, config, tmp_path, key, value, said):
    config.data[key] = value
    with pytest.raises(ValueError, match=said):
        cached()
    assert not (tmp_path / "cache").exists()


def test_an_autoencoder_reads_pictures():
    config = training_defaults("autoencoder")
    cache.check(config)
    config.data.cache_latents, config.data.crop = True, "centre"
    with pytest.raises(ValueError, match="config.data.cache_latents is for methods that train on latents"):
        cache.check(config)


# -- Interruptions, processes, disks ---------------------------------------------------------------------------------


def test_interrupted_encoding_goes_on_where_it_stopped(cached, config, tmp_path, small_shards):
    source = Pictures(24)
    config.data.num_workers = 2
    options = {"text": True, "assignment": buckets(24), "num_time_ids": 5}
    cached(source, **options)
    folder = tmp_path / "cache" / "train"
    want = contents(folder)
    shutil.rmtree(folder)

    class Interrupted(Pictures):
        def __getitem__(self, index):
            if index == 21:  # of the last shard
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        cached(Interrupted(24), **options)
    done = contents(folder)
    assert sorted(done) == ["00000.safetensors", "00001.safetensors", "index.json"]
    with pytest.raises(DataError, match="another vae"):  # half of a cache is refused as a whole one is
        cached(source, **{**options, "keys": {**KEYS, "vae": "other"}})
    _, encoder = cached(source, **options)
    assert encoder.shapes == [(4, *WIDE, 3)] * 2
    assert contents(folder) == want and {name: want[name] for name in done} == done


def test_processes_share_the_work(cached, tmp_path, small_shards, monkeypatch):
    barrier, passed = threading.Barrier(2), []

    def one(process):
        return cached(Pictures(24), assignment=buckets(24), process_index=process, process_count=2)

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(cache.distributed, "barrier", lambda name: passed.append(name) or barrier.wait(timeout=60))
        (first, mine), (second, yours) = pool.map(one, range(2))
    assert mine.shapes == [(4, *SQUARE, 3)] * 3 + [(4, *WIDE, 3)] * 2  # shards 0 and 2, and a first look
    assert yours.shapes == [(4, *SQUARE, 3)] * 2
    assert sorted(passed) == ["cache train: index"] * 2 + ["cache train: shards"] * 2
    for i in (0, 1, 23):
        np.testing.assert_array_equal(first[i]["moments"], second[i]["moments"])
    shared = contents(tmp_path / "cache" / "train")
    cached(Pictures(24), assignment=buckets(24), name="alone")
    assert contents(tmp_path / "cache" / "alone") == shared

    # Disks that are not one: what process 1 should have made is not here
    monkeypatch.setattr(cache, "_PATIENCE", 0.1)
    with pytest.raises(DataError, match=r"00001.safetensors: is not here.*config.data.cache_dir must be one folder"):
        cached(Pictures(24), assignment=buckets(24), name="mine", process_index=0, process_count=2)


@pytest.mark.parametrize("what", ["index.json", "00001.safetensors"])
def test_a_full_disk_is_one_clear_error(cached, tmp_path, small_shards, monkeypatch, what):
    write, written = cache_shards.write, []

    def full(*arguments):
        written.append(arguments)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    def no_text(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if what == "index.json":
            patch.setattr("pathlib.Path.write_text", no_text)
        else:
            patch.setattr(cache_shards, "write", full)
        with pytest.raises(OSError, match=f"No space left on device.*cache/train/{what}"):
            cached()
    folder = tmp_path / "cache" / "train"
    assert sorted(contents(folder)) == ([] if what == "index.json" else ["00000.safetensors", "index.json"])
    source, encoder = cached()
    assert len(encoder.shapes) == (4 if what == "index.json" else 1) and source[11]["moments"].min() == 110


# -- What is damaged -------------------------------------------------------------------------------------------------


def test_bad_files_stay_bad(cached):
    source = Pictures()
    source.broken = {5}
    for _ in range(2):  # made, and found
        found, _ = cached(source, text=True)
        with pytest.raises(BadImage, match=r"05\.jpg: not a picture"):
            found[5]
        assert found[6]["moments"].min() == 60


def test_latents_that_are_not_finite_are_bad(config, tmp_path):
    one = Assignment((SQUARE,), np.zeros(12, np.int64))
    encode = Encode(lambda pixels: np.where(pixels[:, :2, :2, :1] == 70, np.float32(np.nan), np.float32(1)))
    found = cache.cached(Pictures(), "train", tmp_path, config, one, encode, KEYS)
    with pytest.raises(BadImage, match="record 7: its latents in float32 are not finite"):
        found[7]
    assert found[8]["moments"].min() == 1


def test_mostly_bad_files_end_the_run(cached):
    source = Pictures()
    source.broken = set(range(12))
    with pytest.raises(DataError, match="not one of 12 pictures"):
        cached(source)


@pytest.mark.parametrize("damage", ["cut", "header", "missing", "replaced", "another's", "other records"])
def test_a_damaged_shard_is_named(cached, tmp_path, small_shards, damage):
    source, _ = cached()
    folder = tmp_path / "cache" / "train"
    shard = folder / "00000.safetensors"
    whole = shard.read_bytes()
    said = {
        "cut": "cut short",
        "header": "not a safetensors file",
        "missing": "it is gone",
        "replaced": "changed since it was opened",
        "another's": "it is another cache's",
        "other records": "it holds other records",
    }[damage]
    if damage == "cut":
        shard.write_bytes(whole[:-100])
    elif damage == "header":
        shard.write_bytes(whole[:9] + b"\0" * 20 + whole[29:])
    elif damage == "missing":
        shard.unlink()
    elif damage == "replaced":
        source[0]
        shard.write_bytes(whole)
    elif damage == "another's":
        cached(name="other", keys={**KEYS, "vae": "other"})
        shard.write_bytes((tmp_path / "cache" / "other" / shard.name).read_bytes())
    else:
        shard.write_bytes((folder / "00001.safetensors").read_bytes())
    counter = BadFiles(12)
    for i in range(8):
        with pytest.raises(BadImage, match=f"00000.safetensors: .*{said}.*remove the file") as caught:
            source[i]
        counter.bad(caught.value)
    assert list(counter.names) == [str(shard)]
    assert source[8]["moments"].min() == 80  # of the other shard
    shard.unlink(missing_ok=True)
    again, encoder = cached()  # the mend
    assert len(encoder.shapes) == 2 and shard.read_bytes() == whole and again[0]["moments"].min() == 0


def test_a_flipped_bit_costs_one_record(cached, tmp_path):
    source, _ = cached(text=True, num_time_ids=6)
    shard = tmp_path / "cache" / "train" / "00000.safetensors"
    whole = shard.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    sizes = {"records": 12 * 8, "moments": 12 * 128, "contexts": 12 * 60, "pooleds": 12 * 8, "time_ids": 12 * 24}
    assert len(whole) == begin + sum(sizes.values()) + 12 * 4  # and the checksums
    found = set()
    for at in range(begin + 12 * 8, len(whole), 151):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        source, _ = cached(text=True, num_time_ids=6)
        bad = []
        for i in range(12):
            try:
                source[i]
            except BadImage as error:
                assert error.name == str(shard) and "not those that were written" in error.reason
                bad.append(i)
        assert len(bad) == 1, at
        found |= set(bad)
    assert len(found) > 6


def test_many_threads_read_at_once(cached, small_shards):
    source, _ = cached(Pictures(24), text=True)
    order = np.random.default_rng(0).integers(0, 24, 200)
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(lambda i: source[int(i)], order))
    for i, record in zip(order, records, strict=True):
        assert record["index"] == i and record["moments"].min() == 10 * i
        np.testing.assert_array_equal(record["contexts"][0], states_of(f"cat {i}"))


# -- The loader, and real data -----------------------------------------------------------------------------------------


def test_batches(cached, config, small_shards):
    source, assignment = Pictures(24), buckets(24)
    source.broken = {4}
    found, _ = cached(source, text=True, assignment=assignment, num_time_ids=6)
    loader = make_loader(found, None, config, assignment)
    for _ in range(20):
        batch = next(loader)
        wide = batch["moments"].shape[2] == 4
        assert set(batch) == {"moments", "context", "pooled", "time_ids", "index"} and not {4, 5} & set(batch["index"])
        for i, moments, context, told in zip(*map(batch.get, ("index", "moments", "context", "time_ids")), strict=True):
            assert (i % 3 == 0) == wide and moments.min() == 10 * i and told[3] == 0
            np.testing.assert_array_equal(context, states_of(f"cat {i}"))
    assert list(loader.bad_files.names) == ["04.jpg"]
    loader.close()


def test_a_damaged_shard_is_counted_once_by_the_loader(cached, config, tmp_path, small_shards):
    found, _ = cached(Pictures(24))
    shard = tmp_path / "cache" / "train" / "00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    loader = make_loader(found, lambda texts: np.zeros((len(texts), 3), np.int32), config)
    seen = np.concatenate([next(loader)["index"] for _ in range(12)])
    loader.close()
    assert list(loader.bad_files.names) == [str(shard)] and "cut short" in loader.bad_files.names[str(shard)]
    assert set(seen) == {*range(8), *range(16, 24)}


def test_photographs(cached, config, photos):
    config.data.path = str(photos)
    (photos / "05.jpg").write_bytes(b"words")
    found, _ = cached(open_source(config))
    np.testing.assert_allclose(found[3]["moments"].mean((0, 1))[0], 30, atol=1)
    with pytest.raises(BadImage, match=r"05\.jpg: not a picture"):
        found[5]
    (photos / "03.jpg").write_bytes(jpeg(20))
    with pytest.raises(DataError, match="was made with other pictures"):
        cached(open_source(config))
