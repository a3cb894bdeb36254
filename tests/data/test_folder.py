import json
import logging

import numpy as np
import pytest

from sd_jax.config import training_defaults
from sd_jax.data import DataError
from sd_jax.data.folder import words_of
from sd_jax.data.sources import open_source, repeats_of, split_held_out
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


@pytest.fixture
def untold(photos):
    """The same without the .txt files."""
    for text in photos.glob("*.txt"):
        text.unlink()
    return photos


def test_jsonl(config, untold, caplog):
    write_metadata(
        untold,
        {"file_name": "07.jpg", "text": "seven"},
        {"file_name": "./02.jpg", "text": ["two", "a pair"]},
        {"file_name": "01.jpg", "text": None},
        {"file_name": "gone.jpg", "text": "gone"},
    )
    source = opened(config, untold)
    assert len(source) == 4
    assert [source.fields(i) for i in range(4)] == [((),), (("two", "a pair"),), (("seven",),), (("gone",),)]
    assert [source[i]["fields"] for i in range(3)] == [source.fields(i) for i in range(3)]
    assert "9 pictures" in caplog.text and "left out" in caplog.text and "1 of 4 pictures" in caplog.text
    with pytest.raises(BadImage, match=r"gone\.jpg"):
        source[3]


def test_csv_and_other_names_of_columns(config, untold):
    (untold / "metadata.csv").write_text('image,caption\n01.jpg,"one, a number"\n')
    source = opened(config, untold)
    assert len(source) == 1 and source.fields(0) == (("one, a number",),) and number_of(source[0]) == 1


def test_parquet(config, untold):
    import pyarrow
    import pyarrow.parquet

    columns = {"file_name": ["03.jpg", "02.jpg"], "prompt": ["three", "two"], "tags": ["odd, 3", None]}
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, untold / "metadata.parquet")
    config.data.caption_key = "prompt"
    assert [opened(config, untold).fields(i) for i in range(2)] == [(("two",),), (("three",),)]
    config.data.caption_key = "tags, prompt"
    assert [opened(config, untold).fields(i) for i in range(2)] == [((), ("two",)), (("odd, 3",), ("three",))]


def test_metadata_speaks_for_its_own_folder(config, photos):
    (photos / "more").mkdir()
    (photos / "more" / "a.jpg").write_bytes(jpeg(20))
    write_metadata(photos / "more", {"file_name": "a.jpg", "text": "listed"})
    source = opened(config, photos)
    assert len(source) == 13 and source.fields(0) == (("picture 0",),) and source.fields(12) == (("listed",),)


def test_two_captions_of_one_picture_are_an_error(config, photos):
    write_metadata(photos, {"file_name": "02.jpg", "text": "two"})
    with pytest.raises(DataError, match=r"02\.jpg: has two captions, in the metadata and 02\.txt: remove one$"):
        opened(config, photos)
    (photos / "02.txt").rename(photos / "02.caption")
    with pytest.raises(DataError, match=r"02\.jpg: has two captions, in the metadata and 02\.caption: remove one$"):
        opened(config, photos)
    (photos / "02.caption").unlink()
    write_metadata(photos, {"file_name": "02.jpg", "text": "two"}, {"file_name": "./02.jpg", "text": "a pair"})
    with pytest.raises(DataError, match=r"02\.jpg: has two captions, one in record 2 of .*metadata\.jsonl and one bef"):
        opened(config, photos)
    config.data.caption_key = ""  # which are not read
    assert len(opened(config, photos)) == 1


def test_captions_may_be_kohyas_but_not_both(config, photos):
    (photos / "02.txt").rename(photos / "02.caption")
    assert opened(config, photos).fields(2) == (("picture 2",),)
    (photos / "02.txt").write_text("two")
    with pytest.raises(DataError, match=r"02\.jpg: has two captions, in 02\.txt and 02\.caption: remove one$"):
        opened(config, photos)


def test_a_text_speaks_where_the_metadata_says_nothing(config, photos):
    write_metadata(photos, {"file_name": "02.jpg", "text": None}, {"file_name": "03.jpg"})
    source = opened(config, photos)
    assert [source.fields(i) for i in range(2)] == [(("picture 2",),), (("picture 3",),)]


def test_ratings_are_read_of_metadata_alone(config, photos):
    rated = training_defaults("aesthetic")
    write_metadata(photos, {"file_name": "02.jpg", "rating": 4, "text": "two"}, {"file_name": "03.jpg", "rating": 5})
    rated.data.caption_from_names = True
    source = opened(rated, photos)
    assert [source.fields(i) for i in range(2)] == [(("4",),), (("5",),)]


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


