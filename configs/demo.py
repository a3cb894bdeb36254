"""Text to image from nothing on two CPU cores: shapes world at 32x32, one object, some with two.

    python train.py --config=configs/demo.py:autoencoder --workdir=runs/demo/autoencoder
    python train.py --config=configs/demo.py:text_to_image --workdir=runs/demo/text_to_image
    python -m sd_jax.evals --checkpoint=runs/demo/text_to_image --out=runs/demo \
        --stages=runs/demo/autoencoder,runs/demo/text_to_image

(`make demo` is these three.) Eight of the 64 colour-shape pairs are never seen in training.

Cost: 17 minutes on cores busy with other work; not timed on idle ones. Result: sd_jax/assets/shapes_32/report.json.
"""

from ml_collections import ConfigDict

from sd_jax.config import parse_arg, training_defaults
from sd_jax.models.presets import SHAPES_32, TINY_SHAPES


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, stage="autoencoder", init="runs/demo/autoencoder", runlocal=False)
    config = autoencoder() if args.stage == "autoencoder" else text_to_image(args.init)
    config.model = ConfigDict(SHAPES_32.to_dict())
    config.data.resolution = 32
    config.data.num_examples = 20_000
    config.data.two_objects = 0.1
    config.data.held_out = 0.02
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.0
    config.log_steps = 100
    if args.runlocal:
        config.model = ConfigDict(TINY_SHAPES.to_dict())
        config.total_steps, config.optimizer.warmup_steps, config.batch_size = 2, 1, 8
        config.data.num_examples = 100
    return config


def autoencoder() -> ConfigDict:
    config = training_defaults("autoencoder")
    config.total_steps = 800
    config.batch_size = 32
    config.eval_steps = 400
    config.autoencoder.l2_weight = 4.0
    config.autoencoder.kl_weight = 5e-6
    config.ema_decay = 0.99
    return config


def text_to_image(init: str) -> ConfigDict:
    config = training_defaults("full")
    config.init = init
    config.total_steps = 1500
    config.batch_size = 48
    config.eval_steps = 500
    config.ema_decay = 0.997
    config.data.cache_latents = True
    config.samples.prompts = (
        "a large red circle at the top on a plain white background",
        "a medium blue star in the centre on a dotted grey background",
        "a small purple triangle in the bottom left on a striped grey background",
        "a yellow heart above a green square",
    )
    config.samples.guidance_scale = 2.5
    return config
