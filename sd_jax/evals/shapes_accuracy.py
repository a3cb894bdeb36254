"""Reads scenes of the shapes world back from pixels, and scores pictures against the scenes they should show.

The judge is told nothing of the prompt. For each picture:

1. Chroma. Backgrounds have no colour, so in the plane orthogonal to grey a pixel covered by alpha of colour c is
   alpha * chroma(c), whatever lies behind. Its hue names the colour; its length over |chroma(c)| is a first alpha.
2. Things are the connected components of alpha > 1/2; a component of two colours is cut between them, and specks are
   dropped.
3. The background is the nearest of all backgrounds, in squared distance, over the pixels away from the things.
4. Matting. With B the background and C the thing's colour, alpha = <p - B, C - B> / |C - B|^2 near the thing.       (1)
5. Shape, size and centre are those of the template with the greatest normalised correlation with alpha, over
   shapes x sizes x three scales around each size x two degrees of blur x shifts of half a pixel.
6. Position and relation follow from the centres by the definitions in sd_jax.data.shapes.

Pictures of more than 64 pixels a side are averaged down first: nothing that is read is finer.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from sd_jax.data.shapes import COLOURS, INVERSE_RELATIONS, RADII, RADII_OF_TWO, SHAPES, Scene, Thing
from sd_jax.data.shapes_drawing import BACKGROUNDS, background_levels, coverage

MAX_RESOLUTION = 64  # pixels of the side at which pictures are judged
SMALLEST_AREA = 0.0095  # of the picture: less is a speck. A third of the smallest thing
SECOND_COLOUR_AREA = 0.02  # of the picture: a component with so much of another colour is two things
BLUR = 1.2  # standard deviation, in pixels, of the blurred templates
CHUNK = 256  # pictures read at once, which bounds memory

_RGB = np.array(list(COLOURS.values()), np.float32)  # [colours, 3]
# An orthonormal basis of the plane orthogonal to grey.
_PLANE = np.array([[1, -1, 0], [1, 1, -2]], np.float32).T / np.sqrt(np.array([2, 6], np.float32))
_CHROMA = _RGB @ _PLANE  # [colours, 2]
_CHROMA_LENGTH = np.linalg.norm(_CHROMA, axis=1)


# -- Templates -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Templates:
    """Every (shape, size, scale, blur, shift), of norm one, its centre of mass near the middle of a window."""

    window: int  # pixels of the side, odd
    arrays: np.ndarray  # float32 [templates, window * window]
    names: tuple[tuple[str, str], ...]  # (shape, size) of each
    centres: np.ndarray  # float32 [templates, 2]: (x, y) of the thing's centre from the window's middle, in pixels


@functools.cache
def _centre_of_mass(shape: str) -> tuple[float, float]:
    """Where the mass of a shape lies from the centre of its box, in radii."""
    side = 256
    alpha, rows, columns = coverage(shape, 0.5, 0.5, 0.4, side)
    x = np.arange(columns.start, columns.stop) + 0.5 - side / 2
    y = np.arange(rows.start, rows.stop) + 0.5 - side / 2
    mass = alpha.sum() * 0.4 * side
    return float((alpha.sum(0) * x).sum() / mass), float((alpha.sum(1) * y).sum() / mass)


@functools.lru_cache(maxsize=8)
def _templates(resolution: int, pair: bool) -> _Templates:
    radii = RADII_OF_TWO if pair else RADII
    half = math.ceil(max(radii.values()) * 1.2 * resolution) + 2
    window = 2 * half + 1
    shifts = [step / 2.0 for step in range(-2, 3)]
    blur = np.exp(-0.5 * (np.arange(-3, 4) / BLUR) ** 2)
    smear = sum(weight * np.eye(window, k=k) for k, weight in enumerate(blur / blur.sum(), start=-3)).astype(np.float32)
    arrays, names, centres = [], [], []
    for shape in SHAPES:
        mass_x, mass_y = _centre_of_mass(shape)
        for size, fraction in radii.items():
            for scale in (0.93, 1.0, 1.07):
                radius = fraction * scale * resolution
                for dx in shifts:
                    for dy in shifts:
                        centre = (dx - mass_x * radius, dy - mass_y * radius)
                        x, y = (0.5 + c / window for c in centre)
                        alpha, rows, columns = coverage(shape, x, y, radius / window, window, softness=1.5)
                        array = np.zeros((window, window), np.float32)
                        array[rows, columns] = alpha
                        for variant in (array, smear @ array @ smear):  # as drawn, and as a poor decoder draws it
                            arrays.append(variant.ravel() / np.linalg.norm(variant))
                            names.append((shape, size))
                            centres.append(centre)
    return _Templates(window, np.stack(arrays), tuple(names), np.array(centres, np.float32))


@functools.lru_cache(maxsize=8)
def _backgrounds(resolution: int) -> np.ndarray:
    """float32 [backgrounds, resolution * resolution]"""
    return np.stack([background_levels(name, resolution).ravel() for name in BACKGROUNDS])


# -- Reading ---------------------------------------------------------------------------------------------------------


def _square_pictures(pixels: np.ndarray) -> np.ndarray:
    """float32 [pictures, side, side, 3], side at most MAX_RESOLUTION"""
    pixels = np.asarray(pixels)
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.shape[1] != pixels.shape[2] or pixels.dtype != np.uint8:
        raise ValueError(f"need uint8 pixels [pictures, side, side, 3], not {pixels.dtype} {list(pixels.shape)}")
    if pixels.shape[1] > MAX_RESOLUTION:
        size = (MAX_RESOLUTION, MAX_RESOLUTION)
        pixels = np.stack(
            [np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX)) for picture in pixels]
        )
    return pixels.astype(np.float32)


def _find_things(alpha: np.ndarray, hue: np.ndarray) -> list[list[np.ndarray]]:
    """The masks of the things in each picture, largest first. alpha, hue: [pictures, side, side]."""
    from scipy import ndimage

    pictures, side = alpha.shape[:2]
    smallest, second = (math.ceil(area * side * side) for area in (SMALLEST_AREA, SECOND_COLOUR_AREA))
    in_plane = np.zeros((3, 3, 3), bool)  # neighbours share an edge and a picture
    in_plane[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    labels, _ = ndimage.label(alpha > 0.5, in_plane)
    found = [[] for _ in range(pictures)]
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        picture = box[0].start
        inside = labels[box][0] == label
        if inside.sum() < smallest:
            continue
        mask = np.zeros((side, side), bool)
        mask[box[1:]] = inside
        counts = np.bincount(hue[picture][mask], minlength=len(COLOURS))
        colours = [colour for colour in np.argsort(-counts) if counts[colour] >= second]
        if len(colours) <= 1:
            found[picture].append(mask)
            continue
        for colour in colours:  # of each its largest part: fringes of mixed hue lie scattered along the edges
            parts, number = ndimage.label(mask & (hue[picture] == colour))
            sizes = ndimage.sum_labels(mask, parts, range(1, number + 1))
            if sizes.max() >= smallest:
                found[picture].append(parts == 1 + int(np.argmax(sizes)))
    return [sorted(masks, key=np.sum, reverse=True) for masks in found]


def _grown(mask: np.ndarray, steps: int) -> np.ndarray:
    """The pixels within `steps` of a mask. mask: bool [..., side, side]."""
    for _ in range(steps):
        grown = mask.copy()
        grown[..., 1:, :] |= mask[..., :-1, :]
        grown[..., :-1, :] |= mask[..., 1:, :]
        mask = grown.copy()
        mask[..., :, 1:] |= grown[..., :, :-1]
        mask[..., :, :-1] |= grown[..., :, 1:]
    return mask


def _read_colour(chroma: np.ndarray, alpha: np.ndarray, mask: np.ndarray) -> int:
    """The colour whose chroma, paled by at most 40%, is nearest that of the more opaque half of a thing."""
    opaque = mask & (alpha >= np.median(alpha[mask]))
    mean = chroma[opaque].mean(0)
    gain = np.clip(_CHROMA @ mean / _CHROMA_LENGTH**2, 0.6, 1.15)
    return int(np.argmin(((gain[:, None] * _CHROMA - mean) ** 2).sum(1)))


@dataclasses.dataclass(frozen=True)
class _Cutout:
    """The matte of one thing, laid with the middle pixel of its window on the centre of mass."""

    colour: int
    column: int
    row: int
    matte: np.ndarray  # float32 [window * window]


def _cut_out(
    picture: np.ndarray,  # [side, side, 3]
    levels: np.ndarray,  # [side, side], the background
    colour: int,
    mask: np.ndarray,  # bool [side, side]
    others: np.ndarray,  # bool [side, side], the masks of the other things
    window: int,
) -> _Cutout:
    behind = levels[:, :, None]
    span = _RGB[colour] - behind
    alpha = ((picture - behind) * span).sum(-1) / (span * span).sum(-1)  # (Eq. 1)
    near = _grown(mask, 2) & ~_grown(others, 1)
    alpha = np.where(near, np.clip(alpha / np.clip(np.percentile(alpha[mask], 80), 0.5, 1.2), 0.0, 1.0), 0.0)
    alpha = np.maximum(alpha, 1e-3 * mask)  # so that the mass is never nothing, whatever the picture
    middle, mass = np.arange(picture.shape[0]) + 0.5, alpha.sum()
    column, row = int((alpha.sum(0) * middle).sum() / mass), int((alpha.sum(1) * middle).sum() / mass)
    padded = np.pad(alpha, window // 2)
    return _Cutout(colour, column, row, padded[row : row + window, column : column + window].ravel())


def _name_cutouts(cutouts: list[_Cutout], templates: _Templates, side: int) -> list[Thing]:
    """The things whose templates fit best."""
    if not cutouts:
        return []
    things = []
    fits = np.stack([cutout.matte for cutout in cutouts]).astype(np.float32) @ templates.arrays.T
    for cutout, best in zip(cutouts, fits.argmax(1), strict=True):
        shape, size = templates.names[best]
        x, y = (np.array([cutout.column, cutout.row]) + 0.5 + templates.centres[best]) / side
        things.append(Thing(shape, tuple(COLOURS)[cutout.colour], size, float(x), float(y)))
    return things


def _relation(first: Thing, second: Thing) -> str:
    across, down = first.x - second.x, first.y - second.y
    if abs(across) > abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def _chroma(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(chroma, which colour it is nearest in hue, a first alpha) of every pixel."""
    chroma = pictures @ _PLANE
    chroma -= np.median(chroma.reshape(len(chroma), -1, 2), axis=1)[:, None, None]  # a colour cast is no colour
    along = chroma @ (_CHROMA / _CHROMA_LENGTH[:, None]).T  # [pictures, side, side, colours]
    hue = along.argmax(-1)
    return chroma, hue, np.take_along_axis(along, hue[..., None], -1)[..., 0] / _CHROMA_LENGTH[hue]


