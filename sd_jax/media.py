"""Pictures in and out: whatever file people have -> pixels; PNGs that carry text; contact sheets."""

import io
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

Picture = UInt8[np.ndarray, "height width 3"]

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


def write_png(path: str | pathlib.Path, pixels: Picture, text: Mapping[str, str]) -> None:
    """Writes `pixels`, with `text` (key -> value, in any language) in text chunks, and makes the folder if need be."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG", pnginfo=info)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded.getvalue())


def read_png_text(path: str | pathlib.Path) -> dict[str, str]:
    """The text chunks of a PNG file. Raises BadImage where it is none."""
    try:
        with Image.open(path) as image:
            image.load()  # text may follow the pixels
            return {key: str(value) for key, value in getattr(image, "text", {}).items()}
    except (UnidentifiedImageError, SyntaxError) as error:
        raise BadImage(str(path), "not a PNG file") from error


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

    font = ImageFont.load_default(min(max(width // 12, 12), 22))
    line_height = math.ceil(sum(font.getmetrics()) * 1.1)
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
