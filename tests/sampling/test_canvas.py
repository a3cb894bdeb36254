import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sd_jax.media import BadImage
from sd_jax.sampling import canvas

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (2, 16, 24, 3), np.uint8)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def mask_of(height, width, *boxes, batch=1):
    """1 in (top, left, height, width)."""
    mask = np.zeros((batch, height, width, 1), np.float32)
    for top, left, tall, wide in boxes:
        mask[:, top : top + tall, left : left + wide] = 1
    return mask


# -- Pictures ----------------------------------------------------------------------------------------------------------


def test_pictures_of_every_kind(tmp_path):
    one = PICTURE[0]
    path = tmp_path / "picture.png"
    Image.fromarray(one).save(path)
    for image in (path, str(path), Image.fromarray(one), one, one[None], one.astype(np.float32) / 255):
        np.testing.assert_array_equal(canvas.read_pixels(image), one[None])
    for image in (PICTURE, jnp.asarray(PICTURE), jnp.asarray(PICTURE, jnp.float32) / 255, PICTURE.astype(float) / 255):
        np.testing.assert_array_equal(canvas.read_pixels(image), PICTURE)
    halves = canvas.read_pixels(jnp.full((2, 2, 3), 0.5, jnp.bfloat16))
    assert halves.dtype == np.uint8 and (halves == 128).all()


def test_what_pil_images_are_made_into():
    def first(image):
        return tuple(canvas.read_pixels(image)[0, 0, 0])

    assert first(Image.new("L", (2, 1), 7)) == (7, 7, 7)
    assert first(Image.new("1", (2, 1), 1)) == WHITE
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert first(palette) == (10, 20, 30)
    assert first(Image.new("RGBA", (2, 1), (10, 20, 30, 255))) == (10, 20, 30)
    assert first(Image.new("RGBA", (2, 1), (10, 20, 30, 0))) == WHITE
    assert first(Image.fromarray(np.full((1, 2), 65535, np.uint16))) == WHITE
    turned = Image.new("RGB", (3, 1))
    turned.putpixel((0, 0), WHITE)
    turned.getexif()[0x0112] = 6  # to be turned by a quarter
    upright = canvas.read_pixels(turned)
    assert upright.shape == (1, 3, 1, 3) and upright[0, 0, 0, 0] == 255


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"image has the shape \(4, 4\): give \[height, width, 3\]"),
        (np.zeros((4, 4, 4), np.uint8), r"image has the shape \(4, 4, 4\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), r"image has the shape \(0, 4, 4, 3\)"),
        (np.full((2, 2, 3), 200.0), r"image has floats from 200 to 200: give floats in \[0, 1\]"),
        (np.full((2, 2, 3), -1.5), r"image has floats from -1.5 to -1.5"),
        (np.full((2, 2, 3), np.nan), "image has floats from nan to nan"),
        (np.zeros((2, 2, 3), np.int64), r"image is of int64: give uint8 in \[0, 255\] or floats"),
    ],
)
def test_arrays_that_are_no_picture(image, message):
    with pytest.raises(ValueError, match=message):
        canvas.read_pixels(image)


@pytest.mark.parametrize("read", [canvas.read_pixels, lambda path: canvas.read_mask(path, 4, 4)])
def test_files_that_are_no_picture(tmp_path, read):
    path = tmp_path / "notes.txt"
    path.write_text("no picture", encoding="utf-8")
    with pytest.raises(BadImage, match="notes.txt: not a picture"):
        read(path)
    with pytest.raises(BadImage, match="absent.png: cannot be read"):
        read(str(tmp_path / "absent.png"))


# -- Masks -------------------------------------------------------------------------------------------------------------


def test_masks_of_every_kind(tmp_path):
    grey = np.zeros((16, 24), np.uint8)
    grey[2:5, 3:9], grey[7, 7] = 255, 51
    expected = (grey / np.float32(255))[None, ..., None].astype(np.float32)
    colours = np.repeat(grey[..., None], 3, -1)
    path = tmp_path / "mask.png"
    Image.fromarray(grey).save(path)
    kinds = [path, str(path), Image.fromarray(grey), Image.fromarray(colours), grey, grey[..., None], colours]
    kinds += [grey[None], grey[None, ..., None], colours[None], grey.astype(np.float32) / 255, jnp.asarray(grey)]
    for mask in kinds:
        read = canvas.read_mask(mask, 16, 24)
        assert read.dtype == np.float32
        np.testing.assert_allclose(read, expected, atol=1e-7)
    for mask in (grey > 0, (grey > 0)[None], jnp.asarray(grey > 0), (grey > 0).astype(np.float16)):
        np.testing.assert_array_equal(canvas.read_mask(mask, 16, 24), expected > 0)
    batch = np.stack([grey, 255 - grey])
    assert canvas.read_mask(batch, 16, 24).shape == (2, 16, 24, 1)
    np.testing.assert_array_equal(canvas.read_mask(batch, 16, 24), canvas.read_mask(batch[..., None], 16, 24))


