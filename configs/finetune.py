"""Fine-tunes a Stable Diffusion checkpoint of yours (1.x, 2.x, SDXL or its refiner) on a folder of captioned pictures.

    python train.py --config=configs/finetune.py --config.init=v1-5-pruned.safetensors \
        --config.data.path=my_pictures --workdir=runs/my_model
    python sample.py --checkpoint=runs/my_model --prompt="..."

`my_pictures` holds pictures with a caption beside each (`cat.jpg`, `cat.txt`), or metadata.jsonl; or it is any path
that datasets.load_dataset takes.

What the checkpoint is, is detected; nothing here needs to change but the size of the pictures:
--config.data.resolution=768 for SD 2.x that predicts v, 1024 for SDXL. What it predicts is told in the log: see that it
is right. SDXL is told of each picture's own size and of what was cut off (`Conditioning.time_ids`), and its dropped
captions are zeros; the refiner is told an aesthetic score of 6. Inpainting models are trained by
configs/inpainting.py, those of depth and upscaling not.

At full size the state takes 14.6 GB for SD 1.5, 15.6 GB for SD 2.x, 44.7 GB for SDXL and 39.3 GB for its refiner: four
float32 copies of the U-Net (weights, average, two moments), and the frozen text encoders and autoencoder. Activations
come on top. `--dry_run` says the figure for your config. Not yet run on a GPU.
"""

from ml_collections import ConfigDict

from sd_jax.config import parse_arg, training_defaults
from sd_jax.sampling.pipeline import BUNDLED

# Of every config that fine-tunes: for the bundled model in place of a checkpoint; two steps of it, to try the config
ARGS = {"shapes": False, "runlocal": False}


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, **ARGS)
    config = for_checkpoint("full", args)
    config.data.crop, config.data.cache_latents, config.data.cache_text = "random", False, False
    if args.runlocal:
        make_small(config)
    return config


def for_checkpoint(method: str, args: ConfigDict) -> ConfigDict:
    """What the configs that fine-tune share: for a checkpoint of yours, or for the bundled model."""
    config = training_defaults(method)
    config.total_steps = 2000
    config.checkpoint_steps = config.sample_steps = 500
    config.eval_steps = 100
    config.diffusion.train_text_encoder = method == "dreambooth"
    config.diffusion.caption_dropout = 0.1 if method == "full" else 0.0
    config.data.crop, config.data.cache_latents = "centre", True
    config.data.cache_text = not config.diffusion.train_text_encoder
    config.optimizer.learning_rate = 1e-5
    if args.shapes:
        config.init = str(BUNDLED)
        config.total_steps = 700
        config.optimizer.learning_rate = 1e-3
        config.batch_size = 16
        config.data.resolution = 64
        config.data.held_out = 0.0
        config.eval_steps = config.checkpoint_steps = config.sample_steps = 0
        config.optimizer.warmup_steps = 20
        config.samples.guidance_scale = 2.5
        config.samples.prompts = ("a red circle", "a blue star")
        return config
    config.init = "v1-5-pruned-emaonly.safetensors"
    config.batch_size = 4
    config.dtype = "bfloat16"
    config.remat = "blocks"
    config.data.path = "pictures"
    config.data.resolution = 512
    config.diffusion.min_snr_gamma = 5.0
    config.samples.prompts = ("a photograph of a cat", "a photograph of a house by the sea")
    config.samples.guidance_scale = 7.5
    return config


def make_small(config: ConfigDict) -> None:
    """Two steps of the bundled model on shapes world, unless the command line names others."""
    config.init = str(BUNDLED)
    config.dtype, config.remat = "float32", "none"
    config.data.resolution, config.batch_size = 64, 2
    config.data.path, config.data.num_examples = "shapes", 20
    config.total_steps, config.optimizer.warmup_steps = 2, 1
    config.samples.steps = 2
