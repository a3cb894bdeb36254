"""The autoencoder with what Stable Diffusion's learnt by: a perceptual distance, and a discriminator of patches.

    python train.py --config=configs/beside.py:features --workdir=runs/features
    python train.py --config=configs/autoencoder.py --config.init_perceptual=runs/features --workdir=runs/autoencoder
    python train.py --config=configs/autoencoder.py:decoder_only=True --config.init=runs/autoencoder \
        --config.init_perceptual=runs/features --workdir=runs/decoder

on shapes world, minutes on two CPU cores; what it gains is in benchmarks/RESULTS.md. `adversarial=False` is the plain
one to compare with. `decoder_only` moves the decoder alone, as the ft-MSE autoencoders of Stable Diffusion were made:
latents stay what they were to the bit. With `published` the sizes and weights are those of kl-f8 (Rombach et al. 2022,
configs/autoencoder/autoencoder_kl_32x32x4.yaml), for pictures of one's own:

    python train.py --config=configs/autoencoder.py:published --config.data.path=FOLDER \
        --config.init_perceptual=vgg16-397923af.pth,vgg.pth --workdir=runs/kl_f8
"""

from ml_collections import ConfigDict

from configs import demo
from sd_jax.config import parse_arg, training_defaults
from sd_jax.models.families import SD15
from sd_jax.models.presets import TINY_SHAPES, DiscriminatorConfig


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, size="shapes", adversarial=True, decoder_only=False, runlocal=False)
    if args.size not in ("shapes", "published"):
        raise ValueError(f"size={args.size!r}: use shapes or published")
    config = demo.get_config("autoencoder") if args.size == "shapes" else published()
    if args.size == "shapes":
        config.total_steps = 1000
        config.autoencoder.perceptual_weight, config.autoencoder.discriminator_weight = 1.0, 0.05
        config.autoencoder.discriminator_start = 300
        config.model.discriminator = vars(DiscriminatorConfig(width=32, layers=2))
    if not args.adversarial:
        config.autoencoder.perceptual_weight = config.autoencoder.discriminator_weight = 0.0
    if args.decoder_only:
        config.trainable = "^vae/(decoder|post_quant_conv)/|^discriminator/"
    if args.runlocal:
        config.model.vae = ConfigDict(TINY_SHAPES.to_dict()["vae"])
        config.model.discriminator = vars(DiscriminatorConfig(width=8, layers=2))
        config.total_steps, config.optimizer.warmup_steps, config.batch_size, config.eval_batches = 2, 1, 4, 1
        config.data.path, config.data.num_examples, config.data.resolution = "shapes", 60, 32
        config.autoencoder.perceptual_weight = 0.0
    return config


def published() -> ConfigDict:
    """kl-f8: 256x256, batch 12 on each of 8 GPUs, Adam at 4.5e-6 an image (b1 0.5, b2 0.9), no average."""
    config = training_defaults("autoencoder")
    config.model = ConfigDict({**SD15.to_dict(), "discriminator": vars(DiscriminatorConfig())})
    config.data.path, config.data.resolution, config.data.random_flip = "pictures", 256, True
    config.batch_size = 96
    config.total_steps = 250_000
    config.autoencoder.l2_weight = 0.0
    # Theirs are sums over a picture's numbers; ours means, so what stands beside them is divided by 3 x 256 x 256
    config.autoencoder.kl_weight = 1e-6 / (3 * 256 * 256)
    config.autoencoder.perceptual_weight = 1.0
    config.autoencoder.discriminator_weight = 0.5
    config.autoencoder.discriminator_start = 50_000
    config.autoencoder.discriminator_learning_rate = 96 * 4.5e-6
    config.optimizer.learning_rate, config.optimizer.b1, config.optimizer.b2 = 96 * 4.5e-6, 0.5, 0.9
    config.optimizer.weight_decay = config.optimizer.clip_norm = 0.0
    return config
