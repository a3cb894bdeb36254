import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.evals.fid import Moments, frechet_distance
from sd_jax.evals.reconstruction import Reconstructions, psnr, ssim
from sd_jax.models.perceptual import LPIPS
from sd_jax.models.presets import FeaturesConfig
from sd_jax.models.vae import to_image

SIZE = {"widths": (4,), "depths": (1,)}


def pictures():
    """Two of noise, and the same with more of it; 20 wide, 24 high."""
    one = np.random.RandomState(1).randint(0, 256, (2, 24, 20, 3)).astype(np.uint8)
    other = np.clip(one + np.random.RandomState(2).normal(0, 25, one.shape), 0, 255).astype(np.uint8)
    return one, other


def test_known_pictures():
    # scikit-image 0.26.0: peak_signal_noise_ratio, and structural_similarity with gaussian_weights=True, sigma=1.5,
    # use_sample_covariance=False, channel_axis=-1
    one, other = pictures()
    np.testing.assert_allclose(psnr(one, other, 255.0), [20.53701617526, 20.71524453870], rtol=1e-5)
    np.testing.assert_allclose(ssim(one, other, 255.0), [0.94498392746, 0.94734144368], rtol=1e-5)
    images = [to_image(pixels) for pixels in (one, other)]  # means about 0 weigh otherwise in SSIM
    np.testing.assert_allclose(psnr(*images, 2.0), [20.53701617526, 20.71524453870], rtol=1e-5)
    np.testing.assert_allclose(ssim(*images, 2.0), [0.77023437462, 0.84191293903], rtol=1e-5)


def test_equal_pictures():
    one = pictures()[0]
    np.testing.assert_array_equal(psnr(one, one, 255.0), [np.inf, np.inf])
    np.testing.assert_allclose(ssim(one, one, 255.0), [1.0, 1.0], rtol=1e-6)


def test_flat_pictures_by_hand():
    """Without variance, SSIM is its first factor."""
    dark, bright = (np.full((1, 11, 11, 3), level, np.uint8) for level in (100, 160))
    c1 = (0.01 * 255) ** 2
    np.testing.assert_allclose(ssim(dark, bright, 255.0), [(2 * 100 * 160 + c1) / (100**2 + 160**2 + c1)], rtol=1e-4)
    np.testing.assert_allclose(psnr(dark, bright, 255.0), [20 * np.log10(255 / 60)], rtol=1e-5)


def test_small_pictures_are_named():
    with pytest.raises(ValueError, match="pictures of 12x10 are smaller than SSIM's window of 11 pixels"):
        ssim(jnp.zeros((1, 10, 12, 3)), jnp.zeros((1, 10, 12, 3)), 2.0)


def test_figures_of_a_set_are_those_of_its_pictures():
    one, other = (np.concatenate([pixels, pixels[:, ::-1], pixels[:1, :, ::-1]]) for pixels in pictures())
    lpips = LPIPS(**SIZE).init(jax.random.key(0), *[jnp.zeros((1, 24, 20, 3))] * 2)["params"]
    features = lambda pixels: pixels.mean(axis=(1, 2)).astype(np.float32)  # noqa: E731
    judge = Reconstructions((FeaturesConfig(**SIZE), lpips), features, batch_size=2)
    judge.add(one[:3], other[:3])
    judge.add(one[3:], other[3:])
    found = judge.results()
    distance = LPIPS(**SIZE).apply({"params": lpips}, to_image(one), to_image(other))
    expected = {
        "pictures": 5,
        "psnr": float(psnr(one, other, 255.0).mean()),
        "ssim": float(ssim(one, other, 255.0).mean()),
        "lpips": float(distance.mean()),
        "rfid": frechet_distance(*(Moments.of(features(pixels)).gaussian() for pixels in (one, other))),
    }
    assert found == pytest.approx(expected, rel=1e-5) and list(found) == list(expected)


def test_only_what_is_asked_for():
    judge = Reconstructions(batch_size=2)
    with pytest.raises(ValueError, match="there are no reconstructions to judge"):
        judge.results()
    judge.add(*pictures())
    assert list(judge.results()) == ["pictures", "psnr", "ssim"]
