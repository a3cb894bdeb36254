"""Textual inversion: new words for a Stable Diffusion checkpoint of yours, which stays as it is (arXiv 2208.01618).

    python train.py --config=configs/textual_inversion.py --config.init=v1-5-pruned.safetensors \
        --config.data.path=my_cat --config.data.prompt="a photo of <my-cat>" \
        --config.textual_inversion.tokens="(('<my-cat>', 4, 'cat'),)" --workdir=runs/my_cat
    python sample.py --checkpoint=v1-5-pruned.safetensors --embeddings=runs/my_cat --prompt="<my-cat> in a hat"

Each word has so many vectors and starts as the words behind it; captions say it (a caption beside a picture wins over
`data.prompt`). Trained on what is to be avoided, it is a word for negative prompts. The run leaves `my-cat.safetensors`
in its workdir, 3 kB a vector; A1111 reads it under that name.

    python train.py --config=configs/textual_inversion.py:shapes --config.data.path=FOLDER --workdir=runs/word

is the same for the bundled model, on a CPU in minutes: benchmarks/fine_tuning.py makes folders and says what came of
it.
"""

from ml_collections import ConfigDict

from configs.finetune import ARGS, for_checkpoint, make_small
from sd_jax.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, **ARGS)
    config = for_checkpoint("textual_inversion", args)
    config.data.cache_text = False
    config.total_steps = 1500 if args.shapes else 2000
    config.optimizer.learning_rate = 1e-2 if args.shapes else 5e-3
    config.optimizer.weight_decay = 0.0
    config.optimizer.schedule = "cosine" if args.shapes else config.optimizer.schedule
    token, vectors, like = ("zorp", 8, "a shape in the centre") if args.shapes else ("<my-cat>", 4, "cat")
    config.textual_inversion.tokens = ((token, vectors, like),)
    config.data.prompt = "" if args.shapes else f"a photo of {token}"
    config.samples.prompts = (token, f"a {token}")
    if args.runlocal:
        make_small(config)
    return config
