"""Pictures in and out: whatever file people have -> pixels; pictures that carry text; sheets and labelled grids."""

import io
import math
import pathlib
import struct
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

Picture = UInt8[np.ndarray, "height width 3"]

PICTURES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")  # their files' endings
MAX_PIXELS = (
    178_956_970  # half a gigabyte of RGB; a larger claim is taken for a decompression bomb (Pillow's own limit)
)


class BadImage(ValueError):
    """A file that is no picture, or a broken one. `name` is the file, `reason` what is wrong with it."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


# -- In --------------------------------------------------------------------------------------------------------------


def decode_image(
    data: bytes | str | pathlib.Path,  # the file's content, or where it lies
    name: str | None = None,  # how errors name it; None = the path
    at_least: int | None = None,  # a JPEG may be decoded smaller, its sides at least this many pixels; None = full size
) -> Picture:
    """Any picture file -> upright RGB pixels, uint8 [height, width, 3].

    EXIF orientation is applied, palettes, CMYK and grey are converted, 16 bits and more are scaled (not clipped) to
    eight, transparency is laid over white, and of an animation the first frame is taken.
    Raises BadImage for all that cannot be decoded, whatever the cause.
    """
    if isinstance(data, bytes):
        name = name or "picture"
    else:
        name = name or str(data)
        try:
            data = pathlib.Path(data).read_bytes()
        except OSError as error:
            raise BadImage(name, f"cannot be read ({error.strerror})") from error
    if not data:
        raise BadImage(name, "the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(name, f"claims {image.width}x{image.height} pixels, perhaps a decompression bomb")
            if at_least is not None:
                image.draft(None, (at_least, at_least))  # nothing happens unless it is a JPEG
            image.load()
            return np.array(_to_rgb(_upright(image)), np.uint8)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(name, "not a picture in a known format") from error
    except Exception as error:  # noqa: BLE001  decoders raise OSError, SyntaxError, struct.error, IndexError, ...
        raise BadImage(name, str(error) or type(error).__name__) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001  the metadata is broken, the picture need not be
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey of more than eight bits -> uint8. Modes "I" and "F" do not tell their range: the least that holds all."""
    values = np.nan_to_num(values.astype(np.float64))
    if mode.startswith("I;16"):
        top = 65535.0
    else:
        ranges = (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0)
        top = next((r for r in ranges if values.max() <= r), values.max())
    return np.round(np.clip(values / top, 0.0, 1.0) * 255.0).astype(np.uint8)


# -- Out -------------------------------------------------------------------------------------------------------------

FORMATS = ("png", "jpg", "webp")
PARAMETERS = "parameters"  # the text chunk that A1111 and its kin read
RECIPE = "sd_jax"  # ours
_EXIF, _USER_COMMENT, _IMAGE_DESCRIPTION = 0x8769, 0x9286, 0x010E


def write_picture(path: str | pathlib.Path, pixels: Picture, text: Mapping[str, str]) -> None:
    """Writes `pixels` and `text` (key -> value) in the format of the path's ending, and makes the folder if need be.

    PNG takes any text in any language. JPEG (quality 95, full colour) and WebP (lossless) take it as EXIF, which has no
    keys of one's own, so only two: PARAMETERS in any language, as UserComment, where A1111 looks for it; and RECIPE,
    which must be ASCII, as ImageDescription. That one stands in the first directory and is a plain string, so that
    viewers show it and editors keep it; a MakerNote is lost as soon as a program rewrites the file.
    Raises ValueError for another ending, and for text that EXIF has no room for.
    """
    path = pathlib.Path(path)
    ending = path.suffix.lower()
    if ending == ".png":
        write_png(path, pixels, text)
    elif ending == ".webp":
        _write(path, pixels, "WEBP", lossless=True, exif=_exif(text))
    elif ending in (".jpg", ".jpeg"):
        exif = _exif(text)
        if len(exif) > 65533:  # a JPEG segment
            raise ValueError(f"{path}: {len(exif)} bytes of text are more than a JPEG holds: write png or webp")
        _write(path, pixels, "JPEG", quality=95, subsampling=0, exif=exif)
    else:
        raise ValueError(f"{path}: pictures are written as {', '.join(FORMATS)}")


def write_png(path: str | pathlib.Path, pixels: Picture, text: Mapping[str, str]) -> None:
    """Writes `pixels`, with `text` (key -> value, in any language) in text chunks, and makes the folder if need be."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    _write(pathlib.Path(path), pixels, "PNG", pnginfo=info)


def _write(path: pathlib.Path, pixels: Picture, format: str, **options) -> None:
    """The file appears whole: a viewer that watches it never sees half of it."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_bytes(encoded.getvalue())
    aside.replace(path)


