"""The table of filters: columns in any case, LAION's thresholds, what a missing value means."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from sd_jax.data import filters


def kept(columns: dict, **asked) -> list[bool]:
    count = len(next(iter(columns.values())))
    return filters.keep(filters.judge(columns, filters.resolve(asked), count), count).tolist()


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("aesthetic", {"AESTHETIC_SCORE": [5.0, 5.01, None, "6.5", float("nan")]}, [False, True, False, True, False]),
        ("aesthetic", {"Aesthetic": [4, 9]}, [False, True]),
        ("watermark", {"pwatermark": [0.49, 0.5, None]}, [True, False, True]),
        ("unsafe", {"PUNSAFE": [0.1, 0.5, None]}, [True, False, False]),
        ("nsfw", {"NSFW": ["UNLIKELY", "unlikely", "UNSURE", "NSFW", None, ""]}, [True, True, *4 * [False]]),
        ("similarity", {"similarity": [0.28, 0.2799, None]}, [True, False, True]),
        ("resolution", {"WIDTH": [512, 600, 511, None], "HEIGHT": [512, 500, 900, 900]}, [True, False, False, False]),
        ("aspect", {"width": [300, 301, 100], "height": [100, 100, 300]}, [True, False, True]),
        ("sharpness", {"sharpness": [99.9, 100, None]}, [False, True, True]),
        ("blockiness", {"blockiness": [0.5, 0.51, None]}, [True, False, True]),
    ],
)
def test_rows_at_their_defaults(name, columns, expected):
    assert kept(columns, **{name: None}) == expected


def test_the_whole_table_has_a_row_above():
    tested = test_rows_at_their_defaults.pytestmark[0].args[1]
    assert {name for name, *_ in tested} == set(filters.FILTERS)


@pytest.mark.parametrize("name", filters.FILTERS)
def test_a_column_that_is_not_there_is_missing(name):
    assert kept({"other": [1, 2]}, **{name: None}) == 2 * [filters.FILTERS[name].keeps_missing]
    stated = filters.describe(filters.resolve({name: None}))[name]
    assert stated.endswith("kept" if filters.FILTERS[name].keeps_missing else "dropped")


def test_the_first_alias_counts():
    assert kept({"AESTHETIC_SCORE": [9.0], "aesthetic": [1.0]}, aesthetic=5) == [False]


def test_counts():
    columns = {"aesthetic": [6, 4, 6, None], "pwatermark": [0.9, 0.9, 0.1, None]}
    verdicts = filters.judge(columns, filters.resolve({"watermark": 0.5, "aesthetic": None}), 4)
    assert filters.counts(verdicts, 4) == {
        "aesthetic": {"kept": 2, "dropped": 2, "missing": 1, "dropped_first": 2},
        "watermark": {"kept": 2, "dropped": 2, "missing": 1, "dropped_first": 1},
    }
    assert filters.keep(verdicts, 4).tolist() == [False, False, True, False]
    assert filters.keep(filters.judge(columns, {}, 4), 4).all()


def test_configs():
    assert filters.resolve(ConfigDict({"resolution": 256, "nsfw": "UNSURE"})) == {"nsfw": "UNSURE", "resolution": 256.0}
    assert filters.parse("watermark, aesthetic=6") == {"aesthetic": 6.0, "watermark": 0.5} and filters.parse("") == {}
    with pytest.raises(ValueError, match="unknown filter beauty: choose from aesthetic,"):
        filters.parse("beauty=3")
    with pytest.raises(ValueError, match="filter aesthetic='much': give a float, or None for 5.0"):
        filters.parse("aesthetic=much")
    with pytest.raises(ValueError, match="filter unsafe=True"):
        filters.resolve({"unsafe": True})


def test_judged_in_parts_or_at_once():
    rng = np.random.default_rng(0)
    columns = {
        "aesthetic": rng.uniform(3, 7, 50).tolist(),
        "width": [600] * 50,
        "height": rng.integers(400, 700, 50).tolist(),
    }
    whole = kept(columns, aesthetic=5, resolution=512)
    parts = [kept({k: v[i : i + 7] for k, v in columns.items()}, aesthetic=5, resolution=512) for i in range(0, 50, 7)]
    assert sum(parts, []) == whole and 0 < sum(whole) < 50
