"""How much an autoencoder loses: PSNR, SSIM (Wang et al. 2004), LPIPS and FID of reconstructions against originals.

    PSNR = 10 log10(range^2 / mean (a - b)^2)                                                                    (Eq. 1)
    SSIM = mean (2 mu_a mu_b + C_1)(2 s_ab + C_2) / ((mu_a^2 + mu_b^2 + C_1)(s_a^2 + s_b^2 + C_2))               (Eq. 2)

mu, s: means and (co)variances of each channel in Gaussian windows of 11 pixels, sigma 1.5, that lie within the picture;
C_1 = (0.01 range)^2, C_2 = (0.03 range)^2: scikit-image's structural_similarity with gaussian_weights=True, sigma=1.5,
use_sample_covariance=False. rFID is FID between the two sets.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from sd_jax.evals.features import gathered_rows, mapped
from sd_jax.evals.fid import Moments, frechet_distance
from sd_jax.models.perceptual import LPIPS
from sd_jax.models.presets import FeaturesConfig
from sd_jax.models.vae import to_image
from sd_jax.types import AnyArray, Image, Params, Pixels

_RADIUS = 5  # of SSIM's window: 3.5 sigma, rounded


def psnr(a: Image | Pixels, b: Image | Pixels, data_range: float) -> Float[Array, " batch"]:
    """(Eq. 1) of each pair, in dB, float32; infinite for equal pictures. data_range: 2 for images, 255 for pixels."""
    a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
    difference = (a - b) / data_range
    return -10.0 * jnp.log10(jnp.square(difference).mean(axis=(1, 2, 3)))


def ssim(a: Image | Pixels, b: Image | Pixels, data_range: float) -> Float[Array, " batch"]:
    """(Eq. 2) of each pair, averaged over places and channels, float32. data_range: 2 for images, 255 for pixels.

    Raises ValueError for a side of less than 11 pixels, the window's.
    """
    window = 2 * _RADIUS + 1
    if min(a.shape[1:3]) < window:
        raise ValueError(f"pictures of {a.shape[2]}x{a.shape[1]} are smaller than SSIM's window of {window} pixels")
    # Variances do not depend on the origin: about the middle of the range less is lost in mu(a^2) - mu(a)^2
    origin = 0.5 if jnp.issubdtype(a.dtype, jnp.integer) else 0.0
    a, b = (jnp.asarray(x, jnp.float32) / data_range - origin for x in (a, b))
    mean_a, mean_b = _windowed(a), _windowed(b)
    var_a, var_b = _windowed(a * a) - mean_a * mean_a, _windowed(b * b) - mean_b * mean_b
    covariance = _windowed(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + origin, mean_b + origin
    c1, c2 = 0.01**2, 0.03**2
    above = (2.0 * mean_a * mean_b + c1) * (2.0 * covariance + c2)
    below = (mean_a * mean_a + mean_b * mean_b + c1) * (var_a + var_b + c2)
    return (above / below).mean(axis=(1, 2, 3))


def _windowed(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w channels"]:
    """Gaussian means over the windows within the picture, one axis after the other."""
    weights = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / 1.5) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    height, width = x.shape[1] - 2 * _RADIUS, x.shape[2] - 2 * _RADIUS
    x = sum(float(w) * x[:, i : i + height] for i, w in enumerate(weights))
    return sum(float(w) * x[:, :, i : i + width] for i, w in enumerate(weights))


class Reconstructions:
    """Figures over pairs of pictures, `add`ed a batch at a time: this process' share of them."""

    def __init__(
        self,
        lpips: tuple[FeaturesConfig, Params] | None = None,  # None = no LPIPS
        features: Callable[[np.ndarray], np.ndarray] | None = None,  # of `features`; None = no rFID
        batch_size: int = 32,
    ):
        trunk = None if lpips is None else LPIPS(lpips[0].widths, lpips[0].depths)

        def measured(params: Params, a: AnyArray, b: AnyArray) -> jax.Array:
            columns = [psnr(a, b, 255.0), ssim(a, b, 255.0)]
            if trunk is not None:
                with jax.default_matmul_precision("highest"):
                    columns.append(trunk.apply({"params": params}, to_image(a), to_image(b)))
            return jnp.stack(columns, axis=1)

        self._names = ("psnr", "ssim", "lpips")[: 2 if lpips is None else 3]
        self._measure = mapped(measured, {} if lpips is None else lpips[1], batch_size)
        self._features = features
        self._rows = np.zeros((0, len(self._names)), np.float32)
        self._moments: tuple[Moments, Moments] | None = None

    def add(
        self,
        originals: UInt8[np.ndarray, "pictures height width 3"],
        reconstructions: UInt8[np.ndarray, "pictures height width 3"],
    ) -> None:
        self._rows = np.concatenate([self._rows, self._measure(originals, reconstructions)])
        if self._features is not None:
            found = [Moments.of(self._features(pixels)) for pixels in (originals, reconstructions)]
            before = self._moments or [Moments.empty(len(moments.mean)) for moments in found]
            self._moments = tuple(moments.merge(more) for moments, more in zip(before, found, strict=True))

    def results(self) -> dict[str, float]:
        """Over the pictures of all processes, each of which calls it: `pictures` (their number), the means of `psnr`,
        `ssim` and `lpips`, and `rfid`. Raises ValueError where there are none."""
        rows = gathered_rows(self._rows).astype(np.float64)
        if not len(rows):
            raise ValueError("there are no reconstructions to judge")
        found = {"pictures": float(len(rows)), **dict(zip(self._names, rows.mean(axis=0).tolist(), strict=True))}
        if self._features is not None:
            found["rfid"] = frechet_distance(*(moments.gathered().gaussian() for moments in self._moments))
        return found
