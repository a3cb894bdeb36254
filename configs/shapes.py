"""What a pretraining recipe's parts are worth, in shapes world on two CPU cores: a ladder of runs at equal images.

    python train.py --config=configs/shapes.py:full,seed=1 --workdir=runs/shapes_ladder/full_1
    python -m sd_jax.evals --checkpoint=runs/shapes_ladder/full_1 --out=runs/shapes_ladder/full_1 --two_objects=0
    python -m benchmarks.shapes_ladder            (all rungs, three seeds, and the table)

Pictures of one object have aspect ratios 0.6, 1 and 5/3 in equal parts; what is judged are squares of 64x64. As in
Stable Diffusion the autoencoder and the text encoder are there before, frozen (the bundled model's), and the U-Net
starts from nothing and predicts the noise.

    plain    squares cut out of the middle, every timestep counts alike
    buckets  the same, but pictures keep their aspect ratio: 64x64, 48x80 and 80x48
    full     buckets, and min-SNR weights of 5

Every run keeps an average of its weights besides, 0.995 of the old at each step: the last weights of `plain` are the
foot of the ladder (--weights=raw of the evaluation), the averaged ones of `full` its top.

Cost: 9 to 12 minutes a run, two at a time on two cores. Result, over three seeds: 83.0 % of all attributes are right at
the foot (82.3 to 83.7), 88.5 % at the top (87.9 to 89.3), and the average has most of it: benchmarks/RESULTS.md.
"""

from ml_collections import ConfigDict

from sd_jax.config import parse_arg, training_defaults
from sd_jax.models.presets import SHAPES_64
from sd_jax.sampling.pipeline import BUNDLED
from sd_jax.training.trial import make_small

RUNGS = ("plain", "buckets", "full")


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, rung="full", seed=0, runlocal=False)
    if args.rung not in RUNGS:
        raise ValueError(f"rung={args.rung!r}: use {', '.join(RUNGS)}")
    config = training_defaults("full")
    config.seed = args.seed
    config.model = ConfigDict(SHAPES_64.to_dict())
    config.model.noise_schedule.prediction_type = "epsilon"
    config.init, config.init_parts = str(BUNDLED), ("vae", "text_encoder")
    config.diffusion.train_text_encoder = False
    config.total_steps = 1000
    config.batch_size = 48
    config.log_steps = 100
    config.checkpoint_steps, config.eval_steps, config.sample_steps = 0, 500, 0
    config.ema_decays = (0.995,)

    config.data.num_examples = 12_800
    config.data.aspects = (0.6, 1.0, 5 / 3)
    config.data.resolution = 64
    config.data.crop = "centre"
    config.data.held_out = 0.02
    config.data.cache_latents = config.data.cache_text = True
    if args.rung != "plain":
        config.data.buckets.step = 16

    config.diffusion.min_snr_gamma = 5.0 if args.rung == "full" else 0.0
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.0

    config.samples.prompts = ("a large red circle at the top on a plain white background",)
    config.samples.guidance_scale = 2.5
    if args.runlocal:
        make_small(config)
    return config
