"""SDXL's base from nothing (Podell et al. 2023, arXiv 2307.01952, section 2.5), told of each picture's size and crop.

    python train.py --config=configs/sdxl_pretrain.py --config.grad_accumulation=8 --plan=v5p:4x4x4
    python train.py --config=configs/sdxl_pretrain.py:256 --workdir=runs/sdxl/256 --config.init=sd_xl_base.safetensors
    python train.py --config=configs/sdxl_pretrain.py:512 --workdir=runs/sdxl/512
    python train.py --config=configs/sdxl_pretrain.py:1024 --workdir=runs/sdxl/1024
    python train.py --config=configs/sdxl_pretrain.py:runlocal --workdir=/tmp/trial

Each with --config.data.path. The first stage takes the autoencoder and both text encoders of `init` and makes its own
U-Net; the others go on from the workdir before them. Fewer chips: --config.grad_accumulation=N keeps the batch.

Recipe (2,048 pictures a step, no picture left out for being small; rate, decay and average are those of SD 2, the
paper says none):

    stage  steps    pictures                                             TFLOP  million pictures  A100-hours
    256    600,000  squares of 256                                        1.23             1,229       4,829   $9,700
    512    200,000  squares of 512                                        4.71               410       6,164  $12,300
    1024   100,000  buckets of about 1024x1024, sides in steps of 64,    20.23               205      13,229  $26,500
                    noise offset 0.05

The paper does not say how long the last stage was: 100,000 is ours. Squares are cut in the middle; what was cut off
is told.

Cost: TFLOP are of the U-Net forward and backward, of one picture (Google's recipe for SDXL on TPUs prints 20.3);
hours at the 87 TFLOP/s that MosaicML's SD 2 reached on an A100, at $2. No rate of training SDXL is published. The
state takes 44.7 GB over all chips (fsdp=8: 5.6 GB on each). Kept, a picture of 1024 takes 524 kB of moments and 315
kB of text states.

Expected: people preferred the base to SD 1.5 and 2.1 by far (the paper's figure 1); its FID is worse than theirs
(appendix F). Tried here: the plan above fits (4 pictures a chip at a time, 20.22 of 96.91 GB), and :runlocal. Pictures
of all shapes make 33 programs, each of which takes minutes to compile at the first start.
"""

from ml_collections import ConfigDict

from sd_jax.config import parse_arg, pretraining_defaults
from sd_jax.models.families import SDXL
from sd_jax.training.trial import make_small

STAGES = {"256": 600_000, "512": 200_000, "1024": 100_000}  # resolution: steps


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, resolution="1024", runlocal=False)
    if args.resolution not in STAGES:
        raise ValueError(f"resolution={args.resolution!r}: use {', '.join(STAGES)}")
    config = pretraining_defaults()
    config.model = ConfigDict(SDXL.to_dict())
    if args.resolution == "256":
        config.init = "sd_xl_base.safetensors"
        config.init_parts = ("vae", "text_encoder", "text_encoder_2")
    else:
        config.init = {"512": "runs/sdxl/256", "1024": "runs/sdxl/512"}[args.resolution]
    config.total_steps = STAGES[args.resolution]
    config.mesh.fsdp = 8
    config.checkpoint_steps, config.eval_steps, config.sample_steps = 500, 1000, 5000

    config.data.resolution = int(args.resolution)
    if args.resolution == "1024":
        config.data.buckets.step = 64
        config.diffusion.noise_offset = 0.05

    config.diffusion.caption_dropout = 0.1
    if args.runlocal:
        make_small(config)
    return config
