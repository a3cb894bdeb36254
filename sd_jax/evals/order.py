"""What is to be judged, and how. Imports nothing: the command reads it before anything heavy."""

import dataclasses
import pathlib
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Order:
    """The flags of `python -m sd_jax.evals` have these names, and these defaults."""

    out: pathlib.Path
    checkpoint: str | None = None
    adapter: Sequence[str] = ()  # PATH, PATH:STRENGTH or PATH:STRENGTH:TEXT_STRENGTH
    embeddings: str = ""
    base: str = ""
    weights: str = "ema"
    dtype: str = "float32"
    metrics: Sequence[str] = ("shapes",)  # names of METRICS
    captions: str = ""
    data: str = ""
    image_key: str = "image"
    caption_key: str = "text"
    num_images: int = 5000
    features: str = "inception"  # or "clip"
    inception: str = ""
    lpips: str = ""
    clip: str = ""
    clip_tokenizer: str = ""
    aesthetic: str = ""
    cache: str = ""  # "" = out
    one_object: int = 512
    two_objects: int = 128
    batch_size: int = 128
    steps: int = 16
    sampler: str = "dpmpp_2m"
    schedule: str = "normal"
    guidance_scale: float = 2.5
    guidance_scales: Sequence[float] = ()
    seed: int = 0
    shown: int = 32
