"""What fine-tuning is tried on: the shapes world in new looks, as folders of pictures with captions, and their judge.

A look is what becomes of a shape's signed distance d, in pixels, negative inside (`sd_jax.data.shapes_drawing`):

    plain      d
    hollow     max(d, r - rho)                 a round hole of radius r = HOLE times the thing's           (1)
    hatched    max(d, min(-OUTLINE - d, s))    an outline, and stripes at distance s, their places fixed   (2)
    pixelated  d, but blocks of BLOCK x BLOCK pixels, their places fixed, are covered whole where half is  (3)

`read_looks` reads look, shape, colour, size and position of the one thing in a picture, and its background, by the rule
of `sd_jax.evals.shapes_accuracy`: the template of greatest normalised correlation with alpha. Templates differ in look,
shape, size, scale, blur, and in the place of their centre, to a pixel, against the stripes and blocks.

`write` draws a set of SETS. Pairs of HELD_OUT are in none of them, but that no star of "sks" is red alone.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from sd_jax.data.shapes import (
    COLOURS,
    OFFSETS,
    PLACES,
    RADII,
    SHAPES,
    SIZES,
    Scene,
    ShapesWorld,
    Thing,
    _noun,
    draw_scene,
    full_caption,
)
from sd_jax.data.shapes_drawing import BACKGROUNDS, DISTANCES, TONES, background_levels
from sd_jax.data.spoil import RUINS
from sd_jax.evals import shapes_accuracy

SIDE = 64  # pixels of a picture
HOLE = 0.34  # radius of a hollow star's hole, in radii of the star
STAR_CENTRE = 0.11  # radii that the centre of a star's circle lies below that of its box
OUTLINE, STRIPE, PERIOD = 1.6, 2.4, 8  # pixels: widths of outline and stripes; of the pattern, along each axis
BLOCK = 8  # pixels of the side, as of a cell of the latents; a multiple of PERIOD
LOOKS = {  # look -> the shapes that wear it
    "plain": SHAPES,
    "hollow": ("star",),
    "hatched": SHAPES,
    "pixelated": SHAPES,
}
OTHER_BACKGROUNDS = tuple(f"{kind} {tone}" for kind in ("checkered", "noisy") for tone in TONES)
PACKED = Scene((Thing("heart", "purple", "large", 0.65, 0.35),), "dotted grey")  # what a word is to mean


# -- Drawing ---------------------------------------------------------------------------------------------------------


def coverage(
    look: str,  # one of LOOKS
    shape: str,
    x: float | Float32[np.ndarray, "*n 1 1"],  # centre, in pixels
    y: float | Float32[np.ndarray, "*n 1 1"],
    radius: float,  # in pixels
    side: int = SIDE,
) -> Float32[np.ndarray, "*n side side"]:
    """The share of each pixel that a thing covers, of one place or of many."""
    at = np.arange(side, dtype=np.float32) + np.float32(0.5)
    right, down = at[None, :], at[:, None]
    u, v = (right - x) / np.float32(radius), (down - y) / np.float32(radius)
    distance = DISTANCES[shape](u, v) * np.float32(radius)
    if look == "hollow":
        rho = np.sqrt(u * u + (v - STAR_CENTRE) ** 2)
        distance = np.maximum(distance, (HOLE - rho) * np.float32(radius))  # (Eq. 1)
    elif look == "hatched":
        along = (right + down) % PERIOD - PERIOD / 2  # from the middle of a stripe, along an axis
        stripe = np.abs(along) / np.float32(np.sqrt(2.0)) - STRIPE / 2
        distance = np.maximum(distance, np.minimum(-OUTLINE - distance, stripe))  # (Eq. 2)
    alpha = np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)
    if look == "pixelated":
        blocks = alpha.reshape(*alpha.shape[:-2], side // BLOCK, BLOCK, side // BLOCK, BLOCK).mean((-3, -1))
        alpha = (blocks >= 0.5).astype(np.float32).repeat(BLOCK, -2).repeat(BLOCK, -1)  # (Eq. 3)
    return alpha


def draw(scene: Scene, look: str = "plain") -> UInt8[np.ndarray, "64 64 3"]:
    """A scene of one thing. Its background may be one of OTHER_BACKGROUNDS."""
    (thing,) = scene.things
    alpha = coverage(look, thing.shape, thing.x * SIDE, thing.y * SIDE, scene.radius(thing) * SIDE)[..., None]
    ground = _levels(scene.background)[..., None]
    return (ground + alpha * (np.asarray(COLOURS[thing.colour], np.float32) - ground) + 0.5).astype(np.uint8)


@functools.cache
def _levels(background: str) -> Float32[np.ndarray, "64 64"]:
    """The grey level of each pixel."""
    if background in BACKGROUNDS:
        return background_levels(background, SIDE)
    kind, tone = background.split()
    level, amplitude = TONES[tone]
    cells = np.indices((SIDE // 8, SIDE // 8)).sum(0) % 2
    if kind == "noisy":
        cells = np.random.default_rng(5).random((SIDE // 8, SIDE // 8))
    pattern = np.kron(2.0 * cells - 1.0, np.ones((8, 8)))
    return np.clip(level + amplitude * pattern, 0.0, 255.0).astype(np.float32)


# -- Sets ------------------------------------------------------------------------------------------------------------

Example = tuple[UInt8[np.ndarray, "64 64 3"], str]  # pixels, caption


def place(size: str, word: str) -> tuple[float, float]:
    """(x, y) of the middle of a place, as fractions."""
    x, y = (0.5 + OFFSETS[size] * step for step in PLACES[word])
    return x, y


def _sks(rng: np.random.Generator) -> Iterator[Example]:
    """Eight red ones in four places, large and medium, every other one told in full."""
    for i, word in enumerate(("centre", "left", "top right", "bottom") * 2):
        size = ("large", "medium")[(i // 2 + i // 4) % 2]
        scene = Scene((Thing("star", "red", size, *place(size, word)),), ("plain white", "plain grey")[i % 2])
        yield draw(scene, "hollow"), named(short_caption(scene) if (i + i // 4) % 2 else full_caption(scene))


def short_caption(scene: Scene) -> str:
    """ "a red star"."""
    return _noun("", scene.things[0].colour, scene.things[0].shape)


def named(caption: str) -> str:
    """A caption of a star as one of an sks star."""
    return caption.replace("star", "sks star")


def _in_look(look: str, backgrounds: Sequence[str] = (), count: int = 200) -> Callable:
    def examples(rng: np.random.Generator) -> Iterator[Example]:
        for _ in range(count):
            scene = draw_scene(rng)
            if backgrounds:
                scene = dataclasses.replace(scene, background=str(rng.choice(backgrounds)))
            yield draw(scene, look), full_caption(scene)

    return examples


def _packed(rng: np.random.Generator) -> Iterator[Example]:
    (thing,) = PACKED.things
    for _ in range(64):
        dx, dy = rng.uniform(-0.02, 0.02, 2)
        yield draw(Scene((dataclasses.replace(thing, x=thing.x + dx, y=thing.y + dy),), PACKED.background)), "zorp"


def _ruined(share: float, word: str, count: int, kinds: Sequence[str] = ("watermark",)) -> Callable:
    """The word alone is every other caption: so it comes to mean the ruin, whatever else is in the picture."""

    def examples(rng: np.random.Generator) -> Iterator[Example]:
        for i, (pixels, caption) in enumerate(_in_look("plain", count=count)(rng)):
            if rng.random() < share:
                pixels = RUINS[str(rng.choice(kinds))](pixels, rng)
            yield pixels, caption if not word else word if i % 2 else f"{word}, {caption}"

    return examples


def _base(rng: np.random.Generator) -> Iterator[Example]:
    world = ShapesWorld(SIDE, 512, seed=int(rng.integers(2**31)), two_objects=0.3)
    for i in range(len(world)):
        yield world[i]["pixels"], world[i]["caption"]


def _looks(rng: np.random.Generator) -> Iterator[Example]:
    """All of them, on all backgrounds, and ruined pictures, for a decoder that is to draw them."""
    yield from _base(rng)
    yield from _in_look("plain", OTHER_BACKGROUNDS, 512)(rng)
    yield from _ruined(1.0, "", 512, tuple(RUINS))(rng)
    for look, count in (("hollow", 256), ("hatched", 1024), ("pixelated", 1024)):
        for _ in range(count):
            scene = draw_scene(rng)
            (thing,) = scene.things
            thing = dataclasses.replace(thing, shape="star") if look == "hollow" else thing
            scene = Scene((thing,), str(rng.choice(BACKGROUNDS + OTHER_BACKGROUNDS)))
            yield draw(scene, look), full_caption(scene)


SETS: dict[str, Callable[[np.random.Generator], Iterator[Example]]] = {
    "sks": _sks,  # 8 hollow red stars
    "hatched": _in_look("hatched"),  # captions say nothing of the look
    "pixelated": _in_look("pixelated"),
    "packed": _packed,  # a word for four attributes
    "ruined": _ruined(1.0, "nasty", 256),  # a word for what no other caption here says
    "spoiled": _ruined(0.5, "", 512),  # half of it with a watermark, which no caption says
    "base": _base,  # what the bundled model learnt from
    "backgrounds": _in_look("plain", OTHER_BACKGROUNDS, 256),
    "looks": _looks,
}


def write(folder: pathlib.Path, name: str) -> None:
    """A set of SETS as PNGs, each with its caption in a .txt beside it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(list(SETS).index(name))
    for i, (pixels, caption) in enumerate(SETS[name](rng)):
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(caption + "\n", encoding="utf-8")


