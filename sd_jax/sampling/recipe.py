"""Pictures that carry their recipe, and the bar that shows them being made."""

import json
import pathlib

import numpy as np
from tqdm import tqdm

from sd_jax import media, types

RECIPE_KEY = "sd_jax"  # the PNG text chunk that holds the whole recipe as JSON
PARAMETERS_KEY = "parameters"  # the one that A1111 and its kin read


def parameters_text(recipe: types.Recipe, seed: int, width: int, height: int) -> str:
    """A1111's infotext: prompt, negative prompt, then `key: value` pairs in its order."""
    lines = [recipe.prompt]
    if recipe.negative_prompt:
        lines.append(f"Negative prompt: {recipe.negative_prompt}")
    pairs = {
        "Steps": recipe.steps,
        "Sampler": recipe.sampler,
        "Schedule type": recipe.schedule,
        "CFG scale": f"{recipe.guidance_scale:g}",
        "Seed": seed,
        "Size": f"{width}x{height}",
    }
    if (recipe.clip_skip or 1) > 1:
        pairs["Clip skip"] = recipe.clip_skip
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in pairs.items())])


def write_pictures(
    folder: pathlib.Path,
    images: np.ndarray,  # uint8 [batch, height, width, 3]
    recipe: types.Recipe,
    checkpoint: str | None,  # as the user named it; None = the bundled model
) -> list[pathlib.Path]:
    """Writes 00000.png, 00001.png, ... and sheet.png into `folder`; returns their paths. Each names its seed."""
    folder.mkdir(parents=True, exist_ok=True)
    height, width = images.shape[1:3]
    paths = []
    for i, pixels in enumerate(images):
        own = {**recipe.to_dict(), "seed": recipe.seed + i, "batch_size": 1, "width": width, "height": height}
        text = {
            PARAMETERS_KEY: parameters_text(recipe, recipe.seed + i, width, height),
            RECIPE_KEY: json.dumps({**own, "checkpoint": checkpoint}),
        }
        paths.append(folder / f"{i:05d}.png")
        media.write_png(paths[-1], pixels, text)
    sheet = media.contact_sheet(images, captions=[recipe.prompt] * len(images))
    media.write_png(folder / "sheet.png", sheet, {PARAMETERS_KEY: parameters_text(recipe, recipe.seed, width, height)})
    return [*paths, folder / "sheet.png"]


class StepBar:
    """A progress bar of sampler steps; `step` is the callback that a job takes."""

    def __init__(self, steps: int):
        self._bar = tqdm(total=steps, unit="step", dynamic_ncols=True)

    def step(self, index, x, denoised) -> None:
        self._bar.update(1)

    def __enter__(self) -> "StepBar":
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()