def _read_chunk(pictures: np.ndarray) -> list[Scene]:
    number, side = pictures.shape[:2]
    chroma, hue, alpha = _chroma(pictures)
    found = _find_things(alpha, hue)

    # Squared distance to every background over the pixels that no thing touches.
    covered = np.stack([np.any([*masks, np.zeros((side, side), bool)], axis=0) for masks in found])
    free = (~_grown(covered, 2)).reshape(number, -1).astype(np.float32)
    grey = pictures.mean(-1).reshape(number, -1)
    backgrounds = _backgrounds(side)
    distances = free @ (backgrounds**2).T - 2.0 * (free * grey) @ backgrounds.T  # less a term common to all
    nearest = distances.argmin(1)

    cutouts = {False: [], True: []}  # of things alone, and of things in pairs: the latter are drawn smaller
    for i, masks in enumerate(found):
        level = backgrounds[nearest[i]]
        drift = ((grey[i] - level) * free[i]).sum() / max(free[i].sum(), 1.0)
        for mask in masks:
            cutouts[len(masks) > 1].append(
                _cut_out(
                    pictures[i],
                    (level + drift).reshape(side, side),
                    _read_colour(chroma[i], alpha[i], mask),
                    mask,
                    np.any([other & ~mask for other in masks], axis=0),
                    _templates(side, len(masks) > 1).window,
                )
            )
    named = {pair: iter(_name_cutouts(cutouts[pair], _templates(side, pair), side)) for pair in cutouts}

    scenes = []
    for masks, background in zip(found, nearest, strict=True):
        things = tuple(next(named[len(masks) > 1]) for _ in masks)
        relation = _relation(things[0], things[1]) if len(things) == 2 else None
        scenes.append(Scene(things, BACKGROUNDS[background], relation))
    return scenes


