"""Shapes world at 64x64, one object or two: the demo's networks with one more level in the autoencoder.

    python train.py --config=configs/shapes_64.py:autoencoder --workdir=runs/shapes_64/autoencoder
    python train.py --config=configs/shapes_64.py:text_to_image --workdir=runs/shapes_64/text_to_image
    python -m sd_jax.evals --checkpoint=runs/shapes_64/text_to_image --out=runs/shapes_64 \
        --stages=runs/shapes_64/autoencoder,runs/shapes_64/text_to_image

Cost on two CPU cores, estimated from rates: 8 minutes for the autoencoder (80 images/s), 65 for the U-Net (200).
It has not been trained to the end yet, so there is no result to expect.
"""

from ml_collections import ConfigDict

from sd_jax.config import parse_arg, training_defaults
from sd_jax.models.presets import SHAPES_64, TINY_SHAPES


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, stage="autoencoder", init="runs/shapes_64/autoencoder", runlocal=False)
    config = autoencoder() if args.stage == "autoencoder" else text_to_image(args.init)
    config.model = ConfigDict(SHAPES_64.to_dict())
    config.data.resolution = 64
    config.data.held_out = 0.01
    config.data.two_objects = 0.35
    config.optimizer.name = "muon"
    config.optimizer.schedule = "cosine"
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.0
    config.log_steps = 100
    if args.runlocal:
        config.model = ConfigDict(TINY_SHAPES.to_dict())
        config.total_steps, config.optimizer.warmup_steps, config.batch_size = 2, 1, 8
        config.data.num_examples, config.data.resolution = 100, 32
    return config


def autoencoder() -> ConfigDict:
    config = training_defaults("autoencoder")
    config.total_steps = 1200
    config.batch_size = 32
    config.checkpoint_steps = 200
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 50
    config.autoencoder.l2_weight = 4.0
    config.autoencoder.kl_weight = 2e-6
    config.ema_decay = 0.99
    config.data.num_examples = 20_000
    return config


def text_to_image(init: str) -> ConfigDict:
    config = training_defaults("full")
    config.init = init
    config.total_steps = 12_000
    config.batch_size = 64
    config.checkpoint_steps = 500
    config.eval_steps = 500
    config.sample_steps = 500
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_steps = 200
    config.ema_decay = 0.998
    config.data.num_examples = 60_000
    config.data.cache_latents = True
    config.samples.prompts = (
        "a large red circle at the top on a plain white background",
        "a medium blue star in the centre on a dotted grey background",
        "a small purple triangle in the bottom left on a striped grey background",
        "a small yellow heart above a medium green square on a gradient black background",
    )
    config.samples.guidance_scale = 2.5
    return config
