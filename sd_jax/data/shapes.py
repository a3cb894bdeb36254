"""The shapes world: a drawn and captioned data set whose every attribute is known. numpy only.

One or two things (8 shapes x 8 colours x 3 sizes x 9 places) on one of 8 backgrounds, at any resolution, anti-aliased.
Example i of a data set is decided by (seed, split, i) and by nothing else. Pictures may be of several aspect ratios:
the same scene then spreads over the whole of a wide or tall one, and a square cut out of that loses the ends.

The shapes are those that a person names at a glance when they are 11 pixels across and soft: they differ in what
survives blur, namely corners against roundness, a hole (ring), a bay (moon), a cleft (heart), and the number of arms
(three, four, five). Diamonds, hexagons and ellipses were left out, they turn into squares and circles. The colours
differ in hue (at least 25 degrees apart in the plane orthogonal to grey) and the backgrounds have none, so no object
ever melts into its background.

`HELD_OUT` names eight (colour, shape) pairs, each colour and each shape once, that the splits "train" and "seen" never
draw and the split "held_out" always draws: what a model makes of them shows whether it composes or remembers.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import UInt8

from sd_jax.data.shapes_drawing import BACKGROUNDS, DISTANCES, background_levels, coverage

SHAPES = tuple(DISTANCES)
COLOURS = {
    "red": (218, 30, 45),
    "orange": (244, 122, 16),
    "yellow": (250, 218, 40),
    "green": (40, 165, 60),
    "cyan": (30, 195, 215),
    "blue": (35, 75, 225),
    "purple": (140, 50, 195),
    "pink": (248, 120, 190),
}
SIZES = ("small", "medium", "large")
RADII = {"small": 0.17, "medium": 0.23, "large": 0.295}  # of a thing alone, as fractions of the shorter side
RADII_OF_TWO = {"small": 0.14, "medium": 0.19}  # of things in pairs: two large ones would not fit
OFFSETS = {"small": 0.27, "medium": 0.21, "large": 0.15}  # how far from the centre "left" or "top" is
JITTER = 0.02  # half the range of every place, along each axis
PLAIN_SHARE = 0.45  # of pictures are "plain white" before any background is drawn: see `draw_scene`
SPREAD = 0.26  # how far from the centre the two things of a pair lie, along the axis of their relation
SWAY = 0.06  # half the range of their places along the other axis
PLACES = {
    "top left": (-1, -1),
    "top": (0, -1),
    "top right": (1, -1),
    "left": (-1, 0),
    "centre": (0, 0),
    "right": (1, 0),
    "bottom left": (-1, 1),
    "bottom": (0, 1),
    "bottom right": (1, 1),
}
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}  # where the first thing lies
INVERSE_RELATIONS = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
HELD_OUT = (
    ("red", "moon"),
    ("orange", "ring"),
    ("yellow", "cross"),
    ("green", "heart"),
    ("cyan", "circle"),
    ("blue", "star"),
    ("purple", "triangle"),
    ("pink", "square"),
)
SEEN = tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT)
SPLITS = {"train": SEEN, "seen": SEEN, "held_out": HELD_OUT}  # "seen": pairs of training, other pictures


@dataclasses.dataclass(frozen=True)
class Thing:
    shape: str  # one of SHAPES
    colour: str  # one of COLOURS
    size: str  # one of SIZES
    x: float  # centre, fraction of the width from the left
    y: float  # centre, fraction of the height from the top

    @property
    def position(self) -> str:
        """The word for the place of a thing that is alone: the nearest of the nine places of its size."""
        bound = OFFSETS[self.size] / 2.0
        across, down = (int(d > bound) - int(d < -bound) for d in (self.x - 0.5, self.y - 0.5))
        return _PLACE_WORDS[across, down]


_PLACE_WORDS = {where: word for word, where in PLACES.items()}


@dataclasses.dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]  # one or two (a reading of a bad picture may hold none, or more)
    background: str  # one of BACKGROUNDS, e.g. "striped grey"
    relation: str | None = None  # of the first thing to the second, one of RELATIONS; None for a thing alone

    def radius(self, thing: Thing) -> float:
        """The radius as a fraction of the shorter side: pairs are drawn smaller."""
        return (RADII if len(self.things) == 1 else RADII_OF_TWO)[thing.size]


# -- Pictures --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _background_pixels(background: str, size: int | tuple[int, int]) -> np.ndarray:
    levels = np.round(background_levels(background, size)).astype(np.uint8)
    return np.repeat(levels[:, :, None], 3, axis=2)


def render(
    scene: Scene,
    size: int | tuple[int, int],  # pixels: the side of a square, or height and width
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws a scene: pixels."""
    pixels = _background_pixels(scene.background, size).copy()
    for thing in scene.things:
        alpha, rows, columns = coverage(thing.shape, thing.x, thing.y, scene.radius(thing), size)
        under = pixels[rows, columns].astype(np.float32)
        colour = np.asarray(COLOURS[thing.colour], np.float32)
        pixels[rows, columns] = (under + alpha[:, :, None] * (colour - under) + 0.5).astype(np.uint8)
    return pixels


