"""Stable Diffusion 1.x at 512x512: CompVis' later stages, each from the one before.

    python train.py --config=configs/sd15_pretrain_512.py --plan=v5e:16x16
    python train.py --config=configs/sd15_pretrain_512.py:v1_1 --workdir=runs/sd15/v1_1 --config.init=runs/sd15/256
    python train.py --config=configs/sd15_pretrain_512.py:v1_2 --workdir=runs/sd15/v1_2 --config.init=runs/sd15/v1_1
    python train.py --config=configs/sd15_pretrain_512.py:v1_5 --workdir=runs/sd15/v1_5 --config.init=runs/sd15/v1_2
    python train.py --config=configs/sd15_pretrain_512.py:runlocal --workdir=/tmp/trial

`runs/sd15/256` is the workdir of sd15_pretrain_256.py; each with its own --config.data.path. Fewer chips:
--config.grad_accumulation=N keeps the batch (`--plan` says what fits).

Recipe (model cards; 2,048 pictures a step, AdamW, 10,000 steps of warm-up to 1e-4, an average of 0.9999):

    stage  steps    from  pictures                                                captions dropped
    v1_1   194,000  256   laion-high-resolution (at least 1024x1024)              none said
    v1_2   515,000  v1_1  laion-aesthetics v2 5+ (score > 5, pwatermark < 0.5)    none said
    v1_3   195,000  v1_2  as v1_2                                                 10 %
    v1_4   225,000  v1_2  as v1_2                                                 10 %
    v1_5   595,000  v1_2  as v1_2                                                 10 %

Cost: 2.41 TFLOP a picture (U-Net forward and backward). At the published rates of a U-Net of the same arithmetic with
latents and text cached, 36.3 pictures/s on an A100 (MosaicML; $2 an hour) and 136 on an H100 (NeMo in MLPerf 4.1):

    v1_1    397 million pictures  3,040 A100-hours   $6,100     811 H100-hours
    v1_2  1,055 million           8,070             $16,100   2,154
    v1_5  1,219 million           9,325             $18,600   2,489

Caching: in the step, encoding costs 1.4 times as much; kept, a picture takes 131 kB of moments and 118 kB of text
states.

Expected: v1-5's pictures; FID and CLIP score of the stages are published as a plot alone (v1-variants-scores in
CompVis' repository). A first check: MLPerf's SD 2 run counts as converged at FID 90 and CLIP score 0.15 on 30,000 of
COCO's captions. Tried here: the plan above fits (8 pictures a chip, 9.36 of 16.32 GB; more in
benchmarks/RESULTS.md), and :runlocal.
"""

from ml_collections import ConfigDict

from sd_jax.config import parse_arg, pretraining_defaults
from sd_jax.models.families import SD15
from sd_jax.training.trial import make_small

STAGES = {  # steps, what it starts from, share of the captions that are dropped
    "v1_1": (194_000, "256", 0.0),
    "v1_2": (515_000, "v1_1", 0.0),
    "v1_3": (195_000, "v1_2", 0.1),
    "v1_4": (225_000, "v1_2", 0.1),
    "v1_5": (595_000, "v1_2", 0.1),
}


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, stage="v1_1", runlocal=False)
    if args.stage not in STAGES:
        raise ValueError(f"stage={args.stage!r}: use {', '.join(STAGES)}")
    steps, before, dropout = STAGES[args.stage]
    config = pretraining_defaults()
    config.model = ConfigDict(SD15.to_dict())
    config.init = f"runs/sd15/{before}"
    config.total_steps = steps
    config.mesh.fsdp = 4
    config.checkpoint_steps, config.eval_steps, config.sample_steps = 1000, 2000, 10_000

    config.data.resolution = 512

    config.diffusion.caption_dropout = dropout
    if args.runlocal:
        make_small(config)
    return config
