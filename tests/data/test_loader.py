import functools
import itertools
import json
import threading

import numpy as np
import pytest

from sd_jax.data import DataError, buckets
from sd_jax.data.loader import BadFiles, fixed_batches, make_loader, prefetch
from sd_jax.data.sources import assign_sizes, open_source, split_held_out
from sd_jax.media import BadImage

from .conftest import jpeg


def tokenize(captions):
    """Each caption's letters, eight at most."""
    ids = np.zeros((len(captions), 8), np.int32)
    for row, caption in zip(ids, captions, strict=True):
        row[: len(caption)] = [ord(letter) for letter in caption[:8]]
    return ids


def take(loader, count):
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], strict=True)


def indices(batches):
    return np.concatenate([batch["index"] for batch in batches])


class Kept:
    """What is left of a source where its pictures have been encoded."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        record = self.source[index]
        return {"moments": np.zeros((2, 2, 8), np.float32), "fields": record["fields"], "index": record["index"]}

    def fields(self, index):
        return self.source.fields(index)

    def sizes(self):
        return self.source.sizes()

    def full_size(self, index):
        return self.source.full_size(index)

    def fingerprint(self):
        return self.source.fingerprint()


class Encoded(Kept):
    """Records without pictures: moments that tell their number, and states of three captions that tell theirs."""

    def __init__(self, count, pooled=True):
        super().__init__(range(count))
        self.pooled = pooled

    def __getitem__(self, index):
        numbers = np.arange(3, dtype=np.float32) + 10 * index
        record = {"moments": np.full((2, 3, 8), index, np.float32), "time_ids": np.full(6, index, np.float32)}
        record |= {"contexts": np.broadcast_to(numbers[:, None, None], (3, 7, 4)), "index": index}
        return {**record, "pooleds": np.broadcast_to(numbers[:, None], (3, 5))} if self.pooled else record


@pytest.fixture
def broken_photos(photos):
    """Three of twelve pictures are broken."""
    (photos / "02.jpg").write_bytes(b"")
    (photos / "07.jpg").write_bytes(b"these are words")
    (photos / "11.jpg").write_bytes(jpeg(11)[:200])
    return photos


# -- Batches ---------------------------------------------------------------------------------------------------------


def test_what_is_in_a_batch(config, photos):
    config.data.path = str(photos)
    (batch,) = take(make_loader(open_source(config), tokenize, config), 1)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        "pixels": ((4, 16, 16, 3), np.uint8),
        "input_ids": ((4, 8), np.int32),
        "index": ((4,), np.int64),
    }
    np.testing.assert_array_equal(np.round(batch["pixels"].mean((1, 2, 3)) / 10), batch["index"])
    np.testing.assert_array_equal(batch["input_ids"], tokenize([f"picture {i}" for i in batch["index"]]))


def test_without_a_tokenizer_there_are_no_ids(config):
    (batch,) = take(make_loader(open_source(config), None, config), 1)
    assert set(batch) == {"pixels", "index"}


def test_a_model_of_sizes_and_crops_is_told_of_them(config, tmp_path):
    """Pictures whose columns are numbered, 300 and more: a JPEG is decoded smaller, and its true size is told."""
    from PIL import Image

    folder = tmp_path / "wide"
    folder.mkdir()
    columns = np.linspace(0, 240, 480).astype(np.uint8)
    pixels = np.broadcast_to(columns[None, :, None], (320, 480, 3)).copy()
    for i in range(3):
        Image.fromarray(pixels[: 320 - i]).save(folder / f"{i}.jpg", quality=95)
    config.data.path, config.data.random_flip = str(folder), True
    batches = take(make_loader(open_source(config), None, config, num_time_ids=6), 8)
    lefts = set()
    for batch in batches:
        ids = batch["time_ids"]
        assert ids.dtype == np.float32 and ids.shape == (4, 6)
        np.testing.assert_array_equal(ids[:, 0], 320 - batch["index"])
        np.testing.assert_array_equal(ids[:, [1, 2, 4, 5]], np.broadcast_to([480, 0, 16, 16], (4, 4)))
        for row, picture in zip(ids, batch["pixels"], strict=True):
            mirrored = picture[8, 0, 0] > picture[8, -1, 0]
            first = picture[8, -1 if mirrored else 0, 0].astype(int) / 10  # of 24 columns, in the picture as it is
            left = 24 - 16 - row[3] if mirrored else row[3]
            assert abs(first - left) < 1.1
            lefts.add(int(row[3]))
    assert len(lefts) > 4
    (fixed, *_) = fixed_batches(open_source(config), None, config, num_time_ids=5)
    np.testing.assert_array_equal(fixed["time_ids"][0], [320, 480, 0, 4, 6])


def test_what_is_told_changes_no_picture(config, photos):
    config.data.path = str(photos)
    with_ids = take(make_loader(open_source(config), tokenize, config, num_time_ids=6), 4)
    assert all(set(batch) == {"pixels", "input_ids", "index", "time_ids"} for batch in with_ids)
    for batch in with_ids:
        del batch["time_ids"]
    same(with_ids, take(make_loader(open_source(config), tokenize, config), 4))


def test_every_epoch_is_a_new_shuffle_of_everything(config):
    config.data.num_examples = 12
    epochs = indices(take(make_loader(open_source(config), None, config), 9)).reshape(3, 12)
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    config.seed = 1
    other = indices(take(make_loader(open_source(config), None, config), 3))
    assert tuple(other) != tuple(epochs[0])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_records_than_a_batch(config, count):
    config.data.num_examples = count
    batches = take(make_loader(open_source(config), tokenize, config), 3)
    assert np.bincount(indices(batches)).tolist() == [12 // count] * count


def test_workers_change_nothing(config, broken_photos):
    config.data.path = str(broken_photos)
    config.data.random_flip = True
    alone = take(make_loader(open_source(config), tokenize, config), 10)
    for config.data.num_workers in (1, 3):
        same(take(make_loader(open_source(config), tokenize, config), 10), alone)


def test_processes_share_the_global_batch(config):
    config.data.num_examples = 7
    whole = take(make_loader(open_source(config), tokenize, config), 6)
    for count in (2, 4):
        parts = [take(make_loader(open_source(config), tokenize, config, None, i, count), 6) for i in range(count)]
        same(
            [{name: np.concatenate([p[name] for p in at]) for name in at[0]} for at in zip(*parts, strict=True)], whole
        )
    with pytest.raises(ValueError, match="batch_size=4 does not divide into 3"):
        make_loader(open_source(config), tokenize, config, None, 0, 3)


def test_batches_of_several_sizes(config):
    """Shapes world of three aspects: each batch has one size, and each record comes once an epoch."""
    config.data.update(num_examples=30, aspects=(1.0, 2.0, 0.5), resolution=32)
    config.data.buckets.step = 8
    config.data.random_flip = True
    source = open_source(config)
    loader = make_loader(source, tokenize, config, num_time_ids=6)
    assert loader.sizes == ((40, 24), (32, 32), (24, 40))
    whole = take(loader, 7)
    sizes = [batch["pixels"].shape[1:3] for batch in whole]
    assert set(sizes) == set(loader.sizes) and sizes != sorted(sizes)
    assert np.sort(indices(whole)).tolist() == sorted(set(indices(whole)))
    assert len(set(indices(whole))) == 28
    for batch, size in zip(whole, sizes, strict=True):
        np.testing.assert_array_equal(batch["time_ids"][:, 4:], np.broadcast_to(np.float32(size), (4, 2)))
        np.testing.assert_array_equal(batch["time_ids"][:, :2], [source.world.size(i) for i in batch["index"]])
    # An assignment is made once and handed on; processes share it
    assignment = assign_sizes(source, config)
    parts = [take(make_loader(source, tokenize, config, assignment, i, 2, None, 6), 7) for i in range(2)]
    same([{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*parts, strict=True)], whole)
    (fixed, *_) = fixed_batches(source, tokenize, config)
    assert fixed["pixels"].shape == (4, 32, 32, 3)


def test_what_is_left_out_never_comes(config, photos):
    for i in (3, 8):
        (photos / f"{i:02d}.jpg").write_bytes(jpeg(i, 12, 40))
    (photos / "05.jpg").write_bytes(b"")
    config.data.path, config.data.upscale = str(photos), False
    loader = make_loader(open_source(config), None, config)
    assert set(indices(take(loader, 12))) == set(range(12)) - {3, 5, 8}
    assert not loader.bad_files.names  # its header was not read as a picture's, so it is not in the order


def test_an_assignment_of_other_records_is_refused(config):
    with pytest.raises(ValueError, match="an assignment of 7 records for a source of 10"):
        make_loader(open_source(config), None, config, buckets.one_size(7, config.data))


def test_where_a_picture_is_cut(config, tmp_path):
    from PIL import Image

    columns = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (16, 64, 3)).copy()
    Image.fromarray(columns).save(tmp_path / "a.png")
    config.data.update(path=str(tmp_path), crop="centre", random_flip=True)
    batches = take(make_loader(open_source(config), None, config, num_time_ids=6), 8)
    firsts = np.concatenate([batch["pixels"][:, 0, 0, 0] for batch in batches])
    assert set(firsts) == {24, 39}  # the middle, and the middle mirrored
    assert all((batch["time_ids"][:, 3] == 24).all() for batch in batches)
    config.data.crop = "middle"
    with pytest.raises(ValueError, match="config.data.crop='middle': choose random or centre"):
        make_loader(open_source(config), None, config)


def test_crops_and_flips_differ_between_epochs(config, tmp_path):
    rows = np.arange(64, dtype=np.uint8)
    from PIL import Image

    Image.fromarray(np.broadcast_to(rows[None, :, None], (16, 64, 3)).copy()).save(tmp_path / "a.png")
    config.data.path = str(tmp_path)
    config.data.random_flip = True
    config.batch_size = 1
    batches = take(make_loader(open_source(config), None, config), 40)
    assert len({int(batch["pixels"].min()) for batch in batches}) > 10
    falling = [batch["pixels"][0, 0, 0, 0] > batch["pixels"][0, 0, -1, 0] for batch in batches]
    assert 8 < sum(falling) < 32
    config.data.random_flip = False
    assert all(
        b["pixels"][0, 0, 0, 0] == b["pixels"].min() for b in take(make_loader(open_source(config), None, config), 9)
    )


def test_one_of_several_captions_is_drawn(config, photos):
    (photos / "01.txt").unlink()
    rows = [json.dumps({"file_name": "01.jpg", "text": ["a", "b", "c"]})]
    (photos / "metadata.jsonl").write_text("\n".join(rows))
    config.data.path = str(photos)
    ids = np.concatenate([b["input_ids"] for b in take(make_loader(open_source(config), tokenize, config), 10)])
    assert set(ids[:, 0]) == set(map(ord, "abc"))
    assert next(fixed_batches(open_source(config), tokenize, config))["input_ids"][0, 0] == ord("a")


# -- Resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [1, 3, 8])
def test_resume_is_exact(config, broken_photos, workers, done):
    config.data.path = str(broken_photos)
    config.data.random_flip = True
    config.data.num_workers = workers
    whole = take(make_loader(open_source(config), tokenize, config), 12)
    loader = make_loader(open_source(config), tokenize, config)
    first = [next(loader) for _ in range(done)]
    state = json.loads(json.dumps(loader.get_state()))  # as a checkpoint keeps it
    loader.close()
    rest = take(make_loader(open_source(config), tokenize, config, start_state=state), 12 - done)
    same(first + rest, whole)


def test_the_state_can_be_set_back(config):
    loader = make_loader(open_source(config), tokenize, config)
    start = loader.get_state()
    first = [next(loader) for _ in range(3)]
    loader.set_state(start)
    same(take(loader, 3), first)


def test_changed_data_are_told_of(config, caplog):
    loader = make_loader(open_source(config), None, config)
    next(loader)
    state = loader.get_state()
    loader.close()
    config.data.num_examples = 11
    make_loader(open_source(config), None, config, start_state=state).close()
    assert "had 10 records when the run was saved and have 11 now" in caplog.text


def test_the_state_is_the_count_of_images_in_every_process(config):
    for count in (1, 2, 4):
        for index in range(count):
            loader = make_loader(open_source(config), None, config, None, index, count)
            take(loader, 3)
            assert loader.get_state() == {"images": 12, "num_records": 10}


def test_resume_with_several_sizes_and_another_number_of_processes(config):
    config.data.num_workers = 1
    source, assignment = Encoded(26), buckets.Assignment(((16, 16), (8, 32)), np.repeat([0, 1], [14, 12]))
    load = functools.partial(make_loader, source, None, config, assignment)
    whole = take(load(), 15)
    assert [(batch["index"] < 14).all() or (batch["index"] >= 14).all() for batch in whole] == [True] * 15
    for done in (1, 6, 13):  # six batches are an epoch
        loader = load(1, 2)
        take(loader, done)
        state = loader.get_state()
        same(take(load(start_state=state), 15 - done), whole[done:])
        parts = [take(load(i, 4, state), 15 - done) for i in range(4)]
        joined = [{name: np.concatenate([p[name] for p in at]) for name in at[0]} for at in zip(*parts, strict=True)]
        same(joined, whole[done:])


def test_another_batch_size_goes_on_at_the_same_image(config, caplog):
    config.data.num_examples = 24
    state = {"images": 20, "num_records": 24}
    config.batch_size = 10
    whole = take(make_loader(open_source(config), None, config), 4)
    same(take(make_loader(open_source(config), None, config, start_state=state), 2), whole[2:])
    assert not caplog.records
    config.batch_size = 8
    whole = take(make_loader(open_source(config), None, config), 4)
    same(take(make_loader(open_source(config), None, config, start_state=state), 2), whole[2:])
    assert "20 images" in caplog.text and "batches of 8: the last 4 come again" in caplog.text


def test_another_number_of_processes_goes_on_at_the_same_batch(config):
    whole = take(make_loader(open_source(config), None, config), 5)
    loader = make_loader(open_source(config), None, config, None, 0, 2)
    for _ in range(3):
        next(loader)
    state = loader.get_state()
    loader.close()
    same(take(make_loader(open_source(config), None, config, start_state=state), 2), whole[3:])


# -- Bad files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_left_out_counted_and_named_once(config, broken_photos, caplog, workers):
    config.data.path = str(broken_photos)
    config.data.num_workers = workers
    loader = make_loader(open_source(config), tokenize, config)
    batches = take(loader, 18)
    counts = np.bincount(indices(batches), minlength=12)
    assert counts.sum() == 72 and np.flatnonzero(counts == 0).tolist() == [2, 7, 11]
    assert counts[counts > 0].min() >= 6  # six epochs, and now and then in place of a bad one
    reasons = {name[-6:]: reason for name, reason in loader.bad_files.names.items()}
    assert sorted(reasons) == ["02.jpg", "07.jpg", "11.jpg"] and "runcated" in reasons["11.jpg"]
    assert reasons["02.jpg"] == "the file is empty" and reasons["07.jpg"] == "not a picture in a known format"
    assert len(caplog.records) == 3 and all("left out" in record.message for record in caplog.records)
    assert "3 bad files" in str(loader.bad_files) and "07.jpg: not a picture" in str(loader.bad_files)


def test_bad_files_move_nobody(config, photos):
    config.data.path, config.data.random_flip = str(photos), True
    whole = take(make_loader(open_source(config), tokenize, config), 9)
    for i in (2, 7):
        (photos / f"{i:02d}.jpg").write_bytes(b"words")
    broken = take(make_loader(open_source(config), tokenize, config), 9)
    stays = ~np.isin(indices(whole), (2, 7))
    assert 0 < stays.sum() < len(stays) and not np.isin(indices(broken), (2, 7)).any()
    for name in whole[0]:
        a, b = (np.concatenate([batch[name] for batch in batches]) for batches in (whole, broken))
        np.testing.assert_array_equal(a[stays], b[stays])


def test_who_stands_in_for_a_bad_file_is_of_its_size(config, photos):
    for i in range(6):  # each of these as tall as none of the others
        (photos / f"{i:02d}.jpg").write_bytes(jpeg(i, 80, 40))
    config.data.path, config.batch_size = str(photos), 2
    config.data.buckets.step = 4
    source = open_source(config)
    (photos / "03.jpg").write_bytes(jpeg(3, 80, 40)[:-40])  # its header is whole
    loader = make_loader(source, None, config)
    assert len(loader.sizes) == 2
    for batch in take(loader, 24):
        tall = batch["pixels"].shape[1] > batch["pixels"].shape[2]
        assert (batch["index"] < 6).all() == tall and 3 not in batch["index"]
    assert [name[-6:] for name in loader.bad_files.names] == ["03.jpg"]
    for i in range(6):
        (photos / f"{i:02d}.jpg").write_bytes(jpeg(i, 80, 40)[:-40])
    with pytest.raises(
        DataError, match=r"pictures of size 24x8 in a row could not be read|most of data.path is broken"
    ):
        take(make_loader(source, None, config), 24)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("bad", "said"), [(12, "not one of 12 pictures"), (8, "of the first .* pictures could not be read")]
)
def test_a_run_of_mostly_bad_files_ends(config, photos, bad, said, workers):
    for i in range(bad):
        (photos / f"{i:02d}.jpg").write_bytes(b"words")
    config.data.path, config.data.num_workers = str(photos), workers
    loader = make_loader(open_source(config), tokenize, config)
    with pytest.raises(DataError, match=rf"{said}.*\.jpg: not a picture.*data.path") as caught:
        for _ in range(100):
            next(loader)
    assert "\n" not in str(caught.value)
    loader.close()


def test_a_single_good_file_is_enough_at_first(config, photos):
    for i in range(1, 12):
        (photos / f"{i:02d}.jpg").write_bytes(b"words")
    config.data.path = str(photos)
    (batch,) = take(make_loader(open_source(config), tokenize, config), 1)
    assert (batch["index"] == 0).all()


def test_counting_from_many_threads():
    counter = BadFiles(10**6)

    def count(thread):
        for i in range(200):
            counter.good()
            counter.good()
            counter.bad(BadImage(f"{thread} {i % 10}", "broken"))

    threads = [threading.Thread(target=count, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counter.names) == 80


def test_no_records_are_an_error(config):
    with pytest.raises(DataError, match="holds no records"):
        make_loader(split_held_out(open_source(config), 0.0, 0)[1], None, config)


# -- Records that are kept encoded -----------------------------------------------------------------------------------


def test_encoded_records(config):
    batches = take(make_loader(Encoded(10), tokenize, config, num_time_ids=6), 10)
    for batch in batches:
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
            "moments": ((4, 2, 3, 8), np.float32),
            "time_ids": ((4, 6), np.float32),
            "context": ((4, 7, 4), np.float32),
            "pooled": ((4, 5), np.float32),
            "index": ((4,), np.int64),
        }
        np.testing.assert_array_equal(batch["moments"][:, 0, 0, 0], batch["index"])
        np.testing.assert_array_equal(batch["context"][:, 3, 1], batch["pooled"][:, 2])  # of one caption
        np.testing.assert_array_equal(batch["context"][:, 0, 0] // 10, batch["index"])
    drawn = np.concatenate([batch["context"][:, 0, 0] % 10 for batch in batches])
    assert np.bincount(drawn.astype(int)).min() > 5  # all three
    for batch in fixed_batches(Encoded(10), tokenize, config):
        np.testing.assert_array_equal(batch["context"][:, 0, 0], 10 * batch["index"])  # the first
    assert "pooled" not in next(make_loader(Encoded(10, pooled=False), tokenize, config))


def test_captions_are_those_of_a_run_that_crops(config, photos):
    """Moments in place of pixels leave crops nothing to draw: captions must not notice."""

    for i in range(12):
        (photos / f"{i:02d}.txt").unlink()
    rows = [{"file_name": f"{i:02d}.jpg", "text": [f"{letter}{i}" for letter in "abc"]} for i in range(12)]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config.data.path, config.data.random_flip = str(photos), True
    source = open_source(config)
    runs = [take(make_loader(of, tokenize, config), 6) for of in (source, Kept(source))]
    ids = [np.concatenate([batch["input_ids"] for batch in batches]) for batches in runs]
    np.testing.assert_array_equal(*ids)
    assert set(ids[0][:, 0]) == set(map(ord, "abc"))


# -- Held out --------------------------------------------------------------------------------------------------------


def test_fixed_batches_are_in_order_and_in_the_middle(config, broken_photos):
    config.data.path = str(broken_photos)
    batches = list(fixed_batches(open_source(config), tokenize, config))
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 3, 4], [5, 6, 8, 9]]
    same(list(fixed_batches(open_source(config), tokenize, config)), batches)
    config.eval_batches = 3
    assert [len(b["index"]) for b in fixed_batches(open_source(config), tokenize, config)] == [4, 4, 1]
    config.batch_size = 32
    (only,) = fixed_batches(open_source(config), None, config)
    assert len(only["index"]) == 9 and "input_ids" not in only
    config.eval_batches = 0
    assert list(fixed_batches(open_source(config), tokenize, config)) == []


def test_all_processes_get_as_many_fixed_batches(config, broken_photos):
    config.data.path = str(broken_photos)
    parts = [list(fixed_batches(open_source(config), None, config, i, 2)) for i in range(2)]
    assert [[len(b["index"]) for b in part] for part in parts] == [[2, 2], [2, 2]]
    assert not set(indices(parts[0])) & set(indices(parts[1]))
    config.batch_size = 32
    parts = [list(fixed_batches(open_source(config), None, config, i, 2)) for i in range(2)]
    assert [[len(b["index"]) for b in part] for part in parts] == [[16], [16]]


def test_nothing_is_held_out(config):
    _, held_out = split_held_out(open_source(config), 0.0, 0)
    assert list(fixed_batches(held_out, tokenize, config)) == []


# -- Prefetch --------------------------------------------------------------------------------------------------------


class Counter:
    """Batches 0, 1, ..., 4, whose state is the number of the next."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == 5:
            raise StopIteration
        self.at += 1
        return {"n": np.asarray(self.at - 1)}

    def get_state(self):
        return self.at


@pytest.mark.parametrize("size", [0, 1, 2, 9])
def test_states_belong_to_the_batch_that_is_used(size):
    source = Counter()
    got = list(prefetch(source, lambda batch: int(batch["n"]), size))
    assert got == [(n, n + 1) for n in range(5)]


def test_prefetch_runs_ahead():
    source = Counter()
    stream = prefetch(source, lambda batch: batch, 3)
    assert source.at == 0
    next(stream)
    assert source.at == 3


def test_a_prefetched_run_resumes_exactly(config):
    whole = take(make_loader(open_source(config), tokenize, config), 8)
    loader = make_loader(open_source(config), tokenize, config)
    used = list(itertools.islice(prefetch(loader, lambda batch: batch), 3))
    loader.close()
    rest = take(make_loader(open_source(config), tokenize, config, start_state=used[-1][1]), 5)
    same([batch for batch, _ in used] + rest, whole)
