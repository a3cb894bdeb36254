"""Stable Diffusion 1.x from nothing at 256x256: the first stage of CompVis' recipe. Then sd15_pretrain_512.py.

    python train.py --config=configs/sd15_pretrain_256.py --plan=v5e:16x16
    python train.py --config=configs/sd15_pretrain_256.py --workdir=runs/sd15/256 \
        --config.init=sd-v1-4.ckpt --config.data.path=FOLDER_OR_DATASET
    python train.py --config=configs/sd15_pretrain_256.py:runlocal --workdir=/tmp/trial

The same command goes on every host; configs/launch has templates. Of `init` the autoencoder and CLIP-L are taken,
which stay as they are, and never its U-Net. Fewer chips: --config.grad_accumulation=N keeps the batch (`--plan` says
what fits).

Recipe (model card of v1-1): 237,000 steps of 2,048 pictures on laion2B-en, AdamW, 10,000 steps of warm-up to 1e-4,
then constant; an average of 0.9999; no captions dropped. Weight decay 0.01 is torch's default, the clipping ours.

Cost: 237,000 x 2,048 = 485 million pictures of 0.54 TFLOP (U-Net forward and backward). At MosaicML's 137.5
pictures/s on an A100 (a U-Net of the same arithmetic, latents and text cached) 981 A100-hours, 41 days of one, $2,000
at $2 an hour. Caching: computing latents in the step costs 1.4 times as much; kept, a picture takes 33 kB of moments
and 118 kB of text states.

Expected: no figure is published for this stage, whose samples are blurred; v1-1 is judged after 512x512.
Tried here: :runlocal.
"""

from ml_collections import ConfigDict

from sd_jax.config import parse_arg, pretraining_defaults
from sd_jax.models.families import SD15
from sd_jax.training.trial import make_small


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, runlocal=False)
    config = pretraining_defaults()
    config.model = ConfigDict(SD15.to_dict())
    config.init, config.init_parts = "sd-v1-4.ckpt", ("vae", "text_encoder")
    config.total_steps = 237_000
    config.mesh.fsdp = 4
    config.checkpoint_steps, config.eval_steps, config.sample_steps = 2000, 2000, 10_000

    config.data.resolution = 256

    config.diffusion.caption_dropout = 0.0
    if args.runlocal:
        make_small(config)
    return config
