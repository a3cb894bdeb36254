"""Experiment configs: one Python file each, `get_config(arg)` -> ml_collections.ConfigDict.

`--config=configs/file.py:name,key=value` hands `arg` to `get_config`; `--config.key=value` changes one key afterwards,
and a key that does not exist is an error.
"""

import json
import pathlib

from ml_collections import ConfigDict


def parse_arg(arg: str | None, **defaults) -> ConfigDict:
    """The text after the colon of `--config=file.py:arg` as a ConfigDict with the keys of `defaults`.

    `arg` is `key=value` parts joined by commas; a bare `key` means True, or, where no key has this name, the value of
    the first key (so that `demo.py:autoencoder` reads as `stage=autoencoder`). Values take the type of their default.
    Raises ValueError for an unknown key or a value of another type.
    """
    values = dict(defaults)
    first = next(iter(defaults), None)
    for part in filter(None, (arg or "").split(",")):
        key, equals, text = part.partition("=")
        if not equals and key not in defaults:
            key, equals, text = first, "=", key
        if key not in defaults:
            raise ValueError(f"unknown config argument {part!r}: this config knows {', '.join(defaults) or 'none'}")
        default = defaults[key]
        try:
            if isinstance(default, bool):
                values[key] = {"": True, "true": True, "1": True, "false": False, "0": False}[text.lower()]
            else:
                values[key] = type(default)(text)
        except (KeyError, ValueError):
            raise ValueError(f"config argument {part!r}: {key} takes a {type(default).__name__}") from None
    return ConfigDict(values)


def training_defaults(method: str) -> ConfigDict:
    """Every key that the training loop reads, with its default; a config file changes what it cares about.

    The result is locked: a key that is not here, misspelt perhaps, raises AttributeError.

    `config.diffusion` exists for methods that train on noised latents, `config.autoencoder` for the autoencoder.
    """
    config = ConfigDict()
    config.method = method  # a row of sd_jax/training/methods.py
    config.seed = 0
    config.total_steps = 1000  # optimiser steps
    config.batch_size = 32  # images a step, over all devices and accumulated micro-batches
    config.grad_accumulation = 1  # micro-batches that one optimiser step is summed over

    # How often, in optimiser steps; 0 = never (a checkpoint is written at the end in any case)
    config.log_steps = 50  # a line in log.txt; metrics.jsonl has every step
    config.checkpoint_steps = 500
    config.keep_checkpoints = 2  # the newest; the one of lowest held-out loss is kept beside them
    config.eval_steps = 250
    config.eval_batches = 4  # of held-out images, always the same
    config.sample_steps = 500

    # What is trained: `init` is any path that sd_jax.load takes; parts that it lacks are made from `model`
    config.init = ""
    config.prediction_type = ""  # of `init`, where `model` is empty: what its U-Net predicts; empty = what it says
    config.model = ConfigDict()  # ModelSpec.to_dict(); empty = that of `init`
    config.tokenizer = ""  # empty = that of `init`, else one is trained from the captions
    config.dtype = "float32"  # of the computation; parameters stay float32
    config.remat = False
    config.ema_decay = 0.9999

    config.data = ConfigDict()
    config.data.path = "shapes"  # "shapes", a folder of pictures, or whatever datasets.load_dataset takes
    config.data.image_key = "image"
    config.data.caption_key = "text"
    config.data.resolution = 64
    config.data.random_flip = False
    config.data.held_out = 0.05  # share of the records kept for the held-out loss
    config.data.num_workers = 2  # threads that decode
    config.data.cache_latents = False  # encode every picture once, before training
    config.data.num_examples = 20_000  # of shapes world
    config.data.two_objects = 0.0  # share of shapes world's pictures with two objects

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or "muon"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "constant"  # after the warm-up: "constant", "cosine" or "linear" to zero
    config.optimizer.warmup_steps = 100
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.parallelism = "jit"  # or "pmap": plain data parallelism

    if method == "autoencoder":
        config.autoencoder = ConfigDict({"l1_weight": 1.0, "l2_weight": 1.0, "kl_weight": 1e-6})
    else:
        config.diffusion = ConfigDict()
        config.diffusion.train_text_encoder = True
        config.diffusion.caption_dropout = 0.1  # share of the images whose conditioning is that of the empty prompt
        config.diffusion.min_snr_gamma = 0.0  # 0 = no weighting
        config.samples = ConfigDict()  # the grid that is drawn while training
        config.samples.prompts = ("a red circle", "a blue square")
        config.samples.sampler = "dpmpp_2m"
        config.samples.schedule = "normal"
        config.samples.steps = 20
        config.samples.guidance_scale = 5.0
    return config.lock()


def to_json(config: ConfigDict) -> str:
    """The resolved config, keys in their order, tuples as lists."""
    return json.dumps(config.to_dict(), indent=2, default=list)


def dump(config: ConfigDict, path: pathlib.Path) -> None:
    """Writes `to_json` beside `path`, then renames it, so that a crash leaves the old file or the new one."""
    aside = path.with_suffix(".tmp")
    aside.write_text(to_json(config) + "\n")
    aside.rename(path)
