import logging

import numpy as np
import pytest

from sd_jax.config import training_defaults
from sd_jax.data import DataError, cache, mixed
from sd_jax.data.buckets import Assignment
from sd_jax.data.cache_shards import Encode
from sd_jax.data.loader import make_loader
from sd_jax.data.sources import open_source, split_held_out

from .conftest import jpeg, number_of


@pytest.fixture
def config(config, tmp_path):
    """Six pictures, 1 to 6, and four others, 11 to 14, of which a batch of four has two."""
    for folder, first, count in (("own", 1, 6), ("others", 11, 4)):
        (tmp_path / folder).mkdir()
        for i in range(first, first + count):
            (tmp_path / folder / f"{i:02d}.jpg").write_bytes(jpeg(i))
            (tmp_path / folder / f"{i:02d}.txt").write_text(f"{folder} {i}")
    config.data.path, config.prior.path = str(tmp_path / "own"), str(tmp_path / "others")
    config.data.crop = "centre"
    config.prior.weight = 0.25
    return config


def opened(config):
    """What the loop opens, and what it hands to the loader."""
    train, _ = split_held_out(open_source(config), config.data.held_out, config.seed)
    sources = {"train": train}
    if mixed.mixes(config):
        sources["prior"] = mixed.open_prior(config, config.prior.path)
    return sources, mixed.assign(train, sources.get("prior"), config)


def load(config, **kwargs):
    sources, assignments = opened(config)
    source, assignment = mixed.stream(sources, sources, assignments, config)
    return make_loader(source, lambda texts: np.array([[len(text)] for text in texts]), config, assignment, **kwargs)


def take(loader, count):
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def numbers(batch):
    return np.round(batch["pixels"].mean((1, 2, 3)) / 10).astype(int)


def test_every_batch_has_its_share_with_its_weight(config, caplog):
    caplog.set_level(logging.INFO, "sd_jax")
    batches = take(load(config), 12)
    seen = np.array([numbers(batch) for batch in batches])
    for batch, these in zip(batches, seen, strict=True):
        assert batch["loss_weight"].dtype == np.float32 and batch["index"].dtype == np.int64
        np.testing.assert_array_equal(batch["loss_weight"], np.where(these > 10, 0.25, 1.0))
        np.testing.assert_array_equal(batch["input_ids"][:, 0], np.where(these > 10, len("others 11"), len("own 1")))
        np.testing.assert_array_equal(these > 10, [False, True] * 2)
        np.testing.assert_array_equal(batch["index"] % 2**40, np.where(these > 10, these - 11, these - 1))
    assert np.bincount(seen.ravel()).tolist() == [0, *[4] * 6, 0, 0, 0, 0, *[6] * 4]
    indices = np.concatenate([batch["index"] for batch in batches])
    assert len(np.unique(indices)) == 10  # none is an index of both
    assert "2 of the 4 images of a batch are others: 6 of its own, 4 others, their loss times 0.25" in caplog.text


def test_without_others_and_repeats_nothing_is_changed(config):
    config.prior.path = ""
    sources, assignments = opened(config)
    source, assignment = mixed.stream(sources, sources, assignments, config)
    assert source is sources["train"] and assignment is assignments["train"]
    assert set(take(load(config), 1)[0]) == {"pixels", "input_ids", "index"}


@pytest.mark.parametrize(("batch_size", "share", "count"), [(4, 0.5, 2), (5, 0.5, 3), (8, 0.01, 1), (8, 0.99, 7)])
def test_shares_are_rounded_to_one_of_each_kind_at_least(config, batch_size, share, count):
    config.batch_size, config.prior.share = batch_size, share
    assert mixed.count_of(config) == count
    assert (take(load(config), 1)[0]["loss_weight"] == 0.25).sum() == count


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("prior.share", 0.0, r"config\.prior\.share=0\.0"),
        ("prior.share", 1.0, r"config\.prior\.share=1\.0"),
        ("prior.weight", -1.0, r"config\.prior\.weight=-1\.0"),
        ("batch_size", 1, r"config\.batch_size=1 has no room"),
        ("prior.path", "/nowhere", r"prior\.path='/nowhere'"),
    ],
)
def test_what_cannot_be_mixed_is_named(config, key, value, said):
    config.update_from_flattened_dict({key: value})
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        opened(config)
    assert "\n" not in str(error.value)