def read_scenes(pixels: UInt8[np.ndarray, "pictures side side 3"]) -> list[Scene]:
    """What each picture shows.

    The things of a reading are sorted by area, largest first; there may be none or more than two. `relation` is that
    of the first to the second where there are two.
    """
    return [
        scene
        for start in range(0, len(pixels), CHUNK)
        for scene in _read_chunk(_square_pictures(pixels[start : start + CHUNK]))
    ]


def read_masks(pixels: UInt8[np.ndarray, "pictures side side 3"]) -> Bool[np.ndarray, "pictures side side"]:
    """Where things are, more than half opaque; at most MAX_RESOLUTION pixels a side."""
    return _chroma(_square_pictures(pixels))[2] > 0.5


def read_scene(pixels: UInt8[np.ndarray, "side side 3"]) -> Scene:
    """What one picture shows."""
    return read_scenes(np.asarray(pixels)[None])[0]


# -- Scoring ---------------------------------------------------------------------------------------------------------


def _relation_is_right(reading: Scene, scene: Scene) -> bool:
    if len(reading.things) != 2:
        return False
    read = [(thing.colour, thing.shape) for thing in reading.things]
    true = [(thing.colour, thing.shape) for thing in scene.things]
    if read == true:
        return reading.relation == scene.relation
    return read == true[::-1] and reading.relation == INVERSE_RELATIONS[scene.relation]


