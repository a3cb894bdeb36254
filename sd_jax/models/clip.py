"""CLIP whole (Radford et al. 2021): a text and a vision tower that project into one space, and the similarity there.

    f = normalise(W_f vision(picture)),  g = normalise(W_g text(caption)),  logits = exp(logit_scale) f . g

As transformers' CLIPModel; its parameter names: text_model, text_projection, vision_model, visual_projection,
logit_scale.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sd_jax.models.clip_text import CLIPText
from sd_jax.models.clip_vision import CLIPVision
from sd_jax.models.presets import CLIPConfig
from sd_jax.models.remat import policy_of
from sd_jax.types import Image, Params, TokenIds

INITIAL_LOGIT_SCALE = 2.6592  # log(1 / 0.07) to as many digits as OpenAI's and transformers' configs have

Features = Float[Array, "batch features"]


class CLIP(NamedTuple):
    """The two towers in the dtypes of a run. Hashable: it can be a static argument of `jit`."""

    config: CLIPConfig
    text: CLIPText
    vision: CLIPVision

    @staticmethod
    def of(config: CLIPConfig, dtype: str = "float32", remat: str = "none") -> "CLIP":
        """Raises ValueError for a `remat` that models/remat.py does not know."""
        policy_of(remat)
        kwargs = {"dtype": jnp.dtype(dtype), "remat": remat}
        return CLIP(config, CLIPText(config.text_config, **kwargs), CLIPVision(config.vision_config, **kwargs))

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, float32."""
        text, vision = jax.random.split(key)
        size = self.config.vision_config.image_size
        return {
            **self.text.init(text, jnp.zeros((1, 1), jnp.int32))["params"],
            **self.vision.init(vision, jnp.zeros((1, size, size, 3)))["params"],
            "logit_scale": jnp.float32(INITIAL_LOGIT_SCALE),
        }

    def encode_image(self, params: Params, images: Float[Array, "batch height width 3"]) -> Features:
        """Pictures as `data/clip_pixels.py` makes them -> features of length 1, float32."""
        own = {name: params[name] for name in ("vision_model", "visual_projection")}
        return normalised(self.vision.apply({"params": own}, images).pooled)

    def encode_picture(self, params: Params, image: Image) -> Features:
        """Pictures in [-1, 1] -> features of length 1, float32; with a gradient. Raises ValueError unless square."""
        return self.encode_image(params, as_read(self.config, image))

    def encode_text(self, params: Params, ids: TokenIds) -> Features:
        """Token ids, with a start and an end each -> features of length 1, float32."""
        own = {name: params[name] for name in ("text_model", "text_projection")}
        return normalised(self.text.apply({"params": own}, ids).pooled)

    def similarity(
        self,
        params: Params,
        images: Float[Array, "images features"],
        texts: Float[Array, "texts features"],
    ) -> Float[Array, "images texts"]:
        """The logits of every pair of features of length 1: their cosine times exp(logit_scale)."""
        scale = jnp.exp(params["logit_scale"].astype(jnp.float32))
        return scale * jnp.einsum("if,tf->it", images, texts, preferred_element_type=jnp.float32)


def as_read(config: CLIPConfig, image: Image) -> Float[Array, "batch size size 3"]:
    """Pictures in [-1, 1] as the vision tower reads them, with a gradient. Raises ValueError unless square.

    Of another size than the config's they are resized by an antialiased bicubic filter.
    """
    size = config.vision_config.image_size
    if image.shape[1] != image.shape[2]:
        raise ValueError(f"pictures of {image.shape[2]}x{image.shape[1]}: CLIP reads squares")
    image = image.astype(jnp.float32)
    if image.shape[1] != size:
        image = jax.image.resize(image, (image.shape[0], size, size, 3), "bicubic")
    mean, std = (jnp.asarray(x, jnp.float32) for x in (config.image_mean, config.image_std))
    return (0.5 * image + 0.5 - mean[None, None, None]) / std[None, None, None]


def normalised(features: Features) -> Features:
    """Of length 1, float32; zeros stay."""
    features = features.astype(jnp.float32)
    square = jnp.square(features).sum(-1, keepdims=True)
    return features * jax.lax.rsqrt(jnp.where(square == 0, jnp.ones_like(square), square))
