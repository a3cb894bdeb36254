"""Noise that is not white, for training alone. Each function takes white noise and changes it, image by image.

White noise n hardly moves an image's mean: that of 64 x 64 numbers has a standard deviation of 1/64. A network that
never sees a mean destroyed never learns to make one, and its pictures are all of middle brightness. Two cures, with
N(0, 1) drawn anew for every image:

    offset     n' = n + o b,  b ~ N(0, 1), one number for each channel                                      (1)
    pyramid    n' = (n_a + n_b + sum_k d^k up(n_k)) / c,   n_k ~ N(0, 1) of height h_k and width w_k        (2)
               h_k = max(1, floor(h / r_k^k)),  r_k ~ U(2, 4),  k = 1, 2, ... until h_k or w_k is 1

Eq. 1 is that of Guttenberg 2023 ("Diffusion with offset noise", crosslabs.org), as kohya's and diffusers' scripts have
it. Eq. 2 is multi-resolution noise (Whitaker 2023, "Multi-resolution noise for diffusion model training", wandb.ai)
with the sizes of kohya's `multires_noise_discount` d: `up` is bilinear, and c gives unit variance, averaged over the
image. (They divide by the deviation measured over a batch, which for a large batch is c; then an image would depend on
its neighbours.) Their level 0 is white too, hence two parts n_a and n_b; their sum is drawn as sqrt(2) n here.

A network also meets its own errors in sampling, which white noise does not show it (Ning et al. 2023, "Input
perturbation reduces exposure bias", arXiv 2301.11706): it is given more noise than it is asked for,

    perturbed  n' = n + gamma xi,  xi ~ N(0, 1),  while the target is still made of n                       (3)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sd_jax.diffusion.noise import normal

Noise = Float[Array, "batch height width channels"]


def with_offset(
    noise: Noise,  # white
    keys: Key[Array, " batch"],
    draw: int,  # the number of this draw among the example's
    offset: float,  # o; 0.05 to 0.1 is usual
) -> Noise:
    """Eq. 1; of variance 1 + o^2."""
    return noise + offset * normal(keys, draw, (1, 1, noise.shape[-1]), noise.dtype)


def with_pyramid(
    noise: Noise,  # white
    keys: Key[Array, " batch"],
    draw: int,
    discount: float,  # d, in (0, 1]; 0.1 to 0.4 is usual
) -> Noise:
    """Eq. 2, of unit variance.

    Level k of an image is drawn with the key fold_in(fold_in(image's key, draw), k), split in two: of r_k and of n_k,
    which is drawn as large as it can be, floor(h / 2^k) x floor(w / 2^k), and used up to h_k x w_k.
    """
    height, width, channels = noise.shape[1:]
    levels = min(height, width).bit_length() - 1  # where r_k = 2

    def one(white, key):
        total, variance, going = 2**0.5 * white, jnp.asarray(2.0, white.dtype), jnp.asarray(True)
        for k in range(1, levels + 1):
            ratio_key, noise_key = jax.random.split(jax.random.fold_in(key, k))
            ratio = jax.random.uniform(ratio_key, (), white.dtype, 2.0, 4.0) ** k
            coarse = jax.random.normal(noise_key, (height // 2**k, width // 2**k, channels), white.dtype)
            h_k, w_k = (jnp.maximum(1.0, jnp.floor(side / ratio)) for side in (height, width))
            rows, columns = _bilinear(height, coarse.shape[0], h_k), _bilinear(width, coarse.shape[1], w_k)
            weight = jnp.where(going, discount**k, 0.0)
            total += weight * jnp.einsum("ya,xb,abc->yxc", rows, columns, coarse, precision="highest")
            variance += weight**2 * jnp.mean(jnp.sum(rows**2, 1)) * jnp.mean(jnp.sum(columns**2, 1))
            going &= (h_k > 1) & (w_k > 1)
        return total / jnp.sqrt(variance)

    return jax.vmap(one)(noise, jax.vmap(lambda key: jax.random.fold_in(key, draw))(keys))


def perturbed(
    noise: Noise,
    keys: Key[Array, " batch"],
    draw: int,
    gamma: float,  # 0.1 in the paper
) -> Noise:
    """Eq. 3: what the network's input is made of."""
    return noise + gamma * normal(keys, draw, noise.shape[1:], noise.dtype)


def _bilinear(size: int, columns: int, count: Float[Array, ""]) -> Float[Array, "size columns"]:
    """The matrix that stretches the first `count` of `columns` numbers to `size`, pixel centres at halves."""
    places = (jnp.arange(size, dtype=count.dtype) + 0.5) * count / size - 0.5
    places = jnp.clip(places, 0.0, count - 1)
    return jnp.maximum(0.0, 1 - jnp.abs(places[:, None] - jnp.arange(columns, dtype=count.dtype)[None]))
