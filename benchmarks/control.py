"""Whether pictures follow the maps that steer them, tried on the bundled model in shapes world, and what that costs.

    train --config=controlnet.py:shapes --config.control.hint_key=outline --workdir=runs/control/outline
    train --config=controlnet.py:shapes,t2i_adapter --config.control.hint_key=segment --workdir=runs/control/t2i_segment

and so for each of outline, segment and depth, and `--config.seed`; `train` stands for `python train.py`, and the
configs lie in configs/. They are measured by

    python -m benchmarks.control --follow=runs/control/outline,runs/control/t2i_segment
    python -m benchmarks.control --together=runs/control/outline,runs/control/segment
    python -m benchmarks.control --steps=runs/control/outline
    python -m benchmarks.control --drawings=runs/control/outline
    python -m benchmarks.control --speed [--pixels=512]

Every hint is the map of a scene, and its prompt says colour and shape alone ("a blue star"): where and how large, only
the hint says. `iou` is the mean over pictures of |A and B| / |A or B| of where things are, read from the picture
(`shapes_accuracy.read_masks`), and where the scene has them. Pictures are made in 20 steps of dpmpp_2m at guidance 2.5,
the same noise in every row; sheets of them lie in `--sheets`. Of --drawings, those "by hand" are outlines bent by up to
some three pixels, the others what preprocessors make of the same in dark lines on white, and of things in black.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

import sd_jax
from benchmarks.fine_tuning_data import short_caption
from sd_jax import media, preprocessors
from sd_jax.data.shapes import Scene, evaluation_scenes
from sd_jax.data.shapes_maps import draw_map, masks_of
from sd_jax.evals import shapes_accuracy

BATCH, SHOWN, SIDE = 32, 16, 64
RECIPE = {"guidance_scale": 2.5, "steps": 20, "sampler": "dpmpp_2m"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--follow", help="runs, joined by commas: each by itself, whole")
    parser.add_argument("--together", help="two runs: each has one of two things in its hint")
    parser.add_argument("--steps", help="a run: at several strengths, and for a part of the steps")
    parser.add_argument("--drawings", help="a run on outlines: line drawings and scribbles that it is to colour")
    parser.add_argument("--speed", action="store_true", help="sampling with none, one and two ControlNets of SD 1.5")
    parser.add_argument("--pixels", type=int, default=256, help="the side of the pictures of --speed")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--sheets", type=pathlib.Path, default=pathlib.Path("runs/control/sheets"))
    options = parser.parse_args()
    if options.speed:
        speed(options.pixels)
        return
    bench = _Bench(options.prompts, options.sheets)
    if options.follow:
        bench.follow(options.follow.split(","))
    if options.together:
        bench.together(*options.together.split(","))
    if options.steps:
        bench.steps(options.steps)
    if options.drawings:
        bench.drawings(options.drawings)


class _Control:
    """What a run left, and the kind of map that it was trained on."""

    def __init__(self, run: str):
        self.name, self._model = run, sd_jax.load_control(run)
        config = json.loads((pathlib.Path(run) / "config.json").read_text())
        self.kind = config["control"]["hint_key"]

    def maps(self, scenes: Sequence[Scene], only: int | None = None) -> np.ndarray:
        """Of the scenes, or of one thing of each."""
        maps = np.stack([draw_map(self.kind, scene, SIDE) for scene in scenes])
        if only is None:
            return maps
        return maps * np.stack([masks_of(scene, SIDE)[only] for scene in scenes])[..., None]

    def hints(self, maps: np.ndarray, **how):
        return self._model.hint(maps, **how)


class _Bench:
    def __init__(self, prompts: int, sheets: pathlib.Path):
        self.pipe, self.scenes, self.sheets = sd_jax.load(), evaluation_scenes("seen", prompts), sheets

    def follow(self, runs: Sequence[str]) -> None:
        self._row("without", self.scenes, [])
        for run in runs:
            control = _Control(run)
            self._row(run, self.scenes, [(control, control.maps(self.scenes), {})])

    def steps(self, run: str) -> None:
        control = _Control(run)
        maps = control.maps(self.scenes)
        for strength in (0.0, 0.25, 0.5, 1.0, 1.5):
            self._row(f"strength {strength:g}", self.scenes, [(control, maps, {"strength": strength})])
        for start, end in ((0.0, 0.25), (0.0, 0.5), (0.25, 1.0), (0.5, 1.0)):
            self._row(f"{start:g} to {end:g}", self.scenes, [(control, maps, {"start": start, "end": end})])

    def drawings(self, run: str) -> None:
        control = _Control(run)
        outlines = np.stack([draw_map("outline", scene, SIDE) for scene in self.scenes])
        bent = _bent(outlines, np.random.default_rng(0))
        things = np.stack([np.any(masks_of(scene, SIDE), axis=0) for scene in self.scenes])
        black = np.where(things[..., None], np.uint8(0), np.full(3, 255, np.uint8))
        rows = {
            "by hand": bent,
            "line_art of dark lines by hand": preprocessors.apply("line_art", 255 - bent),
            "canny of things": preprocessors.apply("canny", black),
            "scribble of things": preprocessors.apply("scribble", black, sigma=1.0, radius=1),
        }
        for name, maps in rows.items():
            self._row(name, self.scenes, [(control, maps, {})])

    def together(self, first: str, second: str) -> None:
        """Of two things; what one control is told of, the other is not."""
        scenes = evaluation_scenes("seen", len(self.scenes), two_objects=1.0)
        one, other = (_Control(run) for run in (first, second))
        given = (one, one.maps(scenes, 0), {}), (other, other.maps(scenes, 1), {})
        self._row("without", scenes, [])
        self._row(f"{first} of the first thing", scenes, given[:1])
        self._row(f"{first} of the first, {second} of the other", scenes, given)

    def _row(self, name: str, scenes: Sequence[Scene], controls: Sequence[tuple[_Control, np.ndarray, dict]]):
        captions = [self._caption(scene) for scene in scenes]
        drawn = []
        for i in range(0, len(scenes), BATCH):
            here = slice(i, i + BATCH)
            hints = [control.hints(maps[here], **how) for control, maps, how in controls]
            drawn.append(self.pipe.text_to_image(captions[here], control=hints, seed=1000 + i, **RECIPE))
        pixels = np.concatenate(drawn)
        masks = shapes_accuracy.read_masks(pixels)
        wanted = np.stack([np.any(masks_of(scene, SIDE), axis=0) for scene in scenes])
        overlap = (masks & wanted).sum((1, 2)) / np.maximum((masks | wanted).sum((1, 2)), 1)
        found = {"iou": float(overlap.mean()), "colour": self._colours(pixels, scenes)}
        print(f"| {name} |", " | ".join(f"{key} {value:.3f}" for key, value in found.items()), "|", flush=True)
        self.sheets.mkdir(parents=True, exist_ok=True)
        page = np.concatenate([*(maps[:SHOWN] for _, maps, _ in controls), pixels[:SHOWN]])
        media.write_png(self.sheets / f"{name.replace('/', '_')}.png", media.contact_sheet(page, columns=SHOWN), {})

    def _caption(self, scene: Scene) -> str:
        nouns = [short_caption(dataclasses.replace(scene, things=(thing,))) for thing in scene.things]
        return f" {scene.relation} ".join(nouns)

    def _colours(self, pixels: np.ndarray, scenes: Sequence[Scene]) -> float:
        """The share of things whose colour is that of the prompt, the nearest thing in the picture counting."""
        right, total = 0, 0
        for reading, scene in zip(shapes_accuracy.read_scenes(pixels), scenes, strict=True):
            for thing in scene.things:
                near = min(reading.things, key=lambda t, at=thing: (t.x - at.x) ** 2 + (t.y - at.y) ** 2, default=None)
                right += near is not None and near.colour == thing.colour
                total += 1
        return right / total


def _bent(maps: np.ndarray, rng: np.random.Generator, pixels: float = 1.2, smooth: float = 5.0) -> np.ndarray:
    """Each moved by a smooth random field of this standard deviation."""
    grid = np.indices(maps.shape[1:3], np.float32)
    bent = []
    for each in maps[..., 0]:
        field = ndimage.gaussian_filter(rng.standard_normal((2, *each.shape)), (0, smooth, smooth))
        moved = ndimage.map_coordinates(each.astype(np.float32), grid + field * (pixels / field.std()), order=1)
        bent.append(np.clip(moved * 1.5, 0, 255).astype(np.uint8))
    return np.repeat(np.stack(bent)[..., None], 3, axis=-1)


def speed(pixels: int, rounds: int = 2, steps: int = 20) -> None:
    """Of whole jobs, conditioning to picture: medians over rounds, in each of which all three take their turn. And what
    the arithmetic of a step says."""
    import jax
    import jax.numpy as jnp

    from benchmarks import timing
    from sd_jax.adapters import controlnet
    from sd_jax.adapters.controlnet import ControlNet, ControlNetConfig
    from sd_jax.models.families import SD15
    from sd_jax.models.networks import Networks
    from sd_jax.sampling.control import ControlModel
    from sd_jax.sampling.pipeline import Pipeline
    from sd_jax.types import Conditioning

    networks, key = Networks.of(SD15), jax.random.key(0)
    parts = ("unet", "vae", "text_encoder")
    random = lambda make: timing.random_params(lambda: {"params": make()}, "float32")  # noqa: E731
    params = {part: random(lambda part=part: networks.init(part, key)) for part in parts}
    pipe, config = Pipeline(SD15, params), ControlNetConfig(SD15.unet)
    shapes = controlnet.shapes_of(config)
    zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)  # noqa: E731
    control = ControlModel(config, random(zeros))
    hint = control.hint(np.zeros((pixels, pixels, 3), np.uint8))
    told = Conditioning(jnp.zeros((1, 77, SD15.unet.cross_attention_dim)))

    def sample(count: int) -> float:
        began = time.perf_counter()
        given = {"conditioning": told, "negative_conditioning": told, "control": [hint] * count}
        pipe.text_to_image(width=pixels, height=pixels, steps=steps, **given)
        return time.perf_counter() - began

    for count in (0, 1, 2):
        sample(count)
    taken = [[sample(count) for count in (0, 1, 2)] for _ in range(rounds)]
    for count in (1, 2):
        ratios = [each[count] / each[0] for each in taken]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{count} ControlNets against none: {statistics.median(ratios):.3f} of the time ({spread})")

    side = 64
    latents, timestep = jnp.zeros((1, side, side, 4)), jnp.zeros(1)  # which both halves of guidance share
    both = Conditioning(jnp.zeros((2, 77, SD15.unet.cross_attention_dim)))
    read = jnp.zeros((1, side, side, SD15.unet.block_out_channels[0]))
    unet = timing.count_flops(lambda: networks.unet.apply({"params": params["unet"]}, latents, timestep, both))
    net = ControlNet(SD15.unet)
    added = timing.count_flops(lambda: net.apply({"params": control.works}, latents, timestep, both, read))
    print(f"arithmetic of a step at 512x512: {1 + added / unet:.3f} with one, {1 + 2 * added / unet:.3f} with two")


if __name__ == "__main__":
    main()
