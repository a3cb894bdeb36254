"""A step of text-to-image training, from pixels to the average. `python -m benchmarks.text_to_image_step [--batch=16]`

The torch side is what diffusers' example `train_text_to_image.py` does with `--use_ema --foreach_ema`: encode the
pictures, sample, add noise, encode the captions, U-Net forward and backward, clip by norm, AdamW, average. Ours is the
step that `train.py` runs (`training/setup.py`). `--cached=1` leaves both encoders out: moments and text states are
given. `--model=sd2 --size=512 --batch=32 --cached=1 --device=gpu --dtype=bfloat16` is for GPUs.
"""

import dataclasses

from benchmarks import timing

DEFAULTS = {"batch": 16, "size": 128, "model": "small", "cached": 0, "remat": "none"}


def _spec(options):
    """`small`: 6.1 million parameters in the U-Net, 0.5 in the encoder, 15.8 in the text encoder, mostly words."""
    from sd_jax.models.families import SD2_BASE, SD15

    if options.model == "sd2":
        return SD2_BASE
    return dataclasses.replace(
        SD15,
        unet=dataclasses.replace(
            SD15.unet,
            block_out_channels=(64, 128, 128),
            attention_blocks=(True, True, False),
            layers_per_block=1,
            cross_attention_dim=256,
        ),
        vae=dataclasses.replace(SD15.vae, block_out_channels=(32, 64, 64, 64), layers_per_block=1),
        text_encoder=dataclasses.replace(
            SD15.text_encoder, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4
        ),
    )


def _config(options):
    from ml_collections import ConfigDict

    from sd_jax.config import training_defaults

    config = training_defaults("full")
    config.model = ConfigDict(_spec(options).to_dict())
    config.batch_size, config.dtype = options.batch, options.dtype
    config.data.resolution = options.size
    config.data.cache_latents = config.data.cache_text = bool(options.cached)
    config.diffusion.train_text_encoder = False
    config.diffusion.caption_dropout = 0.0
    return config


def describe(options) -> str:
    encoders = "latents and text given" if options.cached else "with both encoders"
    size = f"{options.size}x{options.size}"
    return f"{options.model} model, batch {options.batch}, pictures of {size}, {encoders}, AdamW, EMA, {options.dtype}"


def build_sd_jax(options) -> timing.Program:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sd_jax import sharding
    from sd_jax.models.networks import Networks
    from sd_jax.training import setup
    from sd_jax.training.context import Context, EmptyPrompt
    from sd_jax.training.methods import method_of

    config = _config(options)
    method, networks = method_of(config), Networks.of(_spec(options), config.dtype, options.remat)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32))  # noqa: E731
    shapes = {
        p: jax.eval_shape(lambda p=p: networks.init(p, jax.random.key(0))) for p in ("unet", "vae", "text_encoder")
    }
    loaded = jax.tree.map(draw, shapes)

    text = networks.spec.text_encoder
    words, wide = (77,), (77, text.hidden_size)
    empty = EmptyPrompt(np.zeros(words, np.int32), (np.zeros(wide, jnp.dtype(options.dtype)), None))
    context = Context(networks, config, empty)
    batch_shapes = setup.batch_shapes(config, method, networks, (options.size, options.size))
    fill = {
        "pixels": lambda s: rng.integers(0, 256, s.shape).astype(s.dtype),
        "input_ids": lambda s: np.full(s.shape, text.eos_token_id, s.dtype),
        "slot": lambda s: np.arange(*s.shape, dtype=s.dtype),
    }
    batch = {name: fill.get(name, draw)(s).astype(s.dtype) for name, s in batch_shapes.items()}

    make_state = lambda loaded: setup.initial_state(config, method, networks, loaded)  # noqa: E731
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    step = setup.make_step(method, context, mesh, jax.eval_shape(make_state, shapes))
    state = step.place_state(sharding.jit(make_state, once=True)(loaded))
    flops = options.batch * setup.flops_per_image(method, context, step.abstract_state, batch_shapes)
    del loaded

    def run():
        nonlocal state
        state, metrics = step(state, step.place_batch(batch))
        jax.block_until_ready((state, metrics))

    return timing.Program(run, flops, options.batch)


def build_torch(options) -> timing.Program:
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import EMAModel
    from transformers import CLIPTextConfig, CLIPTextModel

    spec = _spec(options)
    device, half = timing.torch_device(options), options.dtype != "float32"
    weight_dtype = getattr(torch, options.dtype)
    torch.backends.cuda.matmul.allow_tf32 = True  # the script's --allow_tf32
    names = {True: ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), False: ("DownBlock2D", "UpBlock2D")}
    unet = UNet2DConditionModel(
        block_out_channels=spec.unet.block_out_channels,
        down_block_types=tuple(names[attend][0] for attend in spec.unet.attention_blocks),
        up_block_types=tuple(names[attend][1] for attend in reversed(spec.unet.attention_blocks)),
        layers_per_block=spec.unet.layers_per_block,
        cross_attention_dim=spec.unet.cross_attention_dim,
        attention_head_dim=spec.unet.num_attention_heads,
        use_linear_projection=spec.unet.use_linear_projection,
    ).to(device)
    average = EMAModel(unet.parameters(), decay=0.9999, foreach=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    predict = torch.compile(unet) if options.side == "torch.compile" else unet
    factor, latents_size = spec.vae.scaling_factor, options.size // spec.vae.downscale

    if options.cached:
        moments = torch.randn((options.batch, 8, latents_size, latents_size), device=device)
        states = torch.randn((options.batch, 77, spec.unet.cross_attention_dim), device=device, dtype=weight_dtype)
    else:
        levels = len(spec.vae.block_out_channels)
        vae = AutoencoderKL(
            block_out_channels=spec.vae.block_out_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=spec.vae.layers_per_block,
            latent_channels=4,
        )
        text = CLIPTextModel(CLIPTextConfig(**dataclasses.asdict(spec.text_encoder)))
        for frozen in (vae, text):
            frozen.eval().requires_grad_(False).to(device, weight_dtype)
        pixels = torch.rand((options.batch, 3, options.size, options.size), device=device, dtype=weight_dtype) * 2 - 1
        ids = torch.full((options.batch, 77), spec.text_encoder.eos_token_id, device=device)

    def encode():
        if options.cached:
            from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

            return DiagonalGaussianDistribution(moments).sample() * factor, states
        return vae.encode(pixels).latent_dist.sample() * factor, text(ids, return_dict=False)[0]

    def run():
        latents, context = encode()
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (options.batch,), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast(device, weight_dtype, enabled=half):
            predicted = predict(noisy, timesteps, context, return_dict=False)[0]
        torch.nn.functional.mse_loss(predicted.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        timing.synchronize(options)

    return timing.Program(run, samples=options.batch)


if __name__ == "__main__":
    timing.main("benchmarks.text_to_image_step")
