"""An IP-Adapter for a Stable Diffusion checkpoint of yours, which stays as it is: pictures beside the prompt.

    python train.py --config=configs/ip_adapter.py --config.init=v1-5-pruned.safetensors \
        --config.init_clip=models/image_encoder --config.data.path=my_pictures --workdir=runs/eyes
    python sample.py --checkpoint=v1-5-pruned.safetensors --adapter=runs/eyes:0.8 --image_encoder=models/image_encoder \
        --image_prompt=cat.png --prompt="..."

`my_pictures` is any path that configs/finetune.py takes. `init_clip` is any CLIP (`sd_jax.load_clip`) or its vision
tower alone, as h94/IP-Adapter has it in models/image_encoder; it is not in what the run leaves,
`ip_adapter.safetensors`. `configs/ip_adapter.py:plus` reads all patches of a picture, by a resampler, and so more of
it. The published ones saw 10 million pictures; a run on few learns what these share.

    python train.py --config=configs/beside.py:clip,resolution=64 --workdir=runs/clip
    python train.py --config=configs/ip_adapter.py:shapes --config.init_clip=runs/clip --workdir=runs/eyes

is the same for the bundled model and shapes world.
"""

from ml_collections import ConfigDict

from configs.finetune import ARGS, for_checkpoint, make_small
from sd_jax.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, **ARGS, plus=False)
    config = for_checkpoint("ip_adapter", args)
    config.ip_adapter.kind = "plus" if args.plus else "base"
    config.data.cache_latents = False
    config.diffusion.caption_dropout = 0.1
    config.total_steps = 1500 if args.shapes else 20_000
    config.optimizer.learning_rate = 1e-3 if args.shapes else 1e-4
    if args.shapes:
        config.data.path = "shapes"
    if args.runlocal:
        make_small(config)
    return config
