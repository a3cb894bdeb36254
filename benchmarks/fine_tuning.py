"""What each way of fine-tuning is worth, tried on the bundled model; on what, `benchmarks.fine_tuning_data` says.

    python -m benchmarks.fine_tuning --make=runs/fine_tuning

The bundled autoencoder has seen plain things alone: it makes a smear of hatching, and smooth edges of blocks. Its
decoder is shown both first. The encoder, and so the latents and the U-Net that draws them, stay the bundled ones:

    cd runs/fine_tuning                                   (below, paths are relative to it)
    train --config=demo.py:autoencoder,resolution=64 --config.init=sd_jax/assets/shapes_64 --config.total_steps=1000 \
        --config.trainable='^vae/(decoder|post_quant_conv)/' --config.data.path=looks --workdir=decoder
    python -c "import sd_jax; sd_jax.load(vae='decoder').save('model')"

`train` stands for `python train.py`, and the configs lie in configs/. Every run below is of `--config.init=model`, and
of `--config.seed=0`, 1 and 2 where a spread is told.

    DreamBooth        train --config=dreambooth.py:shapes --config.data.path=sks --config.prior.prompt=stars.txt \
                          --workdir=sks_model
    without a prior   train --config=dreambooth.py:shapes --config.data.path=sks --config.prior.prompt= \
                          --config.optimizer.schedule=constant --config.total_steps=200 --workdir=bare
    replay            that with --config.prior.path=base --config.prior.share=0.5 --config.total_steps=600 \
                          --workdir=replay
    L2-SP             that without a prior and --config.optimizer.l2_sp=20.0 --workdir=l2sp
    its LoRA          train --config=lora.py:shapes --config.data.path=sks --config.total_steps=200 --workdir=sks_lora
    its curve         that with --config.total_steps=1000 --config.checkpoint_steps=50 --workdir=sks_curve
    style             train --config=lora.py:shapes --config.data.path=hatched --workdir=hatched_lora
    backgrounds       train --config=lora.py:shapes --config.data.path=backgrounds --workdir=backgrounds_lora
    another base      train --config=finetune.py:shapes --config.data.path=backgrounds --workdir=other_base
    a word            train --config=textual_inversion.py:shapes --config.data.path=packed --workdir=zorp
    a model of ruins  train --config=finetune.py:shapes --config.data.path=spoiled --workdir=spoiled_base
    its antidote      train --config=textual_inversion.py:shapes --config.init=spoiled_base --config.data.path=ruined \
                          --config.textual_inversion.tokens="(('nasty', 4, 'circle'),)" \
                          --config.optimizer.schedule=constant --workdir=nasty
    hypernetwork      train --config=hypernetwork.py:shapes --config.data.path=pixelated --workdir=pixels
    4 steps           train --config=lcm_lora.py:shapes --workdir=fast

and each is measured by

    python -m benchmarks.fine_tuning --concept=sks_model,bare
    python -m benchmarks.fine_tuning --style=hatched_lora                     (pixels/hypernetwork.pt --look=pixelated)
    python -m benchmarks.fine_tuning --style=hatched_lora --second=backgrounds_lora
    python -m benchmarks.fine_tuning --style=hatched_lora --base=other_base --backgrounds=other
    python -m benchmarks.fine_tuning --token=zorp
    python -m benchmarks.fine_tuning --negative=nasty --base=spoiled_base
    python -m benchmarks.fine_tuning --forgetting=full=bare,replay=replay,l2sp=l2sp,lora=sks_lora
    python -m benchmarks.fine_tuning --few_steps=fast
    python -m benchmarks.fine_tuning --judge                                  (the errors of the judges themselves)

Several runs, joined by commas, give a row each: so curves over steps come from what a run left on its way
(hatched_lora/adapters/250, sks_model/checkpoints/500), and spreads from several seeds. A run may be followed by its
strength, as in `hatched_lora:0.8`. Pictures are made in 20 steps of dpmpp_2m at guidance 2.5 unless said, the same
noise in every row; sheets of them lie in `sheets`.
"""

import argparse
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from scipy import ndimage

import sd_jax
from benchmarks import fine_tuning_data as data
from benchmarks.fine_tuning_data import LOOKS, OTHER_BACKGROUNDS, SETS, Reading, read_looks
from sd_jax import media, trees
from sd_jax.checkpoints import files
from sd_jax.data.shapes import (
    COLOURS,
    PLACES,
    Scene,
    Thing,
    evaluation_scenes,
    full_caption,
)
from sd_jax.data.shapes_drawing import BACKGROUNDS, background_levels
from sd_jax.data.spoil import RUINS
from sd_jax.evals import shapes_accuracy

