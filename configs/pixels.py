"""Diffusion on pixels, without an autoencoder (Ho et al. 2020), with text: what latent diffusion is compared with.

    python train.py --config=configs/pixels.py --workdir=runs/pixels

Shapes world at 32x32, one object. `model.vae` is `IdentityConfig`; all else is as in configs/demo.py:text_to_image,
with a level more in the U-Net to see the whole picture. What it reaches has not been measured yet.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import demo
from sd_jax.config import parse_arg
from sd_jax.models.presets import SHAPES_32, IdentityConfig


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, runlocal=False)
    config = demo.get_config("text_to_image")
    unet = dataclasses.replace(
        SHAPES_32.unet,
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 48, 96),
        attention_blocks=(False, False, True),
    )
    config.model = ConfigDict(dataclasses.replace(SHAPES_32, vae=IdentityConfig(32), unet=unet).to_dict())
    config.init = ""
    config.data.cache_latents = False
    if args.runlocal:
        config.total_steps, config.optimizer.warmup_steps, config.batch_size = 2, 1, 4
        config.data.num_examples, config.eval_batches = 60, 1
        config.sample_steps, config.samples.steps = 2, 2
    return config