def test_one_mask_as_wide_as_a_picture_has_channels():
    mask = np.zeros((2, 5, 3), np.uint8)
    mask[1] = 255
    np.testing.assert_array_equal(canvas.read_mask(mask, 5, 3)[:, 0, 0, 0], [0, 1])  # a batch of 2, 5x3


def test_what_is_transparent_in_a_mask_is_kept(tmp_path):
    painted = Image.new("RGBA", (24, 16), (255, 255, 255, 0))
    painted.paste((255, 255, 255, 255), (3, 2, 9, 5))
    path = tmp_path / "painted.png"
    painted.save(path)
    for mask in (painted, path):
        np.testing.assert_array_equal(canvas.read_mask(mask, 16, 24), mask_of(16, 24, (2, 3, 3, 6)))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((8, 24), np.uint8), "mask is 24x8 pixels, the image 24x16: make them of one size"),
        (np.zeros((24, 16), bool), "mask is 16x24 pixels, the image 24x16"),
        (Image.new("L", (48, 32)), "mask is 48x32 pixels, the image 24x16"),
        (np.zeros((2, 8, 24, 1), np.uint8), "mask is 24x8 pixels, the image 24x16"),
        (np.zeros((16, 24, 2, 1, 1), np.uint8), r"mask has the shape \(16, 24, 2, 1, 1\)"),
        (np.zeros(24, np.uint8), r"mask has the shape \(24,\)"),
        (np.full((16, 24), 255.0), r"mask has floats from 255 to 255"),
        (np.full((16, 24), 255), "mask is of int64"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    with pytest.raises(ValueError, match=message):
        canvas.read_mask(mask, 16, 24)


# -- Sizes -------------------------------------------------------------------------------------------------------------


def test_sizes_are_cut_to_a_multiple_with_a_notice(caplog):
    assert canvas.fit_size(512, 768, 8) == (512, 768) and not caplog.records
    assert canvas.fit_size(515, 768, 8) == (512, 768)
    assert caplog.messages == ["768x515 is not divisible by 8: worked on in 768x512"]
    assert canvas.fit_size(3, 15, 8) == (8, 8)


def test_resize():
    assert canvas.resize(PICTURE, 16, 24) is PICTURE
    smooth = np.broadcast_to(np.linspace(0, 255, 24).astype(np.uint8)[None, None, :, None], (2, 16, 24, 3))
    larger = canvas.resize(smooth, 24, 36)
    assert larger.shape == (2, 24, 36, 3) and larger.dtype == np.uint8
    assert np.abs(canvas.resize(larger, 16, 24).astype(int) - smooth).max() <= 3
    expected = np.asarray(Image.fromarray(PICTURE[1]).resize((10, 9), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(canvas.resize(PICTURE, 9, 10)[1], expected)


def test_nothing_of_a_mask_is_lost_when_it_shrinks():
    mask = mask_of(64, 64, (40, 17, 1, 1))
    small = canvas.resize_mask(mask, 16, 16)
    assert small.shape == (1, 16, 16, 1) and small.max() > 0
    assert canvas.resize_mask(mask, 64, 64) is mask
    np.testing.assert_allclose(canvas.resize_mask(np.ones_like(mask), 100, 30), 1, atol=1e-6)


def test_a_latent_with_any_masked_pixel_is_redrawn():
    for _ in range(20):
        mask = (RNG.random((2, 24, 16, 1)) < 0.01).astype(np.float32) * RNG.uniform(0.1, 1, (2, 24, 16, 1))
        mask = mask.astype(np.float32)
        small = canvas.latent_mask(mask, 8)
        assert small.shape == (2, 3, 2, 1)
        for b, row, column in np.ndindex(2, 3, 2):
            cell = mask[b, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert small[b, row, column, 0] == float((cell > 0).any())


# -- Parts -------------------------------------------------------------------------------------------------------------


def test_composite_is_exact_where_the_mask_is_black_or_white():
    new, old = RNG.integers(0, 256, (2, 2, 32, 32, 3), np.uint8)
    mask = np.round(RNG.random((2, 32, 32, 1)) * 4).astype(np.float32) / 4
    out = canvas.composite(new, old, mask)
    assert out.dtype == np.uint8
    every = np.broadcast_to(mask, out.shape)
    np.testing.assert_array_equal(out[every == 0], old[every == 0])
    np.testing.assert_array_equal(out[every == 1], new[every == 1])
    middle = every == 0.5
    assert np.abs(out[middle] - (new[middle].astype(float) + old[middle]) / 2).max() <= 0.5


def test_box_holds_what_is_masked_lies_in_the_picture_and_has_the_shape_asked_for():
    rng = np.random.default_rng(2)
    shaped = 0
    for _ in range(300):
        tall, wide = (int(n) for n in rng.integers(1, 80, 2))
        mask = np.zeros((2, tall, wide, 1), np.float32)
        for _ in range(int(rng.integers(1, 3))):  # anywhere, in either of the batch
            mask[rng.integers(2), rng.integers(tall), rng.integers(wide)] = 0.3
        padding, height, width = int(rng.integers(0, 12)), int(rng.integers(1, 9)) * 8, int(rng.integers(1, 9)) * 8
        box = canvas.box_around(mask, padding, height, width)
        assert all(isinstance(number, int) for number in box)
        assert 0 <= box.top and box.top + box.height <= tall and 0 <= box.left and box.left + box.width <= wide

        rows, columns = np.flatnonzero(mask.max((0, 2, 3))), np.flatnonzero(mask.max((0, 1, 3)))
        needed = (
            max(0, rows[0] - padding),
            min(tall, rows[-1] + 1 + padding),
            max(0, columns[0] - padding),
            min(wide, columns[-1] + 1 + padding),
        )
        assert box.top <= needed[0] and box.top + box.height >= needed[1]
        assert box.left <= needed[2] and box.left + box.width >= needed[3]

        sides = needed[1] - needed[0], needed[3] - needed[2]
        assert box.height == sides[0] or box.width == sides[1]  # no larger than it must be
        if box.height < tall and box.width < wide:
            shaped += 1
            off = min(abs(box.height * width / height - box.width), abs(box.width * height / width - box.height))
            assert off <= 0.5 + 1e-9
    assert shaped > 50


def test_box_by_hand():
    mask = mask_of(100, 200, (40, 90, 10, 20))
    assert canvas.box_around(mask, 0, 64, 64) == (35, 90, 20, 20)
    assert canvas.box_around(mask, 5, 64, 64) == (30, 85, 30, 30)
    assert canvas.box_around(mask, 0, 64, 128) == (40, 90, 10, 20)
    assert canvas.box_around(mask_of(100, 200, (0, 190, 10, 10)), 8, 64, 128) == (0, 164, 18, 36)
    assert canvas.box_around(mask_of(100, 200, (0, 0, 100, 200)), 8, 64, 64) == (0, 0, 100, 200)
    with pytest.raises(ValueError, match="the mask is black all over: white is what is redrawn"):
        canvas.box_around(mask_of(100, 200), 8, 64, 64)


def test_box_is_a_view():
    picture = PICTURE.copy()
    canvas.Box(2, 3, 4, 5).of(picture)[:] = 0
    assert (picture[:, 2:6, 3:8] == 0).all() and picture.sum() > 0
    np.testing.assert_array_equal(picture[:, 6:], PICTURE[:, 6:])


def test_extend():
    mask = mask_of(16, 24, (10, 10, 2, 2), batch=2)
    pixels, larger = canvas.extend(PICTURE, mask, left=8, top=0, right=3, bottom=5, overlap=4)
    assert pixels.shape == (2, 21, 35, 3) and larger.shape == (2, 21, 35, 1)
    np.testing.assert_array_equal(pixels[:, :16, 8:32], PICTURE)
    np.testing.assert_array_equal(pixels[:, :16, :8], np.repeat(PICTURE[:, :, :1], 8, 2))
    np.testing.assert_array_equal(pixels[:, 16:, 8:32], np.repeat(PICTURE[:, -1:], 5, 1))
    expected = np.ones((21, 35))
    expected[: 16 - 4, 8 + 4 : 8 + 24 - 4] = 0  # at the top nothing is added, so the border is kept
    expected[10:12, 18:20] = 1  # the given mask
    np.testing.assert_array_equal(larger[0, ..., 0], expected)


def test_extend_by_nothing_or_too_little():
    mask = mask_of(16, 24)
    pixels, same = canvas.extend(PICTURE[:1], mask, 0, 0, 0, 0)
    np.testing.assert_array_equal(pixels, PICTURE[:1])
    np.testing.assert_array_equal(same, mask)
    _, all_over = canvas.extend(PICTURE[:1], mask, 1, 0, 1, 0, overlap=30)
    assert all_over.all()
    with pytest.raises(ValueError, match="extend by -8 pixels at the right: give 0 or more"):
        canvas.extend(PICTURE, mask_of(16, 24, batch=2), 0, 0, -8, 0)


def test_bytes_of_a_picture_are_no_picture_argument():
    """They are an array of no shape to NumPy; the message says what is wanted."""
    encoded = io.BytesIO()
    Image.fromarray(PICTURE[0]).save(encoded, "PNG")
    with pytest.raises(ValueError, match=r"image has the shape \(\)"):
        canvas.read_pixels(encoded.getvalue())


def test_an_image_as_the_autoencoder_has_it():
    image = np.linspace(-1, 1, 48, dtype=np.float32).reshape(4, 4, 3)
    np.testing.assert_array_equal(canvas.read_pixels(image), canvas.read_pixels((image + 1) / 2))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.float32])
def test_a_mask_of_zeros_and_ones(dtype):
    mask = np.zeros((4, 6), dtype)
    mask[1:3, 2:] = 1
    np.testing.assert_array_equal(canvas.read_mask(mask, 4, 6)[0, ..., 0], mask.astype(np.float32))