BATCH, SHOWN = 32, 48
ATTRIBUTES = ("colour", "shape", "size", "position", "background")
RECIPE = {"guidance_scale": 2.5, "steps": 20, "sampler": "dpmpp_2m"}
FEW_STEPS = {"guidance_scale": 1.0, "sampler": "lcm", "schedule": "lcm"}
ADAPTER = "adapter.safetensors"  # what a run of the LoRA family leaves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--make", type=pathlib.Path, help="write all sets into this folder")
    parser.add_argument("--judge", action="store_true", help="count the judges' own errors")
    parser.add_argument("--concept", help="runs of dreambooth on sks")
    parser.add_argument("--style", help="runs of a LoRA or a hypernetwork on a look")
    parser.add_argument("--token", help="runs of textual inversion on packed")
    parser.add_argument("--negative", help="runs of textual inversion on ruined; --base is a model of ruined pictures")
    parser.add_argument("--forgetting", help="runs on sks with their names: full=RUN,lora=RUN")
    parser.add_argument("--few_steps", help="runs of LCM-LoRA")
    parser.add_argument("--base", default="runs/fine_tuning/model", help="the model that adapters are put on")
    parser.add_argument("--second", help="another adapter, put on over each of --style")
    parser.add_argument("--look", default="hatched", choices=list(LOOKS), help="what --style learnt")
    parser.add_argument("--backgrounds", default="own", choices=("own", "other"), help="what --style is asked for")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--sheets", type=pathlib.Path, default=pathlib.Path("runs/fine_tuning/sheets"))
    options = parser.parse_args()
    if options.make:
        for name in SETS:
            data.write(options.make / name, name)
        (options.make / "stars.txt").write_text("\n".join(class_prompts()) + "\n", encoding="utf-8")
        return
    bench = _Bench(sd_jax.load(options.base), options.sheets, options.prompts)
    if options.judge:
        bench.judges()
    for name in ("concept", "token", "negative", "few_steps", "forgetting"):
        if getattr(options, name):
            getattr(bench, name)(getattr(options, name).split(","))
    if options.style:
        grounds = OTHER_BACKGROUNDS if options.backgrounds == "other" or options.second else BACKGROUNDS
        bench.style(options.style.split(","), options.look, options.second, grounds)


def _row(name: str, **figures: float | str) -> None:
    shown = (f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items())
    print(f"| {name} |", " | ".join(shown), "|", flush=True)


# -- Prompts ---------------------------------------------------------------------------------------------------------


def stars() -> list[Scene]:
    """96 scenes of a medium or large star, 12 of each colour, in all places and on all backgrounds of shapes world."""
    scenes = []
    for number, (i, colour) in itertools.product(range(12), enumerate(COLOURS)):
        size, word = ("large", "medium")[number % 2], tuple(PLACES)[(number + i) % 9]
        thing = Thing("star", colour, size, *data.place(size, word))
        scenes.append(Scene((thing,), BACKGROUNDS[(number + 2 * i) % 8]))
    return scenes


def class_prompts(count: int = 200) -> list[str]:
    """Of a star in any colour, for the pictures that keep the class; every other one is told in full, and those are of
    other scenes than `stars`."""
    scenes = evaluation_scenes("seen", count, seed=5)
    things = [dataclasses.replace(scene.things[0], shape="star") for scene in scenes]
    scenes = [Scene((thing,), scene.background) for thing, scene in zip(things, scenes, strict=True)]
    captions = [(full_caption if i % 2 else data.short_caption)(scene) for i, scene in enumerate(scenes)]
    asked = {full_caption(scene) for scene in stars()}
    return [caption for caption in captions if caption not in asked]


def scenes_on(backgrounds: Sequence[str], count: int) -> list[Scene]:
    """Scenes of one thing, on each of these backgrounds as often."""
    scenes = enumerate(evaluation_scenes("seen", count))
    if tuple(backgrounds) == BACKGROUNDS:
        return [scene for _, scene in scenes]
    return [dataclasses.replace(scene, background=backgrounds[i % len(backgrounds)]) for i, scene in scenes]


# -- Shares ----------------------------------------------------------------------------------------------------------


def share(readings: Sequence[Reading | None], scenes: Sequence[Scene], **wanted: str | None) -> float:
    """Of pictures in which all of these are read: a word, or None for what the scene says.

    `share(readings, scenes, look="hollow", colour=None)`.
    """
    hits = [
        reading is not None
        and all(getattr(reading, name) == (word or truth(scene, name)) for name, word in wanted.items())
        for reading, scene in zip(readings, scenes, strict=True)
    ]
    return float(np.mean(hits))


def truth(scene: Scene, name: str) -> str:
    return getattr(scene if name == "background" else scene.things[0], name)


def accuracy(readings: Sequence[Reading | None], scenes: Sequence[Scene]) -> float:
    """The mean over ATTRIBUTES of the share that is right, whatever the look."""
    return float(np.mean([share(readings, scenes, **{name: None}) for name in ATTRIBUTES]))