def test_a_prompt_alone_asks_for_others_and_other_methods_have_none(config):
    config.prior.path = ""
    assert not mixed.mixes(config)
    config.prior.prompt = "a star"
    assert mixed.mixes(config)
    for method in ("autoencoder", "super_resolution"):
        assert not mixed.mixes(training_defaults(method))


@pytest.mark.parametrize("prompt", ["", "a star"])
def test_others_without_a_caption_have_their_own_prompt(config, tmp_path, prompt):
    config.data.prompt, config.prior.prompt = "a photograph of a sks star", prompt
    (tmp_path / "others" / "12.txt").unlink()
    (tmp_path / "own" / "02.txt").unlink()
    for batch in take(load(config), 6):
        lengths = {2: len(config.data.prompt), 12: len(prompt)}
        expected = [lengths.get(n, len("others 11" if n > 10 else "own 1")) for n in numbers(batch)]
        assert batch["input_ids"][:, 0].tolist() == expected
    config.data.caption_key = ""
    for batch in take(load(config), 6):
        expected = np.where(numbers(batch) > 10, len(prompt), len(config.data.prompt))
        np.testing.assert_array_equal(batch["input_ids"][:, 0], expected)


def test_replay_may_be_of_another_kind(config):
    config.prior.path = "shapes"
    (batch,) = take(load(config), 1)
    assert (numbers(batch)[::2] <= 6).all() and (batch["loss_weight"] == [1, 0.25, 1, 0.25]).all()


