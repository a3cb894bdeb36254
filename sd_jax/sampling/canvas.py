"""Pictures and masks that a job starts from: reading them, sizes, crops, and putting the result back.

A mask says what is redrawn: white (255, or 1 in floats) is redrawn, black is kept, grey is blended in the end.
"""

import pathlib
from logging import getLogger
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sd_jax import media
from sd_jax.sampling.resize import resize_latents
from sd_jax.types import AnyArray, Pixels

Mask = Float[np.ndarray, "batch height width 1"]  # [0, 1]

logger = getLogger(__name__)

# -- Reading -----------------------------------------------------------------------------------------------------------


def read_pixels(image: Any) -> Pixels:
    """uint8 [batch, height, width, 3] of a path, a PIL image, or an array with or without a batch.

    Arrays, JAX's too, are uint8, floats in [0, 1], or images in [-1, 1] that go below 0, as the autoencoder has them.
    Transparency is laid over white. Raises BadImage for a file that is no picture, ValueError for such an array.
    """
    if isinstance(image, str | pathlib.Path):
        return media.decode_image(image)[None]
    if isinstance(image, Image.Image):
        return np.array(media._to_rgb(media._upright(image)), np.uint8)[None]
    array = np.asarray(image)
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[-1] != 3 or not array.size:
        raise ValueError(f"image has the shape {np.shape(image)}: give [height, width, 3], or a batch of such")
    if jnp.issubdtype(array.dtype, jnp.floating) and -1 <= array.min() < 0:
        array = (array.astype(np.float32) + 1) / 2
    return _to_uint8(array, "image")


