"""Pictures ruined on purpose, each with its truth: blurred, watermarked or JPEG-ruined, at known rates from a seed.

What a filter should throw out is known here, so its errors can be counted. Strengths are fractions of the shorter side,
but for JPEG's quality, and lie where a person sees the ruin at a glance at 64 pixels and above.
"""

import io
from collections.abc import Callable, Mapping
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int64
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from sd_jax.data import fingerprints
from sd_jax.data.sources import Source
from sd_jax.media import Picture

BLUR = (0.02, 0.04)  # standard deviation
OPACITY = (0.35, 0.6)  # of a watermark
QUALITY = (3, 8)  # of a JPEG, both included
RATINGS = {"none": 7.0}  # of people, on average; of all that is ruined:
RUINED = 3.0
SPREAD = 0.7  # standard deviation of ratings
TELLS = {"blur": "blurred", "watermark": "with a watermark", "jpeg": "a bad jpeg"}  # what captions say of ruins
_MARK = "SAMPLE"
_STREAM = 0x5B011  # parts these random numbers from a source's own


def blur(pixels: Picture, rng: np.random.Generator) -> Picture:
    """Gaussian."""
    sigma = rng.uniform(*BLUR) * min(pixels.shape[:2])
    return np.array(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)), np.uint8)


def watermark(pixels: Picture, rng: np.random.Generator) -> Picture:
    """A word in white or black, slanted, repeated all over, half seen through."""
    height, width = pixels.shape[:2]
    side, whole = min(height, width), int(np.hypot(height, width)) + 1
    font = ImageFont.load_default(max(round(side * rng.uniform(0.16, 0.22)), 6))
    mask = Image.new("L", (whole, whole))
    draw = ImageDraw.Draw(mask)
    left, top, right, bottom = draw.textbbox((0, 0), _MARK, font=font)
    across, down = round(1.3 * (right - left)), round(2.2 * (bottom - top))
    start = rng.integers(across), rng.integers(down)
    for row, y in enumerate(range(-int(start[1]), whole, down)):
        for x in range(-int(start[0]) - row % 2 * across // 2, whole, across):
            draw.text((x - left, y - top), _MARK, fill=255, font=font)
    mask = mask.rotate(rng.uniform(20, 40), Image.Resampling.BILINEAR)
    corner = (whole - width) // 2, (whole - height) // 2
    cut = np.asarray(mask.crop((*corner, corner[0] + width, corner[1] + height)), np.float32)
    alpha = (cut * np.float32(rng.uniform(*OPACITY) / 255.0))[:, :, None]
    ink = np.float32(255.0 if pixels.mean() < 140 else 0.0)
    return (pixels + alpha * (ink - pixels.astype(np.float32)) + np.float32(0.5)).astype(np.uint8)


def jpeg(pixels: Picture, rng: np.random.Generator) -> Picture:
    """Encoded at a very low quality, and decoded."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=int(rng.integers(QUALITY[0], QUALITY[1] + 1)))
    return np.array(Image.open(out), np.uint8)


RUINS: dict[str, Callable[[Picture, np.random.Generator], Picture]] = {
    "blur": blur,
    "watermark": watermark,
    "jpeg": jpeg,
}


class SpoiledSource:
    """A source, some of whose pictures are ruined. Records have besides "ruin", "none" or one of RUINS, and "rating".

    A record's fate hangs on `seed` and its index alone. Ratings, as people would give them on LAION's scale of 1 to 10,
    are normally distributed around 7 for a picture that is whole and 3 for a ruined one.
    """

    def __init__(
        self,
        source: Source,
        rates: Mapping[str, float],  # of each ruin, the share of records; those that are not named are 0
        seed: int = 0,
        told: float = 0.0,  # share of the ruined pictures whose captions say so, as some captions of the web do
    ):
        unknown = set(rates) - set(RUINS)
        if unknown:
            raise ValueError(f"unknown ruin {', '.join(sorted(unknown))}: choose from {', '.join(RUINS)}")
        if min(rates.values(), default=0.0) < 0 or sum(rates.values()) > 1:
            raise ValueError(f"rates={dict(rates)} of ruin: give shares from 0 on that sum to at most 1")
        self.source, self._seed, self._told = source, seed, told
        self._rates = {name: float(rates.get(name, 0.0)) for name in RUINS}
        self._bounds = np.cumsum(list(self._rates.values()))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex) -> dict:
        record = self.source[index]
        rng, ruin = self._draw(index)
        pixels = RUINS[ruin](record["pixels"], rng) if ruin != "none" else record["pixels"]
        return {**record, "pixels": pixels, "fields": self.fields(index), "ruin": ruin, "rating": self.rating(index)}

    def ruin(self, index: SupportsIndex) -> str:
        """The truth about a record, whose picture is not drawn."""
        return self._draw(index)[1]

    def rating(self, index: SupportsIndex) -> float:
        """Within 1..10."""
        rng, ruin = self._draw(index, 1)
        return float(np.clip(rng.normal(RATINGS.get(ruin, RUINED), SPREAD), 1.0, 10.0))

    def fields(self, index: int) -> tuple[tuple[str, ...], ...]:
        fields, (rng, ruin) = self.source.fields(index), self._draw(index, 2)
        if ruin == "none" or rng.random() >= self._told:
            return fields
        return tuple(tuple(f"{text}, {TELLS[ruin]}" for text in texts) for texts in fields)

    def sizes(self) -> Int64[np.ndarray, "records 2"]:
        return self.source.sizes()

    def full_size(self, index: int) -> tuple[int, int] | None:
        return self.source.full_size(index)

    def fingerprint(self) -> str:
        what = repr((self._rates, self._seed, self._told))
        return fingerprints.digest(self.source.fingerprint(), what, fingerprints.code_of("data/spoil.py"))

    def _draw(self, index: SupportsIndex, number: int = 0) -> tuple[np.random.Generator, str]:
        """(random numbers, the `number`-th stream of a record; the record's ruin)."""
        index = int(index)
        fate = np.random.default_rng((_STREAM, self._seed % 2**32, index)).random()
        place = int(np.searchsorted(self._bounds, fate, side="right"))
        names = (*RUINS, "none")
        return np.random.default_rng((_STREAM, self._seed % 2**32, index, 1 + number)), names[place]
