"""How much of a picture stays in what it prompts, in shapes world: IP-Adapters and image variation.

    train --config=beside.py:clip,resolution=64 --config.data.two_objects=0.5 --config.data.num_examples=60000 \
        --config.total_steps=2000 --workdir=runs/clip
    train --config=ip_adapter.py:shapes --config.init_clip=runs/clip --workdir=runs/eyes
    train --config=image_variation.py:shapes --config.init_clip=runs/clip --workdir=runs/variation

`train` stands for `python train.py`, and the configs lie in configs/. They are measured by

    python -m benchmarks.image_prompt --adapters=runs/eyes --variations=runs/variation --clip=runs/clip

Every row is the share of pictures whose attribute is that of the picture shown, as `shapes_accuracy` reads it. Adapters
are put on the bundled model, and their prompt is empty, or says another colour than the picture has ("a blue star" of a
red one): then `colour` is that of the prompt. 20 steps of dpmpp_2m at guidance 2.5, the same noise in every row.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

import sd_jax
from benchmarks.fine_tuning_data import draw, short_caption
from sd_jax import media
from sd_jax.data.shapes import COLOURS, Scene, evaluation_scenes
from sd_jax.evals.shapes_accuracy import accuracy

ATTRIBUTES = ("colour", "shape", "size", "position", "background")
BATCH, SHOWN = 32, 16
RECIPE = {"guidance_scale": 2.5, "steps": 20, "sampler": "dpmpp_2m"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", default="", help="runs of ip_adapter, joined by commas")
    parser.add_argument("--variations", default="", help="runs of image variation, joined by commas")
    parser.add_argument("--clip", default="runs/clip", help="that the adapters were trained with")
    parser.add_argument("--strengths", default="1", help="of the adapters")
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--sheets", type=pathlib.Path, default=pathlib.Path("runs/image_prompt"))
    options = parser.parse_args()
    scenes = evaluation_scenes("seen", options.pictures)
    shown = np.stack([draw(scene) for scene in scenes])
    empty, other = [""] * len(scenes), [_in_another_colour(scene) for scene in scenes]
    named = [short_caption(scene) for scene in other]
    print("| |", " | ".join(ATTRIBUTES), "|\n" + "|---" * (1 + len(ATTRIBUTES)) + "|")
    options.sheets.mkdir(parents=True, exist_ok=True)
    base = sd_jax.load()
    _row("no picture, no prompt", _drawn(base, empty), scenes, shown, options.sheets)
    _row("no picture, another colour", _drawn(base, named), other, shown, options.sheets)
    for run in filter(None, options.adapters.split(",")):
        for strength in map(float, options.strengths.split(",")):
            pipe = base.with_adapter(run, strength, image_encoder=options.clip)
            name = f"{run} at {strength:g}"
            _row(f"{name}, no prompt", _drawn(pipe, empty, shown), scenes, shown, options.sheets)
            _row(f"{name}, another colour", _drawn(pipe, named, shown), other, shown, options.sheets)
    for run in filter(None, options.variations.split(",")):
        _row(run, _drawn(sd_jax.load(run), empty, shown), scenes, shown, options.sheets)


def _in_another_colour(scene: Scene) -> Scene:
    (thing,) = scene.things
    names = list(COLOURS)
    colour = names[(names.index(thing.colour) + 3) % len(names)]
    return dataclasses.replace(scene, things=(dataclasses.replace(thing, colour=colour),))


def _drawn(pipe, prompts: Sequence[str], shown: np.ndarray | None = None) -> np.ndarray:
    made = []
    for i in range(0, len(prompts), BATCH):
        here = slice(i, i + BATCH)
        picture = None if shown is None else shown[here]
        made.append(pipe.text_to_image(prompts[here], image_prompt=picture, seed=1000 + i, **RECIPE))
    return np.concatenate(made)


def _row(name: str, made: np.ndarray, scenes: Sequence[Scene], shown: np.ndarray, sheets: pathlib.Path) -> None:
    found = accuracy(made, scenes)
    print(f"| {name} |", " | ".join(f"{found[attribute]:.3f}" for attribute in ATTRIBUTES), "|", flush=True)
    sheet = media.contact_sheet(np.concatenate([shown[:SHOWN], made[:SHOWN]]), columns=SHOWN)
    media.write_png(sheets / f"{name.replace('/', '_').replace(' ', '_')}.png", sheet, {})


if __name__ == "__main__":
    main()
