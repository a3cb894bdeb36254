"""The autoencoder of SD 1.5, one way. `python -m benchmarks.vae [--part=decode|encode] [--pixels=512] ...`"""

from benchmarks import timing

TORCH_CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
DEFAULTS = {"part": "decode", "batch": 1, "pixels": 512}


def describe(options) -> str:
    return f"SD 1.5, {options.part}, batch {options.batch}, {options.pixels}x{options.pixels} pixels, {options.dtype}"


def build_sd_jax(options) -> timing.Program:
    import jax
    import jax.numpy as jnp

    from sd_jax import sharding
    from sd_jax.models.families import SD15
    from sd_jax.models.vae import VAE

    model = VAE(SD15.vae, dtype=jnp.dtype(options.dtype))
    params = timing.random_params(lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))), options.dtype)
    side = options.pixels // SD15.vae.downscale
    shape = (side, side, 4) if options.part == "decode" else (options.pixels, options.pixels, 3)
    inputs = jnp.ones((options.batch, *shape))

    def apply(params, inputs):
        return model.apply({"params": params}, inputs, method=options.part)

    function = sharding.jit(apply)
    return timing.Program(
        lambda: jax.block_until_ready(function(params, inputs)), timing.count_flops(apply, params, inputs)
    )


def build_torch(options) -> timing.Program:
    import torch
    from diffusers import AutoencoderKL

    function = timing.place_torch(AutoencoderKL(**TORCH_CONFIG), options, part=options.part)
    side = options.pixels // 8
    shape = (4, side, side) if options.part == "decode" else (3, options.pixels, options.pixels)
    inputs = torch.ones(
        (options.batch, *shape), dtype=getattr(torch, options.dtype), device=timing.torch_device(options)
    )

    @torch.no_grad()
    def run():
        function(inputs)
        timing.synchronize(options)

    return timing.Program(run)


if __name__ == "__main__":
    timing.main("benchmarks.vae")
