"""Pictures of a class that a model makes of itself before it learns something new (Ruiz et al. 2023, section 3.3).

Mixed into the batches (`data/mixed.py`) they keep the class what it was. Picture i is drawn from seed i with the
settings of `config.samples`, and lies with its caption in workdir/prior: a run that was stopped makes those that are
missing. Prompts that are as long as the captions beside them keep more than one short one does: a file holds several.
"""

import pathlib
from logging import getLogger

from ml_collections import ConfigDict

from sd_jax import distributed, media
from sd_jax.sampling.command import read_prompts
from sd_jax.sampling.pipeline import Pipeline
from sd_jax.training.start import Model

AT_ONCE = 16  # at most

logger = getLogger(__name__)


def prior_folder(config: ConfigDict, model: Model, workdir: pathlib.Path) -> str:
    """Where the pictures of `config.prior` are, made first where `config.prior.path` names none.

    Every process of a run calls it; the first one makes them. Raises ValueError for less than one.
    """
    prior = config.prior
    if prior.path:
        return prior.path
    if prior.count < 1:
        raise ValueError(f"config.prior.count={prior.count}: at least 1 picture of config.prior.prompt is needed")
    folder = workdir / "prior"
    if distributed.is_first():
        folder.mkdir(exist_ok=True)
        missing = {i for i in range(prior.count) if not (folder / f"{i:05d}.png").exists()}
        if missing:
            _make(config, model, folder, missing)
    distributed.barrier("prior")
    return str(folder)


def prompts_of(config: ConfigDict) -> list[str]:
    """Of the pictures, in turns: the prompt, or the lines of the file that it names."""
    prompt = config.prior.prompt
    return read_prompts(prompt) if prompt.endswith(".txt") else [prompt]


def _make(config: ConfigDict, model: Model, folder: pathlib.Path, missing: set[int]) -> None:
    samples, side, size = config.samples, config.data.resolution, min(AT_ONCE, config.batch_size)
    fields = {name: samples[name] for name in ("sampler", "schedule", "steps", "guidance_scale")}
    pipe = Pipeline(model.networks.spec, model.loaded, model.tokenizer, config.dtype, config.init)
    prompts = prompts_of(config)
    logger.info("making %d pictures of %r in %s", len(missing), config.prior.prompt, folder)
    for begin in range(0, config.prior.count, size):
        wanted = missing.intersection(range(begin, begin + size))
        if not wanted:
            continue
        texts = [prompts[number % len(prompts)] for number in range(begin, begin + size)]
        pictures = pipe.text_to_image(texts, seed=begin, width=side, height=side, **fields)
        for number in sorted(wanted):
            (folder / f"{number:05d}.txt").write_text(texts[number - begin], encoding="utf-8")
            media.write_png(folder / f"{number:05d}.png", pictures[number - begin], {})
