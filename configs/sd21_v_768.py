"""Stable Diffusion 2.x at 768x768 with the v-objective, and the stages before it: Stability's and MosaicML's recipe.

    python train.py --config=configs/sd21_v_768.py --config.grad_accumulation=4 --plan=v5p:4x4x4
    python train.py --config=configs/sd21_v_768.py:base_256 --workdir=runs/sd21/base_256 --config.init=768-v-ema.ckpt
    python train.py --config=configs/sd21_v_768.py:base_512 --workdir=runs/sd21/base_512
    python train.py --config=configs/sd21_v_768.py:v_512 --workdir=runs/sd21/v_512
    python train.py --config=configs/sd21_v_768.py:v_768 --workdir=runs/sd21/v_768
    python train.py --config=configs/sd21_v_768.py:runlocal --workdir=/tmp/trial

Each with --config.data.path. The first stage takes the autoencoder and OpenCLIP-H of `init` and makes its own U-Net;
every other goes on from the workdir before it. Fewer chips: --config.grad_accumulation=N keeps the batch (`--plan`
says what fits).

Recipe (2,048 pictures a step, AdamW 1e-4 with weight decay 0.01, 10,000 steps of warm-up, 10 % of captions dropped,
an average of 0.9999; steps from Stability's model cards, the rest MosaicML's):

    stage     steps    pictures              predicts   TFLOP a picture  million pictures  A100-hours
    base_256  550,000  256x256               epsilon    0.54             1,126              2,276   $4,600
    base_512  850,000  512x512 or larger     epsilon    2.41             1,741             13,321  $26,600
    v_512     150,000  as base_512           v          2.41               307              2,351   $4,700
    v_768     140,000  768x768 or larger     v          6.87               287              6,257  $12,500
    v21_a      55,000  punsafe < 0.1         v          6.87               113              2,458   $4,900
    v21_b     155,000  punsafe < 0.98        v          6.87               317              6,927  $13,900

Cost: at MosaicML's rates with latents and text cached, 137.5 and 36.3 pictures/s on an A100 at 256 and 512, and $2 an
hour. None is published at 768: the same 87 TFLOP/s (36.3 x 2.41) give 12.7. A TPU v5p did 86.6 pictures/s at 512
(MaxDiffusion in MLPerf 4.1). MosaicML's two base stages came to $47,700 with everything, of which 3,784 A100-hours
made latents. The state takes 15.6 GB over all chips. Kept, a picture of 768 takes 295 kB of moments and 158 kB of
text states.

Expected: FID and CLIP score are published as a plot alone; MLPerf's run of base_512 counts as converged at FID 90 and
CLIP score 0.15 on 30,000 of COCO's captions. Tried here: the plan above fits (8 pictures a chip at a time, 15.31 of
96.91 GB; more in benchmarks/RESULTS.md), and :runlocal.
"""

import dataclasses

from ml_collections import ConfigDict

from sd_jax.config import parse_arg, pretraining_defaults
from sd_jax.models.families import SD2_BASE, SD2_V
from sd_jax.training.trial import make_small

STAGES = {  # resolution, steps, model
    "base_256": (256, 550_000, SD2_BASE),
    "base_512": (512, 850_000, SD2_BASE),
    "v_512": (512, 150_000, dataclasses.replace(SD2_BASE, noise_schedule=SD2_V.noise_schedule)),
    "v_768": (768, 140_000, SD2_V),
    "v21_a": (768, 55_000, SD2_V),
    "v21_b": (768, 155_000, SD2_V),
}


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, stage="v_768", runlocal=False)
    if args.stage not in STAGES:
        raise ValueError(f"stage={args.stage!r}: use {', '.join(STAGES)}")
    resolution, steps, model = STAGES[args.stage]
    place = list(STAGES).index(args.stage)
    config = pretraining_defaults()
    config.model = ConfigDict(model.to_dict())
    if place == 0:
        config.init, config.init_parts = "768-v-ema.ckpt", ("vae", "text_encoder")
    else:
        config.init = f"runs/sd21/{list(STAGES)[place - 1]}"
    config.total_steps = steps
    config.mesh.fsdp = 4
    config.checkpoint_steps, config.eval_steps, config.sample_steps = 1000, 2000, 10_000

    config.data.resolution = resolution

    config.diffusion.caption_dropout = 0.1
    if args.runlocal:
        make_small(config)
    return config
