"""How far two sets of pictures are apart, by features: FID (Heusel et al. 2017), KID (Binkowski et al. 2018).

    FID = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))                                                   (Eq. 1)
    tr (S_1 S_2)^(1/2) = the sum of the singular values of A_1^T A_2,   S_i = A_i A_i^T                          (Eq. 2)
    KID = mean over subsets of the unbiased squared MMD with k(x, y) = (x.y / width + 1)^3                       (Eq. 3)

(Eq. 2) is exact for singular covariances, which fewer samples than features have, where a square root of the product
S_1 S_2 is not: its eigenvalues that should be zero are noise, whose roots add up.

Means and scatters are float64 and merge exactly up to rounding (Chan et al. 1979), so that batches, devices and
processes may each have their own.
"""

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sd_jax.checkpoints.aside import aside
from sd_jax.evals.features import gathered, gathered_rows

Features = Float[np.ndarray, "_samples width"]

_ROWS = 64  # of a scatter that are gathered at once
_PART = 4096  # samples whose moments are taken at once


class Gaussian(NamedTuple):
    """What FID knows of a set: float64 mean [width] and covariance [width, width] (of samples: over n - 1)."""

    mu: np.ndarray
    sigma: np.ndarray


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of samples: their count, mean [width], and scatter [width, width], the sum of (x - mean)(x - mean)^T."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @staticmethod
    def empty(width: int) -> "Moments":
        return Moments(0, np.zeros(width), np.zeros((width, width)))

    @staticmethod
    def of(features: Features) -> "Moments":
        """Raises ValueError for features that are not finite: one of them would make every figure NaN."""
        features = np.asarray(features, np.float64)
        if not len(features):
            return Moments.empty(features.shape[1])
        broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(broken):
            raise ValueError(f"{len(broken)} of {len(features)} samples have features that are not finite")
        mean = features.mean(axis=0)
        centred = features - mean[None]
        return Moments(len(features), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> "Moments":
        """Of both sets together."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features of width {len(self.mean)} and {len(other.mean)} do not go together")
        if not self.count or not other.count:
            return self if self.count else other
        count, apart = self.count + other.count, other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    def add(self, features: Features) -> "Moments":
        return self.merge(Moments.of(features))

    def gathered(self) -> "Moments":
        """Those of all processes together, the same in each of them. Each process calls it."""
        counts, means = gathered_rows(np.array([self.count])), gathered_rows(self.mean[None])
        if not counts.sum():
            return self
        mean = counts @ means / counts.sum()
        apart = means - mean[None]
        between = (apart * counts[:, None]).T @ apart
        # A few rows at a time: a thousand processes' scatters would be many gigabytes
        blocks = [sum(gathered(self.scatter[at : at + _ROWS])) for at in range(0, len(mean), _ROWS)]
        return Moments(int(counts.sum()), mean, np.concatenate(blocks) + between)

    def gaussian(self) -> Gaussian:
        """Raises ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"{self.count} samples have no covariance: at least 2 are needed")
        return Gaussian(self.mean, self.scatter / (self.count - 1))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """(Eq. 1), not rounded up to zero: of equal sets it is within rounding of 0, on either side."""
    if first.mu.shape != second.mu.shape:
        raise ValueError(f"statistics of width {len(first.mu)} and {len(second.mu)}: they are of different networks")
    of_root = np.linalg.svd(_root(first.sigma).T @ _root(second.sigma), compute_uv=False).sum()  # (Eq. 2)
    apart = np.square(first.mu - second.mu).sum()
    return float(apart + np.trace(first.sigma) + np.trace(second.sigma) - 2.0 * of_root)


def _root(sigma: np.ndarray) -> np.ndarray:
    """A [width, rank] with A A^T = sigma, by Cholesky with pivots; what is left below rounding is no rank."""
    from scipy.linalg.lapack import dpstrf

    factor, pivots, rank, _ = dpstrf(sigma, lower=1)
    root = np.empty((len(sigma), rank))
    root[pivots - 1] = np.tril(factor)[:, :rank]
    return root


class Statistics(NamedTuple):
    """What is kept of a set of pictures."""

    gaussian: Gaussian
    features: np.ndarray | None = None  # float32 [pictures, width]; None = only the Gaussian is known

    @staticmethod
    def of(features: Features) -> "Statistics":
        return Statistics(gaussian_of(features), features)


def gaussian_of(features: Features) -> Gaussian:
    """A part at a time, so that a large set is not held twice. Raises ValueError as `Moments` does."""
    moments = Moments.empty(features.shape[1])
    for at in range(0, len(features), _PART):
        moments = moments.add(features[at : at + _PART])
    return moments.gaussian()


def save_statistics(path: str | os.PathLike, statistics: Statistics) -> None:
    """An .npz with `mu` and `sigma`, as pytorch-fid and clean-fid have it, and `feats`, as clean-fid's for KID.

    A file that is there is replaced.
    """
    arrays = {"mu": statistics.gaussian.mu, "sigma": statistics.gaussian.sigma}
    if statistics.features is not None:
        arrays["feats"] = np.asarray(statistics.features, np.float32)
    with aside(path, overwrite=True) as work, work.open("wb") as file:
        np.savez(file, **arrays)


def load_statistics(path: str | os.PathLike) -> Statistics:
    """Any of these files; of one that holds `feats` alone, the Gaussian is computed.

    Raises FileNotFoundError, and ValueError for a file that does not hold such statistics.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            features = file["feats"] if "feats" in file else None
            if features is not None and "mu" not in file:
                return Statistics.of(features)
            mu, sigma = (np.asarray(file[name], np.float64) for name in ("mu", "sigma"))
    except Exception as error:  # a damaged archive raises errors of many classes
        raise ValueError(f"{path}: not statistics for FID, an .npz of `mu` and `sigma` ({error})") from error
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: `mu` {mu.shape} and `sigma` {sigma.shape} are not a finite mean and its covariance")
    return Statistics(Gaussian(mu, sigma), features)


class KID(NamedTuple):
    """Over subsets: the mean, which is the figure, and the standard deviation. Papers often give them times 1000."""

    mean: float
    std: float


def kid(
    features: Features,  # of the generated pictures
    reference: Features,  # of the real ones
    subsets: int = 100,
    subset_size: int = 1000,  # samples of each set; all of the smaller set where it has fewer
    seed: int = 2020,
) -> KID:
    """(Eq. 3), an unbiased estimate, so it may be below 0. The subsets are those that torch-fidelity draws by default.

    Raises ValueError for a set of fewer than two samples.
    """
    features, reference = (np.asarray(a, np.float64) for a in (features, reference))
    size = min(subset_size, len(features), len(reference))
    if size < 2:
        raise ValueError(f"KID of {len(features)} against {len(reference)} samples: at least 2 of each are needed")
    rng = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        x = features[rng.choice(len(features), size, replace=False)]
        y = reference[rng.choice(len(reference), size, replace=False)]
        within = sum(k.sum() - np.trace(k) for k in (_kernel(x, x), _kernel(y, y))) / (size * (size - 1))
        distances.append(within - 2.0 * _kernel(x, y).mean())
    return KID(float(np.mean(distances)), float(np.std(distances)))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1.0) ** 3
