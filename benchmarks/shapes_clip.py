"""What a CLIP that was trained from nothing is worth in shapes world: `python -m benchmarks.shapes_clip`

Retrieval of captions, true captions against wrong ones, and what re-ranking and guidance (without classifier-free
guidance) add to the accuracy of half-trained models, one for each seed. It reads what these commands make:

    python train.py --config=configs/beside.py:clip,resolution=64 --config.data.two_objects=0.5 \
        --config.data.num_examples=60000 --config.total_steps=2000 --workdir=runs/clip
    python train.py --config=configs/beside.py:clip,resolution=64,noised=True --config.init_clip=runs/clip \
        --config.init=sd_jax/assets/shapes_64 --config.data.two_objects=0.5 --config.data.num_examples=60000 \
        --workdir=runs/clip_noised
    python -m benchmarks.shapes_ladder --rungs=plain
"""

import argparse
import dataclasses
import pathlib
import statistics

import numpy as np

import sd_jax
from sd_jax.data.shapes import COLOURS, RADII, RADII_OF_TWO, SHAPES, ShapesWorld, evaluation_scenes, full_caption
from sd_jax.data.shapes_drawing import BACKGROUNDS
from sd_jax.evals.shapes_accuracy import accuracy

ATTRIBUTES = ("colour", "shape", "size", "position", "background")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", default="runs/clip")
    parser.add_argument("--noised", default="runs/clip_noised")
    parser.add_argument("--models", type=pathlib.Path, default=pathlib.Path("runs/shapes_ladder"), help="plain_0, ...")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=128, help="for each seed")
    parser.add_argument("--candidates", type=int, default=8, help="to re-rank; 0 = do not")
    parser.add_argument("--scales", default="8", help="of guidance")
    parser.add_argument("--clamp", type=float, default=0.8, help="of guidance")
    parser.add_argument("--sampler", default="euler_ancestral")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    clip, noised = sd_jax.load_clip(options.clip), sd_jax.load_clip(options.noised)
    for two_objects in (0.0, 0.5):
        print(f"two objects {two_objects:.0%}:", _retrieval(clip, two_objects), flush=True)
    found: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        recipe = {"guidance_scale": 1.0, "steps": options.steps, "sampler": options.sampler}
        draw = _Draw(sd_jax.load(options.models / f"plain_{seed}"), seed, options.prompts, recipe)
        found.setdefault("neither", []).append(draw.mean(draw()))
        if options.candidates:
            best = draw.best_of(clip, options.candidates)
            found.setdefault(f"best of {options.candidates}", []).append(draw.mean(best))
        for name, guide in (("plain CLIP", clip), ("CLIP of noised pictures", noised)):
            for scale in map(float, options.scales.split(",")):
                guided = draw(clip=guide, clip_guidance_scale=scale, clip_guidance_clamp=options.clamp)
                found.setdefault(f"{name}, scale {scale:g}", []).append(draw.mean(guided))
        print(f"seed {seed}:", {name: round(values[-1], 3) for name, values in found.items()}, flush=True)
    print("\n| | all attributes | least, most | more than neither, least |\n|---|---|---|---|")
    for name, values in found.items():
        more = min(value - plain for value, plain in zip(values, found["neither"], strict=True))
        print(f"| {name} | {statistics.mean(values):.3f} | {min(values):.3f}, {max(values):.3f} | {100 * more:+.1f} |")


def _retrieval(clip, two_objects: float, count: int = 256) -> str:
    """Of pictures that it was not trained on: the right caption first of all, and before one that is wrong."""
    world = ShapesWorld(
        resolution=clip.config.vision_config.image_size,
        num_examples=count,
        seed=777,
        split="seen",
        two_objects=two_objects,
    )
    scenes, rng = [world.scene(i) for i in range(count)], np.random.default_rng(0)
    captions, wrong = [full_caption(s) for s in scenes], [full_caption(_wrong(s, rng)) for s in scenes]
    pictures = clip.encode_images(np.stack([world[i]["pixels"] for i in range(count)]))
    near = pictures @ clip.encode_texts(captions).T
    own, near_wrong = np.diag(near), (pictures * clip.encode_texts(wrong)).sum(1)
    first = (own >= near.max(1)).mean()
    return (
        f"top-1 of {count} captions ({len(set(captions))} different) {first:.3f}, "
        f"true before one attribute wrong {(own > near_wrong).mean():.3f}"
    )


def _wrong(scene, rng):
    """The scene with one attribute of its first thing, or its background, changed."""
    thing, radii = scene.things[0], RADII if len(scene.things) == 1 else RADII_OF_TWO
    options = {"colour": COLOURS, "shape": SHAPES, "size": radii, "background": BACKGROUNDS}
    name = str(rng.choice(list(options)))
    owner = scene if name == "background" else thing
    changed = {name: str(rng.choice([value for value in options[name] if value != getattr(owner, name)]))}
    if owner is scene:
        return dataclasses.replace(scene, **changed)
    return dataclasses.replace(scene, things=(dataclasses.replace(thing, **changed), *scene.things[1:]))


class _Draw:
    """Pictures of one seed's prompts, the same noise in every call with the same `number`."""

    def __init__(self, pipe, seed: int, count: int, recipe: dict):
        self.pipe, self.seed, self.recipe = pipe, seed, recipe
        self.scenes = evaluation_scenes("seen", count, seed=seed)
        self.captions = [full_caption(scene) for scene in self.scenes]

    def __call__(self, number: int = 0, **options) -> np.ndarray:
        settings = {**self.recipe, **options}
        seed, size = 10**6 * self.seed + 10**4 * number, 32
        return np.concatenate(
            [
                self.pipe.text_to_image(self.captions[i : i + size], seed=seed + i, **settings)
                for i in range(0, len(self.captions), size)
            ]
        )

    def best_of(self, clip, candidates: int) -> np.ndarray:
        made = np.stack([self(number) for number in range(candidates)], axis=1)
        return np.stack([c[clip.best_of(c, caption)[0]] for c, caption in zip(made, self.captions, strict=True)])

    def mean(self, pictures: np.ndarray) -> float:
        found = accuracy(pictures, self.scenes)
        return statistics.mean(found[name] for name in ATTRIBUTES)


if __name__ == "__main__":
    main()
