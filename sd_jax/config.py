"""Experiment configs: one Python file each, `get_config(arg)` -> ml_collections.ConfigDict.

`--config=configs/file.py:name,key=value` hands `arg` to `get_config`; `--config.key=value` changes one key afterwards,
and a key that does not exist is an error.
"""

import json
import pathlib

from ml_collections import ConfigDict

ADVERSARIAL = ("autoencoder", "esrgan")  # methods that a discriminator may play with
INPAINT = "inpaint"  # in place of a column of hints: they are made of the pictures
CONTROLS = ("controlnet", "t2i_adapter")  # methods that learn to steer a model by pictures
# Methods that leave the model as it is
ADAPTING = ("lora", "lcm_lora", "textual_inversion", "hypernetwork", "ip_adapter", *CONTROLS)


def parse_arg(arg: str | None, **defaults) -> ConfigDict:
    """The text after the colon of `--config=file.py:arg` as a ConfigDict with the keys of `defaults`.

    `arg` is `key=value` parts joined by commas; a bare `key` means True, or, where no key has this name, the value of
    the first key (so that `demo.py:autoencoder` reads as `stage=autoencoder`). Values take the type of their default.
    Raises ValueError for an unknown key or a value of another type.
    """
    values = dict(defaults)
    first = next(iter(defaults), None)
    for part in filter(None, (arg or "").split(",")):
        key, equals, text = part.partition("=")
        if not equals and key not in defaults:
            key, equals, text = first, "=", key
        if key not in defaults:
            raise ValueError(f"unknown config argument {part!r}: this config knows {', '.join(defaults) or 'none'}")
        default = defaults[key]
        try:
            if isinstance(default, bool):
                values[key] = {"": True, "true": True, "1": True, "false": False, "0": False}[text.lower()]
            else:
                values[key] = type(default)(text)
        except (KeyError, ValueError):
            raise ValueError(f"config argument {part!r}: {key} takes a {type(default).__name__}") from None
    return ConfigDict(values)


