import numpy as np
import pytest

from sd_jax.evals import plot


def line_pixels(sheet):
    """(column, row) of the pixels of the line's colour."""
    rows, columns = np.nonzero(np.abs(sheet.astype(int) - plot._LINE).sum(-1) < 60)
    return columns, rows


def test_points_lie_where_their_numbers_say():
    sheet = plot.curve([(1.0, 10.0), (3.0, 30.0), (2.0, 20.0)], ["a", "b", "c"], "x", "y")
    columns, rows = line_pixels(sheet)
    left, top, right, bottom = plot._BOX
    assert columns.min() >= left and columns.max() <= right and rows.min() >= top and rows.max() <= bottom
    # All on one straight line, from the lower left to the upper right
    first, middle, last = (
        rows[np.abs(columns - column) < 2].mean()
        for column in (columns.min(), (columns.min() + columns.max()) / 2, columns.max())
    )
    assert middle == pytest.approx((first + last) / 2, abs=2) and first > last + 200


def test_ticks_are_round_and_cover_the_values():
    for values in ([20.1, 26.3], [0.0003, 0.0009], [-1.0, 1.0], [7.0], [5000.0, 5001.0]):
        ticks, low, high = plot._axis(values)
        assert low < min(values) and high > max(values) and 3 <= len(ticks) <= 8
        texts = [plot._text(tick, ticks) for tick in ticks]
        assert len(set(texts)) == len(ticks)
        np.testing.assert_allclose([float(text) for text in texts], ticks, rtol=1e-6, atol=1e-12)


def test_labels_stand_off_the_line():
    first, middle, last = plot._sides([(0.0, 0.0), (10.0, 0.0), (20.0, 0.0)])
    assert first == (-1.0, 0.0) and last == (1.0, 0.0) and middle == (0.0, -1.0)
    corner = plot._sides([(0.0, 0.0), (10.0, 10.0), (20.0, 0.0)])[1]
    assert corner == pytest.approx((0.0, 1.0))  # below the lowest point


@pytest.mark.parametrize("points", [[], [(0.0, np.nan)], [(np.inf, 0.0), (1.0, 1.0)]])
def test_numbers_must_be_finite(points):
    with pytest.raises(ValueError, match="finite numbers are needed"):
        plot.curve(points, [""] * len(points), "x", "y")