# -- Rows ------------------------------------------------------------------------------------------------------------


class _Bench:
    def __init__(self, base, sheets: pathlib.Path, prompts: int):
        self.base, self.sheets, self.prompts = base, sheets, prompts

    def draw(self, pipe, captions: Sequence[str], sheet: str = "", **recipe) -> np.ndarray:
        """Pictures of captions, and a sheet of the first ones."""
        starts = range(0, len(captions), BATCH)
        settings = RECIPE | recipe
        drawn = [pipe.text_to_image(list(captions[i : i + BATCH]), seed=1000 + i, **settings) for i in starts]
        pixels = np.concatenate(drawn)
        if sheet:
            self.sheets.mkdir(parents=True, exist_ok=True)
            page = media.contact_sheet(pixels[:SHOWN], captions[:SHOWN], columns=8)
            media.write_png(self.sheets / f"{sheet.replace('/', '_').replace(':', '_')}.png", page, {})
        return pixels

    def worn(self, run: str, pipe=None):
        """The base, or `pipe`, with what a run left; "RUN:0.8" with a strength."""
        path, _, strength = run.partition(":")
        return (pipe or self.base).with_adapter(path, float(strength or 1.0))

    def result_of(self, run: str):
        """A run's own model, or the base with its adapter."""
        path = pathlib.Path(run.partition(":")[0])
        adapts = path.is_file() or (path / ADAPTER).exists()
        return self.worn(run) if adapts else sd_jax.load(path)

    def concept(self, runs: Sequence[str]) -> None:
        for run in ("base", *runs):
            self._concept(run, self.base if run == "base" else self.result_of(run))

    def _concept(self, name: str, pipe, **more: float) -> None:
        """`concept` is asked for as "a blue sks star", `told` in full; the class half so, half so, without the name."""
        scenes = stars()
        short, full = ([caption(scene) for scene in scenes] for caption in (data.short_caption, full_caption))
        asked = {
            "concept": [data.named(caption) for caption in short],
            "told": [data.named(caption) for caption in full],
            "class": [(full, short)[i % 2][i] for i in range(len(scenes))],
        }
        new, told, old = (read_looks(self.draw(pipe, captions, f"{kind}_{name}")) for kind, captions in asked.items())
        _row(
            name,
            concept=share(new, scenes, look="hollow", shape="star", colour=None),
            told=share(told, scenes, look="hollow", shape="star", colour=None),
            in_its_place=share(told, scenes, look="hollow", shape="star", colour=None, position=None),
            class_kept=share(old, scenes, look="plain", shape="star"),
            polluted=share(old, scenes, look="hollow"),
            **more,
        )

    def style(self, runs: Sequence[str], look: str, second: str | None, backgrounds: Sequence[str]) -> None:
        """Of two adapters at once, both show where the look and the background, one of those asked for, are read."""
        scenes = scenes_on(backgrounds, self.prompts)
        captions = [full_caption(scene) for scene in scenes]
        pipes = {"base": self.base, **({second: self.worn(second)} if second else {})}
        pipes |= {run: self.worn(run) for run in runs}
        pipes |= {f"{run} + {second}": self.worn(second, pipes[run]) for run in runs if second}
        for name, pipe in pipes.items():
            readings = read_looks(self.draw(pipe, captions, f"style_{name}"))
            _row(
                name,
                look=share(readings, scenes, look=look),
                background=share(readings, scenes, background=None),
                both=share(readings, scenes, look=look, background=None),
                attributes=accuracy(readings, scenes),
                **(self._size(name) if name in runs else {}),
            )

    def _size(self, run: str) -> dict[str, float | str]:
        path = pathlib.Path(run.partition(":")[0])
        path = path / ADAPTER if path.is_dir() else path
        numbers = sum(int(np.prod(tensor.shape)) for tensor in files.open_any(path).tensors.values())
        ours = trees.count(self.base.params)
        return {"numbers": f"{numbers:,} of {ours:,}", "share": numbers / ours, "kB": f"{path.stat().st_size // 1000}"}

    def token(self, runs: Sequence[str], word: str = "zorp") -> None:
        scenes = [data.PACKED] * self.prompts
        for run in runs:
            readings = read_looks(self.draw(self.worn(run), [word] * self.prompts, f"token_{run}"))
            each = {name: share(readings, scenes, **{name: None}) for name in ATTRIBUTES}
            four = share(readings, scenes, colour=None, shape=None, position=None, background=None)
            _row(run, all_four=four, and_size=share(readings, scenes, **dict.fromkeys(ATTRIBUTES)), **each)

    def negative(self, runs: Sequence[str], word: str = "nasty") -> None:
        scenes = evaluation_scenes("seen", self.prompts)
        captions = [full_caption(scene) for scene in scenes]
        for run in ("", *runs):
            pipe, settings = (self.worn(run), {"negative_prompt": word}) if run else (self.base, {})
            pixels = self.draw(pipe, captions, f"negative_{run or 'without'}", **settings)
            marked = float(watermarked(pixels).mean())
            _row(run or "without", watermarked=marked, attributes=accuracy(read_looks(pixels), scenes))

    def forgetting(self, runs: Sequence[str]) -> None:
        """The new task is the concept, the old one all that the base was asked for."""
        scenes = evaluation_scenes("seen", self.prompts)
        captions = [full_caption(scene) for scene in scenes]
        pipes = {name: self.result_of(run) for name, _, run in (run.partition("=") for run in runs)}
        for name, pipe in {"base": self.base, **pipes}.items():
            readings = read_looks(self.draw(pipe, captions, f"old_{name}"))
            plain = share(readings, scenes, look="plain")
            self._concept(name, pipe, old_attributes=accuracy(readings, scenes), old_plain=plain)

    def few_steps(self, runs: Sequence[str]) -> None:
        """Of "a blue star", which leaves open what else is in the picture: with `lcm`, against 25 steps of the base as
        the other rows have them. Prompts that tell everything need one step, with and without."""
        scenes = evaluation_scenes("seen", self.prompts)
        captions = [data.short_caption(scene) for scene in scenes]

        def right(name: str, pipe, **recipe) -> float:
            readings = read_looks(self.draw(pipe, captions, f"steps_{name}", **recipe))
            return share(readings, scenes, look="plain", colour=None, shape=None)

        long = right("base_25", self.base, steps=25)
        _row("base, 25 steps", right=long)
        for run in ("", *runs):
            pipe, name = self.worn(run) if run else self.base, run or "base"
            found = {count: right(f"{name}_{count}", pipe, **FEW_STEPS, steps=count) for count in (1, 2, 4, 8)}
            _row(name, **{f"steps_{count}": value for count, value in found.items()}, four_of_25=found[4] / long)

    def judges(self) -> None:
        """Of pictures drawn anew, as they are and through the base's autoencoder."""
        for look, shapes in LOOKS.items():
            scenes = evaluation_scenes("seen", self.prompts, seed=7)
            if shapes == LOOKS["hollow"]:
                star = [dataclasses.replace(scene.things[0], shape="star") for scene in scenes]
                scenes = [Scene((s,), scene.background) for s, scene in zip(star, scenes, strict=True)]
            pixels = np.stack([data.draw(scene, look) for scene in scenes])
            for name, seen in ((look, pixels), (f"{look}, through the autoencoder", through(self.base, pixels))):
                readings = read_looks(seen)
                each = {attribute: share(readings, scenes, **{attribute: None}) for attribute in ATTRIBUTES}
                _row(name, look=share(readings, scenes, look=look), **each)
        sound = self.draw(self.base, [full_caption(scene) for scene in evaluation_scenes("seen", self.prompts, seed=7)])
        rng = np.random.default_rng(7)
        for name, ruin in {"sound": None, **RUINS}.items():
            seen = sound if ruin is None else through(self.base, np.stack([ruin(picture, rng) for picture in sound]))
            _row(name, called_watermarked=float(watermarked(seen).mean()))