# -- Names of folders and files --------------------------------------------------------------------------------------


@pytest.fixture
def repeated(tmp_path):
    """Two pictures of "sks star" ten times, the first with a text, and one of "star, blue" once."""
    root = tmp_path / "repeated"
    for i, name in enumerate(("10_sks star/a.jpg", "10_sks star/b.jpg", "1_star,  blue/c.jpg")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(i))
    (root / "10_sks star" / "a.txt").write_text("told")
    return root


def test_folders_say_how_often_their_pictures_count_and_what_they_are(config, repeated, caplog):
    caplog.set_level(logging.INFO, "sd_jax")
    source = opened(config, repeated)
    assert len(source) == 3 and repeats_of(source).tolist() == [10, 10, 1]
    assert [source.fields(i) for i in range(3)] == [(("told",),), (("sks star",),), (("star, blue",),)]
    assert "those in '10_sks star' 10, those in '1_star,  blue' 1" in caplog.text and "no caption" not in caplog.text
    train, held = split_held_out(source, 1, seed=0)
    assert sorted(repeats_of(train).tolist() + repeats_of(held).tolist()) == [1, 10, 10]
    config.data.caption_key = ""
    source = opened(config, repeated)
    assert source.fields(1) == () and repeats_of(source).tolist() == [10, 10, 1]


def test_metadata_speaks_before_the_name_of_a_folder(config, repeated):
    write_metadata(repeated, {"file_name": "10_sks star/b.jpg", "text": "row"}, {"file_name": "1_star,  blue/c.jpg"})
    source = opened(config, repeated)
    assert [source.fields(i) for i in range(2)] == [(("row",),), (("star, blue",),)]
    assert repeats_of(source).tolist() == [10, 1]


@pytest.mark.parametrize("other", ["2024_holiday", "holiday", "02_star", "0_star", "10_", "10_sks star/more", ""])
def test_one_folder_of_another_name_and_no_number_is_one_of_repeats(config, repeated, caplog, other):
    caplog.set_level(logging.INFO, "sd_jax")
    (repeated / other).mkdir(exist_ok=True)
    (repeated / other / "z.jpg").write_bytes(jpeg(5))
    source = opened(config, repeated)
    assert repeats_of(source).tolist() == [1] * 4
    assert sorted(source.fields(i) for i in range(4)) == [((),)] * 3 + [(("told",),)]
    assert "is one of repeats: 10_sks star is named so, " + (other or ".") + " is not" in caplog.text


def test_folders_of_years_are_nothing_to_tell_of(config, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sd_jax")
    for folder in ("2023_summer", "2024_holiday"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jpg").write_bytes(jpeg(1))
    source = opened(config, tmp_path)
    assert repeats_of(source).tolist() == [1, 1] and source.fields(0) == ((),) and "repeats" not in caplog.text


def test_files_are_called_by_their_names_where_asked(config, repeated, photos):
    (photos / "03.txt").unlink()
    (photos / "04.txt").unlink()
    (photos / "03.jpg").rename(photos / "a_blue-star_012.jpg")
    assert [opened(config, photos).fields(i) for i in (3, 11)] == [((),), ((),)]
    config.data.caption_from_names = True
    source = opened(config, photos)
    assert [source.fields(i) for i in (2, 3, 11)] == [(("picture 2",),), ((),), (("a blue star",),)]
    assert opened(config, repeated).fields(1) == (("sks star",),)  # the folder's name goes first


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("a/blue_star-012.png", "blue star"),
        ("red star (3).jpg", "red star"),
        ("cat7.webp", "cat"),
        ("_two--words__.png", "two words"),
        ("0012.jpg", ""),
        ("3 cats.jpg", "3 cats"),
    ],
)
def test_words_of_names(file, words):
    assert words_of(file) == words


