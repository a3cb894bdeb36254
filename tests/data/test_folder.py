import json
import logging

import numpy as np
import pytest

from sd_jax.data import DataError
from sd_jax.data.sources import open_source
from sd_jax.media import BadImage

from .conftest import jpeg, number_of


def opened(config, path):
    config.data.path = str(path)
    return open_source(config)


def write_metadata(folder, *rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_pictures_with_texts_beside_them(config, photos):
    source = opened(config, photos)
    assert len(source) == 12
    for i in range(12):
        record = source[i]
        assert number_of(record) == i and record["fields"] == ((f"picture {i}",),) and record["index"] == i
        assert record["pixels"].shape == (40, 48, 3) and source.fields(i) == record["fields"]


def test_subfolders_any_case_and_hidden_files(config, tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".thumbs").mkdir()
    (tmp_path / "b" / "c" / "Z.JPG").write_bytes(jpeg(3))
    (tmp_path / "b" / "c" / "Z.txt").write_text("deep")
    for hidden in ("._a.jpg", ".thumbs/a.jpg"):
        (tmp_path / hidden).write_bytes(b"not a picture")
    (tmp_path / "a.jpeg").write_bytes(jpeg(1))
    (tmp_path / "notes.txt").write_text("about nothing")
    (tmp_path / "loop").symlink_to(tmp_path)
    source = opened(config, tmp_path)
    assert [number_of(source[i]) for i in range(len(source))] == [1, 3]
    assert [source[i]["fields"] for i in range(2)] == [((),), (("deep",),)]


def test_missing_captions_are_counted_and_logged(config, photos, caplog):
    (photos / "03.txt").unlink()
    (photos / "05.txt").unlink()
    source = opened(config, photos)
    assert "2 of 12 pictures" in caplog.text and "no caption" in caplog.text
    assert source[3]["fields"] == source.fields(3) == ((),)


def test_captions_may_be_left_unread(config, photos, caplog):
    (photos / "03.txt").unlink()
    config.data.caption_key = ""
    source = opened(config, photos)
    assert source[4]["fields"] == source.fields(4) == () and not caplog.records


def test_a_folder_with_splits_is_read_from_train(config, photos, caplog):
    caplog.set_level(logging.INFO, "sd_jax")
    (photos / "train").mkdir()
    (photos / "test").mkdir()
    for i in range(12):
        split = "test" if i < 4 else "train"
        (photos / f"{i:02d}.jpg").rename(photos / split / f"{i:02d}.jpg")
    source = opened(config, photos)
    assert [number_of(source[i]) for i in range(len(source))] == list(range(4, 12)) and "train/" in caplog.text


def test_large_jpegs_are_decoded_smaller(config, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(3, 1600, 1200))
    assert opened(config, tmp_path)[0]["pixels"].shape == (200, 150, 3)  # resolution 16, at an eighth


def test_broken_pictures_raise_when_they_are_read(config, photos):
    (photos / "04.jpg").write_bytes(b"")
    source = opened(config, photos)
    assert number_of(source[5]) == 5
    with pytest.raises(BadImage, match=r"04\.jpg: the file is empty"):
        source[4]


def test_sizes_of_every_kind_of_file_without_decoding(config, tmp_path, caplog, monkeypatch):
    from PIL import Image, ImageFile

    def write(name, height, width, orientation=None, **options):
        exif = Image.Exif()
        if orientation:
            exif[0x0112] = orientation
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(tmp_path / name, exif=exif, **options)

    write("a.jpg", 20, 30)
    write("b.jpg", 20, 30, 6)
    write("c.png", 21, 31, 8)
    write("cc.png", 20, 33)
    write("d.webp", 22, 32, 5)
    write("e.tiff", 23, 33, 3)
    write("f.bmp", 24, 34)
    (tmp_path / "g.jpg").write_bytes(b"")
    (tmp_path / "h.png").write_bytes(b"these are words")
    source = opened(config, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decodes"))
        sizes = source.sizes()
    np.testing.assert_array_equal(sizes[7:], [[0, 0], [0, 0]])
    assert sizes.dtype == np.int64
    for size, index in zip(sizes, range(7), strict=False):
        assert tuple(size) == source[index]["pixels"].shape[:2]
    assert sizes[:3].tolist() == [[20, 30], [30, 20], [31, 21]]
    assert [word in caplog.text for word in ("g.jpg: ", "h.png: not a picture")] == [True, True]


# -- Metadata --------------------------------------------------------------------------------------------------------


def test_jsonl(config, photos, caplog):
    write_metadata(
        photos,
        {"file_name": "07.jpg", "text": "seven"},
        {"file_name": "./02.jpg", "text": ["two", "a pair"]},
        {"file_name": "01.jpg", "text": None},
        {"file_name": "gone.jpg", "text": "gone"},
    )
    source = opened(config, photos)
    assert len(source) == 4
    assert [source.fields(i) for i in range(4)] == [((),), (("two", "a pair"),), (("seven",),), (("gone",),)]
    assert [source[i]["fields"] for i in range(3)] == [source.fields(i) for i in range(3)]
    assert "9 pictures" in caplog.text and "left out" in caplog.text and "1 of 4 pictures" in caplog.text
    with pytest.raises(BadImage, match=r"gone\.jpg"):
        source[3]


def test_csv_and_other_names_of_columns(config, photos):
    (photos / "metadata.csv").write_text('image,caption\n01.jpg,"one, a number"\n')
    source = opened(config, photos)
    assert len(source) == 1 and source.fields(0) == (("one, a number",),) and number_of(source[0]) == 1


def test_parquet(config, photos):
    import pyarrow
    import pyarrow.parquet

    columns = {"file_name": ["03.jpg", "02.jpg"], "prompt": ["three", "two"], "tags": ["odd, 3", None]}
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, photos / "metadata.parquet")
    config.data.caption_key = "prompt"
    assert [opened(config, photos).fields(i) for i in range(2)] == [(("two",),), (("three",),)]
    config.data.caption_key = "tags, prompt"
    assert [opened(config, photos).fields(i) for i in range(2)] == [((), ("two",)), (("odd, 3",), ("three",))]


def test_metadata_speaks_for_its_own_folder(config, photos):
    (photos / "more").mkdir()
    (photos / "more" / "a.jpg").write_bytes(jpeg(20))
    write_metadata(photos / "more", {"file_name": "a.jpg", "text": "listed"})
    source = opened(config, photos)
    assert len(source) == 13 and source.fields(0) == (("picture 0",),) and source.fields(12) == (("listed",),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"file_name": "a.jpg"}\n{"file_name"\n', r"metadata.jsonl:2: not a line of JSON"),
        ("[1]\n", r"metadata.jsonl:1: not a JSON object"),
        ('{"file_name": "01.jpg", "titel": "x"}\n', r"data.caption_key='text': .* it has file_name, titel"),
        ('{"where": "01.jpg", "text": "x"}\n', r"data.image_key='image': .* it has where, text"),
        ('{"file_name": "", "text": "x"}\n', r"record 1 has no file_name"),
    ],
)
def test_broken_metadata_is_an_error(config, photos, text, said):
    (photos / "metadata.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        opened(config, photos)


def test_fingerprint_follows_the_pictures(config, photos):
    before = opened(config, photos).fingerprint()
    assert opened(config, photos).fingerprint() == before
    (photos / "01.txt").write_text("another caption")
    assert opened(config, photos).fingerprint() == before
    (photos / "01.jpg").write_bytes(jpeg(9))
    changed = opened(config, photos).fingerprint()
    (photos / "02.jpg").unlink()
    assert len({before, changed, opened(config, photos).fingerprint()}) == 3


def test_every_kind_of_file_at_once(config, tmp_path):
    from PIL import Image

    Image.fromarray(np.full((20, 20), 30000, np.uint16)).save(tmp_path / "a.png")
    Image.new("CMYK", (20, 20)).save(tmp_path / "b.jpg")
    Image.new("RGBA", (20, 20)).save(tmp_path / "c.webp", lossless=True)
    (tmp_path / "d.png").write_text("words")
    source = opened(config, tmp_path)
    assert [int(source[i]["pixels"][0, 0, 0]) for i in range(3)] == [117, 255, 255]
