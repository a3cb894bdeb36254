"""Diffusion on pixels, without an autoencoder (Ho et al. 2020), with text: what latent diffusion is compared with.

    python train.py --config=configs/pixels.py --workdir=runs/pixels

Shapes world at 32x32, one object. `model.vae` is `IdentityConfig`; all else is as in configs/demo.py:text_to_image,
with a level more in the U-Net to see the whole picture. What it reaches has not been measured yet.

A second stage makes what the first one drew larger, 64x64 (Ho et al. 2022, cascaded diffusion):

    python train.py --config=configs/pixels.py:super_resolution --workdir=runs/pixels_64
    python sample.py --checkpoint=runs/pixels --prompt="a large red star at the top on a plain white background"
    python sample.py --checkpoint=runs/pixels_64 --init_image=samples/00000.png --width=64 --height=64 --prompt="..."

It enlarges twofold (`factor=4` of 16x16). Not measured to the end: after 247 of its 500 steps, two minutes of CPU, PSNR
is 27.8 dB where bicubic enlargement has 31.4 (benchmarks/super_resolution.py, 16 pictures).
"""

import dataclasses

from ml_collections import ConfigDict

from configs import demo
from sd_jax.config import parse_arg, training_defaults
from sd_jax.models.presets import SHAPES_32, IdentityConfig


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, stage="base", factor=2, runlocal=False)
    if args.stage not in ("base", "super_resolution"):
        raise ValueError(f"stage={args.stage!r}: use base or super_resolution")
    config = base() if args.stage == "base" else super_resolution(args.factor)
    if args.runlocal:
        config.total_steps, config.optimizer.warmup_steps, config.batch_size = 2, 1, 4
        config.data.num_examples, config.eval_batches = 60, 1
        config.sample_steps, config.samples.steps = 2, 2
    return config


def base() -> ConfigDict:
    config = demo.get_config("text_to_image")
    config.model = _model(32, in_channels=3, block_out_channels=(32, 48, 96), attention_blocks=(False, False, True))
    config.init = ""
    config.data.cache_latents = False
    return config


def super_resolution(factor: int) -> ConfigDict:
    config, first = training_defaults("super_resolution"), base()
    for name in ("optimizer", "data", "ema_decays", "log_steps", "eval_steps", "checkpoint_steps", "sample_steps"):
        config[name] = first[name]
    config.model = _model(
        64,
        in_channels=6,
        block_out_channels=(16, 32, 48),
        attention_blocks=(False, False, False),
        num_class_embeds=100,
    )
    # Most of the picture is shown: to predict it, and not the noise, is learnt soonest
    config.model.noise_schedule.prediction_type = "sample"
    config.super_resolution.factor, config.super_resolution.max_noise_level = factor, 100
    config.total_steps = 500
    config.batch_size = 8
    config.optimizer.name, config.optimizer.learning_rate = "adamw", 2e-3
    config.data.resolution = 64
    config.samples.guidance_scale = 1.0
    return config


def _model(side: int, **unet) -> ConfigDict:
    unet = dataclasses.replace(SHAPES_32.unet, sample_size=side, out_channels=3, **unet)
    return ConfigDict(dataclasses.replace(SHAPES_32, vae=IdentityConfig(side), unet=unet).to_dict())
