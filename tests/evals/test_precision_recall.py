import numpy as np
import pytest

from sd_jax.evals import precision_recall as module
from sd_jax.evals.precision_recall import precision_recall
from tests.evals.test_fid import sets


@pytest.mark.parametrize(
    ("samples", "expected"),
    [  # torch-fidelity 0.4.0, prc_features_to_metric
        ((500, 400, 16), (0.938, 0.7525)),
        ((20, 24, 48), (0.95, 0.4583333)),
    ],
)
@pytest.mark.parametrize("numbers", [2**25, 1000])  # all at once, and in blocks of a few rows
def test_of_known_sets(monkeypatch, samples, expected, numbers):
    monkeypatch.setattr(module, "_NUMBERS", numbers)
    assert precision_recall(*sets(*samples)) == pytest.approx(expected, rel=1e-6)


def test_on_a_line_by_hand():
    """Balls of k=1. Real: 0, 1, 10 reach to 1, 1 and 9 around; generated: 1.5, 19.5, 30 reach 18, 10.5, 10.5."""
    line = lambda *places: np.array(places)[:, None]  # noqa: E731
    found = precision_recall(line(1.5, 19.5, 30.0), line(0.0, 1.0, 10.0), k=1)
    assert found == pytest.approx((1 / 3, 1.0))  # 1.5 lies within; 19.5 and 30 do not
    assert precision_recall(line(1.5, 19.0, 30.0), line(0.0, 1.0, 10.0), k=1).precision == pytest.approx(2 / 3)


def test_equal_and_distant_sets():
    one = sets(30, 1, 8)[0]
    assert precision_recall(one, one) == (1.0, 1.0)
    assert precision_recall(one, one + 100.0) == (0.0, 0.0)


def test_copies_of_one_picture_have_no_distance():
    """A mode that is one picture has a ball without width: only copies lie within."""
    rng = np.random.RandomState(3)
    picture = 1e3 + rng.normal(size=(1, 33))
    copies = np.repeat(picture, 6, axis=0)
    near = np.concatenate([copies[:3], copies[:3] + 1e-3 * rng.normal(size=(3, 33))])
    assert precision_recall(near, copies).precision == 0.5


def test_small_sets_are_named():
    with pytest.raises(ValueError, match="sets of 3 and 9 samples: each needs more than k=3"):
        precision_recall(np.ones((3, 2)), np.ones((9, 2)))