def training_defaults(method: str) -> ConfigDict:
    """Every key that the training loop reads, with its default; a config file changes what it cares about.

    The result is locked: a key that is not here, misspelt perhaps, raises AttributeError.

    `config.diffusion` exists for methods that train on noised latents, `config.autoencoder` for the autoencoder,
    `config.super_resolution` for the method that makes pictures larger, `config.esrgan` for the one that does it in one
    step, `config.inpainting` for those that draw masks.
    """
    config = ConfigDict()
    config.method = method  # a row of sd_jax/training/methods.py
    config.seed = 0
    config.total_steps = 1000  # optimiser steps
    config.batch_size = 32  # images a step, over all devices and accumulated micro-batches
    config.grad_accumulation = 1  # micro-batches that one optimiser step is summed over

    # How often, in optimiser steps; 0 = never (a checkpoint is written at the end in any case)
    config.log_steps = 50  # a line in log.txt; metrics.jsonl has every step
    config.checkpoint_steps = 500
    config.keep_checkpoints = 2  # the newest; the one of lowest held-out loss is kept beside them
    config.eval_steps = 250
    config.eval_batches = 4  # of held-out images, always the same
    config.sample_steps = 500

    # What goes wrong
    config.max_skipped = 20  # steps in a row without a finite loss and gradient, after which the run goes back
    config.rollbacks = 2  # to the last checkpoint, at most so often; after that it ends
    config.watchdog_seconds = 600  # a stage that takes longer is named in the log; 0 = none is

    # What is trained: `init` is any path that sd_jax.load takes; parts that it lacks are made from `model`
    config.init = ""
    config.init_parts = ()  # what is taken of `init`, e.g. ("vae", "text_encoder"); empty = all that it has
    config.prediction_type = ""  # of `init`, where `model` is empty: what its U-Net predicts; empty = what it says
    config.trainable = ""  # a pattern of re.search: of the parts that the method moves, only parameters whose path it
    # finds move, e.g. "vae/(decoder|post_quant_conv)/"; empty = all
    config.model = ConfigDict()  # ModelSpec.to_dict(); empty = that of `init`
    config.tokenizer = ""  # empty = that of `init`, else one is trained from the captions
    config.dtype = "float32"  # of the computation; parameters stay float32
    config.remat = "none"  # what the backward pass computes again: a name in models/remat.py
    config.ema_decays = (0.9999,)  # a running average of the weights for each; samples are made from the first

    config.data = ConfigDict()
    config.data.path = "shapes"  # "shapes", a folder of pictures, or whatever datasets.load_dataset takes; where all
    # pictures lie in folders named as in "10_name class", each counts so often, and the rest may be its caption
    config.data.image_key = "image"
    config.data.held_out = 0.05  # share of the records kept for the held-out loss
    config.data.num_workers = 2  # threads that decode
    config.data.num_examples = 20_000  # of shapes world
    config.data.two_objects = 0.0  # share of shapes world's pictures with two objects
    config.data.aspects = (1.0,)  # width / height of shapes world's pictures, each as often

    # Sizes: squares of `resolution`, or buckets of several aspect ratios and about its area
    config.data.resolution = 64
    config.data.crop = "random"  # where a picture is cut to its size: "random" or "centre"
    config.data.random_flip = False
    config.data.upscale = True  # False: a picture is never made larger; it goes to a smaller bucket
    config.data.buckets = ConfigDict()
    config.data.buckets.step = 0  # sides are multiples of this, at best a 16th of `resolution`; 0 = no buckets
    config.data.buckets.min_side = 0  # 0 = half of `resolution`
    config.data.buckets.max_side = 0  # 0 = twice `resolution`
    config.data.buckets.max_area = 0  # 0 = `resolution` squared

    # Captions: columns joined by commas, of which each example reads one
    config.data.caption_key = "text"
    config.data.caption_from_names = False  # of a folder's pictures that have none: "blue_star-012.png" = "blue star"
    config.data.prompt = ""  # the caption of pictures that have none
    config.data.caption_weights = ()  # how often each column is read, relative to the others; empty = alike
    config.data.tag_separator = ""  # of captions that are tags, e.g. ","; empty = they are prose
    config.data.keep_tags = 0  # so many first tags are neither moved nor left out
    config.data.shuffle_tags = False
    config.data.tag_dropout = 0.0  # share of the tags left out

    # What is computed once, before training, and kept
    config.data.cache_latents = False  # the autoencoder's moments of every picture
    config.data.cache_text = False  # the text encoders' states of every caption
    config.data.cache_captions = 1  # of each record, where `cache_text`: so many draws of its caption
    config.data.cache_dir = ""  # empty = the workdir's own

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or "adamw8bit", "muon", "lion", "adafactor", "prodigy": training/optimizers.py
    config.optimizer.learning_rate = 1e-4
    config.optimizer.rates = ()  # of groups: pairs of a pattern of re.search and what the rate of the parameters is
    # multiplied by whose path it finds, e.g. (("text_encoder/", 0.1), ("attn2", 2.0)); the first that does counts
    config.optimizer.schedule = "constant"  # after the warm-up: "constant", "cosine" or "linear" to zero
    config.optimizer.warmup_steps = 100
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.01
    config.optimizer.l2_sp = 0.0  # a pull back to the weights that the run began with; see training/anchor.py
    config.optimizer.clip_norm = 1.0

    if method in ("clip", "features", "aesthetic"):
        config.sample_steps = 0  # they make no pictures

    # Devices: sizes of the mesh's axes, -1 = what the others leave; see sd_jax/sharding.py
    config.mesh = ConfigDict({"slice": 1, "data": -1, "fsdp": 1, "tensor": 1})
    config.parallelism = "jit"  # or "pmap": plain data parallelism

    if method in ADVERSARIAL:
        config.init_perceptual = ""  # a run of method "features", or two files: torchvision's vgg16 and lpips'
        own = ConfigDict({"l1_weight": 1.0, "l2_weight": 1.0 if method == "autoencoder" else 0.0})
        own.perceptual_weight = 0.0  # LPIPS; 1 in Stable Diffusion
        own.discriminator_weight = 0.0  # PatchGAN; 0.5 in Stable Diffusion
        own.adaptive_weight = True  # the discriminator's gradient is made as large as the others'
        own.discriminator_start = 0  # step from which on it plays; 50,000 in Stable Diffusion
        own.discriminator_learning_rate = 1e-4
        own.r1_weight = 0.0  # a penalty of the discriminator's gradient at real pictures
        config[method] = own
    if method == "autoencoder":
        config.autoencoder.kl_weight = 1e-6
    elif method == "esrgan":
        config.init_upscaler = ""  # any path that load_upscaler takes; empty = from nothing
    elif method == "clip":
        config.init_clip = ""  # any path that load_clip takes, or a run of this method; empty = from nothing
        config.clip = ConfigDict({"noised": False})  # noised pictures, for guidance; needs `init` with an autoencoder
    elif method == "aesthetic":
        config.init_clip = ""  # any path that load_clip takes, or a run of method "clip"
        config.data.rating_key = "rating"  # the column of the ratings, which are numbers
        config.aesthetic = ConfigDict({"loss": "ratings"})  # or "pairs": which of two is rated higher
    elif method in ("full", "dreambooth", "inpainting", "super_resolution", *ADAPTING):
        config.diffusion = ConfigDict()
        config.diffusion.train_text_encoder = method not in ADAPTING
        config.diffusion.text_chunks = 1  # of 75 tokens: 3 = captions of up to 225
        config.diffusion.clip_skip = 0  # the text encoders' layer, 1 = last; 0 = the family's own
        config.diffusion.caption_dropout = 0.1  # share of the images whose conditioning is that of the empty prompt
        config.diffusion.min_snr_gamma = 0.0  # 0 = no weighting
        config.diffusion.timesteps = "uniform"  # how they are drawn: a name in diffusion/timesteps.py
        config.diffusion.timestep_mean = 0.0  # of "logit_normal"
        config.diffusion.timestep_scale = 1.0  # of "logit_normal" and "mode"
        config.diffusion.noise_offset = 0.0  # share of noise that is one number for a whole channel
        config.diffusion.pyramid_discount = 0.0  # of noise at each coarser size; 0 = white noise
        config.diffusion.input_perturbation = 0.0  # noise beyond what the network is to predict
        config.diffusion.masked_loss = False  # counts what is white in a picture's mask: a file of its name in a folder
        # masks/ beside it, else its alpha channel
        config.diffusion.eval_bins = 4  # of timesteps, each with a held-out loss of its own
        config.samples = ConfigDict()  # the grid that is drawn while training
        if method != "super_resolution":
            config.samples.prompts = ("a red circle", "a blue square")
        config.samples.sampler = "dpmpp_2m"
        config.samples.schedule = "normal"
        config.samples.steps = 20
        config.samples.guidance_scale = 5.0
    if "diffusion" in config and method not in ("inpainting", "super_resolution"):
        config.prior = ConfigDict()  # other pictures, mixed in so that what the model knew is kept
        config.prior.path = ""  # where they are, as data.path has it
        config.prior.prompt = ""  # the caption of those that have none; without a path the model makes them of this
        # before the run, or of the lines of a file, *.txt; with neither nothing is mixed in
        config.prior.count = 200  # that are made
        config.prior.share = 0.5  # of every batch
        config.prior.weight = 1.0  # of their loss, relative to the others'
    if method == "full":
        config.init_clip = ""  # any path that load_clip takes, or a folder image_encoder: the U-Net is told the picture
        # through it in place of the caption; empty = that of `init`, or captions
    if method in ("lora", "lcm_lora"):
        config.adapter = ConfigDict({"algorithm": "lora"})  # or "loha", "lokr": adapters/deltas.py has them all
        config.adapter.rank = 8
        config.adapter.alpha = 0.0  # what is added counts alpha / rank; 0 = the rank
        config.adapter.rslora = False  # alpha / sqrt(rank) instead
        config.adapter.dora = False  # length and direction of the weights apart; every step makes them anew
        config.adapter.factor = -1  # of LoKr's first matrix, at most; -1 = near a square
        # Patterns of re.search in "part/path", or (pattern, rank) or (pattern, rank, alpha); the first match counts.
        # These are kohya's: all linears and 1x1 convolutions of the U-Net's transformers
        config.adapter.targets = (
            r"unet/.*attentions_\d+/(proj_in|proj_out|.*/(to_q|to_k|to_v|to_out_0|net_0/proj|net_2))$",
        )
        config.adapter.dtype = "float16"  # of adapter.safetensors
        config.adapter.format = "kohya"  # of adapter.safetensors; or "diffusers", which is PEFT's
    if method == "lcm_lora":
        config.consistency = ConfigDict({"solver_steps": 50})  # of the teacher's walk, of which it learns to skip all
        config.consistency.guidance_min = 5.0  # of the teacher, drawn evenly
        config.consistency.guidance_max = 15.0
    elif method == "textual_inversion":
        config.textual_inversion = ConfigDict()
        config.textual_inversion.tokens = ()  # word, vectors and words that it starts as: ("<sks>", 2, "star")
        config.textual_inversion.keep_norm = True  # vectors stay as long as they were at first
    elif method == "hypernetwork":
        config.hypernetwork = ConfigDict({"layer_structure": (1, 2, 1)})  # widths, in those of what is changed
        config.hypernetwork.widths = ()  # of what is changed; empty = all that attentions read
        config.hypernetwork.activation = "linear"  # one of adapters/hypernetwork.py
        config.hypernetwork.activate_output = False
        config.hypernetwork.layer_norm = False
        config.hypernetwork.weight_init = "normal"
        config.hypernetwork.dropout = ()  # shares that training drops, at each place of the structure, e.g. (0, 0.3, 0)
    elif method == "ip_adapter":
        config.init_clip = ""  # through which it sees: any path that load_clip takes, or a folder image_encoder
        config.ip_adapter = ConfigDict({"kind": "base"})  # or "plus": adapters/ip_adapter.py
        config.ip_adapter.image_dropout = 0.1  # share of the images that it is not shown; see training/ip_adapter.py
        config.diffusion.caption_dropout = 0.1
    if method in CONTROLS:
        config.control = ConfigDict({"format": "diffusers"})  # of what the run leaves; or "single_file"
        config.control.hint_key = "conditioning_image"  # the column of hints; in a folder they lie in hints/.
        # "inpaint" = there are none: a ControlNet sees the pictures themselves, hidden by masks
    if method == "t2i_adapter":
        config.control.light = False  # a small one: bottlenecks of a quarter of the width
        config.control.num_res_blocks = 2  # at each size; 4 in the published light ones
    if method in ADAPTING:
        config.ema_decays = (0.0,)  # the last weights
    if method in ("inpainting", "controlnet"):
        config.inpainting = ConfigDict({"rectangles": 1.0})  # masks, by kind: how often, relative to the others
        config.inpainting.strokes = 2.0
        config.inpainting.whole = 1.0  # all is hidden
        config.inpainting.side = 0.6  # of rectangles, in the picture's, at most
        config.inpainting.thickness = 0.25  # of strokes, in the picture's shorter side, at most
    if method == "super_resolution":
        config.super_resolution = ConfigDict({"factor": 4})  # the small picture is so much smaller,
        config.super_resolution.max_noise_level = 350  # and noised at a level below this, of 1000
    return config.lock()


