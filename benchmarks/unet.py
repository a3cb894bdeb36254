"""One pass through the U-Net of SD 1.5. `python -m benchmarks.unet [--batch=2] [--size=64] [--device=gpu] ...`"""

from benchmarks import timing

DEFAULTS = {"batch": 2, "size": 64}


def describe(options) -> str:
    return f"SD 1.5, batch {options.batch}, latents {options.size}x{options.size}, {options.dtype}"


def build_sd_jax(options) -> timing.Program:
    import jax
    import jax.numpy as jnp

    from sd_jax import sharding
    from sd_jax.models.families import SD15
    from sd_jax.models.unet import UNet
    from sd_jax.types import Conditioning

    model = UNet(SD15.unet, dtype=jnp.dtype(options.dtype))
    inputs = (
        jnp.ones((options.batch, options.size, options.size, 4)),
        jnp.full((options.batch,), 500.0),
        Conditioning(jnp.ones((options.batch, 77, 768))),
    )
    params = timing.random_params(lambda: model.init(jax.random.key(0), *inputs), options.dtype)
    predict = sharding.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))
    return timing.Program(
        lambda: predict(params, *inputs).block_until_ready(),
        timing.count_flops(lambda params: model.apply({"params": params}, *inputs), params),
    )


def build_torch(options) -> timing.Program:
    import torch
    from diffusers import UNet2DConditionModel

    model = timing.place_torch(
        UNet2DConditionModel(cross_attention_dim=768), options
    )  # the other defaults are SD 1.5's
    like = {"dtype": getattr(torch, options.dtype), "device": timing.torch_device(options)}
    inputs = (
        torch.ones((options.batch, 4, options.size, options.size), **like),
        torch.full((options.batch,), 500, device=like["device"]),
        torch.ones((options.batch, 77, 768), **like),
    )

    @torch.no_grad()
    def run():
        model(*inputs)
        timing.synchronize(options)

    return timing.Program(run)


if __name__ == "__main__":
    timing.main("benchmarks.unet")