def test_resumed_and_shared_by_processes_it_is_the_same_stream(config):
    config.prior.share, config.data.random_flip = 0.25, True
    whole = take(load(config), 8)
    loader = load(config)
    take(loader, 3)
    rest = take(load(config, start_state=loader.get_state()), 5)
    parts = [take(load(config, process_index=i, process_count=2), 8) for i in range(2)]
    for n, batch in enumerate(whole):
        for name in batch:
            joined = np.concatenate([part[n][name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name], strict=True)
            if n >= 3:
                np.testing.assert_array_equal(rest[n - 3][name], batch[name], strict=True)


def test_a_broken_picture_is_stood_for_by_one_of_its_kind(config, tmp_path):
    (tmp_path / "own" / "03.jpg").write_bytes(b"")
    (tmp_path / "others" / "12.jpg").write_bytes(b"")
    loader = load(config)
    seen = np.array([numbers(next(loader)) for _ in range(12)])
    assert set(seen[:, ::2].ravel()) == {1, 2, 4, 5, 6} and set(seen[:, 1::2].ravel()) == {11, 13, 14}
    assert len(loader.bad_files.names) == 2


# -- Repeats ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def repeated(config, tmp_path):
    """Pictures 1 and 2 three times, 3 to 6 once."""
    for i in range(1, 7):
        folder = tmp_path / "own" / ("3_sks star" if i <= 2 else "1_star")
        folder.mkdir(exist_ok=True)
        (tmp_path / "own" / f"{i:02d}.jpg").rename(folder / f"{i:02d}.jpg")
    return config


def test_pictures_come_as_often_as_their_folders_say(repeated):
    repeated.prior.path, repeated.batch_size = "", 5
    loader = load(repeated)
    assert loader.get_state()["num_records"] == 10
    for _ in range(3):  # epochs
        seen = np.concatenate([numbers(next(loader)) for _ in range(2)])
        assert np.bincount(seen).tolist() == [0, 3, 3, 1, 1, 1, 1]


def test_copies_are_drawn_anew_and_share_an_index(repeated):
    repeated.prior.path, repeated.data.random_flip = "", True
    repeated.data.crop = "random"
    batches = take(load(repeated), 10)
    assert set(np.concatenate([batch["index"] for batch in batches])) == set(range(6))


def test_repeats_and_others_at_once(repeated):
    repeated.batch_size = 10
    seen = np.array([numbers(batch) for batch in take(load(repeated), 10)])
    assert np.bincount(seen[:, ::2].ravel()).tolist() == [0, 15, 15, 5, 5, 5, 5]
    assert set(seen[:, 1::2].ravel()) == {11, 12, 13, 14}


def test_copies_never_fall_on_both_sides_of_the_split(repeated):
    for seed in range(8):
        repeated.seed, repeated.data.held_out = seed, 0.4
        train, held = split_held_out(open_source(repeated), repeated.data.held_out, seed)
        repeated.prior.path = ""
        seen = np.concatenate([numbers(batch) for batch in take(load(repeated), 8)])
        assert len(held) and not {number_of(held[i]) for i in range(len(held))} & set(seen)


# -- Sizes and caches ------------------------------------------------------------------------------------------------


class Shapes:
    """Pictures of given (height, width), whose grey says which they are; counts how often each is decoded."""

    def __init__(self, *shapes):
        self.shapes, self.read = np.array(shapes, np.int64), []

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        self.read.append(index)
        pixels = np.full((*self.shapes[index], 3), 10 * index, np.uint8)
        return {"pixels": pixels, "fields": self.fields(index), "index": index}

    def fields(self, index):
        return ((f"{index}",),)

    def sizes(self):
        return self.shapes

    def full_size(self, index):
        return None

    def fingerprint(self):
        return repr(self.shapes)


TALL, SQUARE, WIDE = (64, 32), (32, 32), (32, 64)


@pytest.fixture
def buckets(config):
    config.data.resolution, config.data.buckets.step = 32, 8
    return config


def test_others_are_dealt_to_the_sizes_of_the_own_by_aspect(buckets):
    """Of a tall size with two batches an epoch, a square one with one and a wide one with one."""
    own = Shapes(*[TALL] * 4, *[SQUARE] * 2, *[WIDE] * 2)
    others = Shapes(*[SQUARE] * 8, (40, 32), (0, 0), (32, 40), (48, 32))
    assignments = mixed.assign(own, others, buckets)
    assert assignments["train"].of_record.tolist() == [0] * 4 + [1] * 2 + [2] * 2
    dealt = assignments["prior"]
    assert dealt.sizes == assignments["train"].sizes and len(dealt.sizes) == 3
    counts = np.bincount(dealt.of_record[dealt.of_record >= 0]).tolist()
    assert counts == [5, 3, 3] and dealt.of_record[[11, 8, 9, 10]].tolist() == [0, 0, -1, 2]
    source, assignment = mixed.stream(
        {"train": own, "prior": others}, {"train": own, "prior": others}, assignments, buckets
    )
    loader = make_loader(source, None, buckets, assignment)
    shapes = {next(loader)["pixels"].shape[1:3] for _ in range(12)}
    assert shapes == set(dealt.sizes)


def test_every_size_needs_one_of_the_others(buckets):
    own = Shapes(*[TALL] * 4, *[SQUARE] * 2, *[WIDE] * 2)
    with pytest.raises(
        DataError, match=r"config\.prior: 2 of 3 pictures can be read, and batches come in 3 sizes: give"
    ):
        mixed.assign(own, Shapes(SQUARE, SQUARE, (0, 0)), buckets)
    buckets.data.upscale = False
    assert mixed.assign(own, Shapes(*[(8, 8)] * 3), buckets)["prior"].of_record.tolist() == [0, 1, 2]
    buckets.data.buckets.step, buckets.data.upscale = 0, True
    assert mixed.assign(own, Shapes((0, 0)), buckets)["prior"].of_record.tolist() == [0]  # nothing is measured


def test_pictures_that_count_often_fill_batches_of_their_own_size(buckets, tmp_path):
    """One tall, one square and one wide picture, three times each, at batches of three: none is cut to another size."""
    buckets.prior.path, buckets.batch_size = "", 3
    for i, (height, width) in enumerate((TALL, SQUARE, WIDE)):
        (tmp_path / "three" / "3_star").mkdir(parents=True, exist_ok=True)
        (tmp_path / "three" / "3_star" / f"{i}.jpg").write_bytes(jpeg(i, height, width))
    buckets.data.path = str(tmp_path / "three")
    batches = take(load(buckets), 3)
    assert {batch["pixels"].shape[1:3] for batch in batches} == set(opened(buckets)[1]["train"].sizes)
    assert sorted(tuple(numbers(batch)) for batch in batches) == [(0, 0, 0), (1, 1, 1), (2, 2, 2)]


def encode_pictures(pixels):
    return np.repeat(pixels[:, ::8, ::8, :1].astype(np.float32), 8, axis=3)


def test_each_source_is_cached_once_and_by_itself(repeated, tmp_path):
    repeated.data.cache_latents = True
    sources, assignments = opened(repeated)
    calls = []

    def pictures(pixels):
        calls.append(len(pixels))
        return encode_pictures(pixels)

    def cached():
        encode, keys = Encode(pictures), {"vae": "v"}
        each = {
            name: cache.cached(source, name, tmp_path / "cache", repeated, assignments[name], encode, keys)
            for name, source in sources.items()
        }
        return mixed.stream(sources, each, assignments, repeated)

    source, assignment = cached()
    assert len(source) == 10 + 4 and len(assignment.of_record) == 14
    batches = take(make_loader(source, None, repeated, assignment), 10)
    for batch in batches:
        grey = np.round(batch["moments"].mean((1, 2, 3)) / 10).astype(int)
        of_index = np.array([3, 4, 5, 6, 1, 2])[batch["index"] % 2**40]  # the folder 1_star comes first
        np.testing.assert_array_equal(grey, np.where(batch["loss_weight"] == 1, of_index, grey))
        np.testing.assert_array_equal(grey > 10, batch["loss_weight"] == 0.25)
    calls.clear()
    cached()
    assert not calls  # both were found
    assert sum(1 for _ in (tmp_path / "cache" / "train").glob("*.safetensors")) == 1


def test_masks_are_kept_with_cached_latents(config, tmp_path):
    """Half of picture 1 counts, all of the others."""
    from PIL import Image

    (tmp_path / "own" / "masks").mkdir()
    half = np.zeros((40, 48), np.uint8)
    half[:, :24] = 255
    Image.fromarray(half).save(tmp_path / "own" / "masks" / "01.png")
    config.diffusion.masked_loss = True
    batches = take(load(config), 6)
    for batch in batches:
        assert batch["mask"].shape == (4, 16, 16) and batch["mask"].dtype == np.uint8
        for number, mask in zip(numbers(batch), batch["mask"], strict=True):
            assert (abs(mask[:, 10:] - (0.0 if number == 1 else 255.0)) < 5).all() and (mask[:, :6] > 250).all()
    config.data.cache_latents = True
    sources, assignments = opened(config)
    each = {
        name: cache.cached(
            source, name, tmp_path / "cache", config, assignments[name], Encode(encode_pictures), {"vae": ""}
        )
        for name, source in sources.items()
    }
    source, assignment = mixed.stream(sources, each, assignments, config)
    kept = take(make_loader(source, None, config, assignment), 6)
    for batch, before in zip(kept, batches, strict=True):
        assert batch["mask"].shape == (4, 2, 2) and batch["mask"].dtype == np.uint8
        shares = before["mask"].reshape(4, 2, 8, 2, 8).mean((2, 4))
        np.testing.assert_array_equal(batch["mask"], np.round(shares).astype(np.uint8))
    config.diffusion.masked_loss = False
    sources, assignments = opened(config)
    with pytest.raises(DataError, match=r"masks or without \(config\.diffusion\.masked_loss was True, is False\)"):
        cache.cached(
            sources["train"],
            "train",
            tmp_path / "cache",
            config,
            assignments["train"],
            Encode(encode_pictures),
            {"vae": ""},
        )


def test_a_mixture_tells_of_both(config):
    sources, assignments = opened(config)
    source, _ = mixed.stream(sources, sources, assignments, config)
    assert source.fields(0) == (("own 1",),) and source.fields(6) == (("others 11",),)
    assert source.sizes().tolist() == [[40, 48]] * 10 and source.full_size(9) == (40, 48)
    assert len({source.fingerprint(), *(each.fingerprint() for each in sources.values())}) == 3
    assert isinstance(assignments["prior"], Assignment)
