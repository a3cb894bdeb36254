"""One training step of a U-Net with AdamW. `python -m benchmarks.train_step [--model=small|sd15] [--batch=32] ...`"""

import dataclasses

from benchmarks import timing

DEFAULTS = {"batch": 32, "size": 16, "model": "small"}


def _config(options):
    """`small` has 5.2 million parameters; `sd15` is for GPUs."""
    from sd_jax.models.families import SD15

    small = {"block_out_channels": (64, 128), "attention_blocks": (True, True), "layers_per_block": 1}
    return dataclasses.replace(SD15.unet, **small) if options.model == "small" else SD15.unet


def describe(options) -> str:
    return (
        f"{options.model} U-Net, batch {options.batch}, latents {options.size}x{options.size}, AdamW, {options.dtype}"
    )


def build_sd_jax(options) -> timing.Program:
    import jax
    import jax.numpy as jnp
    import optax

    from sd_jax import sharding
    from sd_jax.models.unet import UNet
    from sd_jax.types import Conditioning

    model = UNet(_config(options), dtype=jnp.dtype(options.dtype))
    shape = (options.batch, options.size, options.size, 4)
    latents, noise = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    inputs = latents, jnp.full((options.batch,), 500.0), Conditioning(jnp.ones((options.batch, 77, 768)))
    params = timing.random_params(lambda: model.init(jax.random.key(0), *inputs), "float32")
    optimizer = optax.adamw(1e-4)
    state = (params, optimizer.init(params))

    def loss(params):
        predicted = model.apply({"params": params}, *inputs)
        return jnp.square(predicted.astype(jnp.float32) - noise).mean()

    @sharding.jit(donate_argnums=0)
    def step(state):
        params, moments = state
        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    def run():
        nonlocal state
        state, value = step(state)
        jax.block_until_ready((state, value))

    return timing.Program(run, timing.count_flops(jax.grad(loss), params), options.batch)


def build_torch(options) -> timing.Program:
    import torch
    from diffusers import UNet2DConditionModel

    config = _config(options)
    names = {True: ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), False: ("DownBlock2D", "UpBlock2D")}
    device = timing.torch_device(options)
    model = UNet2DConditionModel(
        block_out_channels=config.block_out_channels,
        down_block_types=tuple(names[attend][0] for attend in config.attention_blocks),
        up_block_types=tuple(names[attend][1] for attend in reversed(config.attention_blocks)),
        layers_per_block=config.layers_per_block,
        cross_attention_dim=768,
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4)
    predict = torch.compile(model) if options.side == "torch.compile" else model
    shape = (options.batch, 4, options.size, options.size)
    latents, noise = (torch.randn(shape, device=device) for _ in range(2))
    timesteps = torch.full((options.batch,), 500, device=device)
    context = torch.ones((options.batch, 77, 768), device=device)
    half = options.dtype != "float32"  # parameters stay float32, as ours do

    def run():
        with torch.autocast(device, getattr(torch, options.dtype), enabled=half):
            predicted = predict(latents, timesteps, context).sample
        torch.nn.functional.mse_loss(predicted.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        timing.synchronize(options)

    return timing.Program(run, samples=options.batch)


if __name__ == "__main__":
    timing.main("benchmarks.train_step")
