"""What a picture's file says before it is decoded."""

import io
import pathlib

from PIL import Image

_ORIENTATION = 0x0112  # the EXIF tag; from 5 on height and width change places


def full_size(file: bytes | pathlib.Path) -> tuple[int, int] | None:
    """(height, width) of a JPEG, upright; None for all else, which `media.decode_image` never makes smaller.

    For files that have been decoded: raises whatever PIL does for others.
    """
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        if image.format not in ("JPEG", "MPO"):
            return None
        try:
            sideways = image.getexif().get(_ORIENTATION, 1) >= 5
        except Exception:  # noqa: BLE001  the metadata is broken, the picture need not be
            sideways = False
        return image.size if sideways else image.size[::-1]
