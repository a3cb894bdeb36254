import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sd_jax import media
from sd_jax.media import BadImage, decode_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png(width: int, height: int, bits: int, kind: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand, for what Pillow does not write."""

    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    body = b"".join(chunk(*c) for c in chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def left_right(left, right, mode="RGB") -> Image.Image:
    """16 wide, 8 high: two colours."""
    image = Image.new(mode, (16, 8), right)
    image.paste(left, (0, 0, 8, 8))
    return image


# -- In --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_usual_formats(format):
    pixels = decode_image(encoded(left_right(RED, BLUE), format))
    assert pixels.shape == (8, 16, 3) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels[4, 2], RED, atol=12)
    np.testing.assert_allclose(pixels[4, 13], BLUE, atol=12)


# What each EXIF orientation says of where the left half of the stored picture belongs
@pytest.mark.parametrize(
    ("orientation", "side"),
    [(1, "left"), (2, "right"), (3, "right"), (4, "left"), (5, "top"), (6, "top"), (7, "bottom"), (8, "bottom")],
)
def test_exif_orientation(orientation, side):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode_image(encoded(left_right(RED, BLUE), "JPEG", exif=exif, quality=95)).astype(int)
    assert pixels.shape == ((8, 16, 3) if orientation < 5 else (16, 8, 3))
    where = {"left": np.s_[:, :7], "right": np.s_[:, 9:], "top": np.s_[:7], "bottom": np.s_[9:]}[side]
    np.testing.assert_allclose(pixels[where].mean((0, 1)), RED, atol=12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says so
def test_broken_exif_does_not_matter():
    data = encoded(left_right(RED, BLUE), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff")
    assert decode_image(data).shape == (8, 16, 3)


def test_cmyk():
    pixels = decode_image(encoded(left_right((0, 255, 255, 0), (0, 0, 0, 0), "CMYK"), "JPEG", quality=95))
    np.testing.assert_allclose(pixels[4, 2], RED, atol=12)
    np.testing.assert_allclose(pixels[4, 13], WHITE, atol=12)


def test_palette_with_transparency():
    image = Image.new("P", (16, 8), 1)
    image.putpalette([*RED, *GREEN, *BLUE])
    image.paste(0, (0, 0, 8, 8))
    pixels = decode_image(encoded(image, "PNG", transparency=1))
    assert tuple(pixels[4, 2]) == RED and tuple(pixels[4, 13]) == WHITE
    partly = decode_image(encoded(image, "PNG", transparency=bytes([255, 128, 0])))
    np.testing.assert_allclose(partly[4, 13], (127, 255, 127), atol=1)


@pytest.mark.parametrize(
    ("mode", "colour", "seen"), [("RGBA", (255, 0, 0, 128), (255, 127, 127)), ("LA", (0, 0), WHITE)]
)
def test_alpha_lies_on_white(mode, colour, seen):
    np.testing.assert_allclose(decode_image(encoded(Image.new(mode, (4, 4), colour), "PNG"))[0, 0], seen, atol=1)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format):
    values = np.array([[0, 255, 256], [32896, 65279, 65535]], np.uint16)
    pixels = decode_image(encoded(Image.fromarray(values), format))
    np.testing.assert_array_equal(pixels[:, :, 0], [[0, 1, 1], [128, 254, 255]])
    assert (pixels == pixels[:, :, :1]).all()


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (6, 4)])
def test_sixteen_bit_colour(kind, channels):
    row = np.full((4, channels), 65535, ">u2")
    row[:, :3] = (0x80FF, 0x00FF, 0xFFFF)
    pixels = decode_image(png(4, 4, 16, kind, (b"\0" + row.tobytes()) * 4))
    np.testing.assert_allclose(pixels[0, 0], (128, 0, 255), atol=1)


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0, 3e9])
def test_float_tiff_fills_the_range(top):
    values = (np.linspace(0, 1, 32, dtype=np.float32) * np.float32(top)).reshape(4, 8)
    pixels = decode_image(encoded(Image.fromarray(values), "TIFF"))
    assert pixels.min() == 0 and pixels.max() == 255 and abs(int(pixels[2, 0, 0]) - 132) <= 1


def test_one_bit_and_grey():
    assert decode_image(encoded(Image.new("1", (3, 3), 1), "PNG")).min() == 255
    assert (decode_image(encoded(Image.new("L", (3, 3), 77), "PNG")) == 77).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)
    assert tuple(decode_image(data)[4, 4]) == RED


def test_large_jpeg_may_be_decoded_smaller():
    data = encoded(Image.new("RGB", (640, 480), RED), "JPEG")
    assert decode_image(data).shape == (480, 640, 3)
    assert decode_image(data, at_least=100).shape == (120, 160, 3)
    assert decode_image(data, at_least=1000).shape == (480, 640, 3)


BROKEN = {
    "empty.jpg": (b"", "empty"),
    "text.png": (b"these are words", "not a picture"),
    "cut.jpg": (encoded(Image.effect_noise((64, 64), 90), "JPEG")[:900], "truncated"),
    "cut.png": (encoded(Image.effect_noise((64, 64), 90), "PNG")[:900], "truncated"),
    "header.jpg": (encoded(left_right(RED, BLUE), "JPEG")[:30], ""),
    "bomb.png": (png(60_000, 60_000, 8, 2, b"\0"), "bomb"),
    "large.png": (png(13_000, 13_800, 8, 2, b"\0"), "bomb"),
    "flat.png": (png(0, 4, 8, 2, b"\0"), ""),
    "void.gif": (b"GIF89a" + bytes(7), ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_say_which_and_why(name, tmp_path):
    data, reason = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadImage) as caught:
        decode_image(tmp_path / name)
    assert name in str(caught.value) and reason in caught.value.reason and caught.value.reason
    assert caught.value.name == str(tmp_path / name) and "0x" not in caught.value.reason


def test_missing_file(tmp_path):
    with pytest.raises(BadImage, match=r"none\.png: cannot be read \(No such file"):
        decode_image(tmp_path / "none.png")
    with pytest.raises(BadImage, match="record 7: the file is empty"):
        decode_image(b"", name="record 7")


# -- Out -------------------------------------------------------------------------------------------------------------


TEXT = {"parameters": "a cat, 猫 naïve 🐈\nSteps: 20, Seed: 3", "sd_jax": '{"prompt": "a cat, \\u732b"}'}


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp"])
def test_pictures_carry_text(tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    media.write_picture(tmp_path / "new" / name, pixels, TEXT)
    assert media.read_text(tmp_path / "new" / name) == TEXT
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]
    again = decode_image(tmp_path / "new" / name).astype(int)
    assert again.shape == pixels.shape and np.abs(again - pixels).max() <= (0 if name[2:] in ("png", "webp") else 40)


def test_png_carries_any_text(tmp_path):
    text = {"parameters": "a cat", "sd_jax": '{"prompt": "猫 naïve"}', "workflow": "{}"}
    media.write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8), text)
    assert media.read_text(tmp_path / "a.png") == text


def test_pictures_without_text(tmp_path):
    for ending in media.FORMATS:
        media.write_picture(tmp_path / f"a.{ending}", np.zeros((4, 4, 3), np.uint8), {})
        assert media.read_text(tmp_path / f"a.{ending}") == {}


def test_what_cannot_be_written_or_read(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"a\.gif: pictures are written as png, jpg, webp"):
        media.write_picture(tmp_path / "a.gif", pixels, {})
    with pytest.raises(ValueError, match="EXIF has no place for text named workflow"):
        media.write_picture(tmp_path / "a.webp", pixels, {"workflow": "{}"})
    with pytest.raises(ValueError, match=r"a\.jpg: 66.* bytes of text are more than a JPEG holds: write png or webp"):
        media.write_picture(tmp_path / "a.jpg", pixels, {"parameters": "x" * 33_000})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b.png").write_bytes(b"words")
    with pytest.raises(BadImage, match=r"b\.png: not a picture"):
        media.read_text(tmp_path / "b.png")
    with pytest.raises(BadImage, match=r"none\.png: cannot be read \(No such file"):
        media.read_text(tmp_path / "none.png")
    media.write_png(tmp_path / "cut.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), {})
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    with pytest.raises(BadImage, match=r"cut\.png"):
        media.read_text(tmp_path / "cut.png")


def exif_entries(data: bytes, at: int) -> dict[int, tuple[int, bytes]]:
    """{tag: (type, value)} of a directory of big-endian EXIF, read by hand."""
    entries = {}
    (count,) = struct.unpack_from(">H", data, at)
    for i in range(count):
        tag, kind, length, place = struct.unpack_from(">HHLL", data, at + 2 + 12 * i)
        entries[tag] = kind, data[place : place + length] if kind != 4 else struct.pack(">L", place)
    return entries


@pytest.mark.parametrize("format", ["jpg", "webp"])
def test_exif_is_laid_out_as_piexif_reads_it(tmp_path, format):
    media.write_picture(tmp_path / f"a.{format}", np.zeros((4, 4, 3), np.uint8), {"parameters": "猫", "sd_jax": "{}"})
    with Image.open(tmp_path / f"a.{format}") as image:
        data = image.info["exif"].removeprefix(b"Exif\0\0")
    assert data[:8] == b"MM\0*\0\0\0\x08"
    first = exif_entries(data, 8)
    assert first[0x010E][0] == 2 and first[0x010E][1].rstrip(b"\0") == b"{}"
    (second,) = struct.unpack(">L", first[0x8769][1])
    assert exif_entries(data, second) == {0x9286: (7, b"UNICODE\0" + "猫".encode("utf-16-be"))}


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + "Steps: 2, é".encode("utf-16-be"),
        b"UNICODE\0" + "Steps: 2, é".encode("utf-16-le"),
        b"UNICODE\0" + "Steps: 2, é".encode("utf-16"),
        b"ASCII\0\0\0" + "Steps: 2, é".encode(),
        b"\0" * 8 + "Steps: 2, é\0".encode(),
        "Steps: 2, é".encode(),
    ],
)
def test_comments_of_other_programs(tmp_path, comment):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert media.read_text(tmp_path / "a.jpg") == {"parameters": "Steps: 2, é"}


def test_contact_sheet_places_every_picture():
    colours = np.array([RED, GREEN, BLUE, (9, 9, 9), (200, 100, 0)], np.uint8)
    sheet = media.contact_sheet(np.broadcast_to(colours[:, None, None], (5, 32, 48, 3)).copy(), columns=2, scale=1)
    for i, colour in enumerate(colours):
        top, left = 6 + i // 2 * 38, 6 + i % 2 * 54
        assert (sheet[top : top + 32, left : left + 48] == colour).all()
    assert sheet.shape == (3 * 38 + 6, 2 * 54 + 6, 3)
    assert (sheet[6 + 2 * 38 :, 6 + 54 :] == 255).all()  # the place of a sixth


def test_contact_sheet_enlarges_small_pictures_and_sets_captions():
    pixels = np.full((3, 32, 32, 3), 128, np.uint8)
    plain = media.contact_sheet(pixels)
    told = media.contact_sheet(
        pixels, ["a small red circle in the top left on a striped grey background", "", "b " * 200]
    )
    assert plain.shape[1] == told.shape[1] == 2 * (128 + 6) + 6
    assert plain.shape[0] == 2 * (128 + 6) + 6
    beneath = told[6 + 128 : 6 + 128 + 40]  # room beneath the first two pictures
    assert (beneath[:, 6 : 6 + 128] < 60).any() and (beneath[:, 6 + 128 :] == 255).all()
    assert (told[-100:, 6 + 128 :] == 255).all()  # the long caption stays beneath its picture
    assert told.shape[0] < 600  # endless captions are cut
    with pytest.raises(ValueError, match="2 captions for 3 pictures"):
        media.contact_sheet(pixels, ["a", "b"])


def test_words_wider_than_a_line_are_broken():
    sheet = media.contact_sheet(np.zeros((1, 128, 128, 3), np.uint8), ["a" * 60])
    assert sheet.shape[0] > 128 + 3 * 12 and (sheet[140:, -6:] == 255).all()


def test_labelled_grid_places_every_picture():
    colours = np.array([RED, GREEN, BLUE, (255, 0, 9), (200, 100, 0), (0, 99, 9)], np.uint8).reshape(1, 2, 3, 3)
    pixels = np.broadcast_to(colours[:, :, :, None, None], (1, 2, 3, 32, 48, 3)).copy()
    plain = media.labelled_grid(pixels, [""], ["", ""], ["", "", ""], scale=1)
    assert plain.shape == (6 + 2 * 38 + 6, 6 + 3 * 54 + 6, 3)
    for row in range(2):
        for column in range(3):
            top, left = 6 + 38 * row, 6 + 54 * column
            assert (plain[top : top + 32, left : left + 48] == colours[0, row, column]).all()


def test_labels_stand_at_their_pictures():
    pixels = np.full((2, 2, 3, 128, 128, 3), RED, np.uint8)
    table = media.labelled_grid(pixels, ["first", "second"], ["above", ""], ["", "right", ""])
    inked, red = (table < 100).all(-1), (table == RED).all(-1)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    top, left = rows[0], columns[0]
    assert not (inked & red).any()
    assert inked[top : top + 128, :left].any() and not inked[top + 134 : top + 262, :left].any()
    assert inked[:top, left + 134 : left + 262].any()
    assert not inked[top - 10 : top, left : left + 128].any()
    ends = np.flatnonzero(np.diff(rows) > 1)
    second = rows[ends[1] + 1]
    assert len(ends) == 3  # one block above the other
    assert second - top > 2 * 134 and inked[top + 262 : second].any()
    with pytest.raises(ValueError, match="1 row_labels for 2 rows"):
        media.labelled_grid(pixels, ["", ""], [""], ["", "", ""])
