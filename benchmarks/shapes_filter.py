"""What an aesthetic filter is worth in shapes world, where 30 % of the pictures are ruined: `sd_jax.data.spoil`

    python -m benchmarks.shapes_filter --make=runs/filter
    python train.py --config=configs/beside.py:clip,resolution=64 --config.data.path=runs/filter/web \
        --config.total_steps=1200 --workdir=runs/filter/clip
    python train.py --config=configs/beside.py:aesthetic,resolution=64 --config.init_clip=runs/filter/clip \
        --config.data.path=runs/filter/rated --config.total_steps=1500 --workdir=runs/filter/head
    python -m sd_jax.data.prepare --data='runs/filter/raw/*.tar' --out=runs/filter/kept --clip=runs/filter/clip \
        --aesthetic=runs/filter/head --filters=aesthetic=5
    python train.py --config=configs/demo.py:autoencoder,resolution=64 --config.data.path=runs/filter/raw \
        --config.total_steps=1000 --workdir=runs/filter/autoencoder
    python -c "import sd_jax; sd_jax.load(vae='runs/filter/autoencoder').save('runs/filter/base')"
    for name in raw kept; do python train.py --config=configs/shapes.py:plain --config.init=runs/filter/base \
        --config.total_steps=1500 --config.data.path=runs/filter/$name --workdir=runs/filter/model_$name; done
    python -m benchmarks.shapes_filter --judge=runs/features_1     (a run of benchmarks/shapes_autoencoder.py)

The captions of `web`, which the CLIP learns from, say of ruined pictures that they are, as those of the web do at
times; the captions of `raw`, which the models learn from, do not. The head learns from the ratings of `rated`, 2,000
pictures of which 60 % are ruined. The autoencoder learns from `raw` as well: the bundled one, which knows sound
pictures alone, mends what is blurred.

What the models draw is judged by a network that the filter did not use: a line through the means and deviations of its
features, fitted to sound and ruined pictures of other seeds, each seen through the autoencoder.
"""

import argparse
import io
import json
import pathlib
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import sd_jax
from sd_jax import media
from sd_jax.checkpoints.beside import open_beside
from sd_jax.checkpoints.place import place
from sd_jax.config import training_defaults
from sd_jax.data.clip_scorer import clip_scorer
from sd_jax.data.shapes import evaluation_scenes, full_caption
from sd_jax.data.shards import TarWriter
from sd_jax.data.sources import ShapesSource
from sd_jax.data.spoil import RUINS, SpoiledSource
from sd_jax.models.perceptual import VGGFeatures
from sd_jax.models.vae import to_image

SETS = {  # pictures, seed, rate of each ruin, share of captions that tell
    "web": (24_000, 11, 0.1, 1.0),
    "rated": (2_000, 12, 0.2, 0.0),
    "raw": (12_800, 13, 0.1, 0.0),
}
JUDGED = (4_000, 21), (1_000, 22)  # what the judge is fitted to, and what its own errors are counted on
RESOLUTION, BATCH, SHOWN = 64, 64, 64
MODELS = ("raw", "kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--make", type=pathlib.Path, help="write web, rated and raw into this folder, and end")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/filter"))
    parser.add_argument("--judge", default="runs/features_1", help="a run of method 'features'")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--guidance_scale", type=float, default=2.5)
    parser.add_argument("--models_only", action="store_true", help="leave the head and what was kept out")
    options = parser.parse_args()
    if options.make:
        for name in SETS:
            write(options.make / name, spoiled(*SETS[name]))
        return
    if not options.models_only:
        _filter(options.folder)
    _models(options.folder, options.judge, options.prompts, options.guidance_scale)


def spoiled(count: int, seed: int, rate: float = 0.1, told: float = 0.0) -> SpoiledSource:
    config = training_defaults("full")
    config.data.num_examples, config.data.resolution, config.seed = count, RESOLUTION, seed
    return SpoiledSource(ShapesSource(config), dict.fromkeys(RUINS, rate), seed, told)


def write(folder: pathlib.Path, source: SpoiledSource, size: int = 1000) -> None:
    """Tars of `size` pictures, with their rating and the truth about them."""
    folder.mkdir(parents=True)
    for start in range(0, len(source), size):
        with TarWriter(folder / f"{start // size:05d}.tar") as tar:
            for index in range(start, min(start + size, len(source))):
                record, png = source[index], io.BytesIO()
                Image.fromarray(record["pixels"]).save(png, "PNG", compress_level=1)
                columns = {"rating": round(record["rating"], 3), "ruin": record["ruin"]}
                tar.add(f"{index:09d}", png.getvalue(), record["fields"][0], columns)


def auc(scores: np.ndarray, good: np.ndarray) -> float:
    """How often something good scores higher than something bad."""
    return float(np.mean(scores[good][:, None] > scores[~good][None, :]))


