"""What it costs to take a batch in parts, and what it saves. `python -m benchmarks.accumulation`

A training step of the bundled model (a fine-tuning, and a LoRA) at once and in parts, in turns in one process; the
temporaries are the compiler's own count.
"""

import argparse
import functools
import importlib
import statistics
import time

import jax
import jax.numpy as jnp

import sd_jax
from sd_jax import sharding
from sd_jax.models.networks import Networks
from sd_jax.training import plan, setup
from sd_jax.training.context import Context
from sd_jax.training.methods import method_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"| batch of {options.batch} | of the time of the whole | temporaries, of the whole's |\n|---|---|---|")
    for name in ("finetune", "lora"):
        made = {parts: _made(name, options.batch, parts) for parts in (1, options.parts)}
        taken = [{parts: run() for parts, (run, _) in made.items()} for _ in range(options.rounds + 1)][1:]
        ratios = [each[options.parts] / each[1] for each in taken]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name}, {options.parts} parts | {spread} | {made[options.parts][1] / made[1][1]:.2f} |", flush=True)


def _made(name: str, batch: int, parts: int):
    """(a function that makes two steps and returns the seconds of one, bytes of temporaries)"""
    config = importlib.import_module(f"configs.{name}").get_config("shapes")
    config.batch_size, config.grad_accumulation = batch, parts
    method, networks = method_of(config), Networks.of(sd_jax.load().spec, config.dtype)
    shapes = setup.batch_shapes(config, method, networks, (config.data.resolution,) * 2)
    loaded = setup.frozen_shapes(config, method, networks)
    abstract = jax.eval_shape(functools.partial(setup.initial_state, config, method, networks), loaded)
    context = Context(networks, config, plan.empty_prompt(shapes))
    step = setup.make_step(method, context, sharding.make_mesh(config.mesh.to_dict()), abstract)
    program = step.compile(shapes)
    ones = lambda leaf: jnp.ones(leaf.shape, leaf.dtype)  # noqa: E731
    state = step.place_state(jax.tree.map(ones, abstract))
    arrays = step.place_batch(jax.device_get(jax.tree.map(ones, shapes)))

    def run() -> float:
        nonlocal state
        began = time.perf_counter()
        for _ in range(2):
            state, _ = step(state, arrays)
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / 2

    return run, program.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main()
