"""An inpainting model, whose U-Net sees mask and masked picture, of a Stable Diffusion checkpoint of yours.

    python train.py --config=configs/inpainting.py --config.init=v1-5-pruned.safetensors \
        --config.data.path=my_pictures --workdir=runs/inpainting
    python sample.py --checkpoint=runs/inpainting --init_image=cat.png --mask=mask.png --prompt="..."

`my_pictures` is any path that configs/finetune.py takes. The first convolution gets weights of zero for the five new
channels, so that the model begins as what it is of; one that inpaints already goes on. Masks are random, of the mix of
`config.inpainting`.

A ControlNet that redraws beside a model that stays as it is (control_v11p_sd15_inpaint) is trained by

    python train.py --config=configs/controlnet.py --config.control.hint_key=inpaint ...

and given `mask=` with its picture (`control.hint(image, mask=mask)`).

    python train.py --config=configs/inpainting.py:shapes --workdir=runs/inpainting

is the same for the bundled model and shapes world: 800 steps of 16 at 70 to 90 pictures a second, three minutes, on two
cores that have little else to do. It learns to go on with what it is shown; benchmarks/RESULTS.md says how far.
"""

from ml_collections import ConfigDict

from configs.finetune import ARGS, for_checkpoint, make_small
from sd_jax.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, **ARGS)
    config = for_checkpoint("inpainting", args)
    config.data.cache_latents = False
    config.diffusion.caption_dropout = 0.1
    config.total_steps = 800 if args.shapes else 20_000
    if args.shapes:
        config.data.path, config.data.two_objects = "shapes", 0.5
        config.ema_decays = (0.99,)
    if args.runlocal:
        make_small(config)
    return config
