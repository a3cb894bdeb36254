"""What each remat policy costs a U-Net on a TPU v5e. `python -m benchmarks.remat [--batch=16] [--dtype=bfloat16]`

Compiles the gradient for that chip, without one (it takes libtpu), and prints the memory that it holds at once and its
arithmetic. The table is in sd_jax/models/remat.py.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp

from benchmarks.timing import count_flops
from sd_jax import hardware
from sd_jax.models.families import SD15
from sd_jax.models.remat import POLICIES
from sd_jax.models.unet import UNet
from sd_jax.types import Conditioning

# A third of SD 1.5's width, one level less: 25 million parameters
CONFIG = dataclasses.replace(
    SD15.unet, block_out_channels=(64, 128, 256), attention_blocks=(True, True, True), cross_attention_dim=128
)
QUICKLY = {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0}


def main() -> None:
    from jax.experimental import topologies

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=32, help="side of the latents")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()

    chip = topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]
    lies = jax.sharding.SingleDeviceSharding(chip)
    on_chip = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies), tree)  # noqa: E731
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    batch, size = options.batch, options.size
    inputs = shape(batch, size, size, 4), shape(batch), Conditioning(shape(batch, 77, 128))
    params = jax.eval_shape(UNet(CONFIG).init, jax.random.key(0), *inputs)["params"]
    params, inputs = on_chip(params), on_chip(inputs)

    print(
        f"batch {batch}, latents {size}x{size}, {options.dtype}\n| policy | temporaries | arithmetic |\n|---|---|---|"
    )
    first = None
    for name in POLICIES:
        model = UNet(CONFIG, remat=name, dtype=jnp.dtype(options.dtype))

        def loss(params, *inputs, model=model):
            return jnp.square(model.apply({"params": params}, *inputs).astype(jnp.float32)).mean()

        with hardware.target("tpu"):
            flops = count_flops(jax.grad(loss), params, *inputs)
            compiled = jax.jit(jax.grad(loss), compiler_options=QUICKLY).lower(params, *inputs).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        first = first or (memory, flops)
        print(f"| {name} | {memory / 1e9:.2f} GB, {memory / first[0]:.2f} | {flops / first[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
