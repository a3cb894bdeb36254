"""What an inpainting model draws better than the model it was made of, in shapes world.

    train --config=inpainting.py:shapes --workdir=runs/inpainting

where `train` stands for `python train.py` and the config lies in configs/; measured by

    python -m benchmarks.inpainting --checkpoint=runs/inpainting [--prompts=96]

In pictures of two things, one is masked, a box 4 pixels around it, and a prompt of the whole picture asks for another
colour, or another shape, in its place (`job_effects.repaint`). The bundled model keeps the rest by masking what it
walks on; the trained one is shown it.

    named     what is redrawn has the prompt's colour and shape; `other`: the other thing is as before
    outside   mean distance, of 255 levels, from the picture that was given, before known pixels are put back
    border    the same at the two pixels inside the mask's border, where there was background and should be again

"the autoencoder" is the picture itself, in and out. "strokes" are drawn over pictures whose own prompt is given:
`distance` is the mean under them from the picture as it was, `relation` that both things are read right, each in its
place. 20 steps of dpmpp_2m at guidance 2.5, strength 1, the same noise in every row.
"""

import argparse

import numpy as np

import sd_jax
from sd_jax.data.shapes import evaluation_scenes, full_caption
from sd_jax.diffusion.noise import image_keys
from sd_jax.diffusion.random_masks import Mix, random_masks
from sd_jax.evals import job_effects
from sd_jax.evals.shapes_accuracy import accuracy
from sd_jax.models.vae import to_pixels

MARGIN, BORDER, BATCH = 4, 2, 32
STROKES = Mix(rectangles=0.0, strokes=1.0, whole=0.0, side=0.6, thickness=0.25)
RECIPE = {"strength": 1.0, "guidance_scale": 2.5, "steps": 20, "sampler": "dpmpp_2m"}


class Watched:
    """A pipeline of which what it inpaints is kept as it was before known pixels are put back."""

    def __init__(self, checkpoint: str | None):
        self._pipe, self.inside, self.outside = sd_jax.load(checkpoint), [], []

    def inpaint(self, prompts, image, mask, seed, **recipe) -> np.ndarray:
        made = []
        for i in range(0, len(prompts), BATCH):
            here = slice(i, i + BATCH)
            given = {"image": image[here], "mask": mask[here], "seed": seed + i, **recipe}
            latents = self._pipe.inpaint(prompts[here], output="latents", **given)
            raw = np.asarray(to_pixels(self._pipe.decode_latents(latents)))
            self.note(raw, image[here], mask[here])
            made.append(np.where(mask[here][..., None], raw, image[here]))
        return np.concatenate(made)

    def through_autoencoder(self, image: np.ndarray, mask: np.ndarray) -> None:
        self.inside, self.outside = [], []
        self.note(np.asarray(to_pixels(self._pipe.decode_latents(self._pipe.encode_image(image)))), image, mask)

    def note(self, raw: np.ndarray, image: np.ndarray, mask: np.ndarray) -> None:
        away = np.abs(raw.astype(np.float32) - image).mean(-1)
        inner = mask.copy()
        for axis in (1, 2):
            inner = np.logical_and.reduce([np.roll(inner, shift, axis) for shift in range(-BORDER, BORDER + 1)])
        self.outside.append(away[~mask].mean())
        self.inside.append(away[mask & ~inner].mean())

    @property
    def numbers(self) -> dict[str, float]:
        return {"outside": float(np.mean(self.outside)), "border": float(np.mean(self.inside))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="of the inpainting model")
    parser.add_argument("--prompts", type=int, default=96)
    options = parser.parse_args()
    for attribute in ("colour", "shape"):
        for name, checkpoint in (("bundled", None), ("inpainting", options.checkpoint)):
            pipe = Watched(checkpoint)
            found = job_effects.repaint(pipe, options.prompts, attribute, MARGIN, **RECIPE)
            row = {key: found.numbers[key] for key in ("named", "other", "background")} | pipe.numbers
            print(
                f"| {attribute}, {name} |", " | ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True
            )
    scenes = evaluation_scenes("seen", options.prompts, 0, two_objects=1.0)
    boxes = np.stack([job_effects.box_mask(scene, 0, MARGIN) for scene in scenes])
    pipe.through_autoencoder(found.before, boxes)
    _print("the autoencoder", pipe.numbers)

    keys = image_keys(0, options.prompts)
    strokes = np.asarray(random_masks(keys, 0, found.before.shape[1:3], STROKES))[..., 0] == 1
    captions = [full_caption(scene) for scene in scenes]
    for name, checkpoint in (("bundled", None), ("inpainting", options.checkpoint)):
        made = Watched(checkpoint).inpaint(captions, found.before, strokes, 0, **RECIPE)
        away = np.abs(made.astype(np.float32) - found.before)[strokes]
        read = {key: accuracy(made, scenes)[key] for key in ("relation", "background")}
        _print(f"strokes, {name}", {"distance": away.mean(), **read})


def _print(name: str, row: dict[str, float]) -> None:
    print(f"| {name} |", " | ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
