"""A ControlNet, or a T2I-Adapter, for a Stable Diffusion checkpoint of yours, which stays as it is.

    python -m sd_jax.preprocessors canny my_pictures my_pictures/hints
    python train.py --config=configs/controlnet.py --config.init=v1-5-pruned.safetensors \
        --config.data.path=my_pictures --workdir=runs/edges
    python sample.py --checkpoint=v1-5-pruned.safetensors --control=runs/edges:edges.png:0.8 --prompt="..."

`my_pictures` holds pictures with their captions as configs/finetune.py takes them, and in hints/ a picture of the same
name for each: the map that is to be followed. Half of the captions are dropped, so that the hint alone says much
(Zhang et al. 2023, section 3.4). `configs/controlnet.py:t2i_adapter` trains a T2I-Adapter, a fifth as large, which
works once for a picture and not once a step.

    python train.py --config=configs/controlnet.py:shapes --workdir=runs/outline

is the same for the bundled model and shapes world, whose maps are --config.control.hint_key=outline, segment and depth,
on a CPU in minutes: benchmarks/control.py says what came of it.
"""

from ml_collections import ConfigDict

from configs.finetune import ARGS, for_checkpoint, make_small
from sd_jax.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, **ARGS, t2i_adapter=False)
    config = for_checkpoint("t2i_adapter" if args.t2i_adapter else "controlnet", args)
    config.data.cache_latents = False
    config.total_steps = 1500 if args.shapes else 20_000
    config.optimizer.learning_rate = 1e-3 if args.shapes else 1e-5
    config.diffusion.caption_dropout = 0.1 if args.shapes else 0.5
    if args.shapes or args.runlocal:
        config.data.path, config.control.hint_key = "shapes", "outline"
    if args.runlocal:
        make_small(config)
    return config
