"""A model card in the form of the Hugging Face hub, made of a report: huggingface.co/docs/hub/model-cards."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

_TAGS = ("jax", "flax", "stable-diffusion", "text-to-image")
_SHEETS = {
    "samples.png": "Pictures of prompts with attribute pairs that were held out of training",
    "captions.png": "Pictures of captions that the figures are taken of",
    "reconstructions.png": "Real pictures, and below them what the autoencoder makes of them",
}
CURVE, _CURVE = "sweep.png", "Figures at several guidance scales"


def check_licence(licence: str) -> None:
    """Raises ValueError for one that cannot be an identifier of the hub."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise ValueError(f"--card={licence}: give an identifier of the hub, such as apache-2.0 or openrail++")


def model_card(
    report: Mapping[str, Any],  # of `judging.judge`
    sweep: Sequence[Mapping[str, float]],
    sheets: Sequence[str],  # file names beside the card, but for CURVE
    licence: str,  # the hub's identifier: apache-2.0, openrail++, ...
    trained_on: str = "",  # "" = what `config` says
    config: Mapping[str, Any] | None = None,  # that it was trained with
) -> str:
    """The text of README.md."""
    model = report["model"]
    name = pathlib.PurePath(model["checkpoint"]).name
    parts = [
        _front_matter(licence),
        f"# {name}",
        f"A text-to-image model of sd_jax, weights {model['sha256']}.\n\n"
        f'```python\nimport sd_jax\n\npipe = sd_jax.load("{name}")\nimages = pipe.text_to_image("...", seed=0)\n```',
        "## Figures",
        _figures(report),
        _conditions(report),
    ]
    if "accuracy" in report:
        parts += ["Share of each attribute that comes out as the prompt says:", _accuracy(report["accuracy"])]
    if sweep:
        names = [_words(key) for key in sweep[0]]
        parts += ["## Guidance", _table(names, [[_number(value) for value in point.values()] for point in sweep])]
        parts += [f"![{_CURVE}]({CURVE})"]
    if sheets:
        parts += ["## Pictures", *(f"![{_SHEETS[sheet]}]({sheet})\n\n{_SHEETS[sheet]}." for sheet in sheets)]
    parts += ["## Training", _training(trained_on, config), "## Licence", f"`{licence}`"]
    return "\n\n".join(parts) + "\n"


def _front_matter(licence: str) -> str:
    tags = "".join(f"\n- {tag}" for tag in _TAGS)
    return f"---\nlibrary_name: sd_jax\nlicense: {licence}\npipeline_tag: text-to-image\ntags:{tags}\n---"


def _figures(report: Mapping[str, Any]) -> str:
    rows = [[_words(name), _number(value), report["judges"][name]] for name, value in report["figures"].items()]
    return _table(["figure", "value", "judged by"], rows)


def _conditions(report: Mapping[str, Any]) -> str:
    counts = {
        "captions": "{} pictures of captions",
        "reference": "{} real pictures",
        "reconstruction": "{} reconstructions",
        "one_object": "{} prompts of one object",
        "two_objects": "{} of two, for seen and for held-out pairs each",
    }
    said = [counts[name].format(number) for name, number in report["pictures"].items()]
    recipe = ", ".join(f"{_words(name)} {value}" for name, value in report["recipe"].items())
    data = f"\n\nData: {report['data']}." if report.get("data") else ""
    return f"Taken of {', '.join(said)}; {recipe}.{data}"


def _accuracy(accuracy: Mapping[str, Mapping[str, float | None]]) -> str:
    names = list(next(iter(accuracy.values())))
    rows = [[_words(split), *(_number(right[name]) for name in names)] for split, right in accuracy.items()]
    return _table(["pairs", *names], rows)


def _training(trained_on: str, config: Mapping[str, Any] | None) -> str:
    if config is None:
        return f"Trained on {trained_on}." if trained_on else "What it was trained on is not told."
    data = config["data"]
    if not trained_on:
        drawn = f" ({data['num_examples']} drawn pictures)" if data["path"] == "shapes" else ""
        trained_on = f"`{data['path']}`{drawn}"
    steps = f"{config['total_steps']} steps of {config['batch_size']} pictures at {data['resolution']} pixels"
    begun = f", from `{config['init']}`" if config.get("init") else ""
    text = json.dumps(config, indent=2)
    return (
        f"Trained on {trained_on}: {steps}{begun}, by method `{config['method']}`.\n\n"
        f"<details><summary>config.json</summary>\n\n```json\n{text}\n```\n\n</details>"
    )


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(names), " | ".join(["---"] * len(names)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def _words(name: str) -> str:
    known = {"fid": "FID", "kid": "KID", "kid_std": "KID, deviation", "rfid": "rFID", "psnr": "PSNR, dB"}
    known |= {"ssim": "SSIM", "lpips": "LPIPS", "clip_score": "CLIP score"}
    return known.get(name, name.replace("_", " "))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
