"""A hypernetwork, A1111's, for a Stable Diffusion checkpoint of yours, which stays as it is.

    python train.py --config=configs/hypernetwork.py --config.init=v1-5-pruned.safetensors \
        --config.data.path=my_style --workdir=runs/my_style
    python sample.py --checkpoint=v1-5-pruned.safetensors --adapter=runs/my_style/hypernetwork.pt:0.8 --prompt="..."

The run leaves `hypernetwork.pt`, which A1111 reads (87 MB of SD 1.5 at the usual structure).
`--config.hypernetwork.dropout="(0, 0.3, 0)"` drops in training.

    python train.py --config=configs/hypernetwork.py:shapes --config.data.path=FOLDER --workdir=runs/style

is the same for the bundled model, on a CPU in minutes: benchmarks/fine_tuning.py makes folders and says what came of
it.
"""

from ml_collections import ConfigDict

from configs.finetune import ARGS, for_checkpoint, make_small
from sd_jax.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, **ARGS)
    config = for_checkpoint("hypernetwork", args)
    config.total_steps = 1500 if args.shapes else 5000
    config.optimizer.learning_rate = 5e-3 if args.shapes else 1e-5
    config.optimizer.schedule = "cosine" if args.shapes else config.optimizer.schedule
    config.hypernetwork.activation = "relu"
    config.hypernetwork.layer_structure = (1, 4, 1) if args.shapes else (1, 2, 1)
    if args.runlocal:
        make_small(config)
    return config
