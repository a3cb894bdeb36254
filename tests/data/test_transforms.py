import numpy as np
import pytest

from sd_jax.data.transforms import AESTHETIC_SCORE, Fitted, draws, fit, time_ids


def ramp(height, width):
    """Red says the column, green the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0], pixels[:, :, 1] = np.arange(width), np.arange(height)[:, None]
    return pixels


def test_what_fits_is_untouched():
    np.testing.assert_array_equal(fit(ramp(20, 20), 20).pixels, ramp(20, 20))


def test_the_middle_is_cut_out():
    np.testing.assert_array_equal(fit(ramp(20, 50), 20).pixels, ramp(20, 50)[:, 15:35])
    np.testing.assert_array_equal(fit(ramp(50, 20), 20).pixels, ramp(50, 20)[15:35])


@pytest.mark.parametrize(("height", "width"), [(200, 100), (61, 200), (10, 7), (1, 1)])
def test_every_size_becomes_the_resolution(height, width):
    out = fit(ramp(height, width), 32).pixels
    assert out.shape == (32, 32, 3) and out.dtype == np.uint8 and out.flags.c_contiguous
    if min(height, width) > 1:
        side = min(height, width)
        assert abs(out[:, :, 0].mean() - (width - 1) / 2) < 0.05 * side + 1
        assert abs(out[:, :, 1].mean() - (height - 1) / 2) < 0.05 * side + 1


def test_shrinking_does_not_alias():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(fit(stripes, 32).pixels[:, 2:-2].astype(int) - 128).max() <= 2


def test_a_long_thin_picture_takes_little_memory():
    assert fit(np.zeros((1, 5_000_000, 3), np.uint8), 64).pixels.shape == (64, 64, 3)


def test_random_crops_cover_the_picture():
    lefts = {int(fit(ramp(20, 30), 20, draws(0, 0, n)).pixels[0, 0, 0]) for n in range(200)}
    assert lefts == set(range(11))


def test_half_of_the_pictures_are_mirrored():
    mirrored = [int(fit(ramp(20, 20), 20, draws(0, 0, n), flip=True).pixels[0, 0, 0]) == 19 for n in range(200)]
    assert 70 < sum(mirrored) < 130
    assert fit(ramp(20, 20), 20, None, flip=True).pixels[0, 0, 0] == 0


def test_draws_hang_on_seed_record_and_position():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0)]
    assert len({draws(*key).random() for key in keys}) == 5
    assert draws(3, 4, 5).random() == draws(3, 4, 5).random()


# -- What was cut out, and what a model is told of it ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "resolution", "crop"),
    [
        (20, 20, 20, (0, 0)),
        (20, 50, 20, (0, 15)),  # (50 - 20) / 2
        (50, 20, 20, (15, 0)),
        (20, 50, 60, (0, 45)),  # the whole picture would be 60x150
        (1000, 600, 300, (100, 0)),  # 500x300, of which 200 rows go
        (7, 10, 21, (0, 3)),  # the first of 3 columns, in a picture three times as wide
    ],
)
def test_the_crop_is_in_pixels_of_the_resized_picture(height, width, resolution, crop):
    assert fit(ramp(height, width), resolution).crop == crop


def test_a_random_crop_tells_what_it_left_out():
    for n in range(50):
        at_size = fit(ramp(20, 30), 20, draws(0, 0, n))
        assert at_size.crop == (0, at_size.pixels[0, 0, 0])
        twice = fit(ramp(30, 20), 40, draws(0, 0, n))
        assert twice.crop[1] == 0 and abs(twice.crop[0] - 2 * twice.pixels[0, 0, 1].astype(int)) <= 1


def test_a_mirrored_crop_is_one_of_the_mirrored_picture():
    mirrored = 0
    for n in range(50):
        fitted = fit(ramp(20, 30), 20, draws(0, 0, n), flip=True)
        whole = ramp(20, 30)
        if fitted.pixels[0, 0, 0] > fitted.pixels[0, -1, 0]:
            mirrored, whole = mirrored + 1, whole[:, ::-1]
        left = fitted.crop[1]
        np.testing.assert_array_equal(fitted.pixels, whole[:, left : left + 20])
    assert 10 < mirrored < 40


def test_time_ids_in_their_order():
    fitted = Fitted(np.zeros((8, 8, 3), np.uint8), (3, 5))
    ids = time_ids((100, 200), fitted.crop, 8, 6)
    np.testing.assert_array_equal(ids, np.array([100, 200, 3, 5, 8, 8], np.float32), strict=True)
    np.testing.assert_array_equal(time_ids((100, 200), (3, 5), 8, 5), [100, 200, 3, 5, AESTHETIC_SCORE])
    with pytest.raises(ValueError, match="reads 4 time_ids"):
        time_ids((100, 200), (3, 5), 8, 4)
