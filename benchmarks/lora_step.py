"""A training step of a LoRA, latents and text given. `python -m benchmarks.lora_step [--model=small|sd15|sdxl] ...`

The torch side is what diffusers' example `train_text_to_image_lora.py` does with peft: noise, U-Net forward and
backward, clip by norm, AdamW. Ours is the step that `train.py` runs (`training/setup.py`) with the layers of
configs/lora.py, which the LoRA of the other side changes too, at the same rank. What each side trains, and what its
optimiser holds, is told; ours beside what `--plan` counts. `sd15` and `sdxl` are for GPUs, with `--dtype=bfloat16` and
latents of `--size=64` and 128.
"""

import dataclasses

from benchmarks import timing

DEFAULTS = {"batch": 32, "size": 16, "model": "small", "rank": 8, "remat": "none"}
# The targets of configs/lora.py by peft's rule: a module's name ends so
TARGETS = ["proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]


def _spec(options):
    """`small` has 5.2 million parameters in the U-Net."""
    from sd_jax.models.families import FAMILIES, SD15

    if options.model != "small":
        return FAMILIES[options.model]
    small = {"block_out_channels": (64, 128), "attention_blocks": (True, True), "layers_per_block": 1}
    return dataclasses.replace(SD15, unet=dataclasses.replace(SD15.unet, **small))


def _config(options):
    from ml_collections import ConfigDict

    from sd_jax.config import training_defaults

    config = training_defaults("lora")
    spec = _spec(options)
    config.model = ConfigDict(spec.to_dict())
    config.batch_size, config.dtype, config.adapter.rank = options.batch, options.dtype, options.rank
    config.data.resolution = options.size * spec.vae.downscale
    config.data.cache_latents = config.data.cache_text = True
    config.diffusion.caption_dropout = 0.0
    return config


def describe(options) -> str:
    size = f"{options.size}x{options.size}"
    return (
        f"LoRA of rank {options.rank}, {options.model} U-Net, batch {options.batch}, latents {size}, {options.dtype}, "
        f"remat {options.remat}"
    )


def _note(trained: int, held: int) -> str:
    return f"{trained:,} parameters trained, the optimiser holds {held:,} bytes"


def build_sd_jax(options) -> timing.Program:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sd_jax import sharding, trees
    from sd_jax.models.networks import Networks
    from sd_jax.training import setup
    from sd_jax.training.context import Context, EmptyPrompt
    from sd_jax.training.methods import method_of

    config = _config(options)
    method, networks = method_of(config), Networks.of(_spec(options), config.dtype, options.remat)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), leaf.dtype)  # noqa: E731
    shapes = setup.frozen_shapes(config, method, networks)
    loaded = jax.tree.map(draw, shapes)
    sizes = setup.batch_shapes(config, method, networks, (config.data.resolution,) * 2)
    batch = {name: np.asarray(draw(s)) for name, s in sizes.items()}
    batch["slot"] = np.arange(options.batch, dtype=np.int32)
    pooled = batch["pooled"][0] if "pooled" in batch else None
    context = Context(networks, config, EmptyPrompt(None, (batch["context"][0], pooled)))

    make_state = lambda loaded: setup.initial_state(config, method, networks, loaded)  # noqa: E731
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    step = setup.make_step(method, context, mesh, jax.eval_shape(make_state, shapes))
    state = step.place_state(sharding.jit(make_state, once=True)(loaded))
    flops = options.batch * setup.flops_per_image(method, context, step.abstract_state, sizes)
    held = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
    note = f"{_note(trees.count(state.params), held)}; --plan: {trees.num_bytes(step.abstract_state.opt_state):,}"
    del loaded

    def run():
        nonlocal state
        state, metrics = step(state, step.place_batch(batch))
        jax.block_until_ready((state, metrics))

    return timing.Program(run, flops, options.batch, note)


def build_torch(options) -> timing.Program:
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    spec = _spec(options)
    unet, device, half = spec.unet, timing.torch_device(options), options.dtype != "float32"
    weight_dtype = getattr(torch, options.dtype)
    torch.backends.cuda.matmul.allow_tf32 = True  # the script's --allow_tf32
    names = {True: ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), False: ("DownBlock2D", "UpBlock2D")}
    told = {}
    if unet.addition_embed_type:
        told = {
            "addition_embed_type": unet.addition_embed_type,
            "addition_time_embed_dim": unet.addition_time_embed_dim,
            "projection_class_embeddings_input_dim": unet.projection_class_embeddings_input_dim,
        }
    model = UNet2DConditionModel(
        block_out_channels=unet.block_out_channels,
        down_block_types=tuple(names[attend][0] for attend in unet.attention_blocks),
        up_block_types=tuple(names[attend][1] for attend in reversed(unet.attention_blocks)),
        layers_per_block=unet.layers_per_block,
        transformer_layers_per_block=unet.transformer_layers_per_block,
        cross_attention_dim=unet.cross_attention_dim,
        attention_head_dim=unet.num_attention_heads,
        use_linear_projection=unet.use_linear_projection,
        **told,
    )
    model.requires_grad_(False).to(device, weight_dtype)
    model.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=TARGETS))
    if half:
        cast_training_params(model, torch.float32)
    if options.remat != "none":
        model.enable_gradient_checkpointing()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    predict = torch.compile(model) if options.side == "torch.compile" else model
    latents = torch.randn((options.batch, 4, options.size, options.size), device=device)
    context = torch.randn((options.batch, 77, unet.cross_attention_dim), device=device, dtype=weight_dtype)
    besides = None
    if told:
        pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
        besides = {
            "text_embeds": torch.randn((options.batch, pooled), device=device, dtype=weight_dtype),
            "time_ids": torch.full((options.batch, 6), 1024.0, device=device),
        }

    def run():
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (options.batch,), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast(device, weight_dtype, enabled=half):
            predicted = predict(noisy, timesteps, context, added_cond_kwargs=besides, return_dict=False)[0]
        torch.nn.functional.mse_loss(predicted.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        timing.synchronize(options)

    run()  # after which the optimiser has its moments
    held = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    return timing.Program(run, samples=options.batch, note=_note(sum(p.numel() for p in trained), held))


if __name__ == "__main__":
    timing.main("benchmarks.lora_step")
