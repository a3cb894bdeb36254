import numpy as np
import pytest
from PIL import Image

from sd_jax.config import training_defaults
from sd_jax.data.buckets import make_sizes
from sd_jax.data.transforms import AESTHETIC_SCORE, Fitted, draws, fit, time_ids


def ramp(height, width):
    """Red says the column, green the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0], pixels[:, :, 1] = np.arange(width), np.arange(height)[:, None]
    return pixels


def test_what_fits_is_untouched():
    np.testing.assert_array_equal(fit(ramp(20, 20), (20, 20)).pixels, ramp(20, 20))
    np.testing.assert_array_equal(fit(ramp(20, 30), (20, 30)).pixels, ramp(20, 30))


def test_the_middle_is_cut_out():
    np.testing.assert_array_equal(fit(ramp(20, 50), (20, 20)).pixels, ramp(20, 50)[:, 15:35])
    np.testing.assert_array_equal(fit(ramp(50, 20), (20, 20)).pixels, ramp(50, 20)[15:35])
    np.testing.assert_array_equal(fit(ramp(20, 50), (20, 40)).pixels, ramp(20, 50)[:, 5:45])


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (48, 16)])
@pytest.mark.parametrize(("height", "width"), [(200, 100), (61, 200), (10, 7), (1, 1)])
def test_every_picture_becomes_the_size(height, width, size):
    for flip in (False, True):
        out = fit(ramp(height, width), size, flip=flip).pixels
        assert out.shape == (*size, 3) and out.dtype == np.uint8 and out.flags.c_contiguous
        if min(height, width) > 1:
            side = min(height, width)
            assert abs(out[:, :, 0].mean() - (width - 1) / 2) < 0.05 * side + 1
            assert abs(out[:, :, 1].mean() - (height - 1) / 2) < 0.05 * side + 1


def test_any_picture_in_any_size():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        (height, width), size = rng.integers(1, 60, 2), tuple(int(side) for side in rng.integers(1, 60, 2))
        fitted = fit(np.zeros((height, width, 3), np.uint8), size, rng, bool(rng.integers(2)))
        scale = max(size[0] / height, size[1] / width)
        assert fitted.pixels.shape == (*size, 3)
        for at, wanted, side in zip(fitted.crop, size, (height, width), strict=True):
            assert 0 <= at <= side * scale - wanted + 1


@pytest.mark.parametrize(("height", "width"), [(100, 100), (90, 160), (160, 70)])
def test_nothing_is_squashed(height, width):
    """A circle stays one in every size that pictures are trained at."""
    config = training_defaults("full")
    config.data.resolution, config.data.buckets.step = 64, 8
    down, across = np.ogrid[:height, :width]
    inside = (down - (height - 1) / 2) ** 2 + (across - (width - 1) / 2) ** 2 < 25**2
    picture = np.where(inside[:, :, None], np.uint8(255), np.zeros(3, np.uint8))
    for size in make_sizes(config.data):
        if max(size) <= 1.5 * min(size):  # the circle is not cut
            fitted = fit(picture, size).pixels[:, :, 0].astype(float) / 255
            tall, wide = fitted.sum(0).max(), fitted.sum(1).max()  # its axes, in pixels
            assert abs(tall / wide - 1) < 0.02, size
            assert abs(wide - 50 * max(size[0] / height, size[1] / width)) < 1.0, size


def test_it_is_as_if_the_whole_picture_were_resized_and_then_cut():
    noise = np.random.default_rng(0).integers(0, 256, (90, 160, 3)).astype(np.uint8)
    whole = np.asarray(Image.fromarray(noise).resize((80, 45), Image.Resampling.LANCZOS))
    exact = [fit(noise, (45, 50), draws(0, 0, n)) for n in range(60)]
    exact = [fitted for fitted in exact if np.array_equal(whole[:, fitted.crop[1] :][:, :50], fitted.pixels)]
    assert len(exact) > 15  # where the cut falls on whole pixels


def test_shrinking_does_not_alias():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(fit(stripes, (32, 32)).pixels[:, 2:-2].astype(int) - 128).max() <= 2


def test_a_long_thin_picture_takes_little_memory():
    assert fit(np.zeros((1, 5_000_000, 3), np.uint8), (64, 64)).pixels.shape == (64, 64, 3)


def test_random_crops_cover_the_picture():
    lefts = {int(fit(ramp(20, 30), (20, 20), draws(0, 0, n)).pixels[0, 0, 0]) for n in range(200)}
    assert lefts == set(range(11))


def test_draws_hang_on_seed_record_and_position():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0)]
    assert len({draws(*key).random() for key in keys}) == 5
    assert draws(3, 4, 5).random() == draws(3, 4, 5).random()


# -- What was cut out, and what a model is told of it ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "size", "crop"),
    [
        (20, 20, (20, 20), (0, 0)),
        (20, 50, (20, 20), (0, 15)),  # (50 - 20) / 2
        (50, 20, (20, 20), (15, 0)),
        (20, 50, (60, 60), (0, 45)),  # the whole picture would be 60x150
        (1000, 600, (300, 300), (100, 0)),  # 500x300, of which 200 rows go
        (7, 10, (21, 21), (0, 3)),  # the first of 3 columns, in a picture three times as wide
        (200, 600, (50, 100), (0, 25)),  # 50x150
        (200, 600, (100, 50), (0, 125)),  # 100x300
        (600, 400, (60, 60), (15, 0)),  # 90x60
    ],
)
def test_the_crop_is_in_pixels_of_the_resized_picture(height, width, size, crop):
    assert fit(np.zeros((height, width, 3), np.uint8), size).crop == crop


def test_a_random_crop_tells_what_it_left_out():
    for n in range(50):
        at_size = fit(ramp(20, 30), (20, 20), draws(0, 0, n))
        assert at_size.crop == (0, at_size.pixels[0, 0, 0])
        twice = fit(ramp(30, 20), (40, 40), draws(0, 0, n))
        assert twice.crop[1] == 0 and abs(twice.crop[0] - 2 * twice.pixels[0, 0, 1].astype(int)) <= 1


def test_a_mirrored_crop_is_one_of_the_mirrored_picture():
    lefts = set()
    for n in range(50):
        fitted = fit(ramp(20, 30), (20, 20), draws(0, 0, n), flip=True)
        left = fitted.crop[1]
        np.testing.assert_array_equal(fitted.pixels, ramp(20, 30)[:, ::-1][:, left : left + 20])
        lefts.add(left)
    assert len(lefts) > 8
    assert fit(ramp(20, 30), (20, 20), None, flip=True).pixels[0, 0, 0] == 24  # of the middle


def test_time_ids_in_their_order():
    fitted = Fitted(np.zeros((8, 12, 3), np.uint8), (3, 5))
    ids = time_ids((100, 200), fitted.crop, (8, 12), 6)
    np.testing.assert_array_equal(ids, np.array([100, 200, 3, 5, 8, 12], np.float32), strict=True)
    np.testing.assert_array_equal(time_ids((100, 200), (3, 5), (8, 12), 5), [100, 200, 3, 5, AESTHETIC_SCORE])
    with pytest.raises(ValueError, match="reads 4 time_ids"):
        time_ids((100, 200), (3, 5), (8, 12), 4)


@pytest.mark.parametrize("flip", [False, True])
def test_a_mask_is_cut_as_its_picture(flip):
    """The mask is the picture's own red: it must come out the same, wherever it is cut and however it is scaled."""
    picture = ramp(30, 50) * np.uint8(4)
    for size in ((20, 20), (30, 50), (24, 16), (64, 40)):
        for n in range(10):
            fitted = fit(picture, size, draws(0, 0, n), flip, picture[:, :, 0])
            np.testing.assert_array_equal(fitted.mask, fitted.pixels[:, :, 0])
            assert fitted.mask.flags.c_contiguous
    assert fit(picture, (20, 20)).mask is None