def read_mask(
    mask: Any,  # as for `read_pixels`; arrays also without channels or with one, and of bool or whole 0 and 1
    height: int,  # of the picture that it belongs to
    width: int,
) -> Mask:
    """[batch, height, width, 1], in [0, 1], colours averaged. What is transparent in a file is kept, like black.

    Raises BadImage and ValueError as `read_pixels` does, and ValueError for another size than the picture's.
    """
    if isinstance(mask, str | pathlib.Path):
        media.decode_image(mask)  # says what is wrong with a file that is no picture
        with Image.open(mask) as opened:
            mask = opened.copy()
    if isinstance(mask, Image.Image):
        mask = _over_black(media._upright(mask))
    array = np.asarray(mask)
    if array.ndim == 2:
        array = array[None, ..., None]
    elif array.ndim == 3:  # a batch, or one with channels
        several = array.shape[1:] == (height, width) or array.shape[2] not in (1, 3)
        array = array[..., None] if several else array[None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise ValueError(f"mask has the shape {np.shape(mask)}: give [height, width], or a batch of such")
    if array.shape[1:3] != (height, width):
        found = f"{array.shape[2]}x{array.shape[1]}"
        raise ValueError(f"mask is {found} pixels, the image {width}x{height}: make them of one size")
    if not jnp.issubdtype(array.dtype, jnp.floating) and array.size and 0 <= array.min() and array.max() <= 1:
        array = array.astype(np.uint8) * np.uint8(255)  # bool, or 0 and 1 in whole numbers
    array = _to_uint8(array, "mask")
    return array.mean(-1, dtype=np.float32, keepdims=True) / np.float32(255)


def read_depth(depth: Any) -> Float[np.ndarray, "batch height width 1"]:
    """A map of depth: a path, a PIL image (of 16 bits, too), or an array [height, width] or a batch of such, with or
    without channels, which are averaged. Numbers of any range; the larger, the nearer, as MiDaS has it.

    Raises BadImage for a file that is no picture, ValueError for such an array.
    """
    if isinstance(depth, str | pathlib.Path):
        media.decode_image(depth)  # says what is wrong with a file that is no picture
        with Image.open(depth) as opened:
            depth = opened.copy()
    if isinstance(depth, Image.Image):
        depth = media._upright(depth)
        depth = np.asarray(depth if depth.mode[0] in "IF" else media._to_rgb(depth))
    array = np.asarray(depth).astype(np.float32)
    if array.ndim == 2:
        array = array[None, ..., None]
    elif array.ndim == 3:  # a batch, or one with channels
        array = array[None] if array.shape[2] in (1, 3) else array[..., None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3) or not array.size:
        raise ValueError(f"depth has the shape {np.shape(depth)}: give [height, width], or a batch of such")
    if not np.isfinite(array).all():
        raise ValueError("depth has numbers that are not finite")
    return array.mean(-1, dtype=np.float32, keepdims=True)


def _over_black(image: Image.Image) -> np.ndarray:
    if not image.has_transparency_data:
        return np.array(media._to_rgb(image), np.uint8)
    image = image.convert("RGBA")
    return np.array(Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB"))


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} is of {array.dtype}: give uint8 in [0, 255] or floats in [0, 1]")
    array = array.astype(np.float32)
    if not np.all((array >= 0) & (array <= 1)):  # NaN is outside too
        low, high = array.min(), array.max()
        raise ValueError(f"{name} has floats from {low:g} to {high:g}: give floats in [0, 1], or uint8 in [0, 255]")
    return np.round(array * 255).astype(np.uint8)


# -- Sizes -------------------------------------------------------------------------------------------------------------


def fit_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """The largest size within that is divisible as the networks need it; a notice is logged where it differs."""
    fitted = max(height - height % multiple, multiple), max(width - width % multiple, multiple)
    if fitted != (height, width):
        logger.warning("%dx%d is not divisible by %d: worked on in %dx%d", width, height, multiple, *fitted[::-1])
    return fitted


def resize(pixels: Pixels, height: int, width: int) -> UInt8[AnyArray, "batch new_height new_width 3"]:
    """By Lanczos' filter, as diffusers and the web UIs do."""
    if pixels.shape[1:3] == (height, width):
        return pixels
    pictures = [Image.fromarray(np.asarray(p)).resize((width, height), Image.Resampling.LANCZOS) for p in pixels]
    return np.stack([np.array(p, np.uint8) for p in pictures])


def resize_mask(mask: Mask, height: int, width: int) -> Float[np.ndarray, "batch new_height new_width 1"]:
    """Linearly: nothing that was to be redrawn falls between the pixels of a smaller mask."""
    if mask.shape[1:3] == (height, width):
        return mask
    resized = [Image.fromarray(m[..., 0]).resize((width, height), Image.Resampling.BILINEAR) for m in mask]
    return np.stack([np.array(m, np.float32) for m in resized])[..., None]


def latent_mask(mask: Mask, factor: int) -> Float[np.ndarray, "batch h w 1"]:
    """1 where anything in a latent's factor x factor pixels is to be redrawn, else 0. Sides are divisible by factor."""
    batch, height, width, _ = mask.shape
    cells = mask.reshape(batch, height // factor, factor, width // factor, factor)
    return (cells.max((2, 4)) > 0).astype(np.float32)[..., None]


def latent_depth(
    depth: Float[np.ndarray, "batch height width 1"], height: int, width: int
) -> Float[np.ndarray, "batch new_height new_width 1"]:
    """In the latents' size, by bicubic interpolation, then from -1 (far) to 1 (near), each picture by itself.

    As diffusers' StableDiffusionDepth2ImgPipeline has it. A map that is the same everywhere is far.
    """
    depth = resize_latents(depth, height, width, "bicubic")
    low, high = (edge((1, 2, 3), keepdims=True) for edge in (depth.min, depth.max))
    return 2 * (depth - low) / np.where(high > low, high - low, np.float32(1)) - 1


# -- Parts of a picture ------------------------------------------------------------------------------------------------


def composite(new: Pixels, old: Pixels, mask: Mask) -> Pixels:
    """New where the mask is white and old where it is black, each to the bit; blended where it is grey."""
    blended = old.astype(np.float32) + mask * (new.astype(np.float32) - old.astype(np.float32))
    return np.round(blended).astype(np.uint8)


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, array: np.ndarray) -> np.ndarray:
        """A view of that part of [batch, height, width, c]."""
        return array[:, self.top : self.top + self.height, self.left : self.left + self.width]


def box_around(mask: Mask, padding: int, height: int, width: int) -> Box:
    """What is cut out for "only masked": all that is not black, and `padding` pixels around it.

    It has the shape of height x width as nearly as the picture's borders allow. Raises ValueError for a black mask.
    """
    rows, columns = (np.flatnonzero(mask.max((0, other, 3))) for other in (2, 1))
    if not len(rows):
        raise ValueError("the mask is black all over: white is what is redrawn")
    limits = mask.shape[1:3]
    spans = [
        (max(0, int(found[0]) - padding), min(limit, int(found[-1]) + 1 + padding))
        for found, limit in zip((rows, columns), limits, strict=True)
    ]
    tall, wide = (stop - start for start, stop in spans)
    wanted = max(tall, round(wide * height / width)), max(wide, round(tall * width / height))
    placed = []
    for (start, stop), side, limit in zip(spans, wanted, limits, strict=True):
        side = min(side, limit)
        start = start - (side - (stop - start)) // 2  # grown to both sides alike
        placed.append((min(max(0, start), limit - side), side))
    return Box(placed[0][0], placed[1][0], placed[0][1], placed[1][1])


def extend(
    pixels: Pixels,
    mask: Mask,
    left: int,  # pixels to add on this side
    top: int,
    right: int,
    bottom: int,
    overlap: int = 8,  # pixels of the old picture, along what is added, that are redrawn too, so that the seam joins
) -> tuple[UInt8[np.ndarray, "batch new_h new_w 3"], Float[np.ndarray, "batch new_h new_w 1"]]:
    """A larger canvas for outpainting, and its mask; what is added repeats the border until it is redrawn.

    Raises ValueError for a negative number of pixels.
    """
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    for name, added in sides.items():
        if added < 0:
            raise ValueError(f"extend by {added} pixels at the {name}: give 0 or more")
    height, width = pixels.shape[1:3]
    kept = np.zeros((height, width, 1), bool)
    rows, columns = (
        slice(overlap if before else 0, max(0, side - overlap) if after else side)
        for before, after, side in ((top, bottom, height), (left, right, width))
    )
    kept[rows, columns] = True
    around = ((0, 0), (top, bottom), (left, right), (0, 0))
    mask = np.where(kept, mask, np.float32(1))
    return np.pad(pixels, around, mode="edge"), np.pad(mask, around, constant_values=np.float32(1))