def reads_hints(config: ConfigDict) -> bool:
    """Whether the data has the pictures that a control is trained to follow."""
    return "control" in config and config.control.hint_key != INPAINT


def pretraining_defaults() -> ConfigDict:
    """What the published recipes of Stable Diffusion share, on top of `training_defaults("full")`: 2,048 pictures a
    step, AdamW at 1e-4 after 10,000 steps of warm-up, a frozen text encoder; here latents and text are cached."""
    config = training_defaults("full")
    config.batch_size = 2048
    config.dtype = "bfloat16"
    config.remat = "blocks"
    config.data.path = "pictures"
    config.data.crop = "centre"
    config.data.held_out = 1e-4
    config.data.num_workers = 32
    config.data.cache_latents = config.data.cache_text = True
    config.diffusion.train_text_encoder = False
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 10_000
    config.samples.prompts = ("a photograph of a cat", "a photograph of a house by the sea")
    config.samples.guidance_scale = 7.5
    return config


def to_json(config: ConfigDict) -> str:
    """The resolved config, keys in their order, tuples as lists."""
    return json.dumps(config.to_dict(), indent=2, default=list)


def dump(config: ConfigDict, path: pathlib.Path) -> None:
    """Writes `to_json` beside `path`, then renames it, so that a crash leaves the old file or the new one."""
    aside = path.with_suffix(".tmp")
    aside.write_text(to_json(config) + "\n")
    aside.rename(path)