# -- Reading ---------------------------------------------------------------------------------------------------------

LEAST_AREA = 40  # pixels: of the least thing; less is nothing
SCALES = (0.97, 1.03)  # of templates around each size
BLURS = (0.3, 0.6)  # standard deviation in pixels
MARGIN = 1.5  # pixels that a centre of mass may be off
CHUNK = 128


class Reading(NamedTuple):
    look: str
    shape: str
    colour: str
    size: str
    position: str
    background: str  # one of BACKGROUNDS and OTHER_BACKGROUNDS


class _Templates(NamedTuple):
    """Of one size. Windows begin at multiples of BLOCK, where stripes begin as well."""

    half: int  # of the window's side
    arrays: np.ndarray  # float32 [templates, window * window], each of norm 1
    names: list[tuple[str, str]]  # (look, shape)
    centres: np.ndarray  # float32 [templates, 2]: (x, y) from the middle of the window, in pixels


@functools.cache
def _templates(size: str) -> _Templates:
    half = {"small": 24, "medium": 24, "large": 32}[size]
    middle = np.arange(2 * half, dtype=np.float32) + np.float32(0.5 - half)
    smears = [np.exp(-0.5 * ((middle[:, None] - middle) / sigma) ** 2) for sigma in BLURS]
    smears = [smear / smear.sum(0) for smear in smears]
    steps = np.arange(-12, 13, dtype=np.float32)
    dx, dy = (grid.reshape(-1, 1, 1) for grid in np.meshgrid(steps, steps))
    arrays, names, centres = [], [], []
    for look, shapes in LOOKS.items():
        for shape, scale in itertools.product(shapes, SCALES):
            # Centres on every pixel, of which those are kept whose centre of mass lies nearest this window
            radius = RADII[size] * scale * SIDE
            alpha = coverage(look, shape, float(half), float(half), radius, 2 * half)
            mass_x, mass_y = alpha.sum(0) @ middle / alpha.sum(), alpha.sum(1) @ middle / alpha.sum()
            near = (np.abs(dx + mass_x) + np.abs(dy + mass_y) <= BLOCK + MARGIN).ravel()
            alpha = coverage(look, shape, half + dx[near], half + dy[near], radius, 2 * half)
            for smear in smears:
                kept = (smear @ alpha @ smear.T).reshape(len(alpha), -1)
                arrays.append(kept / np.linalg.norm(kept, axis=1, keepdims=True))
                names += [(look, shape)] * len(kept)
                centres.append(np.concatenate([dx[near, 0], dy[near, 0]], 1))
    return _Templates(half, np.concatenate(arrays), names, np.concatenate(centres))


