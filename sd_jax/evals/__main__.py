"""Judges a model of shapes world: python -m sd_jax.evals --checkpoint=WORKDIR --out=DIR.

Writes DIR/report.json, how often each attribute of a prompt is right, for colour-shape pairs that the model was trained
on (`seen`) and for pairs that it never saw together (`held_out`); and DIR/samples.png, pictures of held-out prompts.
"""

import time

STARTED = time.time()

import json  # noqa: E402
import pathlib  # noqa: E402
import sys  # noqa: E402

import numpy as np  # noqa: E402
from absl import app, flags  # noqa: E402

flags.DEFINE_string("checkpoint", None, "The model: any path that sd_jax.load takes; none = the bundled model.")
flags.DEFINE_string("weights", "ema", "Of a workdir: ema, raw, or ema:0.999 where there are several averages.")
flags.DEFINE_string("out", None, "The folder for report.json and samples.png.", required=True)
flags.DEFINE_list("stages", [], "Workdirs whose seconds are part of the report's total.")
flags.DEFINE_integer("one_object", 512, "Prompts of one object, for each of seen and held_out.")
flags.DEFINE_integer("two_objects", 128, "Prompts of two objects, likewise: for `relation`.")
flags.DEFINE_integer("batch_size", 128, "Pictures at once.")
flags.DEFINE_integer("steps", 16, "Of the sampler.")
flags.DEFINE_string("sampler", "dpmpp_2m", "Recipe: sampler.")
flags.DEFINE_string("schedule", "normal", "Recipe: schedule.")
flags.DEFINE_float("guidance_scale", 2.5, "Recipe: guidance_scale.")
flags.DEFINE_integer("seed", 0, "Of prompts and noise.")
flags.DEFINE_integer("shown", 32, "Pictures in samples.png.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    try:
        _judge(flags.FLAGS, pathlib.Path(flags.FLAGS.out))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def _judge(options, out: pathlib.Path) -> None:
    from sd_jax import media
    from sd_jax.data import shapes
    from sd_jax.evals.shapes_accuracy import accuracy
    from sd_jax.sampling.pipeline import load

    pipe = load(options.checkpoint, weights=options.weights)
    recipe = {name: options[name].value for name in ("steps", "sampler", "schedule", "guidance_scale")}

    def pictures(captions: list[str]) -> np.ndarray:
        """One picture each; the last batch is filled up, so that everything compiles once."""
        images = []
        for at in range(0, len(captions), options.batch_size):
            batch = captions[at : at + options.batch_size]
            filled = batch + [""] * (options.batch_size - len(batch))
            images.append(pipe.text_to_image(filled, seed=options.seed + at, **recipe)[: len(batch)])
        return np.concatenate(images)

    results, shown = {}, None
    for split in ("seen", "held_out"):
        scenes = shapes.evaluation_scenes(split, options.one_object, options.seed)
        scenes += shapes.evaluation_scenes(split, options.two_objects, options.seed, two_objects=1.0)
        captions = [shapes.full_caption(scene) for scene in scenes]
        images = pictures(captions)
        results[split] = accuracy(images, scenes)
        if split == "held_out":
            # As many of one object as the whole set has, in proportion
            order = np.linspace(0, len(scenes) - 1, options.shown).astype(int)
            shown = media.contact_sheet(images[order], captions=[captions[i] for i in order])

    seconds = {pathlib.Path(stage).name: _seconds(pathlib.Path(stage)) for stage in options.stages}
    seconds["evaluation"] = round(time.time() - STARTED, 1)
    report = {
        "accuracy": results,
        "pictures": {"one_object": options.one_object, "two_objects": options.two_objects},
        "recipe": {**recipe, "seed": options.seed, "weights": options.weights},
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
    }
    out.mkdir(parents=True, exist_ok=True)
    media.write_png(out / "samples.png", shown, {})
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def _seconds(workdir: pathlib.Path) -> float:
    """What a training run took, from the summary that it left."""
    summary = workdir / "summary.json"
    if not summary.exists():
        raise FileNotFoundError(f"{summary} is missing: --stages takes workdirs of finished runs")
    return json.loads(summary.read_text())["seconds"]


if __name__ == "__main__":
    app.run(main)
