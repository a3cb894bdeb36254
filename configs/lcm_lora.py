"""LCM-LoRA: a LoRA that lets a Stable Diffusion checkpoint of yours make pictures in 4 to 8 steps (arXiv 2311.05556).

    python train.py --config=configs/lcm_lora.py --config.init=v1-5-pruned.safetensors \
        --config.data.path=many_pictures --workdir=runs/fast
    python sample.py --checkpoint=v1-5-pruned.safetensors --adapter=runs/fast --sampler=lcm --schedule=lcm --steps=4 \
        --guidance_scale=1 --prompt="..."

It is distilled from the checkpoint itself with guidance from 5 to 15; the pictures only say where to start, and any
captioned set like those that the model learnt from will do.

    python train.py --config=configs/lcm_lora.py:shapes --workdir=runs/fast

is the same for the bundled model and shapes world, on a CPU: benchmarks/fine_tuning.py says what came of it.
"""

from ml_collections import ConfigDict

from configs.finetune import ARGS, for_checkpoint, make_small
from sd_jax.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, **ARGS)
    config = for_checkpoint("lcm_lora", args)
    config.total_steps = 3000 if args.shapes else 6000
    config.optimizer.learning_rate = 3e-4 if args.shapes else 1e-4
    config.adapter.rank = 16 if args.shapes else 64
    config.samples.sampler = config.samples.schedule = "lcm"
    config.samples.steps, config.samples.guidance_scale = 4, 1.0
    if args.shapes:
        config.data.path, config.data.two_objects = "shapes", 0.3
        config.batch_size, config.optimizer.schedule = 32, "cosine"
        config.consistency.guidance_min, config.consistency.guidance_max = 1.5, 4.0
    if args.runlocal:
        config.adapter.rank = 4
        make_small(config)
    return config