def score(readings: Sequence[Scene], scenes: Sequence[Scene]) -> dict[str, float | None]:
    """The share of readings that are right, for each attribute; None where no scene has it.

    colour, shape, size, position: over scenes of one thing, of the largest thing read; a picture of nothing is wrong.
    background: over all scenes, kind and tone both.
    count: over all scenes, the number of things.
    relation: over scenes of two things. Right only if exactly two things are read, with the colours and shapes of the
        scene, each in its place: the thing that should be above is above, whichever of the two was read first.
    """
    if len(readings) != len(scenes):
        raise ValueError(f"{len(readings)} readings for {len(scenes)} scenes")
    right = {name: [] for name in ("colour", "shape", "size", "position", "background", "relation", "count")}
    for reading, scene in zip(readings, scenes, strict=True):
        right["background"].append(reading.background == scene.background)
        right["count"].append(len(reading.things) == len(scene.things))
        if len(scene.things) == 2:
            right["relation"].append(_relation_is_right(reading, scene))
            continue
        for name in ("colour", "shape", "size", "position"):
            read = getattr(reading.things[0], name) if reading.things else None
            right[name].append(read == getattr(scene.things[0], name))
    return {name: float(np.mean(values)) if values else None for name, values in right.items()}


def accuracy(pixels: UInt8[np.ndarray, "pictures side side 3"], scenes: Sequence[Scene]) -> dict[str, float | None]:
    """How well pictures show the scenes they were made for: `score` of what is read from them.

    The pixels come in the order of `scenes`. Returns fractions in [0, 1], or None, by attribute.
    """
    return score(read_scenes(pixels), scenes)
