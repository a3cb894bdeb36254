"""What feeds a training step beside the step. `python -m benchmarks.data_loading [--rounds=5] [--workers=2]`

Loading alone is the demo's loader on cached latents, captions drawn and tokenised; the step is that of
`configs/demo.py:text_to_image`. Both run in one process and take turns. Beneath it, what one thread reads from a cache:
records of several sizes, at random from shards that lie in the system's memory, each checked. The command ends with
status 1 where loading is less than ten times as fast as the step. Needs no other library; weights are random.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import sys
import tempfile
import time

LEAST = 10.0  # times the step's rate
BATCHES, STEPS = 100, 3  # of a round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="threads of the loader")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ratio = _demo(options, pathlib.Path(folder))
        _reading(pathlib.Path(folder))
    if ratio < LEAST:
        sys.exit(f"loading is {ratio:.1f} times as fast as the step, less than {LEAST:g}")


def _demo(options, folder: pathlib.Path) -> float:
    """Prints both rates; -> the median ratio of a round."""
    import jax
    import numpy as np

    import sd_jax
    from configs.demo import get_config
    from sd_jax import sharding
    from sd_jax.data import buckets, loader, sources
    from sd_jax.models.networks import Networks
    from sd_jax.models.presets import SHAPES_32
    from sd_jax.training import setup
    from sd_jax.training.context import Context, EmptyPrompt
    from sd_jax.training.methods import METHODS

    config = get_config("text_to_image")
    config.data.num_workers = options.workers
    tokenizer = sd_jax.load().tokenizer
    ids = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id}
    text = dataclasses.replace(SHAPES_32.text_encoder, **ids, pad_token_id=tokenizer.pad_token_id)
    networks = Networks.of(dataclasses.replace(SHAPES_32, text_encoder=text))
    tokenize = functools.partial(tokenizer, max_length=text.max_position_embeddings)

    train, _ = sources.split_held_out(sources.open_source(config), config.data.held_out, config.seed)
    assignment = buckets.one_size(len(train), config.data)
    side = config.data.resolution // networks.spec.vae.downscale
    moments = (side, side, 2 * networks.spec.vae.latent_channels)
    cached = _cached(train, folder, config, assignment, moments)
    batches = loader.make_loader(cached, tokenize, config, assignment)

    mesh = sharding.make_mesh(config.mesh.to_dict())
    context = Context(networks, config, EmptyPrompt(tokenize([""])[0]))
    make_state = functools.partial(setup.initial_state, config, METHODS["full"], networks)
    step = setup.make_step(METHODS["full"], context, mesh, jax.eval_shape(make_state, {}))
    state = step.place_state(sharding.jit(make_state)({}))
    slots = np.arange(config.batch_size, dtype=np.int32)
    names = setup.batch_shapes(config, METHODS["full"], networks, (config.data.resolution,) * 2)
    batch = next(batches)
    batch = step.place_batch({name: batch[name] for name in names if name != "slot"} | {"slot": slots})

    rates = []
    for number in range(options.rounds + 1):  # the first compiles and does not count
        begun = time.perf_counter()
        for _ in range(BATCHES):
            next(batches)
        loading = BATCHES * config.batch_size / (time.perf_counter() - begun)
        begun = time.perf_counter()
        for _ in range(STEPS):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        if number:
            rates.append((loading, STEPS * config.batch_size / (time.perf_counter() - begun)))
    batches.close()
    ratios = sorted(loading / training for loading, training in rates)
    print(f"demo, batch {config.batch_size}, latents {side}x{side}, {jax.devices()[0].device_kind}, images/s:")
    for name, of in zip(("loading alone", "training step"), zip(*rates, strict=True), strict=True):
        print(f"  {name}  {statistics.median(of):9.0f} (least {min(of):.0f}, most {max(of):.0f})")
    print(f"  ratio {statistics.median(ratios):.1f} (least {ratios[0]:.1f}, most {ratios[-1]:.1f})", flush=True)
    return statistics.median(ratios)


def _cached(source, folder: pathlib.Path, config, assignment, moments: tuple[int, ...]):
    """`source` with random numbers of this shape as its latents."""
    import numpy as np

    from sd_jax.data import cache
    from sd_jax.data.cache_shards import Encode

    rng = np.random.default_rng(0)
    encode = Encode(lambda pixels: rng.standard_normal((len(pixels), *moments), np.float32))
    return cache.cached(source, "train", folder, config, assignment, encode, {"vae": "random"})


def _reading(folder: pathlib.Path) -> None:
    """Prints how fast one thread reads records of several sizes."""
    import ml_dtypes
    import numpy as np

    from sd_jax.checkpoints.read_safetensors import write
    from sd_jax.data.cache_shards import OpenShard, Shard, checksums

    print("reading alone, one thread, at random from one shard in memory:")
    states = {"contexts": ((1, 77, 768), ml_dtypes.bfloat16)}
    kinds = {
        "latents 16x16, 4 channels": {"moments": ((16, 16, 8), np.float32)},
        "latents 64x64 (512x512 pixels)": {"moments": ((64, 64, 8), np.float32)},
        "latents 64x64 and a caption's states": {"moments": ((64, 64, 8), np.float32), **states},
        "latents 128x128 (1024x1024 pixels)": {"moments": ((128, 128, 8), np.float32)},
    }
    for number, (name, of_record) in enumerate(kinds.items()):
        size = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in of_record.values())
        count = min(2**26 // size, 1024)
        shard = Shard(folder / f"{number}.safetensors", None, np.arange(count))
        arrays = {n: np.ones((count, *shape), dtype) for n, (shape, dtype) in of_record.items()}
        arrays |= {"records": shard.records, "checksums": checksums(arrays)}
        write(shard.path, arrays, {"key": "benchmark", "bad": "{}"})
        opened, rows = OpenShard(shard, "benchmark"), np.random.default_rng(0).integers(0, count, 4000)
        begun = time.perf_counter()
        for row in rows:
            opened.read(int(row))
        rate = len(rows) / (time.perf_counter() - begun)
        print(f"  {name:38}{rate:9.0f} records/s  {rate * size / 1e9:6.2f} GB/s", flush=True)


if __name__ == "__main__":
    main()
