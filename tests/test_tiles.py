"""Where tiles lie and what each counts; what is made of them, in tests/sampling and tests/upscalers."""

import numpy as np
import pytest

from sd_jax import tiles


def layouts(count, most=40):
    """(height, width, tile, overlap) in cells: any sides, tiles from 2 cells to more than the picture."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        tile = int(rng.integers(2, 24))
        yield *(int(side) for side in rng.integers(1, most, 2)), tile, int(rng.integers(0, tile))


def test_tiles_are_of_one_size_overlap_enough_and_their_shares_add_up():
    for height, width, tile, overlap in layouts(200):
        sides, corners, shares = tiles.lay_tiles(height, width, tile, overlap)
        assert sides == (min(tile, height), min(tile, width)) and shares.shape == (len(corners), *sides, 1)
        total = np.zeros((height, width, 1))
        for corner, share in zip(corners, shares, strict=True):
            total[tiles.window(corner, sides)] += share  # fails to broadcast where a tile leaves the picture
        np.testing.assert_allclose(total, 1, atol=1e-6)
        for starts, side, length in zip(
            map(sorted, map(set, zip(*corners, strict=True))), sides, (height, width), strict=True
        ):
            assert starts[0] == 0 and starts[-1] + side == length
            assert all(b - a <= tile - overlap for a, b in zip(starts, starts[1:], strict=False))


def test_no_more_tiles_than_needed():
    count = lambda length, tile, overlap: len(tiles.lay_tiles(length, 1, tile, overlap).corners)  # noqa: E731
    assert [count(n, 8, 2) for n in (7, 8, 9, 14, 15, 20, 21)] == [1, 1, 2, 2, 3, 3, 4]
    assert tiles.lay_tiles(40, 8, 16).corners == tiles.lay_tiles(40, 8, 16, 4).corners  # a quarter


def test_from_place_to_place_a_share_changes_by_at_most_one_part_of_the_overlap():
    """So a seam is at most 1 / overlap of what tiles differ by (up to a third of the tile); without one it is all."""
    largest = lambda overlap, size=(30, 41), tile=12: max(  # noqa: E731
        np.abs(np.diff(shown, axis=axis)).sum(0).max() / 2
        for shown in [shares_in_place(*size, tile, overlap)]
        for axis in (1, 2)
    )
    for overlap in (1, 2, 3, 4):
        assert largest(overlap) <= 1 / overlap + 1e-6
    assert largest(0, size=(24, 36)) == 1


def shares_in_place(height, width, tile, overlap):
    """[tiles, height, width]: the shares of each tile in the whole picture."""
    sides, corners, shares = tiles.lay_tiles(height, width, tile, overlap)
    shown = np.zeros((len(corners), height, width))
    for each, corner, share in zip(shown, corners, shares, strict=True):
        each[tiles.window(corner, sides)] = share[..., 0]
    return shown


def test_margins_count_where_no_other_tile_is():
    """So what a tile says there is not seen, but at the edges of the picture."""
    _, corners, shares = tiles.lay_tiles(8, 26, 8, 4, scale=2, margin=1)
    columns = shares[:, 5, :, 0]
    assert [left for _, left in corners] == [0, 3, 7, 10, 14, 18]
    assert columns[1:, :2].max() < 1e-4 and columns[:-1, -2:].max() < 1e-4
    assert columns[0, :2].min() > 1 - 1e-4 and columns[-1, -2:].min() > 1 - 1e-4
    np.testing.assert_allclose(columns[-1, 2:6], [1 / 8, 3 / 8, 5 / 8, 7 / 8], atol=1e-4)  # the rest is a ramp
    total = np.zeros((16, 52, 1))
    for corner, share in zip(corners, shares, strict=True):
        total[tiles.window(corner, (8, 8), 2)] += share
    np.testing.assert_allclose(total, 1, atol=1e-5)


@pytest.mark.parametrize(("tile", "overlap"), [(4, 4), (4, -1), (0, None)])
def test_a_tile_that_is_all_overlap_is_refused(tile, overlap):
    with pytest.raises(ValueError, match=f"tiles of side {tile} cannot overlap by"):
        tiles.lay_tiles(16, 16, tile, overlap)


def test_a_picture_is_put_together_from_its_tiles():
    """Cells of 2 pixels become 3: what is made of a tile lies where the tile does, and no tile begins within a cell."""
    picture = np.random.default_rng(0).integers(0, 256, (14, 22, 3)).astype(np.uint8)
    seen = []

    def function(part):
        seen.append(part.shape)
        cells = part.reshape(1, part.shape[1] // 2, 2, part.shape[2] // 2, 2, 3).max((2, 4))
        return cells.repeat(3, axis=1).repeat(3, axis=2)

    made = tiles.map_tiles(function, picture, 2, 3, tile=4, overlap=1)
    assert set(seen) == {(1, 8, 8, 3)} and len(seen) == 8 and made.dtype == np.float32
    np.testing.assert_allclose(made, function(picture[None])[0], rtol=1e-5)
