"""FID and KID against the packages that papers use, and against their definitions."""

import numpy as np
import pytest
from scipy import linalg

from sd_jax.evals import fid
from sd_jax.evals.fid import (
    Gaussian,
    Moments,
    Statistics,
    frechet_distance,
    gaussian_of,
    kid,
    load_statistics,
    save_statistics,
)


def sets(first, second, width):
    rng = np.random.RandomState(0)
    mix = rng.normal(size=(width, width)) / np.sqrt(width)
    return rng.normal(size=(first, width)) @ mix, 1.1 * rng.normal(size=(second, width)) @ mix + 0.2


def gaussian(features):
    return Moments.of(features).gaussian()


@pytest.mark.parametrize(
    ("samples", "expected"),
    [  # torch-fidelity 0.4.0, fid_statistics_to_metric, and clean-fid 0.1.35, fid_from_feats (scipy 1.17.1)
        ((500, 400, 16), 1.20740109864),
        ((20, 24, 48), 42.6341734135),  # fewer samples than features
    ],
)
def test_fid_of_known_sets(samples, expected):
    one, other = (gaussian(features) for features in sets(*samples))
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-6)


def test_fid_is_its_definition():
    one, other = (gaussian(features) for features in sets(60, 50, 8))
    root = linalg.sqrtm(one.sigma @ other.sigma).real
    expected = ((one.mu - other.mu) ** 2).sum() + np.trace(one.sigma + other.sigma - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("count", [2, 40, 400])
def test_equal_sets_are_not_apart(count):
    one = gaussian(sets(count, 1, 64)[0])
    assert abs(frechet_distance(one, one)) < 1e-12 * np.trace(one.sigma)


def test_singular_covariances_by_hand():
    """Two lines at an angle t: the root's trace is |cos t| times the deviations."""
    t, a, b = 0.7, 3.0, 2.0
    first, second = np.eye(6)[0], np.cos(t) * np.eye(6)[0] + np.sin(t) * np.eye(6)[1]
    one = Gaussian(np.zeros(6), a**2 * np.outer(first, first))
    other = Gaussian(np.ones(6), b**2 * np.outer(second, second))
    assert frechet_distance(one, other) == pytest.approx(6 + a**2 + b**2 - 2 * a * b * np.cos(t), rel=1e-12)
    still = Gaussian(np.zeros(6), np.zeros((6, 6)))
    assert frechet_distance(one, still) == pytest.approx(a**2, rel=1e-12)


def test_widths_must_agree():
    one, other = Moments.of(np.ones((2, 3))), Moments.of(np.ones((2, 4)))
    with pytest.raises(ValueError, match="width 3 and 4: they are of different networks"):
        frechet_distance(one.gaussian(), other.gaussian())
    with pytest.raises(ValueError, match="width 3 and 4 do not go together"):
        one.merge(other)


def test_moments_merge_however_they_are_split():
    """Far from zero, where sums of squares would lose all digits."""
    features = np.random.RandomState(1).normal(1e6, 1.0, (101, 5))
    moments = Moments.empty(5)
    for part in np.split(features, [0, 1, 2, 40, 97]):
        moments = moments.add(part)
    assert moments.count == 101
    np.testing.assert_allclose(moments.gaussian().mu, features.mean(0), rtol=1e-15)
    np.testing.assert_allclose(moments.gaussian().sigma, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-8)
    tree = Moments.of(features[:30]).merge(Moments.of(features[30:60]).merge(Moments.of(features[60:])))
    np.testing.assert_allclose(tree.scatter, moments.scatter, rtol=1e-8, atol=1e-6)
    assert moments.gathered().count == 101
    np.testing.assert_allclose(moments.gathered().scatter, moments.scatter, rtol=1e-15)


def test_too_few_and_broken_samples_are_named():
    with pytest.raises(ValueError, match="1 samples have no covariance: at least 2 are needed"):
        Moments.of(np.ones((1, 3))).gaussian()
    with pytest.raises(ValueError, match="2 of 4 samples have features that are not finite"):
        Moments.of(np.array([[0.0, 1], [np.nan, np.inf], [0, np.inf], [1, 1]]))


def test_statistics_are_files_of_pytorch_fid(tmp_path):
    one = gaussian(sets(20, 1, 6)[0])
    save_statistics(tmp_path / "real.npz", Statistics(Gaussian(one.mu + 1, one.sigma)))
    save_statistics(tmp_path / "real.npz", Statistics(one))
    with np.load(tmp_path / "real.npz") as file:
        assert sorted(file.files) == ["mu", "sigma"]
        np.testing.assert_array_equal(file["sigma"], one.sigma)
    back = load_statistics(tmp_path / "real.npz")
    assert back.features is None and frechet_distance(one, back.gaussian) == frechet_distance(one, one)
    assert [path.name for path in tmp_path.iterdir()] == ["real.npz"]


def test_features_are_kept_with_them(tmp_path):
    features = sets(20, 1, 6)[0].astype(np.float32)
    save_statistics(tmp_path / "both.npz", Statistics.of(features))
    np.savez(tmp_path / "clean_fid_kid.npz", feats=features)
    for name in ("both", "clean_fid_kid"):
        back = load_statistics(tmp_path / f"{name}.npz")
        np.testing.assert_array_equal(back.features, features)
        np.testing.assert_array_equal(back.gaussian.sigma, gaussian(features).sigma)


def test_moments_of_parts_are_those_of_the_whole(monkeypatch):
    features = sets(20, 1, 6)[0]
    monkeypatch.setattr(fid, "_PART", 7)
    np.testing.assert_allclose(gaussian_of(features).sigma, gaussian(features).sigma, rtol=1e-12, atol=1e-14)


def test_other_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.npz"):
        load_statistics(tmp_path / "nowhere.npz")
    np.savez(tmp_path / "kid.npz", features=np.ones(3))
    np.savez(tmp_path / "shape.npz", mu=np.ones(3), sigma=np.ones((2, 2)))
    np.savez(tmp_path / "nan.npz", mu=np.ones(2), sigma=np.full((2, 2), np.nan))
    (tmp_path / "text.npz").write_text("mu")
    for name, said in {
        "kid": "mu",
        "shape": r"\(3,\).*\(2, 2\)",
        "nan": "not a finite mean",
        "text": "not stat",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}\.npz: .*{said}"):
            load_statistics(tmp_path / f"{name}.npz")


def test_kid_of_known_sets():
    one, other = sets(500, 400, 16)
    # torch-fidelity 0.4.0, kid_features_to_metric with kid_subsets=10, kid_subset_size=100, its default seed
    found = kid(one, other, subsets=10, subset_size=100)
    assert found == pytest.approx((0.2019787402989, 0.0674341537669), rel=1e-6)
    # clean-fid 0.1.35, kernel_distance of 400 and 400 samples in one subset
    assert kid(one[:400], other, subsets=1).mean == pytest.approx(0.2019894774661, rel=1e-6)


def test_kid_is_its_definition():
    one, other = sets(5, 4, 3)
    k = lambda x, y: (x @ y / 3 + 1) ** 3  # noqa: E731
    one = one[np.random.RandomState(2020).choice(5, 4, replace=False)]
    within = sum(k(a[i], a[j]) for a in (one, other) for i in range(4) for j in range(4) if i != j) / 12
    between = sum(k(x, y) for x in one for y in other) / 16
    assert kid(sets(5, 4, 3)[0], other, subsets=1).mean == pytest.approx(within - 2 * between, rel=1e-10)


def test_kid_needs_two_samples():
    with pytest.raises(ValueError, match="KID of 5 against 1 samples: at least 2 of each are needed"):
        kid(np.ones((5, 2)), np.ones((1, 2)))
