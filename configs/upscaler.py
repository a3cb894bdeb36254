"""An upscaler of one step, ESRGAN's network or Real-ESRGAN's compact one, on shapes world from 32 to 128 pixels.

    python train.py --config=configs/beside.py:features --workdir=runs/features
    python train.py --config=configs/upscaler.py --config.init_perceptual=runs/features --workdir=runs/upscaler
    python train.py --config=configs/upscaler.py:compact,adversarial=False --workdir=runs/upscaler_compact

`adversarial=False` learns likeness alone, which has the higher PSNR and the softer edges. l2 is much of it: most of a
picture of shapes world is flat, and where pixels repeated are right already, l1 alone keeps the compact network at them
(27.9 dB after 300 steps as before the first). A published file goes on learning, its sizes in place of these, with
--config.init_upscaler=RealESRGAN_x4plus.pth --config.data.path=FOLDER.

Measured: the compact one without a discriminator, 300 steps (--config.total_steps=300), a minute of processor time, six
of the clock on two cores busy with other work. Of 64 other pictures PSNR is then 33.9 dB; bicubic enlargement has 30.4,
pixels repeated 28.3. With the discriminator, its 600 steps: 36.9 dB and the sharper edges (benchmarks/RESULTS.md). What
the larger network reaches has not been measured; a step of it takes some 3 seconds.

    upscaler = sd_jax.load_upscaler("runs/upscaler")
    upscaler.save("upscaler.safetensors")  # by Real-ESRGAN's names, for other programs
"""

from ml_collections import ConfigDict

from sd_jax.config import parse_arg, training_defaults
from sd_jax.models.presets import DiscriminatorConfig, ModelSpec, RRDBConfig, SRVGGConfig


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, network="rrdb", scale=4, adversarial=True, runlocal=False)
    networks = {
        "rrdb": RRDBConfig(args.scale, features=24, blocks=3, growth=12),
        "compact": SRVGGConfig(args.scale, features=32, convolutions=8),
    }
    if args.network not in networks:
        raise ValueError(f"network={args.network!r}: use rrdb or compact")
    network, discriminator = networks[args.network], DiscriminatorConfig(width=32, layers=2)
    config = training_defaults("esrgan")
    config.data.resolution = 128
    config.data.num_examples, config.data.two_objects, config.data.held_out = 20_000, 0.35, 0.01
    config.batch_size = 16
    config.total_steps = 600
    config.eval_steps, config.checkpoint_steps, config.sample_steps, config.log_steps = 100, 0, 300, 50
    config.ema_decays = (0.99,)
    config.esrgan.l2_weight = 10.0
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.schedule = "muon", 4e-3, "cosine"
    config.optimizer.warmup_steps, config.optimizer.weight_decay = 50, 0.0
    if args.adversarial:
        config.esrgan.perceptual_weight, config.esrgan.discriminator_weight = 1.0, 0.05
        config.esrgan.discriminator_start = 200
    if args.runlocal:
        network = RRDBConfig(2, features=8, blocks=1, growth=4) if args.network == "rrdb" else SRVGGConfig(2, 8, 1)
        discriminator = DiscriminatorConfig(width=4, layers=2)
        config.esrgan.perceptual_weight = 0.0
        config.data.resolution, config.data.num_examples, config.data.held_out = 32, 60, 0.1
        config.total_steps, config.optimizer.warmup_steps, config.batch_size, config.eval_batches = 2, 1, 4, 1
        config.sample_steps = 2
    config.model = ConfigDict(ModelSpec(upscaler=network, discriminator=discriminator).to_dict())
    return config
