import io

import numpy as np
import pytest
from PIL import Image

from sd_jax import media
from sd_jax.data.headers import full_size


def file(kind: str, orientation: int | None = None, height: int = 40, width: int = 72) -> bytes:
    out, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(out, kind, exif=exif)
    return out.getvalue()


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_the_size_is_that_of_the_whole_decoded_picture(orientation):
    data = file("JPEG", orientation)
    assert full_size(data) == media.decode_image(data).shape[:2]
    assert full_size(data) == ((72, 40) if orientation in (6, 8) else (40, 72))


def test_the_size_is_the_same_however_small_a_picture_is_decoded(tmp_path):
    (tmp_path / "a.jpg").write_bytes(file("JPEG", 6, 800, 640))
    assert media.decode_image(tmp_path / "a.jpg", at_least=100).shape == (160, 200, 3)
    assert full_size(tmp_path / "a.jpg") == (640, 800)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
def test_what_is_never_decoded_smaller_says_nothing(kind):
    data = file(kind, 6, 800, 640)
    assert full_size(data) is None
    assert media.decode_image(data, at_least=100).shape[:2] == media.decode_image(data).shape[:2]


def test_broken_metadata_turns_nothing():
    data = file("JPEG", 6).replace(b"MM\0*", b"MM\0?", 1).replace(b"II*\0", b"II?\0", 1)
    assert full_size(data) == media.decode_image(data).shape[:2] == (40, 72)
