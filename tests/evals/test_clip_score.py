import numpy as np
import pytest

from sd_jax.evals.clip_score import clip_score


def at(*degrees):
    """Unit vectors of a plane."""
    angles = np.deg2rad(np.array(degrees))
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def test_score_is_the_cosine_in_percent_and_never_below_zero():
    found = clip_score(at(0, 30, 90, 200), at(0, 90, 90, 20))
    np.testing.assert_allclose(found, [100, 50, 100, 0], atol=1e-4)


def test_features_in_half_precision_are_normalised_to_all_digits():
    found = clip_score(1.003 * at(0, 60), at(60, 0))
    np.testing.assert_allclose(found, [50, 50], atol=1e-4)


@pytest.mark.parametrize("factor", [2.0, 0.0, np.nan])
def test_features_of_another_norm_are_refused(factor):
    with pytest.raises(ValueError, match="divide each by its norm"):
        clip_score(at(0, 10) * np.float32(factor), at(0, 10))