def read_text(path: str | pathlib.Path) -> dict[str, str]:
    """The text that a picture carries: PNG's chunks, and of EXIF what `write_picture` puts there.

    Raises BadImage where the file is no picture, or cannot be read.
    """
    try:
        with Image.open(path) as image:
            image.load()  # text may follow the pixels
            text = {key: str(value) for key, value in getattr(image, "text", {}).items()}
            exif = image.getexif()
            found = {PARAMETERS: exif.get_ifd(_EXIF).get(_USER_COMMENT), RECIPE: exif.get(_IMAGE_DESCRIPTION)}
    except UnidentifiedImageError as error:
        raise BadImage(str(path), "not a picture in a known format") from error
    except OSError as error:
        raise BadImage(str(path), f"cannot be read ({error.strerror or error})") from error
    except Exception as error:  # noqa: BLE001  decoders raise SyntaxError, struct.error, IndexError, ...
        raise BadImage(str(path), str(error) or type(error).__name__) from error
    found = {key: _comment(value) for key, value in found.items() if value}
    return {key: value for key, value in found.items() if value} | text


def _exif(text: Mapping[str, str]) -> bytes:
    """EXIF with a UserComment and an ImageDescription.

    Pillow would give the comment the type BYTE, which piexif reads as a tuple of numbers, and A1111 then not at all:
    so the two directories are laid out here. An entry is tag, type, count, and where the value is.
    """
    unknown = set(text) - {PARAMETERS, RECIPE}
    if unknown:
        raise ValueError(f"EXIF has no place for text named {', '.join(sorted(unknown))}: write png")
    described = text.get(RECIPE, "").encode("ascii") + b"\0"
    described = described.ljust(5, b"\0")  # four bytes would have to stand in the entry itself
    comment = b"UNICODE\0" + text.get(PARAMETERS, "").encode("utf-16-be")
    first = 8 + 2 + 2 * 12 + 4  # behind the header and the first directory
    second = first + len(described) + len(described) % 2
    return b"".join(
        [
            b"Exif\0\0" + b"MM\0*" + struct.pack(">L", 8),
            struct.pack(">HHHLLHHLLL", 2, _IMAGE_DESCRIPTION, 2, len(described), first, _EXIF, 4, 1, second, 0),
            described.ljust(second - first, b"\0"),
            struct.pack(">HHHLLL", 1, _USER_COMMENT, 7, len(comment), second + 2 + 12 + 4, 0),
            comment,
        ]
    )


def _comment(value: str | bytes | tuple) -> str:
    """EXIF text as it is written by various programs: plain, or behind eight bytes that name its characters."""
    if isinstance(value, str):
        return value.rstrip("\0")
    kind, rest = bytes(value[:8]), bytes(value[8:])
    if kind == b"UNICODE\0":  # by the standard in the order of the whole file, by piexif and A1111 big end first
        big, little = (rest.decode(f"utf-16-{end}", "replace") for end in ("be", "le"))
        return max(big, little, key=lambda text: sum(character < "\x80" for character in text)).lstrip("\ufeff")
    return (rest if kind in (b"ASCII\0\0\0", b"\0" * 8) else bytes(value)).decode("utf-8", "replace").rstrip("\0")


# -- Sheets ----------------------------------------------------------------------------------------------------------

_READABLE = 128  # pixels; smaller pictures are enlarged so that a caption fits beneath
_MARGIN = 6
_MOST_LINES = 8
_INK = (25, 25, 25)