def test_an_empty_folder_is_one_line(config, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises((DataError, FileNotFoundError), match="data.path") as error:
        opened(config, tmp_path / "nothing")
    assert "\n" not in str(error.value)


# -- Masks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def masked(tmp_path):
    """a.jpg with a mask of half its size, b.png with an alpha channel, c.jpg with neither; each 32 x 48."""
    from PIL import Image

    root = tmp_path / "masked"
    (root / "masks").mkdir(parents=True)
    for name in ("a.jpg", "c.jpg"):
        (root / name).write_bytes(jpeg(3, 32, 48))
    left = np.zeros((32, 48), np.uint8)
    left[:, :24] = 255
    Image.fromarray(left[::2, ::2]).save(root / "masks" / "a.png")
    Image.fromarray(np.dstack([np.full((32, 48, 3), 100, np.uint8), left.T.reshape(32, 48)])).save(root / "b.png")
    return root


def test_masks_are_no_pictures_and_are_read_where_asked(config, masked, caplog):
    caplog.set_level(logging.INFO, "sd_jax")
    source = opened(config, masked)
    assert len(source) == 3 and "mask" not in source[0] and "1 masks" in caplog.text
    unmasked = source.fingerprint()
    config.diffusion.masked_loss = True
    source = opened(config, masked)
    assert len(source) == 3 and source.fingerprint() != unmasked
    a, b, c = (source[i]["mask"] for i in range(3))
    assert a.shape == b.shape == c.shape == (32, 48) and a.dtype == b.dtype == c.dtype == np.uint8
    assert (a[:, :23] == 255).all() and (a[:, 25:] == 0).all() and (c == 255).all()
    np.testing.assert_array_equal(b.reshape(48, 32)[:24], 255)
    np.testing.assert_array_equal(b.reshape(48, 32)[24:], 0)
    write_metadata(masked, {"file_name": "a.jpg", "text": "half"})
    source = opened(config, masked)
    assert len(source) == 1
    np.testing.assert_array_equal(source[0]["mask"], a)
    write_metadata(masked, {"file_name": "a.jpg", "text": "half"}, {"file_name": "masks/a.png", "text": "a picture"})
    source = opened(config, masked)
    assert len(source) == 2 and (source[0]["mask"] == 255).all()


def test_a_mask_of_a_picture_that_is_decoded_smaller(config, tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "a.jpg").write_bytes(jpeg(3, 1600, 1200))
    (tmp_path / "masks" / "a.jpg").write_bytes(jpeg(25, 800, 600))
    config.diffusion.masked_loss = True
    record = opened(config, tmp_path)[0]
    assert record["mask"].shape == record["pixels"].shape[:2] == (200, 150) and (record["mask"] == 250).all()
    (tmp_path / "masks" / "a.jpg").write_bytes(jpeg(25, 600, 800))
    with pytest.raises(BadImage, match=r"masks/a\.jpg: a mask of 800x600 for a picture of another shape, 150x200"):
        opened(config, tmp_path)[0]


def test_only_folders_have_masks(config):
    config.diffusion.masked_loss = True
    with pytest.raises(DataError, match=r"config\.diffusion\.masked_loss: data\.path='shapes' .* set it to False"):
        opened(config, "shapes")


# -- Hints -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hinted(tmp_path):
    """a.jpg with a hint of half its size, and b.jpg; each 32 x 48."""
    from PIL import Image

    root = tmp_path / "hinted"
    (root / "hints").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg"):
        (root / name).write_bytes(jpeg(3, 32, 48))
    left = np.zeros((16, 24, 3), np.uint8)
    left[:, :12] = 255
    for name in ("a.png", "b.png"):
        Image.fromarray(left).save(root / "hints" / name)
    return root


def test_hints_are_no_pictures_and_are_read_by_methods_that_steer(config, hinted, caplog):
    caplog.set_level(logging.INFO, "sd_jax")
    source = opened(config, hinted)
    assert len(source) == 2 and "hint" not in source[0] and "2 hints" in caplog.text
    steering = training_defaults("controlnet").unlock()
    steering.data.path = str(hinted)
    source, unhinted = open_source(steering), source.fingerprint()
    assert len(source) == 2 and source.fingerprint() != unhinted
    hint = source[0]["hint"]
    assert hint.shape == (32, 48, 3) and hint.dtype == np.uint8
    assert (hint[:, :20] > 250).all() and (hint[:, 28:] < 5).all()
    (hinted / "hints" / "b.png").unlink()
    with pytest.raises(
        DataError, match=r"b\.jpg: has no hint, one of 1 such pictures of 2: put a picture of its name "
    ):
        open_source(steering)
    (hinted / "hints" / "b.jpg").write_bytes(jpeg(25, 48, 32))
    with pytest.raises(BadImage, match=r"hints/b\.jpg: a hint of 32x48 for a picture of another shape, 48x32"):
        open_source(steering)[1]
