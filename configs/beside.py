"""Networks beside the diffusion model, from nothing on shapes world: a CLIP, a perceptual trunk, an aesthetic head.

    python train.py --config=configs/beside.py:clip --workdir=runs/clip
    python train.py --config=configs/beside.py:features --workdir=runs/features
    python train.py --config=configs/beside.py:aesthetic --config.init_clip=runs/clip --config.data.path=FOLDER \
        --workdir=runs/aesthetic

`clip` and `features` read shapes world, `aesthetic` any pictures with a column of ratings. `clip,noised=True` goes on
from a CLIP on noised pictures, for guidance (--config.init_clip=runs/clip --config.init=A_MODEL).

Cost on two cores busy with other work: `features` (600 steps of 64 pictures) 73 s; `clip,resolution=64` (2,000 steps)
26 minutes, `noised` after it 16, `aesthetic` 42 s. Results: benchmarks/RESULTS.md. A head finds only what its CLIP was
made to see: ruined pictures are told from sound ones at an AUC of 0.996 where captions of its pictures said which
were ruined (benchmarks/shapes_filter.py), and of 0.76 where they did not.
"""

import dataclasses

from ml_collections import ConfigDict

from sd_jax.config import parse_arg, training_defaults
from sd_jax.models.presets import SHAPES_CLIP, SHAPES_FEATURES, AestheticConfig, ModelSpec


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, method="clip", resolution=32, noised=False, runlocal=False)
    if args.method not in ("clip", "features", "aesthetic"):
        raise ValueError(f"method={args.method!r}: use clip, features or aesthetic")
    config = training_defaults(args.method)
    vision = dataclasses.replace(SHAPES_CLIP.vision_config, image_size=args.resolution, patch_size=args.resolution // 8)
    clip = dataclasses.replace(SHAPES_CLIP, vision_config=vision)
    beside = {"clip": clip, "features": SHAPES_FEATURES, "aesthetic": AestheticConfig("mlp_relu", clip.projection_dim)}
    config.model = ConfigDict(ModelSpec(**{args.method: beside[args.method]}).to_dict())
    config.data.resolution = args.resolution
    config.data.crop = "centre"
    config.data.num_examples = 40_000
    config.data.held_out = 512
    config.batch_size = 256
    config.total_steps = 1500
    config.eval_steps = 250
    config.eval_batches = 2
    config.ema_decays = (0.99,)
    config.checkpoint_steps = 0
    config.log_steps = 100
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.1
    if args.method == "clip" and args.noised:
        config.clip.noised, config.model = True, ConfigDict()  # of `init` and `init_clip`
        config.batch_size, config.total_steps, config.optimizer.learning_rate = 128, 600, 5e-4
    if args.method == "aesthetic":
        config.batch_size, config.total_steps, config.optimizer.weight_decay = 64, 600, 0.01
    if args.runlocal:
        config.total_steps, config.optimizer.warmup_steps, config.batch_size = 2, 1, 8
        config.data.num_examples, config.data.held_out = 100, 10
    return config