# -- Captions --------------------------------------------------------------------------------------------------------

_PLACE_PHRASES = {
    word: f"{'in' if ' ' in word or word == 'centre' else 'on' if word in ('left', 'right') else 'at'} the {word}"
    for word in PLACES
}
_LONG_RELATIONS = {"left of": "to the left of", "right of": "to the right of"}


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _noun(*words: str) -> str:
    return _article(" ".join(word for word in words if word))


def full_caption(scene: Scene) -> str:
    """The caption that names every attribute; evaluation prompts are of this form.

    "a small red circle in the top left on a striped grey background", or
    "a small red circle above a medium blue square on a plain white background".
    """
    nouns = [_noun(thing.size, thing.colour, thing.shape) for thing in scene.things]
    where = scene.relation if len(nouns) == 2 else _PLACE_PHRASES[scene.things[0].position]
    ground = f"on {_article(scene.background)} background"
    return " ".join([nouns[0], where, *nouns[1:], ground])


def draw_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption of a scene, of varied form: "a red circle" one time in eight, else mostly all that there is."""
    chance = rng.random(8)
    terse = chance[7] < 0.125
    sized, placed, grounded = (not terse and c < share for c, share in zip(chance, (0.92, 0.96, 0.92), strict=False))
    nouns = [_noun(thing.size if sized else "", thing.colour, thing.shape) for thing in scene.things]
    if len(nouns) == 2:
        relation = scene.relation
        if chance[3] < 0.5:  # the same relation, told from the other thing
            nouns, relation = nouns[::-1], INVERSE_RELATIONS[relation]
        if chance[4] < 0.3:
            relation = _LONG_RELATIONS.get(relation, relation)
        if chance[1] > 0.96:
            subject = f"{nouns[0]} and {nouns[1]}"
        else:
            subject = f"{nouns[0]} {relation} {nouns[1]}"
    else:
        thing = scene.things[0]
        if chance[3] < 0.04:  # a name may come without its colour, or a colour without its shape's name
            nouns = [_noun(thing.size if sized else "", thing.shape)]
        elif chance[3] < 0.08:
            nouns = [_noun(thing.size if sized else "", thing.colour, "shape")]
        subject = f"{nouns[0]} {_PLACE_PHRASES[thing.position]}" if placed else nouns[0]
    kind, tone = scene.background.split()
    named = scene.background if chance[5] < 0.9 else kind if chance[5] < 0.95 else tone
    ground = f"on {_article(named)} background"
    if chance[6] < 0.15:
        subject = f"a picture of {subject}"
    elif chance[6] < 0.25:
        subject = f"there is {subject}"
    elif grounded and chance[6] < 0.35:
        return f"{ground}, {subject}"
    return f"{subject} {ground}" if grounded else subject


# -- Scenes ----------------------------------------------------------------------------------------------------------


def _pick(options: Sequence, rng: np.random.Generator):
    return options[int(rng.random() * len(options))]


def _around(value: float, half_range: float, rng: np.random.Generator) -> float:
    return value + (2.0 * rng.random() - 1.0) * half_range


def _scene_of_one(pair: tuple[str, str], size: str, place: str, background: str, rng: np.random.Generator) -> Scene:
    colour, shape = pair
    x, y = (_around(0.5 + OFFSETS[size] * step, JITTER, rng) for step in PLACES[place])
    return Scene((Thing(shape, colour, size, x, y),), background)


def _scene_of_two(
    pairs: Sequence[tuple[str, str]], sizes: Sequence[str], relation: str, background: str, rng: np.random.Generator
) -> Scene:
    things = []
    for side, (colour, shape), size in zip((1, -1), pairs, sizes, strict=True):
        x, y = (_around(0.5 + side * SPREAD * step, JITTER if step else SWAY, rng) for step in RELATIONS[relation])
        things.append(Thing(shape, colour, size, x, y))
    return Scene(tuple(things), background, relation)


def draw_scene(rng: np.random.Generator, split: str = "train", two_objects: float = 0.0) -> Scene:
    """A random scene, of two things with probability `two_objects`; the two differ in colour, shape or both.

    Backgrounds vary more than things do. Drawn evenly, they keep a small model from finding out within 90,000 pictures
    what "left" means (measured with twelve of them: places right by chance). With half of the pictures on one, 92% of
    places are right after 22,000.
    """
    pairs = SPLITS[split]
    background = "plain white" if rng.random() < PLAIN_SHARE else _pick(BACKGROUNDS, rng)
    if rng.random() >= two_objects:
        return _scene_of_one(_pick(pairs, rng), _pick(SIZES, rng), _pick(tuple(PLACES), rng), background, rng)
    first = int(rng.random() * len(pairs))
    second = (first + 1 + int(rng.random() * (len(pairs) - 1))) % len(pairs)
    sizes = [_pick(tuple(RADII_OF_TWO), rng) for _ in range(2)]
    return _scene_of_two([pairs[first], pairs[second]], sizes, _pick(tuple(RELATIONS), rng), background, rng)


def _check(split: str, two_objects: float) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the shapes world; choose from {', '.join(SPLITS)}")
    if not 0.0 <= two_objects <= 1.0:
        raise ValueError(f"two_objects is a probability, not {two_objects}; give a number from 0 to 1")


@dataclasses.dataclass(frozen=True)
class ShapesWorld:
    """A data set with random access; picklable, without state, so any number of workers may read it.

    Item i is {"pixels": uint8 [*self.size(i), 3], "caption": str, "index": i}.
    """

    resolution: int  # pixels of the side of a square; pictures of other aspects have about its area
    num_examples: int
    seed: int = 0
    split: str = "train"  # one of SPLITS
    two_objects: float = 0.0  # the probability of two things in a picture
    aspects: tuple[float, ...] = (1.0,)  # width / height, each as likely

    def __post_init__(self):
        _check(self.split, self.two_objects)
        if not self.aspects or not all(0.2 <= aspect <= 5.0 for aspect in self.aspects):
            raise ValueError(f"aspects={self.aspects} of shapes world: give one or more numbers from 0.2 to 5")

    def __len__(self) -> int:
        return self.num_examples

    def _rng(self, index: int, number: int = 0) -> np.random.Generator:
        # Philox is keyed, not seeded: neighbouring keys give independent streams, and it starts at no cost.
        stream = index * len(SPLITS) + list(SPLITS).index(self.split)
        philox = np.random.Philox(key=np.array([self.seed, stream], np.uint64), counter=number << 192)
        return np.random.Generator(philox)

    def _index(self, index: SupportsIndex) -> int:
        index = operator.index(index)
        if not 0 <= index < self.num_examples:
            raise IndexError(f"example {index} of {self.num_examples}")
        return index

    def scene(self, index: SupportsIndex) -> Scene:
        """The true attributes of example `index`."""
        return draw_scene(self._rng(self._index(index)), self.split, self.two_objects)

    def size(self, index: SupportsIndex) -> tuple[int, int]:
        """(height, width) of example `index`."""
        index = self._index(index)
        root = 1.0
        if len(self.aspects) > 1 or self.aspects[0] != 1.0:
            root = math.sqrt(_pick(self.aspects, self._rng(index, 1)))  # of its own: all else stays as it is
        return round(self.resolution / root), round(self.resolution * root)

    def caption(self, index: SupportsIndex) -> str:
        """The caption of example `index`, whose picture is not drawn."""
        rng = self._rng(self._index(index))
        return draw_caption(draw_scene(rng, self.split, self.two_objects), rng)

    def __getitem__(self, index: SupportsIndex) -> dict:
        index = self._index(index)
        rng = self._rng(index)
        scene = draw_scene(rng, self.split, self.two_objects)
        return {"pixels": render(scene, self.size(index)), "caption": draw_caption(scene, rng), "index": index}


def evaluation_scenes(split: str, count: int, seed: int = 0, two_objects: float = 0.0) -> list[Scene]:
    """Scenes in which pairs, sizes, places, relations and backgrounds each occur equally often (to within one).

    A share `two_objects` of them, rounded, holds two things; those come last.
    """
    _check(split, two_objects)
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, 2**63], np.uint64)))

    def balanced(options: Sequence, number: int) -> list:
        order = np.concatenate([rng.permutation(len(options)) for _ in range(number // len(options) + 1)])
        return [options[i] for i in rng.permutation(order[:number])]

    pairs, num_two = SPLITS[split], round(count * two_objects)
    num_one = count - num_two
    ones = zip(
        *(balanced(options, num_one) for options in (pairs, SIZES, tuple(PLACES), BACKGROUNDS)),
        strict=True,
    )
    scenes = [_scene_of_one(*words, rng) for words in ones]
    firsts, steps = (balanced(range(start, len(pairs)), num_two) for start in (0, 1))
    twos = zip(
        [(pairs[i], pairs[(i + step) % len(pairs)]) for i, step in zip(firsts, steps, strict=True)],
        [tuple(sizes) for sizes in zip(*(balanced(tuple(RADII_OF_TWO), num_two) for _ in range(2)), strict=True)],
        balanced(tuple(RELATIONS), num_two),
        balanced(BACKGROUNDS, num_two),
        strict=True,
    )
    return scenes + [_scene_of_two(*words, rng) for words in twos]
