"""A super-resolution stage in pixels against bicubic enlargement: `python -m benchmarks.super_resolution`

Of pictures of shapes world that none was trained on, made small: PSNR of what becomes of them, and the share of their
attributes that shapes accuracy reads right. It reads what these commands make, the second only for `--first`, which
draws a cascade: small pictures by the first stage, enlarged by the second.

    python train.py --config=configs/pixels.py:super_resolution --workdir=runs/pixels_64
    python train.py --config=configs/pixels.py --workdir=runs/pixels
"""

import argparse
import pathlib

import jax.numpy as jnp
import numpy as np

import sd_jax
from sd_jax import media
from sd_jax.data.shapes import ShapesWorld, full_caption
from sd_jax.diffusion.low_resolution import enlarged, make_small
from sd_jax.evals.reconstruction import psnr
from sd_jax.evals.shapes_accuracy import accuracy
from sd_jax.models.vae import to_image, to_pixels

SHOWN = 8
ATTRIBUTES = ("colour", "shape", "size", "position", "background")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="of the second stage; none = bicubic enlargement alone")
    parser.add_argument("--first", help="of the first stage, for a cascade")
    parser.add_argument("--factor", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--noise_level", type=int, default=0)
    parser.add_argument("--weights", default="ema", help="of the second stage")
    parser.add_argument("--sheet", type=pathlib.Path, help="where to draw pictures: small, by each way, and true")
    options = parser.parse_args()
    world = ShapesWorld(64, num_examples=options.pictures, seed=4242, split="seen")
    scenes = [world.scene(i) for i in range(options.pictures)]
    true = np.stack([world[i]["pixels"] for i in range(options.pictures)])
    captions = [full_caption(scene) for scene in scenes]
    small = np.asarray(to_pixels(make_small(to_image(true), options.factor)))
    ways = {"bicubic": np.asarray(to_pixels(enlarged(to_image(small), (64, 64)))), "true": true}
    fields = {"steps": options.steps, "sampler": "dpmpp_2m", "width": 64, "height": 64}
    fields |= {"noise_level": options.noise_level, "guidance_scale": 1.0}
    if options.checkpoint:
        second = sd_jax.load(options.checkpoint, weights=options.weights)
        parts = [slice(at, at + options.batch_size) for at in range(0, options.pictures, options.batch_size)]
        ways["second stage"] = np.concatenate(
            [second.upscale(small[part], captions[part], seed=part.start, **fields) for part in parts]
        )
    print(f"{options.factor}-fold, {options.pictures} pictures\n| | PSNR |", " | ".join(ATTRIBUTES), "| all |")
    print("|---" * (3 + len(ATTRIBUTES)) + "|")
    for name, made in ways.items():
        near = float(np.mean(psnr(jnp.asarray(made), jnp.asarray(true), 255.0))) if name != "true" else np.inf
        shares = [100 * accuracy(made, scenes)[attribute] for attribute in ATTRIBUTES]
        print(f"| {name} | {near:.2f} |", " | ".join(f"{s:.1f}" for s in shares), f"| {np.mean(shares):.1f} |")
    if options.sheet:
        blocks = small[:SHOWN].repeat(options.factor, axis=1).repeat(options.factor, axis=2)
        rows = [blocks, *(ways[name][:SHOWN] for name in ("bicubic", "second stage", "true") if name in ways)]
        if options.first:
            drawn = sd_jax.load(options.first).text_to_image(captions[:SHOWN], steps=20, sampler="dpmpp_2m")
            factor = 64 // drawn.shape[1]
            rows.append(drawn.repeat(factor, axis=1).repeat(factor, axis=2))
            rows.append(second.upscale(drawn, captions[:SHOWN], **fields))
        media.write_png(options.sheet, media.contact_sheet(np.concatenate(rows), columns=SHOWN), {})


if __name__ == "__main__":
    main()
