"""The adversarial autoencoder against the plain one in shapes world: `python -m benchmarks.shapes_autoencoder`

Judged by a network that neither learnt by (`features_1`): its perceptual distance, the Fréchet distance between its
features of pictures and of their reconstructions, and PSNR; of 512 pictures that none was trained on. It reads what
these commands make:

    python train.py --config=configs/beside.py:features --config.total_steps=600 --config.batch_size=64 \
        --workdir=runs/features_0                                     (and --config.seed=1 for runs/features_1)
    python train.py --config=configs/autoencoder.py:adversarial=False --workdir=runs/autoencoder_plain
    python train.py --config=configs/autoencoder.py --config.init_perceptual=runs/features_0 \
        --workdir=runs/autoencoder_adversarial
    python train.py --config=configs/autoencoder.py:decoder_only=True --config.init=runs/autoencoder_plain \
        --config.init_perceptual=runs/features_0 --config.total_steps=500 --config.optimizer.learning_rate=2e-3 \
        --config.autoencoder.discriminator_start=100 --workdir=runs/autoencoder_decoder
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import sd_jax
from sd_jax import media
from sd_jax.checkpoints.beside import open_beside
from sd_jax.checkpoints.place import place
from sd_jax.data.shapes import ShapesWorld
from sd_jax.evals.fid import frechet_distance, gaussian_of
from sd_jax.evals.reconstruction import psnr
from sd_jax.models.perceptual import LPIPS, VGGFeatures
from sd_jax.models.vae import to_image, to_pixels

PICTURES, BATCH, SHOWN = 512, 64, 8
NAMES = ("plain", "adversarial", "decoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--judge", default="runs/features_1", help="a run of method 'features'")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs"), help="autoencoder_plain, ...")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--sheet", type=pathlib.Path, help="where to draw pictures and what each makes of them")
    options = parser.parse_args()
    judge = open_beside("perceptual", options.judge)
    distance, features = _judges(judge.config, place(judge.params, jnp.float32, where=options.judge))
    world = ShapesWorld(options.resolution, num_examples=PICTURES, seed=4242, split="seen")
    pixels = np.stack([world[i]["pixels"] for i in range(PICTURES)])
    images, rows, encoders = np.asarray(to_image(pixels)), [pixels[:SHOWN]], {}
    real = gaussian_of(_mapped(features, images))
    print("| autoencoder | PSNR | perceptual distance | rFID | scale factor |\n|---|---|---|---|---|")
    for name in NAMES:
        pipe = sd_jax.load(options.runs / f"autoencoder_{name}")
        again = np.clip(_mapped(lambda x, p=pipe: p.decode_latents(p.encode_image(x)), images), -1.0, 1.0)
        figures = (
            f"{float(np.mean(psnr(jnp.asarray(again), jnp.asarray(images), 2.0))):.2f}",
            f"{_mapped(distance, again, images).mean():.5f}",
            f"{frechet_distance(gaussian_of(_mapped(features, again)), real):.4f}",
            f"{pipe.spec.vae.scaling_factor:.4f}",
        )
        print(f"| {name} |", " | ".join(figures), "|", flush=True)
        rows.append(np.asarray(to_pixels(jnp.asarray(again[:SHOWN]))))
        encoders[name] = {part: pipe.params["vae"][part] for part in ("encoder", "quant_conv")}
    same = jax.tree.map(np.array_equal, encoders["plain"], encoders["decoder"])
    print("the encoder behind `decoder` is that of `plain` to the bit:", all(jax.tree.leaves(same)))
    if options.sheet:
        media.write_png(options.sheet, media.contact_sheet(np.concatenate(rows), columns=SHOWN), {})


def _judges(config, params):
    """Functions of batches of images: the distance of two, and the features of one, means over places of all stages."""
    lpips, trunk = LPIPS(config.widths, config.depths), VGGFeatures(config.widths, config.depths)
    own = {name: tree for name, tree in params.items() if not name.startswith("lin")}

    def features(images):
        return jnp.concatenate([stage.mean((1, 2)) for stage in trunk.apply({"params": own}, images)], axis=-1)

    return jax.jit(lambda a, b: lpips.apply({"params": params}, a, b)), jax.jit(features)


def _mapped(function, *arrays) -> np.ndarray:
    batches = range(0, len(arrays[0]), BATCH)
    return np.concatenate([np.asarray(function(*(x[i : i + BATCH] for x in arrays))) for i in batches])


if __name__ == "__main__":
    main()