def through(pipe, pixels: np.ndarray) -> np.ndarray:
    """Pictures as a model's autoencoder gives them back."""
    return _mapped(lambda some: _rounded(pipe.decode_latents(pipe.encode_image(some))), pixels)


def _mapped(function: Callable, pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([np.asarray(function(pixels[i : i + BATCH])) for i in range(0, len(pixels), BATCH)])


def _rounded(images: jax.Array) -> np.ndarray:
    return np.clip(np.asarray(images) * 127.5 + 128.0, 0.0, 255.0).astype(np.uint8)


# -- Watermarks ------------------------------------------------------------------------------------------------------

MARKED = 8.0  # levels of grey


def watermarked(pixels: np.ndarray) -> np.ndarray:
    """Which pictures have a watermark: where the grey of what lies away from things, its background taken off and the
    rest averaged over 3x3, leaves three pixels in a hundred off by MARKED or more."""
    found = []
    for picture, scene in zip(pixels.astype(np.float32), shapes_accuracy.read_scenes(pixels), strict=True):
        free = ~shapes_accuracy._grown(shapes_accuracy.read_masks(picture.astype(np.uint8)[None])[0], 4)
        off = (picture.mean(-1) - background_levels(scene.background, data.SIDE)) * free
        off -= np.median(off[free]) * free
        found.append(np.quantile(np.abs(ndimage.uniform_filter(off, 3)[free]), 0.97) > MARKED)
    return np.array(found)


if __name__ == "__main__":
    main()
