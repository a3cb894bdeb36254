"""Webdataset tars with random access."""

import io
import json
import tarfile

import pytest

from sd_jax.data import DataError, tars
from sd_jax.data.sources import Source, open_source
from sd_jax.media import BadImage

from .conftest import jpeg, number_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sd_jax" / "tars"


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "in"
    path.mkdir()
    return path


def write_tar(path, numbers, **others):
    with tarfile.open(path, "w") as tar:
        for n in numbers:
            files = {"jpg": b"words" if n == 2 else jpeg(n), **{ext: make(n) for ext, make in others.items()}}
            for ext, data in files.items():
                info = tarfile.TarInfo(f"{n:05d}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def opened(config, path, **keys):
    config.data.path = str(path)
    for name, value in keys.items():
        config.data[name] = value
    return open_source(config)


TEXT, ABOUT = (
    (lambda n: f"picture {n}".encode()),
    (lambda n: json.dumps({"caption": f"json {n}", "rating": n}).encode()),
)


def test_records_and_captions(config, root):
    write_tar(root / "00000.tar", (0, 1), txt=TEXT, json=ABOUT)
    write_tar(root / "00001.tar", (2, 3), txt=TEXT, json=ABOUT)
    (root / "sheet.jpg").write_bytes(jpeg(7))  # beside tars pictures are decoration
    (root / "00000.parquet").write_bytes(b"")
    source = opened(config, root)
    assert isinstance(source, tars.TarSource) and isinstance(source, Source)
    assert [source.fields(i) for i in range(len(source))] == [((f"picture {i}",),) for i in range(4)]
    assert source.sizes().tolist() == [[40, 48], [40, 48], [0, 0], [40, 48]]
    for i in (3, 0, 1):
        record = source[i]
        assert number_of(record) == i and record["index"] == i and record["fields"] == source.fields(i)
    assert source.full_size(1) == (40, 48)
    with pytest.raises(BadImage, match="record 2 .*00001.tar: 00002.jpg"):
        source[2]
    fields = lambda key, path=f"{root}/*.tar": opened(config, path, caption_key=key).fields(3)  # noqa: E731
    assert fields("json.caption") == (("json 3",),) and fields("txt,json.caption") == (("picture 3",), ("json 3",))
    assert fields("rating") == (("3",),) and fields("") == ()
    assert len(opened(config, root / "00001.tar", caption_key="text")) == 2
    with pytest.raises(DataError, match="no such column; it has jpg, json, txt, json.caption"):
        fields("blip")


def test_sizes_that_json_tells_are_held_against_headers(config, root, monkeypatch):
    from sd_jax.data import headers

    monkeypatch.setattr(headers, "_PROBED", 2)  # the first and the last
    told = lambda n: json.dumps({"HEIGHT": 40, "width": 48 + (n == 1)}).encode()  # noqa: E731
    write_tar(root / "a.tar", (0, 1, 3), json=told)
    assert opened(config, root, caption_key="").sizes().tolist() == [[40, 48], [40, 49], [40, 48]]
    write_tar(root / "a.tar", (0, 1, 3), json=lambda n: b'{"HEIGHT": 400, "width": 480}')
    assert opened(config, root, caption_key="").sizes().tolist() == [[40, 48]] * 3


def test_what_some_records_lack(config, root, caplog):
    with tarfile.open(root / "a.tar", "w") as tar:
        for name, data in {
            "0.png": jpeg(0),
            "1.jpg": jpeg(1),
            "1.txt": b"one",
            "2.txt": b"two",
            "3.jpg": jpeg(3),
        }.items():
            info = tarfile.TarInfo(f"a/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = opened(config, root)
    assert [source.fields(i) for i in range(4)] == [((),), (("one",),), (("two",),), ((),)]
    assert [number_of(source[i]) for i in (0, 1, 3)] == [0, 1, 3] and "2 of 4 records" in caplog.text
    with pytest.raises(BadImage, match="record 2: there is no picture"):
        source[2]


def test_they_are_listed_once(config, root, cache, monkeypatch):
    write_tar(root / "a.tar", (0, 1), txt=TEXT)
    first = opened(config, root)
    assert len(list(cache.glob("*.npy"))) == 1
    with monkeypatch.context() as patch:
        patch.delattr(tars, "_listed")
        second = opened(config, root)
    assert number_of(second[1]) == 1 and second.fingerprint() == first.fingerprint()
    next(cache.glob("*.npy")).write_bytes(b"damaged")
    assert number_of(opened(config, root)[1]) == 1
    write_tar(root / "a.tar", (3, 1, 0), txt=TEXT)
    assert number_of(opened(config, root)[0]) == 3 and opened(config, root).fingerprint() != first.fingerprint()
    with pytest.raises(BadImage, match="a.tar"):  # what was opened before is another tar by now
        (root / "a.tar").write_bytes(b"")
        first[0]


def test_a_tar_that_was_cut(config, root, caplog):
    write_tar(root / "a.tar", (0, 1, 3), txt=TEXT)
    data = (root / "a.tar").read_bytes()
    (root / "a.tar").write_bytes(data[: len(data) // 2])
    source = opened(config, root)
    assert len(source) == 1 and number_of(source[0]) == 0 and "damaged shard" in caplog.text
    (root / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match="holds no records"):
        opened(config, root)
