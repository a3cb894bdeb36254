"""The ways to a larger picture, tried on shapes world: what each makes, whether tiles show, and what 4096x4096 takes.

    train --config=configs/beside.py:features --config.total_steps=600 --config.batch_size=64 \
        --workdir=runs/larger/features
    train --config=configs/upscaler.py:compact,adversarial=False --config.total_steps=300 --workdir=runs/larger/compact
    train --config=configs/upscaler.py:compact --config.init_perceptual=runs/larger/features \
        --workdir=runs/larger/compact_gan
    train --config=configs/pixels.py:super_resolution,factor=4 --config.data.resolution=128 --config.batch_size=2 \
        --config.total_steps=1500 --config.optimizer.name=muon --config.optimizer.learning_rate=4e-3 \
        --config.optimizer.schedule=cosine --workdir=runs/larger/pixels_x4
    train --config=configs/finetune.py:shapes --config.data.resolution=128 --config.total_steps=1000 \
        --workdir=runs/larger/at_128

where `train` stands for `python train.py`, and then

    python -m benchmarks.larger --ways       from 32 to 128 pixels, beside the true picture
    python -m benchmarks.larger --bodies     does a model that was trained at 64 pixels draw things twice in larger ones
    python -m benchmarks.larger --seams      do the borders of tiles show
    python -m benchmarks.larger --large      4096x4096 pixels, the memory and the time, in a process of its own

--seams and --large need the second run alone, --bodies none. Times are of the processor, summed over cores,
compilation left out unless said.
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import pathlib
import resource
import time
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, UInt8

import sd_jax
from sd_jax import media
from sd_jax.data.shapes import ShapesWorld, evaluation_scenes, full_caption, render
from sd_jax.diffusion.low_resolution import enlarged, make_small
from sd_jax.evals import shapes_accuracy
from sd_jax.evals.networks import open_lpips
from sd_jax.evals.reconstruction import Reconstructions
from sd_jax.models.vae import to_image, to_pixels
from sd_jax.sampling.resize import resize_latents
from sd_jax.sampling.tiles import decode_tiled, encode_tiled
from sd_jax.tiles import lay_tiles

TRAINED = 64  # pixels of the pictures that the bundled model learnt from
SMALL, LARGE, BATCH, SHOWN = 32, 128, 16, 6
HIRES_STRENGTHS = (0.4, 0.6)
STRENGTH = 0.35  # of what --ways draws again
RECIPE = {"guidance_scale": 2.5, "steps": 10, "sampler": "dpmpp_2m"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", action="store_true")
    parser.add_argument("--bodies", action="store_true")
    parser.add_argument("--seams", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/larger"), help="what was trained")
    parser.add_argument("--pictures", type=int, default=96, help="of --ways and --bodies")
    parser.add_argument("--side", type=int, default=4096, help="of --large")
    parser.add_argument("--sheet", type=pathlib.Path, help="where --ways draws pictures: small, by each way, and true")
    options = parser.parse_args()
    if options.ways:
        ways(options.runs, options.pictures, options.sheet)
    if options.bodies:
        bodies(options.pictures)
    if options.seams:
        seams(options.runs)
    if options.large:
        large(options.runs, options.side)


# -- Four ways ---------------------------------------------------------------------------------------------------------


def ways(runs: pathlib.Path, pictures: int, sheet: pathlib.Path | None) -> None:
    world = ShapesWorld(LARGE, num_examples=pictures, seed=4242, split="seen")
    true = np.stack([world[i]["pixels"] for i in range(pictures)])
    captions = [full_caption(world.scene(i)) for i in range(pictures)]
    small = np.asarray(to_pixels(make_small(to_image(true), LARGE // SMALL)))
    at_128, second = sd_jax.load(runs / "at_128"), sd_jax.load(runs / "pixels_x4")
    enlarger = sd_jax.load_upscaler(runs / "compact")
    by_model = {"width": LARGE, "height": LARGE, "steps": 10, "sampler": "dpmpp_2m", "guidance_scale": 1.0}
    adversarial = sd_jax.load_upscaler(runs / "compact_gan")
    redrawn = functools.partial(at_128.upscale, scale=LARGE / SMALL, strength=STRENGTH, **RECIPE)

    def from_latents(pixels, texts):
        side = LARGE // at_128.spec.vae.downscale
        large = resize_latents(at_128.encode_image(np.asarray(to_image(pixels))), side, side)
        blurred = np.asarray(to_pixels(at_128.decode_latents(large)))
        return at_128.image_to_image(texts, image=blurred, strength=STRENGTH, **RECIPE)

    makers: dict[str, Callable] = {
        "bicubic": lambda pixels, texts: np.asarray(to_pixels(enlarged(to_image(pixels), (LARGE, LARGE)))),
        "ESRGAN (compact)": lambda pixels, texts: enlarger(pixels),
        "ESRGAN (compact), adversarial": lambda pixels, texts: adversarial(pixels),
        "diffusion x4, 10 steps": lambda pixels, texts: second.upscale(pixels, texts, noise_level=0, **by_model),
        "drawn again": redrawn,
        "latents enlarged, drawn again": from_latents,
        "ESRGAN, drawn again": functools.partial(redrawn, enlarger=enlarger),
    }
    _, lpips = open_lpips(str(runs / "features"))
    rows = [small.repeat(LARGE // SMALL, axis=1).repeat(LARGE // SMALL, axis=2)]
    print("| | PSNR | LPIPS | sharpness of edges | seconds a picture |\n|---|---|---|---|---|")
    for name, make in makers.items():
        make(small[:BATCH], captions[:BATCH])  # compiles
        began = time.process_time()
        batches = [slice(at, at + BATCH) for at in range(0, pictures, BATCH)]
        made = np.concatenate([make(small[part], captions[part]) for part in batches])
        taken = (time.process_time() - began) / pictures
        judge = Reconstructions(lpips)
        judge.add(true, made)
        found = judge.results()
        figures = f"{found['psnr']:.2f} | {found['lpips']:.4f} | {sharpness(made, true):.2f} | {taken:.3f}"
        print(f"| {name} | {figures} |", flush=True)
        rows.append(made)
    if sheet is not None:
        shown = np.concatenate([row[:SHOWN] for row in (*rows, true)])
        media.write_png(sheet, media.contact_sheet(shown, columns=SHOWN), {})


def sharpness(
    made: UInt8[np.ndarray, "batch height width 3"], true: UInt8[np.ndarray, "batch height width 3"], least: float = 16
) -> float:
    """The mean gradient of grey at the edges of the true pictures, in parts of theirs: 1 = as sharp, less = softer.

    Edges are where the true gradient is at least so many levels a pixel.
    """
    of_made, of_true = (
        np.hypot(*np.gradient(pixels.astype(np.float32).mean(-1), axis=(1, 2))) for pixels in (made, true)
    )
    edges = of_true >= least
    return float(of_made[edges].mean() / of_true[edges].mean())


# -- Two bodies --------------------------------------------------------------------------------------------------------


def bodies(prompts: int, sides: Sequence[int] = (64, 128)) -> None:
    """Prompts of one thing; how many pictures show another one. True pictures tell how often the count is wrong."""
    pipe = sd_jax.load()
    scenes = evaluation_scenes("seen", prompts)
    captions = [full_caption(scene) for scene in scenes]

    def drawn(job, **fields) -> np.ndarray:
        parts = [slice(at, at + BATCH) for at in range(0, prompts, BATCH)]
        return np.concatenate([job(captions[part], seed=1000 + part.start, **RECIPE, **fields) for part in parts])

    print("| pixels | | more than one thing | none |\n|---|---|---|---|")
    for side in sides:
        made = {"true": np.stack([render(scene, side) for scene in scenes])}
        made["direct"] = drawn(pipe.text_to_image, width=side, height=side)
        for strength in HIRES_STRENGTHS if side > TRAINED else ():
            how = {"scale": side / TRAINED, "strength": strength}
            made[f"hires fix at {strength:g}"] = drawn(pipe.hires_fix, width=TRAINED, height=TRAINED, **how)
        for name, pixels in made.items():
            counts = count_things(pixels)
            print(f"| {side} | {name} | {np.mean(counts > 1):.1%} | {np.mean(counts == 0):.1%} |", flush=True)


def count_things(pixels: UInt8[np.ndarray, "pictures side side 3"]) -> np.ndarray:
    """Connected things in each picture; specks are left out, and neighbours that touch are one.

    A thing may be as small, in pixels, as in the pictures that the model learnt from: that is how doubles come out.
    """
    from scipy import ndimage

    masks = shapes_accuracy.read_masks(pixels)
    smallest = shapes_accuracy.SMALLEST_AREA * masks[0].size * (TRAINED / pixels.shape[1]) ** 2
    counts = []
    for mask in masks:
        labels, number = ndimage.label(mask)
        counts.append(int((ndimage.sum_labels(mask, labels, range(1, number + 1)) >= smallest).sum()))
    return np.array(counts)


# -- Seams -------------------------------------------------------------------------------------------------------------


def texture(side: int, seed: int) -> UInt8[np.ndarray, "side side 3"]:
    """Coloured noise of equal power in every octave: a picture that is nowhere plain, and the same everywhere."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    white = np.fft.rfft2(rng.standard_normal((3, side, side)))
    noise = np.fft.irfft2(white / np.maximum(frequency, 1 / side), (side, side))
    noise = noise / noise.std((1, 2), keepdims=True)
    return np.clip(128 + 50 * noise, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def seams(runs: pathlib.Path, pictures: int = 4, side: int = 512, tile: int = 128) -> None:
    """In each way, steps at the borders of tiles against steps elsewhere, divided by the same of the untiled result."""
    pipe, enlarger = sd_jax.load(), sd_jax.load_upscaler(runs / "compact")
    factor, scale = pipe.spec.vae.downscale, enlarger.scale
    pixels = np.stack([texture(side, seed) for seed in range(pictures)])
    halves, small = (np.asarray(to_pixels(make_small(to_image(pixels), by))) for by in (2, scale))
    image = np.asarray(to_image(pixels))
    latents = np.asarray(pipe.encode_image(image))
    cells, tile_small = tile // factor, tile // scale
    redraw = functools.partial(pipe.upscale, halves, "", scale=2.0, strength=0.5, steps=8, guidance_scale=1.0)
    whole = redraw(), np.asarray(pipe.decode_latents(latents)), latents, enlarger(small)
    tiled = {
        "drawn again": lambda overlap: redraw(tile=tile) if overlap is None else None,
        "decoded": lambda overlap: decode_tiled(pipe.decode_latents, latents, factor, cells, overlap),
        "encoded": lambda overlap: encode_tiled(pipe.encode_image, image, factor, cells, overlap),
        "enlarged": lambda overlap: enlarger(small, tile_small, overlap),
    }
    in_cells = (cells, factor), (cells, factor), (cells, 1), (tile_small, scale)  # a tile, and pixels of a cell
    print("| | jump at the borders | without overlap |\n|---|---|---|")
    for (name, make), untiled, (cells, by) in zip(tiled.items(), whole, in_cells, strict=True):
        found = []
        for overlap in (None, 0):
            made = make(overlap)
            borders = borders_of(untiled.shape[1] // by, cells, overlap, by)
            found.append("" if made is None else f"{jump(made, borders, by) / jump(untiled, borders, by):.3f}")
        print(f"| {name} |", " | ".join(found), "|", flush=True)


def borders_of(length: int, tile: int, overlap: int | None, by: int) -> list[int]:
    """The last pixels before tiles begin and of where they end, along one side of a square."""
    starts = {top for top, _ in lay_tiles(length, length, tile, overlap).corners}
    return sorted({at * by - 1 for start in starts for at in (start, start + tile) if 0 < at < length})


def jump(pictures: Float[np.ndarray, "batch side side channels"], borders: Sequence[int], by: int) -> float:
    """The mean step from pixel to pixel across these borders, in parts of that where other cells meet."""
    ratios = []
    for axis in (1, 2):
        steps = np.abs(np.diff(pictures.astype(np.float32), axis=axis)).mean((0, 3 - axis, 3))
        elsewhere = np.setdiff1d(np.arange(by - 1, len(steps), by), borders)
        ratios.append(steps[list(borders)].mean() / steps[elsewhere].mean())
    return float(np.mean(ratios))


# -- The largest -------------------------------------------------------------------------------------------------------


def large(runs: pathlib.Path, side: int) -> None:
    print(f"| to {side}x{side} | peak memory, GB | minutes | of the processor |\n|---|---|---|---|")
    for way in (_by_enlarger, _drawn_again):
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            peak, clock, processor = fresh.submit(_measured, way, runs, side).result()
        figures = f"{peak:.2f} | {clock / 60:.1f} | {processor / 60:.1f}"
        print(f"| {way.__doc__} | {figures} |", flush=True)


def _measured(way: Callable, runs: pathlib.Path, side: int) -> tuple[float, float, float]:
    """(GB at most, seconds, seconds of the processor), loading and compilation included."""
    small = texture(side // 4, 0)
    clock, processor = time.perf_counter(), time.process_time()
    made = way(runs, small)
    assert made.shape == (1, side, side, 3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return peak, time.perf_counter() - clock, time.process_time() - processor


def _by_enlarger(runs: pathlib.Path, small: np.ndarray) -> np.ndarray:
    """enlarger, tiles of 256 pixels that become 1024"""
    return sd_jax.load_upscaler(runs / "compact")(small[None], tile=256)


def _drawn_again(runs: pathlib.Path, small: np.ndarray) -> np.ndarray:
    """drawn again by the bundled model, tiles of 256 pixels, 1 step of 3"""
    return sd_jax.load().upscale(small, "", scale=4.0, tile=256, steps=3, strength=0.35, guidance_scale=1.0)


if __name__ == "__main__":
    main()
