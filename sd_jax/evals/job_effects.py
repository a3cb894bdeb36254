"""What the jobs do in shapes world: whether each changes what it was asked to change, and nothing else.

Scenes of known truth are drawn and given to a job with a prompt that asks for something else; the judge of
`shapes_accuracy`, which is told neither, reads what comes back. `python -m benchmarks.job_effects` measures all of it
and says what must come out.

What the bundled model does best with is in the dicts below; each job needs it said in its own way:

    image_to_image  the prompt names shape and new colour alone. Place and size must come from the picture: made from
                    a caption that names them too, text_to_image alone covers the drawn thing with an IoU of 0.85
    inpaint         the prompt describes the whole picture as it should become. Where it names the new thing alone,
                    the model counts the other thing for it, and fills the mask with background
    only_masked     the prompt describes the part that is worked on: with much padding, the whole picture; with little,
                    "a large blue circle in the centre"
    extend          the prompt says where the thing lies in the larger picture; else the new part gets another
    hires_fix       low strength, and pictures rather than latents enlarged: the model knows one size, and from strength
                    0.5 on draws what it draws in that size, several times
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from sd_jax.data.shapes import COLOURS, OFFSETS, SHAPES, Scene, Thing, evaluation_scenes, full_caption, render
from sd_jax.data.shapes_drawing import coverage
from sd_jax.evals.shapes_accuracy import MAX_RESOLUTION, read_scenes, score

if TYPE_CHECKING:
    from sd_jax.sampling.pipeline import Pipeline

SIDE = MAX_RESOLUTION  # pixels of the drawn pictures

RECOLOUR = {"strength": 0.4, "guidance_scale": 2.5}
REPAINT = {"strength": 1.0, "guidance_scale": 2.5}
REPAINT_PART = {**REPAINT, "only_masked": True, "padding": 4}
EXTEND = {"strength": 1.0, "guidance_scale": 2.5}
ENLARGE = {"strength": 0.3, "upscaler": "lanczos", "guidance_scale": 2.5}

LITTLE_PADDING = 8  # pixels, up to which `only_masked` works on little but the thing itself


class Effect(NamedTuple):
    """What a job did. The numbers are shares of the pictures, where nothing else is said."""

    numbers: dict[str, float | None]
    before: UInt8[np.ndarray, "pictures height width 3"]
    after: UInt8[np.ndarray, "pictures new_height new_width 3"]


# -- Jobs --------------------------------------------------------------------------------------------------------------


def recolour(pipe: "Pipeline", count: int, seed: int = 0, **recipe) -> Effect:
    """image_to_image of scenes of one thing, asked for another colour.

    iou: mean, of the drawn thing and what the thing that is read covers; iou_of_others: the same with the results of
    other scenes, which is what chance gives. colour: is the new one. shape, background: are kept.
    """
    rng = np.random.default_rng(seed)
    scenes = evaluation_scenes("seen", count, seed)
    wanted = [_changed(scene, 0, "colour", rng) for scene in scenes]
    before = _drawn(scenes)
    after = pipe.image_to_image([_noun(scene.things[0]) for scene in wanted], image=before, seed=seed, **recipe)
    readings = read_scenes(after)
    truth = [thing_mask(scene, 0) for scene in scenes]
    found = [
        covered(picture, reading.things[0].colour) if reading.things else np.zeros((SIDE, SIDE), bool)
        for picture, reading in zip(after, readings, strict=True)
    ]
    scores = score(readings, wanted)
    numbers = {
        "iou": _mean(map(_iou, truth, found)),
        "iou_of_others": _mean(map(_iou, truth, found[1:] + found[:1])),
        **{name: scores[name] for name in ("colour", "shape", "background")},
    }
    return Effect(numbers, before, after)


def repaint(
    pipe: "Pipeline",
    count: int,
    attribute: str = "colour",  # or "shape"
    margin: int = 2,  # of the mask, in pixels, around the bounding box of the thing
    seed: int = 0,
    **recipe,
) -> Effect:
    """inpaint of scenes of two things, one of them masked and asked to have another colour or shape.

    named: has what is asked. other: the other thing is read as before, in colour, shape, size and place. pixels: those
    outside the mask are equal to the bit. background: is kept.
    """
    rng = np.random.default_rng(seed)
    scenes = evaluation_scenes("seen", count, seed, two_objects=1.0)
    named = [int(rng.integers(2)) for _ in scenes]
    wanted = [_changed(scene, i, attribute, rng) for scene, i in zip(scenes, named, strict=True)]
    before = _drawn(scenes)
    masks = np.stack([box_mask(scene, i, margin) for scene, i in zip(scenes, named, strict=True)])
    prompts = [full_caption(scene) for scene in wanted]
    if not recipe.get("only_masked"):
        after = pipe.inpaint(prompts, image=before, mask=masks, seed=seed, **recipe)
    else:  # one by one: a batch has one part in common
        if recipe["padding"] <= LITTLE_PADDING:
            things = [scene.things[i] for scene, i in zip(wanted, named, strict=True)]
            places = [dataclasses.replace(thing, size="large", x=0.5, y=0.5) for thing in things]
            prompts = [full_caption(Scene((p,), scene.background)) for p, scene in zip(places, wanted, strict=True)]
        each = enumerate(zip(prompts, before, masks, strict=True))
        after = np.concatenate([pipe.inpaint(p, image=b, mask=m, seed=seed + i, **recipe) for i, (p, b, m) in each])
    rows = []
    for i, scene, reading, old, new, mask in zip(named, wanted, read_scenes(after), before, after, masks, strict=True):
        one, other = scene.things[i], scene.things[1 - i]
        rows.append(
            {
                "named": _is_read(reading, one, "colour", "shape"),
                "other": _is_read(reading, other, "colour", "shape", "size"),
                "pixels": np.array_equal(new[~mask], old[~mask]),
                "background": reading.background == scene.background,
            }
        )
    return Effect({name: _mean(row[name] for row in rows) for name in rows[0]}, before, after)


def extend(pipe: "Pipeline", count: int, seed: int = 0, **recipe) -> Effect:
    """inpaint of scenes of one thing, half a picture larger on the right.

    background: the right half of the old picture and the new half are read, together, as the old background (all
    patterns repeat twice in half a picture). clean: nothing in the new half has a colour. thing: is still read in the
    old part. pixels: the old ones are equal to the bit, but for the overlap that is redrawn with the new.
    """
    scenes = evaluation_scenes("seen", count, seed)
    before = _drawn(scenes)
    added, overlap = SIDE // 2, 8
    prompts = [full_caption(Scene((_on_the_left(scene.things[0]),), scene.background)) for scene in scenes]
    after = pipe.inpaint(prompts, image=before, extend=(0, 0, added, 0), seed=seed, **recipe)
    old, moved = read_scenes(after[:, :, :SIDE]), read_scenes(after[:, :, added:])
    numbers = {
        "background": _mean(r.background == s.background for r, s in zip(moved, scenes, strict=True)),
        "clean": _mean(max(covered(p, c).mean() for c in COLOURS) < 0.02 for p in after[:, :, SIDE:]),
        "thing": _mean(_is_read(r, s.things[0], "colour", "shape") for r, s in zip(old, scenes, strict=True)),
        "pixels": _mean(map(np.array_equal, after[:, :, : SIDE - overlap], before[:, :, : SIDE - overlap])),
    }
    return Effect(numbers, before, after)


def enlarge(pipe: "Pipeline", count: int, scale: float = 1.5, direct: bool = False, seed: int = 0, **recipe) -> Effect:
    """hires_fix of captions of one thing or two; `direct`: text_to_image in that size at once.

    The numbers are those of `shapes_accuracy.score`. before: the same captions and noise in the model's own size.
    """
    scenes = evaluation_scenes("seen", count, seed, two_objects=0.5)
    captions = [full_caption(scene) for scene in scenes]
    plain = {name: value for name, value in recipe.items() if name not in ("strength", "upscaler")}
    before = pipe.text_to_image(captions, seed=seed, **plain)
    if direct:
        side = round(SIDE * scale)
        after = pipe.text_to_image(captions, seed=seed, width=side, height=side, **plain)
    else:
        after = pipe.hires_fix(captions, seed=seed, scale=scale, **recipe)
    return Effect(score(read_scenes(after), scenes), before, after)


# -- Prompts and noise -------------------------------------------------------------------------------------------------


def share(pipe: "Pipeline", prompt: str, wanted: dict[str, str], count: int, seed: int = 0, **recipe) -> float:
    """How many pictures of a prompt show, as their largest thing, one of the wanted attributes ({"colour": "red"})."""
    readings = read_scenes(pipe.text_to_image(prompt, batch_size=count, seed=seed, **recipe))
    return _mean(bool(reading.things) and _has(reading.things[0], wanted) for reading in readings)


def vary(pipe: "Pipeline", prompt: str, strength: float, count: int, seed: int = 0, **recipe) -> tuple[float, float]:
    """How far `count` variations are from the seed's own picture: the root mean squares (of latents, of pixels).

    Latents have about unit variance, pixels are in [0, 255]. Strength 0 has one variation alone, that picture: there a
    batch goes on from seed to seed.
    """
    recipe = {**recipe, "seed": seed, "output": "latents"}
    own = pipe.text_to_image(prompt, **recipe)
    recipe |= {"variation_seed": seed + 1000, "variation_strength": strength, "batch_size": count if strength else 1}
    varied = pipe.text_to_image(prompt, **recipe)
    pixels = [pipe.finish(latents).astype(np.float32) for latents in (own, varied)]
    return tuple(float(np.sqrt(np.square(a - b).mean())) for a, b in ((own, varied), pixels))


# -- Truth and readings ------------------------------------------------------------------------------------------------


def thing_mask(scene: Scene, i: int) -> Bool[np.ndarray, "side side"]:
    """The pixels of which a thing, as it is drawn, covers more than half."""
    thing = scene.things[i]
    mask = np.zeros((SIDE, SIDE), bool)
    alpha, rows, columns = coverage(thing.shape, thing.x, thing.y, scene.radius(thing), SIDE)
    mask[rows, columns] = alpha > 0.5
    return mask


def box_mask(scene: Scene, i: int, margin: int) -> Bool[np.ndarray, "side side"]:
    """The bounding box of a thing, and `margin` pixels around it."""
    mask = thing_mask(scene, i)
    spans = []
    for axis in (1, 0):
        found = np.flatnonzero(mask.any(axis))
        spans.append(slice(max(0, found[0] - margin), found[-1] + 1 + margin))
    mask[tuple(spans)] = True
    return mask


def covered(picture: UInt8[np.ndarray, "height width 3"], colour: str) -> Bool[np.ndarray, "height width"]:
    """The pixels of which a thing of this colour covers more than half, by the length of their chroma along its own."""
    chroma, whole = (x - x.mean(-1, keepdims=True) for x in (picture.astype(np.float32), np.float32(COLOURS[colour])))
    return chroma @ whole > 0.5 * (whole @ whole)


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max((one | other).sum(), 1))


def _mean(values: Iterable) -> float:
    return float(np.mean(list(values)))


def _drawn(scenes: Sequence[Scene]) -> UInt8[np.ndarray, "pictures side side 3"]:
    return np.stack([render(scene, SIDE) for scene in scenes])


def _changed(scene: Scene, i: int, attribute: str, rng: np.random.Generator) -> Scene:
    """The scene with a colour or shape of thing i that nothing there has."""
    taken = {getattr(thing, attribute) for thing in scene.things}
    free = [value for value in {"colour": COLOURS, "shape": SHAPES}[attribute] if value not in taken]
    things = list(scene.things)
    things[i] = dataclasses.replace(things[i], **{attribute: free[int(rng.integers(len(free)))]})
    return dataclasses.replace(scene, things=tuple(things))


def _noun(thing: Thing) -> str:
    return f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {thing.colour} {thing.shape}"


def _on_the_left(thing: Thing) -> Thing:
    return dataclasses.replace(thing, x=0.5 - OFFSETS[thing.size], y=0.5)


def _has(thing: Thing, wanted: dict[str, str]) -> bool:
    return all(getattr(thing, name) == value for name, value in wanted.items())


def _is_read(reading: Scene, thing: Thing, *attributes: str) -> bool:
    """Whether the nearest thing that is read within a tenth of the picture has the same attributes."""
    away = lambda read: math.hypot(read.x - thing.x, read.y - thing.y)  # noqa: E731
    nearest = min(reading.things, key=away, default=None)
    return nearest is not None and away(nearest) < 0.1 and _has(nearest, {a: getattr(thing, a) for a in attributes})
