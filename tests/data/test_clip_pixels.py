import dataclasses

import numpy as np
import pytest
from PIL import Image

from sd_jax.data.clip_pixels import preprocess, square
from sd_jax.models.presets import TINY_CLIP

SIZE = 32  # TINY_CLIP's
# Height and width: square or not, small or large, with an odd or even rest (of 3, 7, ...: the two references differ)
SIDES = [(32, 32), (32, 35), (35, 32), (70, 200), (201, 64), (7, 9), (1, 3), (333, 211), (37, 32), (33, 128)]


def noise(height, width):
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


def torchvision_square(pixels, size):
    """Resize(size, BICUBIC) and CenterCrop(size) of torchvision on a Pillow image, as its source has them
    (torchvision/transforms/functional.py: _compute_resized_output_size, center_crop)."""
    image = Image.fromarray(pixels)
    width, height = image.size
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = size, int(size * long / short)
    new_width, new_height = (new_short, new_long) if width <= height else (new_long, new_short)
    image = image.resize((new_width, new_height), Image.BICUBIC)
    top, left = int(round((new_height - size) / 2.0)), int(round((new_width - size) / 2.0))
    return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("sides", SIDES)
def test_equals_torchvision(sides):
    np.testing.assert_array_equal(square(noise(*sides), SIZE), torchvision_square(noise(*sides), SIZE), strict=True)


def test_the_two_references_differ_by_one_pixel_where_three_are_left_over():
    pixels = noise(32, 35)  # as high as the result, so that nothing is resampled
    np.testing.assert_array_equal(square(pixels, SIZE), pixels[:, 2:34])
    np.testing.assert_array_equal(square(pixels, SIZE, "transformers"), pixels[:, 1:33])
    for width in (33, 34, 36, 37):  # rests of 1, 2, 4, 5
        pixels = noise(32, width)
        np.testing.assert_array_equal(square(pixels, SIZE), square(pixels, SIZE, "transformers"))


def test_normalised():
    config = dataclasses.replace(TINY_CLIP, image_mean=(0.5, 0.25, 0.0), image_std=(0.5, 0.25, 2.0))
    pixels = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    pixels[1] = 255
    batch = preprocess(list(pixels), config)
    assert batch.dtype == np.float32 and batch.shape == (2, SIZE, SIZE, 3)
    np.testing.assert_array_equal(batch[:, 0, 0], np.asarray([[-1, -1, 0], [1, 3, 0.5]], np.float32))
    assert preprocess([], TINY_CLIP).shape == (0, SIZE, SIZE, 3)


def test_long_strips_take_no_memory():
    """30 million pixels of a strip would be kept whole; what is cut out is the same to one level."""
    strip = noise(4, 4 * 100)
    whole = torchvision_square(strip, SIZE).astype(int)
    assert np.abs(square(strip, SIZE).astype(int) - whole).max() <= 1
    assert square(noise(1, 60_000), SIZE).shape == (SIZE, SIZE, 3)


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="cut='left' is not one of openai, transformers"):
        preprocess([noise(3, 3)], TINY_CLIP, "left")
    with pytest.raises(ValueError, match="a picture of 0x3 has no pixels"):
        preprocess([noise(0, 3)], TINY_CLIP)


@pytest.mark.parity
def test_equals_transformers():
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    pictures = [noise(*sides) for sides in SIDES]
    theirs = processor([Image.fromarray(p) for p in pictures], return_tensors="np")["pixel_values"]
    ours = preprocess(pictures, TINY_CLIP, "transformers")
    np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), theirs, atol=1e-6, rtol=0)
    rests = [SIZE * max(sides) // min(sides) - SIZE for sides in SIDES]
    differ = [not np.array_equal(ours[i], preprocess([picture], TINY_CLIP)[0]) for i, picture in enumerate(pictures)]
    assert differ == [rest % 4 == 3 for rest in rests]
