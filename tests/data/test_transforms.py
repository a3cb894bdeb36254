import numpy as np
import pytest

from sd_jax.data.transforms import draws, fit


def ramp(height, width):
    """Red says the column, green the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0], pixels[:, :, 1] = np.arange(width), np.arange(height)[:, None]
    return pixels


def test_what_fits_is_untouched():
    np.testing.assert_array_equal(fit(ramp(20, 20), 20), ramp(20, 20))


def test_the_middle_is_cut_out():
    np.testing.assert_array_equal(fit(ramp(20, 50), 20), ramp(20, 50)[:, 15:35])
    np.testing.assert_array_equal(fit(ramp(50, 20), 20), ramp(50, 20)[15:35])


@pytest.mark.parametrize(("height", "width"), [(200, 100), (61, 200), (10, 7), (1, 1)])
def test_every_size_becomes_the_resolution(height, width):
    out = fit(ramp(height, width), 32)
    assert out.shape == (32, 32, 3) and out.dtype == np.uint8 and out.flags.c_contiguous
    if min(height, width) > 1:
        side = min(height, width)
        assert abs(out[:, :, 0].mean() - (width - 1) / 2) < 0.05 * side + 1
        assert abs(out[:, :, 1].mean() - (height - 1) / 2) < 0.05 * side + 1


def test_shrinking_does_not_alias():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(fit(stripes, 32)[:, 2:-2].astype(int) - 128).max() <= 2


def test_a_long_thin_picture_takes_little_memory():
    assert fit(np.zeros((1, 5_000_000, 3), np.uint8), 64).shape == (64, 64, 3)


def test_random_crops_cover_the_picture():
    lefts = {int(fit(ramp(20, 30), 20, draws(0, 0, n))[0, 0, 0]) for n in range(200)}
    assert lefts == set(range(11))


def test_half_of_the_pictures_are_mirrored():
    mirrored = [int(fit(ramp(20, 20), 20, draws(0, 0, n), flip=True)[0, 0, 0]) == 19 for n in range(200)]
    assert 70 < sum(mirrored) < 130
    assert fit(ramp(20, 20), 20, None, flip=True)[0, 0, 0] == 0


def test_draws_hang_on_seed_record_and_position():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0)]
    assert len({draws(*key).random() for key in keys}) == 5
    assert draws(3, 4, 5).random() == draws(3, 4, 5).random()
