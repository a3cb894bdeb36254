"""What a walk costs beside its U-Net calls. `python -m benchmarks.loop_overhead [--model=middle] [--steps=20] ...`

Sides, in turns in one process: the bare jitted U-Net on the doubled batch, each call on the answer of the one before;
`text_to_image` of the same number of guided Euler steps, conditioning given, latents returned; and the same with a
callback. Ratios are to the bare calls of the same round.
"""

import argparse
import statistics
import time

from benchmarks import timing

MODELS = ("bundled", "middle", "sd15")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="middle", help="the bundled model, or random weights")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()

    sides = build(options)
    for run in sides.values():  # compiles
        run()
    seconds = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)

    bare = seconds["bare calls"]
    each = 1000 * statistics.median(bare) / options.steps
    print(f"{options.model}, batch {options.batch}, {options.steps} guided Euler steps; {each:.3g} ms a bare call")
    for name, times in seconds.items():
        ratios = sorted(time / other for time, other in zip(times, bare, strict=True))
        spread = f"{statistics.median(ratios):.3f} of the bare calls ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(f"  {name:14}{statistics.median(times):8.4g} s  {spread}")


def build(options) -> dict:
    """What is timed, by name."""
    import jax
    import numpy as np

    from sd_jax.types import Conditioning

    pipe = _pipeline(options.model)
    unet = pipe.spec.unet
    rng = np.random.default_rng(0)
    shape = (2 * options.batch, unet.sample_size, unet.sample_size, unet.in_channels)
    tokens = pipe.spec.text_encoder.max_position_embeddings
    context = 0.1 * rng.standard_normal((2 * options.batch, tokens, unet.cross_attention_dim), np.float32)
    noise, timesteps = rng.standard_normal(shape, np.float32), np.full(shape[0], 500, np.float32)
    both = Conditioning(jax.device_put(context))
    prompt, negative = (Conditioning(context[i * options.batch : (i + 1) * options.batch]) for i in range(2))

    def bare():
        x = jax.device_put(noise)
        for _ in range(options.steps):
            x = pipe.predict(x, timesteps, both)
        x.block_until_ready()

    def walk(callback=None):
        pipe.text_to_image(
            conditioning=prompt,
            negative_conditioning=negative,
            latents=noise[: options.batch],
            steps=options.steps,
            output="latents",
            callback=callback,
        )

    look_on = lambda step, x, denoised: None  # noqa: E731
    return {"bare calls": bare, "walk": walk, "with callback": lambda: walk(look_on)}


def _pipeline(model: str):
    import dataclasses

    import jax

    import sd_jax
    from sd_jax.models.families import SD15
    from sd_jax.models.networks import Networks
    from sd_jax.sampling.pipeline import Pipeline

    if model == "bundled":
        return sd_jax.load()
    small = dataclasses.replace(
        SD15.unet, sample_size=32, block_out_channels=(64, 128, 256, 256), cross_attention_dim=256
    )
    spec = SD15 if model == "sd15" else dataclasses.replace(SD15, unet=small)
    networks = Networks.of(spec, "float32")
    params = timing.random_params(lambda: {"params": networks.init("unet", jax.random.key(0))}, "float32")
    return Pipeline(spec, {"unet": params})


if __name__ == "__main__":
    main()