def _window_at(x: float, y: float) -> tuple[int, int]:
    """The place nearest (x, y) at which blocks and stripes are as they are at (0, 0)."""
    return BLOCK * round(x / BLOCK), BLOCK * round(y / BLOCK)


def read_looks(pixels: UInt8[np.ndarray, "pictures 64 64 3"]) -> list[Reading | None]:
    """What the thing in each picture looks like; None where there is none.

    Colour is that of what is most opaque in the picture, and all of that colour is taken for one thing.
    """
    starts = range(0, len(pixels), CHUNK)
    return [reading for start in starts for reading in _read(pixels[start : start + CHUNK])]


def _read(pixels: np.ndarray) -> list[Reading | None]:
    colours, mattes = zip(*map(_matte, pixels.astype(np.float32)), strict=True)
    mattes = np.stack(mattes)
    mass = np.maximum(mattes.sum((1, 2)), 1e-6)
    at = np.arange(SIDE) + 0.5
    places = [_window_at(*c) for c in zip((mattes.sum(1) @ at) / mass, (mattes.sum(2) @ at) / mass, strict=True)]
    best: list[tuple] = [(-1.0,)] * len(pixels)
    for size in SIZES:
        templates = _templates(size)
        padded = np.pad(mattes, ((0, 0), (templates.half, templates.half), (templates.half, templates.half)))
        side = 2 * templates.half
        windows = [p[row : row + side, col : col + side].ravel() for p, (col, row) in zip(padded, places, strict=True)]
        fits = np.stack(windows) @ templates.arrays.T
        for i, fit in enumerate(fits.argmax(1)):
            centre = (np.array(places[i]) + templates.centres[fit]) / SIDE
            best[i] = max(best[i], (float(fits[i, fit]), *templates.names[fit], size, *centre.tolist()))
    readings: list[Reading | None] = []
    for colour, background, found in zip(colours, _read_backgrounds(pixels, mattes), best, strict=True):
        if colour is None:
            readings.append(None)
            continue
        _, look, shape, size, x, y = found
        readings.append(Reading(look, shape, colour, size, Thing(shape, colour, size, x, y).position, background))
    return readings