# -- The head, and what `prepare` keeps --------------------------------------------------------------------------------


def _filter(folder: pathlib.Path) -> None:
    scorer, source = clip_scorer(str(folder / "clip"), str(folder / "head"), batch_size=BATCH), spoiled(*SETS["raw"])
    ruins, scores = np.array([source.ruin(i) for i in range(len(source))]), []
    for start in range(0, len(source), BATCH):
        records = [source[i] for i in range(start, min(start + BATCH, len(source)))]
        inputs = np.stack([scorer.preprocess(record["pixels"]) for record in records])
        scores += scorer.score({"inputs": inputs, "caption": [""] * len(records)})["aesthetic"]
    scores, good = np.array(scores), ruins == "none"
    by_ruin = {name: round(auc(scores[good | (ruins == name)], good[good | (ruins == name)]), 4) for name in RUINS}
    print(f"AUC {auc(scores, good):.4f}, of one ruin at a time {by_ruin}")

    kept = _ruins_in(folder / "kept")
    for name in ("none", *RUINS):
        print(f"{name}: {kept.count(name)} of {(ruins == name).sum()} kept")
    bad = len(kept) - kept.count("none")
    print(f"good kept {kept.count('none') / good.sum():.4f}, bad kept {bad / (~good).sum():.4f}", flush=True)


def _ruins_in(folder: pathlib.Path) -> list[str]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [json.load(tar.extractfile(m))["ruin"] for m in tar if m.name.endswith(".json")]
    return found


# -- What models draw that learnt from either --------------------------------------------------------------------------


def _models(folder: pathlib.Path, judge: str, prompts: int, scale: float) -> None:
    pipes = {name: sd_jax.load(folder / f"model_{name}") for name in MODELS}
    find = _Judge(judge, pipes["raw"])
    captions = [full_caption(scene) for scene in evaluation_scenes("seen", prompts)]
    for name, pipe in pipes.items():
        drawn = [
            pipe.text_to_image(captions[i : i + BATCH], seed=i, guidance_scale=scale, steps=20, sampler="dpmpp_2m")
            for i in range(0, prompts, BATCH)
        ]
        pixels = np.concatenate(drawn)
        print(f"{name}: {find(pixels).mean():.4f} of {prompts} pictures are ruined", flush=True)
        media.write_png(folder / f"{name}.png", media.contact_sheet(pixels[:SHOWN], columns=8), {})


class _Judge:
    """Pixels -> which are ruined. Its errors are counted on pictures that it was not fitted to."""

    def __init__(self, run: str, pipe):
        opened = open_beside("perceptual", run)
        trunk, params = (
            VGGFeatures(opened.config.widths, opened.config.depths),
            place(opened.params, jnp.float32, where=run),
        )
        params = {name: tree for name, tree in params.items() if not name.startswith("lin")}

        def statistics_of(images):
            stages = [images, *trunk.apply({"params": params}, images)]
            edges = [jnp.abs(jnp.diff(stage, axis=1)).mean((1, 2)) for stage in stages]
            return jnp.concatenate(edges + [f(stage, (1, 2)) for stage in stages for f in (jnp.mean, jnp.std)], -1)

        self._features = jax.jit(statistics_of)
        x, bad = self._seen(pipe, *JUDGED[0])
        self._mean, self._std = x.mean(0), x.std(0) + 1e-6
        x = self._whitened(x)
        self._weights = np.linalg.solve(x.T @ x + len(x) * 1e-3 * np.eye(x.shape[1]), x.T @ (2.0 * bad - 1.0))
        x, bad = self._seen(pipe, *JUDGED[1])
        found = self._whitened(x) @ self._weights > 0
        print(
            f"the judge calls {found[~bad].mean():.4f} of good pictures ruined, {found[bad].mean():.4f} of ruined ones"
        )

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return self._whitened(self._of(np.asarray(to_image(pixels)))) @ self._weights > 0

    def _seen(self, pipe, count: int, seed: int):
        source, seen = spoiled(count, seed), []
        for start in range(0, count, BATCH):
            pixels = np.stack([source[i]["pixels"] for i in range(start, min(start + BATCH, count))])
            seen.append(np.asarray(pipe.decode_latents(pipe.encode_image(pixels))))
        return self._of(np.concatenate(seen)), np.array([source.ruin(i) != "none" for i in range(count)])

    def _of(self, images) -> np.ndarray:
        rows = [np.asarray(self._features(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
        return np.concatenate(rows).astype(np.float64)

    def _whitened(self, x: np.ndarray) -> np.ndarray:
        return np.concatenate([(x - self._mean) / self._std, np.ones((len(x), 1))], axis=1)


if __name__ == "__main__":
    main()
