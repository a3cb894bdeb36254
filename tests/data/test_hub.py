import json

import pytest

from sd_jax.data import DataError
from sd_jax.data.loader import make_loader
from sd_jax.data.sources import open_source
from sd_jax.media import BadImage

from .conftest import jpeg, number_of

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def quiet():
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def opened(config, path, **keys):
    config.data.path = str(path)
    for name, value in keys.items():
        config.data[name] = value
    return open_source(config)


def hub_images(numbers, texts):
    """A datasets.Dataset with an Image column; the third picture is broken."""
    import datasets

    data = [b"words" if n == 2 else jpeg(n) for n in numbers]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict(
        {"image": [{"bytes": d, "path": None} for d in data], "text": texts}, features=features
    )


def check(source, texts):
    """Pictures 0, 1, 3 decode, picture 2 is broken when it is read."""
    assert [source.fields(i) for i in range(len(source))] == texts
    assert source.sizes().tolist() == [[40, 48] if i != 2 else [0, 0] for i in range(len(source))]
    for i in (0, 1, 3):
        record = source[i]
        assert number_of(record) == i and record["index"] == i
        assert source.full_size(i) == record["pixels"].shape[:2] == (40, 48)
        assert record["fields"] == texts[i]
    with pytest.raises(BadImage, match=r"record 2.*: not a picture"):
        source[2]


def test_parquet_with_an_image_column(config, tmp_path, caplog):
    dataset = hub_images(range(4), ["a", None, "c", " "])
    (tmp_path / "data").mkdir()
    dataset.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "preview.jpg").write_bytes(jpeg(9))  # decoration
    check(opened(config, tmp_path), [(("a",),), ((),), (("c",),), ((),)])
    assert "2 of 4 records" in caplog.text
    check(opened(config, tmp_path / "data" / "train-00000-of-00001.parquet"), [(("a",),), ((),), (("c",),), ((),)])
    check(opened(config, f"{tmp_path}/data/*.parquet", caption_key=""), [(), (), (), ()])


def test_parquet_with_plain_bytes_and_lists_of_captions(config, tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"picture": [jpeg(0), None], "captions": [["x", "y"], []], "size": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = opened(config, tmp_path, image_key="picture")
    assert number_of(source[0]) == 0 and source[0]["fields"] == (("x", "y"),) and source.fields(1) == ((),)
    with pytest.raises(BadImage, match="record 1: column picture is empty"):
        source[1]
    with pytest.raises(BadImage, match="record 0: column size holds int"):
        opened(config, tmp_path, image_key="size")[0]


def test_what_save_to_disk_wrote(config, tmp_path):
    import datasets

    dataset = hub_images(range(4), list("abcd"))
    dataset.save_to_disk(tmp_path / "one")
    check(opened(config, tmp_path / "one"), [((letter,),) for letter in "abcd"])
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "splits")
    check(opened(config, tmp_path / "splits"), [((letter,),) for letter in "abcd"])
    datasets.DatasetDict({"x": dataset, "y": dataset}).save_to_disk(tmp_path / "odd")
    with pytest.raises(DataError, match="no split 'train', only x, y"):
        opened(config, tmp_path / "odd")


def test_jsonl_with_file_names(config, photos):
    rows = [{"image": f"{n:02d}.jpg", "caption": f"number {n}"} for n in range(3)] + [{"image": None, "caption": "x"}]
    (photos / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = opened(config, photos / "list.jsonl")
    assert [number_of(source[n]) for n in range(3)] == [0, 1, 2] and source.fields(1) == (("number 1",),)


def with_sizes(path, heights, widths, names=("HEIGHT", "WIDTH")):
    """Pictures of 40x48, the third broken, and what columns say of their sizes."""
    dataset = hub_images(range(len(heights)), ["x"] * len(heights))
    for name, values in zip(names, (heights, widths), strict=True):
        dataset = dataset.add_column(name, values)
    dataset.to_parquet(path)


def test_sizes_are_read_from_columns_of_any_usual_name(config, tmp_path, monkeypatch):
    from sd_jax.data import headers

    monkeypatch.setattr(headers, "_PROBED", 2)  # the first and the last
    probed, read = [], headers.size
    monkeypatch.setattr(headers, "size", lambda data, name: probed.append(name) or read(data, name))
    # What the columns say of the records between is believed, but for the one of which they say nothing
    with_sizes(tmp_path / "a.parquet", [40, 7, None, 40, 40], [48.0, 9.0, 9.0, None, 48.0])
    assert opened(config, tmp_path).sizes().tolist() == [[40, 48], [7, 9], [0, 0], [40, 48], [40, 48]]
    assert len(probed) == 4


@pytest.mark.parametrize(("heights", "widths"), [([80] * 4, [96] * 4), (["40"] * 4, ["wide"] * 4)])
def test_columns_that_are_not_the_sizes_of_the_pictures_are_not_believed(config, tmp_path, heights, widths):
    with_sizes(tmp_path / "a.parquet", heights, widths, ("height", "image_width"))
    assert opened(config, tmp_path).sizes().tolist() == [[40, 48], [40, 48], [0, 0], [40, 48]]


def test_missing_columns_are_listed(config, tmp_path):
    hub_images(range(4), list("abcd")).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"data.image_key='photo': .* it has image, text"):
        opened(config, tmp_path, image_key="photo")
    with pytest.raises(DataError, match=r"data.caption_key='titel': .* it has image, text"):
        opened(config, tmp_path, image_key="image", caption_key="titel")


def test_fingerprint_follows_the_files(config, tmp_path):
    dataset = hub_images(range(4), list("abcd"))
    dataset.save_to_disk(tmp_path / "a")
    hub_images(range(3), list("abc")).save_to_disk(tmp_path / "b")
    prints = [opened(config, tmp_path / name).fingerprint() for name in "aab"]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "nowhere.parquet", "here/no/where", "*.tar"])
def test_missing_paths(config, name):
    with pytest.raises(FileNotFoundError, match=r"data.path='.*' does not exist: give a folder"):
        opened(config, name)


def test_unknown_names_on_the_hub(config):
    with pytest.raises(FileNotFoundError, match=r"data.path='someone/pictures' is neither here nor .*: give a folder"):
        opened(config, "someone/pictures")


def test_machines_without_network_learn_it_at_once(config, monkeypatch):
    import socket

    from huggingface_hub import constants

    def no_network(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits to try again"))
    with pytest.raises(FileNotFoundError, match=r"data.path='someone/pictures' is neither here"):
        opened(config, "someone/pictures")
    assert constants.HF_HUB_OFFLINE is False


def test_many_threads_read_one_data_set(config, tmp_path):
    numbers = [n for n in range(20) if n != 2]
    hub_images(numbers, [f"{n}" for n in numbers]).to_parquet(tmp_path / "a.parquet")
    source = opened(config, tmp_path)
    config.data.num_workers = 4
    loader = make_loader(source, None, config)
    for _ in range(40):
        batch = next(loader)
        assert [round(grey / 10) for grey in batch["pixels"].mean((1, 2, 3))] == [numbers[i] for i in batch["index"]]
    loader.close()


def test_folders_and_files_of_nothing(config, tmp_path):
    with pytest.raises(DataError, match="holds neither pictures nor parquet"):
        opened(config, tmp_path)
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="is no data set: give a folder"):
        opened(config, tmp_path / "a.zip")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 is how it starts")
    with pytest.raises(DataError, match="cannot be read as a data set"):
        opened(config, tmp_path)
    with pytest.raises(DataError, match="data.path is empty"):
        opened(config, "")
