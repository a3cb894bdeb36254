"""DreamBooth: a Stable Diffusion checkpoint of yours learns one thing from a few pictures of it (arXiv 2208.12242).

    python train.py --config=configs/dreambooth.py --config.init=v1-5-pruned.safetensors --config.data.path=my_dog \
        --config.data.prompt="a photo of sks dog" --config.prior.prompt="a photo of a dog" --workdir=runs/my_dog
    python sample.py --checkpoint=runs/my_dog --prompt="sks dog on the moon"

`my_dog` holds three to ten pictures; a caption beside one wins over `data.prompt`. Before it trains, the run makes 200
pictures of `prior.prompt` with the model as it is, into workdir/prior, which keep the class (`dog`) what it was; the
same command finds them again. `--config.prior.prompt=""` does without, and `--config.prior.path=FOLDER` takes pictures
of your own. The text encoder learns too (`--config.diffusion.train_text_encoder=False` where memory is short). With
configs/lora.py and the same keys it is DreamBooth by LoRA.

    python train.py --config=configs/dreambooth.py:shapes --config.data.path=FOLDER --workdir=runs/sks

is the same for the bundled model, on a CPU in minutes: benchmarks/fine_tuning.py makes the folder and says what came of
it.
"""

from ml_collections import ConfigDict

from configs.finetune import ARGS, for_checkpoint, make_small
from sd_jax.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, **ARGS)
    config = for_checkpoint("dreambooth", args)
    config.total_steps = 1500 if args.shapes else 800
    config.optimizer.learning_rate = 5e-4 if args.shapes else 2e-6
    config.prior.prompt = "a star" if args.shapes else "a photo of a dog"
    if args.shapes:  # a model as small forgets more: three in four of what it sees are the class
        config.prior.count, config.prior.share, config.optimizer.schedule = 800, 0.75, "cosine"
    config.data.prompt = "" if args.shapes else "a photo of sks dog"
    config.samples.prompts = ("a blue sks star", "a blue star") if args.shapes else ("sks dog on the moon", "a dog")
    if args.runlocal:
        config.prior.count, config.samples.steps = 2, 2
        make_small(config)
    return config
