"""Judges a model: python -m sd_jax.evals --checkpoint=PATH --out=DIR [--metrics=fid,clip_score ...].

By default, how often each attribute of a prompt of shapes world is right, for colour-shape pairs that the model was
trained on (`seen`) and for pairs that it never saw together (`held_out`). Further metrics read networks from files:

    fid, kid, precision_recall   --inception=FILE (or --features=clip), and real pictures: --data
    clip_score                   --clip=PATH
    aesthetic                    --clip=PATH --aesthetic=FILE
    reconstruction               --data; LPIPS with --lpips=vgg16.pth,vgg.pth, rFID with --inception

What fine-tuning made a model forget: --base=PATH, the model that it began from, adds each of these figures before and
after, and sheets of the same prompts and noise. --adapter=PATH:STRENGTH and --embeddings=DIR are put on the model.

Captions are those of --captions (a file, one a line), else of the data. Of a workdir, the data is by default what it
was trained on. What DIR holds afterwards:

    report.json   all figures, and which weights they come from
    *.png         samples of shapes world, pictures of captions, reconstructions; before-*.png are those of --base
    sweep.json, sweep.png     --guidance_scales=1,2,3,5,8: figures at each, and the FID-CLIP curve
    README.md                 --card=apache-2.0: a model card
    reference-*.npz           what the network said of the real pictures, for the next time (or in --cache)
"""

import time

STARTED = time.time()

import json  # noqa: E402
import pathlib  # noqa: E402
import sys  # noqa: E402

from absl import app, flags  # noqa: E402

from sd_jax.evals.order import Order  # noqa: E402

_TEXTS = {
    "checkpoint": "The model: any path that sd_jax.load takes; none = the bundled model.",
    "embeddings": "A file of textual inversion, or a folder of them.",
    "base": "The model before it was fine-tuned, any path that sd_jax.load takes.",
    "weights": "Of a workdir: ema, raw, or ema:0.999 where there are several averages.",
    "dtype": "Of weights and computation: float32, bfloat16 or float16.",
    "captions": "A file of captions, one a line; none = those of the data.",
    "data": "Real pictures: a folder, a data set's name, 'shapes'; or statistics as .npz. None = the workdir's own.",
    "image_key": "The column of --data's pictures.",
    "caption_key": "The columns of its captions, joined by commas.",
    "inception": "pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or another file of its layout.",
    "lpips": "vgg16.pth,vgg.pth: torchvision's and the lpips package's; or a run of method 'features'.",
    "clip": "A CLIP: a folder of transformers or OpenCLIP, a file, a run of method 'clip'.",
    "clip_tokenizer": "A folder or hub name; none = the CLIP's own, else OpenAI's from the hub.",
    "aesthetic": "A predictor of LAION's, or a run of method 'aesthetic'.",
    "cache": "The folder of reference-*.npz; none = --out.",
    "sampler": "Recipe: sampler.",
    "schedule": "Recipe: schedule.",
}
_NUMBERS = {
    "num_images": "Pictures drawn of captions, and at most so many real ones.",
    "one_object": "Prompts of one object, for each of seen and held_out.",
    "two_objects": "Prompts of two objects, likewise: for `relation`.",
    "batch_size": "Pictures at once.",
    "steps": "Of the sampler.",
    "seed": "Of prompts and noise.",
    "shown": "Pictures in a sheet.",
}
for name, text in _TEXTS.items():
    flags.DEFINE_string(name, getattr(Order, name), text)
for name, text in _NUMBERS.items():
    flags.DEFINE_integer(name, getattr(Order, name), text, lower_bound=0 if name in ("seed", "two_objects") else 1)
flags.DEFINE_string("out", None, "The folder for report.json and pictures.", required=True)
flags.DEFINE_list(
    "metrics",
    ["shapes"],
    "shapes, fid, kid, clip_score, precision_recall, aesthetic, reconstruction, joined by commas.",
)
flags.DEFINE_enum("features", "inception", ("inception", "clip"), "The network behind FID, KID, precision and recall.")
flags.DEFINE_float("guidance_scale", Order.guidance_scale, "Recipe: guidance_scale.")
flags.DEFINE_multi_string("adapter", [], "PATH, PATH:STRENGTH or PATH:STRENGTH:TEXT_STRENGTH; may be given again.")
flags.DEFINE_list("guidance_scales", [], "Scales of a sweep, joined by commas.")
flags.DEFINE_list("stages", [], "Workdirs whose seconds are part of the report's total.")
flags.DEFINE_string("card", "", "Write a model card too, with this licence: an identifier of the hub.")
flags.DEFINE_string("trained_on", "", "For the card: what the model was trained on; none = what its config says.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    try:
        _judge(flags.FLAGS)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def _judge(options) -> None:
    from sd_jax import distributed

    distributed.initialize()
    import jax

    from sd_jax import media
    from sd_jax.evals import judging
    from sd_jax.evals.card import CURVE, check_licence, model_card
    from sd_jax.evals.reference import trained_with

    names = (*_TEXTS, *_NUMBERS, "metrics", "features", "guidance_scale", "adapter")
    if options.card:
        check_licence(options.card)
    out = pathlib.Path(options.out)
    scales = tuple(_scale(text) for text in options.guidance_scales)
    order = Order(out=out, guidance_scales=scales, **{name: options[name].value for name in names})
    seconds = {pathlib.Path(stage).name: _seconds(pathlib.Path(stage)) for stage in options.stages}
    report, sweep, sheets = judging.judge(order)
    if jax.process_index():
        return
    seconds["evaluation"] = round(time.time() - STARTED, 1)
    report["seconds"] = {**seconds, "total": round(sum(seconds.values()), 1)}
    if sweep:
        media.write_png(out / CURVE, judging.curve_of(sweep), {})
        _write(out / "sweep.json", sweep)
    for name, sheet in sheets.items():
        media.write_png(out / name, sheet, {})
    _write(out / "report.json", report)
    if options.card:
        card = model_card(
            report, sweep, list(sheets), options.card, options.trained_on, trained_with(options.checkpoint)
        )
        (out / "README.md").write_text(card, encoding="utf-8")
    print(json.dumps(report, indent=2))


def _write(path: pathlib.Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def _scale(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--guidance_scales={text}: give numbers joined by commas") from None


def _seconds(workdir: pathlib.Path) -> float:
    """What a training run took, from the summary that it left."""
    summary = workdir / "summary.json"
    if not summary.exists():
        raise FileNotFoundError(f"{summary} is missing: --stages takes workdirs of finished runs")
    return json.loads(summary.read_text())["seconds"]


if __name__ == "__main__":
    app.run(main)
