"""A LoRA, or another of its family, of a Stable Diffusion checkpoint of yours on a folder of captioned pictures.

    python train.py --config=configs/lora.py --config.init=v1-5-pruned.safetensors --config.data.path=my_pictures \
        --workdir=runs/my_lora
    python sample.py --checkpoint=v1-5-pruned.safetensors --adapter=runs/my_lora:0.8 --prompt="..."

`my_pictures` is any path that configs/finetune.py takes, or folders as kohya's trainer has them (`10_sks dog`: each
picture counts ten times, and is captioned "sks dog" where no file says more). What is trained is the U-Net's
transformers, at rank 8; LoCon, the text encoder and ranks of their own for some layers:

    --config.adapter.targets="(r'unet/.*attentions', (r'unet/.*resnets.*/conv', 4), r'text_encoder/.*(self_attn|mlp)')"

(and --config.data.cache_text=False where the text encoder learns too). `--config.adapter.algorithm=loha` or `lokr`,
`--config.adapter.dora`, `--config.adapter.rslora`. The run leaves `adapter.safetensors` in kohya's layout, or with
`--config.adapter.format=diffusers` in PEFT's. SDXL, on pictures of 1024:

    python train.py --config=configs/lora.py:sdxl --config.init=sd_xl_base_1.0.safetensors \
        --config.data.path=my_pictures --workdir=runs/my_lora

The memory of a run is told before it is launched, and with the name of a family before there is a checkpoint:

    python train.py --config=configs/lora.py --config.init=sd15 --plan=cpu:1
    python train.py --config=configs/lora.py:sdxl --config.init=sdxl --plan=cpu:1

It says 8.4 GB for SD 1.5 at 512x512 and one picture (--config.batch_size=1 --config.grad_accumulation=1): 1.7 GB of
weights in bfloat16, 6.6 GB while a step runs, as a CPU keeps what `remat` would compute again. Where it is heeded,
SD 1.5 takes 3.1 GB, and SDXL at 1024x1024 7.4 GB, 5.1 of them weights (--plan=v5e:2x2, a picture a chip). The batch of
4 is taken one picture at a time; with memory to spare, --config.grad_accumulation=1 takes it at once.

    python train.py --config=configs/lora.py:shapes --config.data.path=FOLDER --workdir=runs/style

is the same for the bundled model, on a CPU in minutes: benchmarks/fine_tuning.py makes folders and says what came of
it.
"""

from ml_collections import ConfigDict

from configs.finetune import ARGS, for_checkpoint, make_small
from sd_jax.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, **ARGS, sdxl=False)
    config = for_checkpoint("lora", args)
    if args.sdxl:
        config.init = "sd_xl_base_1.0.safetensors"
        config.data.resolution = 1024
    if not (args.shapes or args.runlocal):
        config.grad_accumulation = 4  # one picture at a time
    config.total_steps = 1500 if args.shapes else 2000
    config.optimizer.learning_rate = 2e-3 if args.shapes else 1e-4
    config.adapter.rank = 4 if args.shapes else 8
    if args.runlocal:
        make_small(config)
    return config
