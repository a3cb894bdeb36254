"""What the jobs do in shapes world, as a table. `python -m benchmarks.job_effects [--count=64] [--sheet=PATH] ...`

Needs no other library; on two idle cores it takes some ten minutes. It ends with status 1 where a number is not what is
required. With --sheet a PNG shows pictures of every job, what it was given beside what it made.
"""

import argparse
import sys
from typing import NamedTuple

SHOWN = 6  # pictures of each job on the sheet


class Row(NamedTuple):
    what: str
    numbers: tuple[float, ...]
    settings: str
    required: str = ""  # of every number ">= 0.8"; from one to the next "rises" or "falls", or stays; or nothing

    @property
    def is_met(self) -> bool:
        if self.required in ("rises", "falls"):
            ordered = self.numbers if self.required == "rises" else self.numbers[::-1]
            return list(ordered) == sorted(ordered) and ordered[0] < ordered[-1]
        return not self.required or min(self.numbers) >= float(self.required.removeprefix(">= "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=64, help="pictures of each number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", default="", help="where to write the pictures")
    options = parser.parse_args()

    import sd_jax

    pipe = sd_jax.load()
    print("| what | number | settings | required |\n|---|---|---|---|")
    missed, sheet = [], {}
    for measure in (_jobs, _sizes, _prompts, _variations):
        for row in measure(pipe, options.count, options.seed, sheet):
            numbers = " ".join(f"{number:.3g}" for number in row.numbers)
            print(f"| {row.what} | {numbers} | {row.settings} | {row.required} |", flush=True)
            if not row.is_met:
                missed.append(row.what)
    if options.sheet:
        _write_sheet(options.sheet, sheet)
    if missed:
        sys.exit(f"not as required: {', '.join(missed)}")


def _jobs(pipe, count, seed, sheet):
    from sd_jax.evals import job_effects as effects

    recipe = effects.RECOLOUR
    done = sheet["image_to_image"] = effects.recolour(pipe, count, seed, **recipe)
    say = _told(recipe)
    what = "image_to_image, another colour: "
    yield Row(what + "IoU of the thing with the drawn one", _numbers(done, "iou"), say, ">= 0.8")
    yield Row(what + "IoU by chance", _numbers(done, "iou_of_others"), say)
    yield Row(what + "has it", _numbers(done, "colour"), say, ">= 0.8")
    yield Row(what + "shape, background kept", _numbers(done, "shape", "background"), say)
    strengths = (0.2, 0.4, 0.6, 0.8, 1.0)
    swept = [effects.recolour(pipe, count, seed, **{**recipe, "strength": s}).numbers for s in strengths]
    at = "strength 0.2 0.4 0.6 0.8 1"
    yield Row(what + "IoU", tuple(n["iou"] for n in swept), at, "falls")
    yield Row(what + "has it", tuple(n["colour"] for n in swept), at)

    ways = {"": effects.REPAINT, ", only_masked": effects.REPAINT_PART}
    ways[", only_masked, padding 32"] = {**effects.REPAINT_PART, "padding": 32}
    outside = []
    for way, recipe in ways.items():
        for attribute in ("colour", "shape"):
            done = sheet[f"inpaint{way}, {attribute}"] = effects.repaint(pipe, count, attribute, seed=seed, **recipe)
            outside.append(done.numbers["pixels"])
            what = f"inpaint{way}, another {attribute} for one of two: "
            yield Row(what + "the other unchanged", _numbers(done, "other"), _told(recipe), ">= 0.95")
            yield Row(what + "has it, background kept", _numbers(done, "named", "background"), _told(recipe), ">= 0.95")
    yield Row("inpaint: pixels outside the mask equal to the bit", (min(outside),), "least of all these", ">= 1")

    done = sheet["extend"] = effects.extend(pipe, count, seed, **effects.EXTEND)
    what, say = "extend by 32 on the right: ", _told(effects.EXTEND)
    yield Row(what + "old pixels equal to the bit", _numbers(done, "pixels"), say, ">= 1")
    yield Row(what + "background continues", _numbers(done, "background"), say, ">= 0.9")
    yield Row(what + "nothing new in colour", _numbers(done, "clean"), say, ">= 0.9")
    yield Row(what + "old thing as it was", _numbers(done, "thing"), say)


def _sizes(pipe, count, seed, sheet):
    from sd_jax.evals import job_effects as effects

    names = ("shape", "size", "position", "relation")
    direct = sheet["96x96 directly"] = effects.enlarge(pipe, count, direct=True, seed=seed, guidance_scale=2.5)
    done = sheet["hires_fix"] = effects.enlarge(pipe, count, seed=seed, **effects.ENLARGE)
    rows = (("96x96 directly: ", direct, "guidance_scale 2.5", ""),)
    rows += (("hires_fix, scale 1.5: ", done, _told(effects.ENLARGE), f">= {direct.numbers['count'] + 0.5:.3g}"),)
    for what, made, say, required in rows:
        yield Row(what + "as many things as asked for", _numbers(made, "count"), say, required)
        yield Row(what + ", ".join(names), _numbers(made, *names), say)
    strengths = (0.3, 0.4, 0.5, 0.6, 0.7)
    for upscaler in ("lanczos", "bislerp", "bicubic", "bilinear", "nearest"):
        recipes = [{**effects.ENLARGE, "upscaler": upscaler, "strength": s} for s in strengths]
        made = [effects.enlarge(pipe, count, seed=seed, **recipe).numbers for recipe in recipes]
        at = f"{upscaler}, strength {' '.join(map(str, strengths))}"
        yield Row("hires_fix, scale 1.5: as many things as asked for", tuple(n["count"] for n in made), at)


def _prompts(pipe, count, seed, sheet):
    from sd_jax.evals.job_effects import share

    def swept(what, prompt, wanted, values, required, **more):
        recipe = {"guidance_scale": 2.5, **more}
        shares = [share(pipe, prompt.replace("W", str(v)), wanted, count, seed, **recipe) for v in values]
        syntax = f", {more['prompt_syntax']}" if more else ""
        return Row(f"{what}: `{prompt}`", tuple(shares), f"W = {' '.join(map(str, values))}{syntax}", required)

    red, blue, star = {"colour": "red"}, {"colour": "blue"}, {"shape": "star"}
    weights = (0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
    for syntax in ("a1111", "comfy"):
        yield swept("red", "a (red:W) blue circle", red, weights, "rises", prompt_syntax=syntax)
    yield swept("red", "a blue (red:W) circle", red, weights, "rises")
    yield swept("green", "a (green:W) purple circle", {"colour": "green"}, weights, "rises")
    yield swept("red", "a (red:W) circle", red, (0.0, 0.5, 1.0, 1.5), "")
    parts = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
    both = "a red circle AND a small shape in the top left:W"
    yield swept("top left", both, {"position": "top left"}, parts, "rises")
    yield swept("small", both, {"size": "small"}, parts, "rises")
    yield swept("red circle", both, {"colour": "red", "shape": "circle"}, parts, ">= 0.9")
    for colour in ("blue", "purple"):  # contradictions are averaged
        yield swept(colour, "a red circle AND a blue circle:W", {"colour": colour}, (0.0, 0.5, 1.0, 1.5), "")
    yield swept("blue", "a [red:blue:W] circle", blue, (0.5, 0.8, 0.85, 0.9, 1.0), "falls")
    yield swept("star", "a red [circle:star:W]", star, (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0), "falls")
    places = (0.0, 0.1, 0.15, 0.2, 0.3)
    yield swept("right", "a red circle on the [left:right:W]", {"position": "right"}, places, "falls")


def _variations(pipe, count, seed, sheet):
    from sd_jax.evals.job_effects import vary

    strengths = (0.0, 0.1, 0.3, 0.6, 1.0)
    for prompt in ("a red circle", "a small blue star in the top left on a plain white background"):
        distances = [vary(pipe, prompt, strength, count, seed, guidance_scale=2.5) for strength in strengths]
        at = f"variation_strength {' '.join(map(str, strengths))}"
        for name, numbers in zip(("latents", "pixels of 255"), zip(*distances, strict=True), strict=True):
            yield Row(f"variation of `{prompt}`: distance in {name}", numbers, at, "rises")


def _told(recipe: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in recipe.items())


def _numbers(done, *names) -> tuple[float, ...]:
    return tuple(done.numbers[name] for name in names)


def _write_sheet(path: str, jobs: dict) -> None:
    """Pairs of before and after, side by side on white, a title under the first of each job."""
    import numpy as np

    from sd_jax import media

    pictures, titles = [], []
    side = max(max(done.after.shape[1:3]) for done in jobs.values())
    for name, done in jobs.items():
        for i in np.linspace(0, len(done.after) - 1, SHOWN).astype(int):
            pair = np.full((side, 2 * side + 4, 3), 255, np.uint8)
            for picture, left in ((done.before[i], 0), (done.after[i], side + 4)):
                pair[: picture.shape[0], left : left + picture.shape[1]] = picture
            pictures.append(pair)
            titles.append(name)
    media.write_png(path, media.contact_sheet(np.stack(pictures), captions=titles, columns=SHOWN), {})


if __name__ == "__main__":
    main()
