"""Image variation: a Stable Diffusion checkpoint of yours learns to be told a picture in place of text.

    python train.py --config=configs/image_variation.py --config.init=v1-5-pruned.safetensors \
        --config.init_clip=clip-vit-large-patch14 --config.data.path=my_pictures --workdir=runs/variation
    python sample.py --checkpoint=runs/variation --image_prompt=cat.png

`my_pictures` is any path that configs/finetune.py takes; captions are not read. The picture that is to be denoised is
seen through `init_clip`, any path that `sd_jax.load_clip` takes or a vision tower alone, which stays as it is; its
features, one token as wide as the U-Net reads (768 for SD 1.x and CLIP-L), are the whole context, zeros for a tenth.
A folder for image variation (lambdalabs/sd-image-variations-diffusers) goes on learning without `init_clip`.

    python train.py --config=configs/beside.py:clip,resolution=64 --workdir=runs/clip
    python train.py --config=configs/image_variation.py:shapes --config.init_clip=runs/clip --workdir=runs/variation

is the same in shapes world, the U-Net from nothing, in ten minutes on two CPU cores: colour, background and size of the
picture shown stay in 100, 82 and 71 % of what it makes, which is about what that CLIP tells (benchmarks/RESULTS.md).
"""

import dataclasses

from ml_collections import ConfigDict

from configs.finetune import ARGS, for_checkpoint, make_small
from sd_jax.config import parse_arg
from sd_jax.models.presets import SHAPES_64, SHAPES_CLIP


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, **ARGS)
    config = for_checkpoint("full", args)
    config.diffusion.train_text_encoder = False
    config.data.cache_latents = config.data.cache_text = False
    config.total_steps = 20_000
    if args.shapes or args.runlocal:
        unet = dataclasses.replace(SHAPES_64.unet, cross_attention_dim=SHAPES_CLIP.projection_dim)
        config.model = ConfigDict(dataclasses.replace(SHAPES_64, unet=unet).to_dict())
        config.init_parts = ("vae",)
        config.data.path, config.total_steps = "shapes", 2000
        config.optimizer.name, config.optimizer.learning_rate = "muon", 4e-3
        config.ema_decays = (0.995,)
    if args.runlocal:
        make_small(config)
    return config