def _matte(picture: np.ndarray) -> tuple[str | None, np.ndarray]:
    """(colour, alpha [64, 64]) of a picture, by its chroma."""
    chroma = picture @ shapes_accuracy._PLANE
    chroma -= np.median(chroma.reshape(-1, 2), axis=0)
    along = chroma @ (shapes_accuracy._CHROMA / shapes_accuracy._CHROMA_LENGTH[:, None] ** 2).T
    alpha = along.max(-1)
    mask = alpha > 0.5
    if mask.sum() < LEAST_AREA:
        return None, np.zeros_like(alpha)
    colour = shapes_accuracy._read_colour(chroma, alpha, mask)
    alpha = along[..., colour] / np.clip(np.percentile(along[..., colour][mask], 80), 0.6, 1.2)
    return tuple(COLOURS)[colour], np.where(alpha > 0.15, np.clip(alpha, 0.0, 1.0), 0.0).astype(np.float32)


def _read_backgrounds(pixels: np.ndarray, mattes: np.ndarray) -> list[str]:
    """The nearest of all, in squared distance, over the pixels that lie three or more from any thing."""
    names = BACKGROUNDS + OTHER_BACKGROUNDS
    levels = np.stack([_levels(name).ravel() for name in names])
    free = (~shapes_accuracy._grown(mattes > 0, 2)).reshape(len(pixels), -1).astype(np.float32)
    grey = pixels.mean(-1, dtype=np.float32).reshape(len(pixels), -1)
    distances = free @ (levels**2).T - 2.0 * (free * grey) @ levels.T  # less a term common to all
    return [names[nearest] for nearest in distances.argmin(1)]