def contact_sheet(
    pixels: UInt8[np.ndarray, "batch height width 3"],
    captions: Sequence[str] | None = None,  # one per picture, set beneath it; None = none
    columns: int | None = None,  # None = about as many columns as rows
    scale: int | None = None,  # how many times pictures are enlarged; None = until they are 128 pixels wide
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """All pictures of a batch on one white sheet, row by row."""
    count, height, width, _ = pixels.shape
    if count == 0:
        raise ValueError("a contact sheet needs at least one picture")
    if captions is not None and len(captions) != count:
        raise ValueError(f"{len(captions)} captions for {count} pictures")
    scale = max(1, math.ceil(_READABLE / width)) if scale is None else scale
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    height, width = height * scale, width * scale

    font, line_height = _font(width)
    lines = [_wrap(caption, font, width) for caption in captions or [""] * count]
    deepest = [max(len(cell) for cell in lines[row * columns : (row + 1) * columns]) for row in range(rows)]
    texts = [n * line_height + _MARGIN if n else 0 for n in deepest]  # height of each row's text
    tops = np.cumsum([_MARGIN, *(height + text + _MARGIN for text in texts)])

    sheet = Image.new("RGB", (columns * (width + _MARGIN) + _MARGIN, int(tops[-1])), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pixels):
        row, column = divmod(i, columns)
        left, top = _MARGIN + column * (width + _MARGIN), int(tops[row])
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (left, top))
        for j, line in enumerate(lines[i]):
            draw.text((left, top + height + _MARGIN // 2 + j * line_height), line, fill=_INK, font=font)
    return np.array(sheet, np.uint8)


def labelled_grid(
    pixels: UInt8[np.ndarray, "blocks rows columns height width 3"],
    block_labels: Sequence[str],  # a title over each block; "" = none
    row_labels: Sequence[str],  # at the left
    column_labels: Sequence[str],  # on top
    scale: int | None = None,  # how many times pictures are enlarged; None = until they are 128 pixels wide
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """Tables of pictures on one white sheet, which is as square as the blocks allow."""
    blocks, rows, columns, height, width, _ = pixels.shape
    for name, labels, count in (
        ("block", block_labels, blocks),
        ("row", row_labels, rows),
        ("column", column_labels, columns),
    ):
        if len(labels) != count:
            raise ValueError(f"{len(labels)} {name}_labels for {count} {name}s")
    scale = max(1, math.ceil(_READABLE / width)) if scale is None else scale
    height, width = height * scale, width * scale

    font, line_height = _font(width)
    large, large_height = _font(width, 1.4)
    titles = [_wrap(label, large, columns * (width + _MARGIN)) for label in block_labels]
    tops = [_wrap(label, font, width) for label in column_labels]
    sides = [_wrap(label, font, width) for label in row_labels]
    title_height = max(len(lines) * large_height + 2 * _MARGIN if lines else 0 for lines in titles)
    top_height = max(map(len, tops)) * line_height
    widest = max((font.getlength(line) for lines in sides for line in lines), default=0)
    left = math.ceil(widest) + (2 * _MARGIN if widest else _MARGIN)
    over = title_height + top_height + _MARGIN
    size = (left + columns * (width + _MARGIN) + _MARGIN, over + rows * (height + _MARGIN) + _MARGIN)
    across = min(range(1, blocks + 1), key=lambda n: max(n * size[0], math.ceil(blocks / n) * size[1]))

    sheet = Image.new("RGB", (across * size[0], math.ceil(blocks / across) * size[1]), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)

    def write(lines: list[str], x: int, y: int, anchor: str, font=font, line_height=line_height) -> None:
        for i, line in enumerate(lines):
            draw.text((x, y + i * line_height), line, fill=_INK, font=font, anchor=anchor)

    for block in range(blocks):
        x0, y0 = block % across * size[0], block // across * size[1]
        write(titles[block], x0 + (left + size[0]) // 2, y0 + _MARGIN, "ma", large, large_height)
        for column in range(columns):
            x = x0 + left + column * (width + _MARGIN)
            write(tops[column], x + width // 2, y0 + over - _MARGIN // 2 - len(tops[column]) * line_height, "ma")
        for row in range(rows):
            y = y0 + over + row * (height + _MARGIN)
            write(sides[row], x0 + left - _MARGIN, y + (height - len(sides[row]) * line_height) // 2, "ra")
            for column in range(columns):
                enlarged = Image.fromarray(pixels[block, row, column]).resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (x0 + left + column * (width + _MARGIN), y))
    return np.array(sheet, np.uint8)


def _font(width: int, times: float = 1.0) -> tuple[ImageFont.FreeTypeFont, int]:
    """For text beside pictures of this width, and the height of its lines."""
    font = ImageFont.load_default(times * min(max(width // 12, 12), 22))
    return font, math.ceil(sum(font.getmetrics()) * 1.1)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks text into lines at most `width` pixels wide, at spaces, and inside words that are wider than a line."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(word) > 1:
            fits = next((n for n in range(len(word) - 1, 1, -1) if font.getlength(word[:n]) <= width), 1)
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    lines += [line] if line else []
    if len(lines) > _MOST_LINES:
        last = lines[_MOST_LINES - 1]
        while last and font.getlength(last + " ...") > width:
            last = last[:-1]
        lines = [*lines[: _MOST_LINES - 1], last + " ..."]
    return lines
