"""Keeping a part of the picture: a denoiser that redraws only what is within a mask, and what models that were trained
to inpaint are shown of the rest.

Outside the mask the clean latents x0 are known, and so are the noisy ones: at noise level sigma they are

    x = x0 + sigma n                                                                                        (1)

with the noise n that the walk starts from. So before every call of the model x is set to Eq. 1 outside the mask, and
after it the answer is set to x0 there; ComfyUI does the same.

diffusers sets the latents to Eq. 1 at the next sigma after every step instead, and to x0 after the last. Inside the
mask that comes to the same: a sampler computes each place of x from that place of earlier x and answers alone, so what
it has outside reaches the inside through the model only, and the model sees Eq. 1 there either way. Outside, every
sampler whose last step lands on the model's answer ends at x0. Two things differ: what the first call sees, for which
there is `start`; and the noise that a sampler adds before a call (s_churn), which diffusers adds outside as well.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax.diffusion.denoiser import Denoise
from sd_jax.diffusion.predictions import along_batch
from sd_jax.types import AnyArray, Image


def without_masked(image: Image, mask: Float[AnyArray, "batch_or_1 height width 1"]) -> Image:
    """What a model that was trained to inpaint sees of a picture: grey (0) where it is redrawn (1)."""
    return jnp.asarray(image) * (1 - jnp.asarray(mask))


def beside_latents(
    mask: Float[AnyArray, "batch_or_1 height width 1"],  # 1 = redrawn
    kept: Float[Array, "batch h w channels"],  # latents of `without_masked`
) -> Float[Array, "batch h w channels_plus_1"]:
    """What such a model reads beside noised latents: the mask at each latent's first pixel, then `kept`.

    So it is in diffusers and in the models of Stable Diffusion.
    """
    factor = mask.shape[1] // kept.shape[1]
    seen = jnp.asarray(mask)[:, ::factor, ::factor].astype(kept.dtype)
    return jnp.concatenate([jnp.broadcast_to(seen, (*kept.shape[:3], 1)), kept], axis=-1)


def within_mask(
    denoise: Denoise,
    clean: Float[Array, "batch height width channels"],  # x0
    noise: Float[Array, "batch height width channels"],  # n, unit variance
    mask: Float[Array, "batch height width 1"],  # 1 = redrawn, 0 = kept; in between, a mixture
    start: Float[Array, ""] | None = None,  # from this sigma up, the model sees x as it is; None = never
) -> Denoise:
    """The denoiser that knows x0 where the mask is 0.

    With `start`, the sigma that the walk begins at, its first call sees what the walk begins with everywhere: in
    diffusers at strength 1, noise without a trace of x0.
    """

    def masked(x: Float[Array, "batch height width channels"], sigma: Float[Array, "..."]) -> Array:
        at = along_batch(sigma, x)
        seen = mask * x + (1 - mask) * (clean + at * noise)
        answer = denoise(seen if start is None else jnp.where(at < start, seen, x), sigma)
        return mask * answer + (1 - mask) * clean

    return masked
