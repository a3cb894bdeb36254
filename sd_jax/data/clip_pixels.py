"""Pictures of any size -> what a CLIP reads, as the reference does it, on the host.

    the shorter side becomes `size`, the longer one floor(size * long / short), by Pillow's bicubic filter on uint8
    (which widens with the scale: antialiased); the square in the middle; (x / 255 - mean) / std

The two references differ in one thing. Where an odd number of pixels is left over, transformers' CLIPImageProcessorPil
cuts at floor(rest / 2), torchvision's CenterCrop (OpenAI's and OpenCLIP's transform) at rest / 2 rounded to even: one
pixel further for rests of 3, 7, 11, ... `cut` says whose is meant. Palettes and alpha are gone before this: OpenAI's
transform resizes a picture of a palette by its indices, transformers' its colours.

Stable Diffusion's own image embedders do none of it (CompVis/stable-diffusion ldm/modules/encoders/modules.py,
FrozenClipImageEmbedder): they squash the whole picture to a square in float, with bicubic weights of another shape
(kornia, corners aligned), by default without antialiasing. So their features are others than these.

Sources: openai/CLIP `clip/clip.py` (_transform), mlfoundations/open_clip `src/open_clip/transform.py`, transformers
`models/clip/image_processing_pil_clip.py`. Nothing here imports JAX: it runs in the processes that decode.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from sd_jax.media import Picture

if TYPE_CHECKING:
    from sd_jax.models.presets import CLIPConfig

CUTS = ("openai", "transformers")
_LONGEST = 64  # times the shorter side: of longer strips only the part that is cut out is resampled


def preprocess(
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    config: "CLIPConfig",  # image_size, image_mean, image_std
    cut: str = "openai",  # one of CUTS
) -> Float32[np.ndarray, "batch size size 3"]:
    """Pictures of any sizes -> a batch for `CLIP.encode_image`.

    Of strips more than 64 times as long as wide only the middle is resampled, or memory would have no bound; a value
    may then be one of 255 off. Raises ValueError for an unknown `cut` or a picture without pixels.
    """
    if cut not in CUTS:
        raise ValueError(f"cut={cut!r} is not one of {', '.join(CUTS)}")
    size = config.vision_config.image_size
    squares = np.stack([square(picture, size, cut) for picture in pictures]) if len(pictures) else None
    if squares is None:
        return np.zeros((0, size, size, 3), np.float32)
    mean, std = (np.asarray(values, np.float32) for values in (config.image_mean, config.image_std))
    return (squares.astype(np.float32) / np.float32(255) - mean) / std


def square(picture: Picture, size: int, cut: str = "openai") -> UInt8[np.ndarray, "size size 3"]:
    """Resized and cut to size x size, uint8."""
    height, width = picture.shape[:2]
    if not min(height, width):
        raise ValueError(f"a picture of {height}x{width} has no pixels")
    short, long = min(height, width), max(height, width)
    longer = int(size * long / short)
    whole = (size, longer) if height <= width else (longer, size)
    top, left = (_begin(side - size, cut) for side in whole)
    image = Image.fromarray(picture)
    if longer > _LONGEST * size:
        rows, columns = height / whole[0], width / whole[1]
        box = (left * columns, top * rows, (left + size) * columns, (top + size) * rows)
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))
    resized = np.asarray(image.resize(whole[::-1], Image.Resampling.BICUBIC))
    return resized[top : top + size, left : left + size]


def _begin(rest: int, cut: str) -> int:
    return rest // 2 if cut == "transformers" else round(rest / 2)
