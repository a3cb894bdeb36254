"""Latents and text states made before against in the step: `python -m benchmarks.precomputed [--rounds=3] [--steps=30]`

Whole runs of train.py in turns, on shapes world at 128x128 with the bundled autoencoder and text encoder and a U-Net of
SD 1.5's plan, 64 to 128 channels wide. A rate is that of the middle step of a run, its data loading included; that of
a cached run leaves out the making of the cache, whose time is told. Flags of train.py may follow.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from sd_jax.training.metrics import read_rows

ROOT = pathlib.Path(__file__).parents[1]
BATCH = 16
FLAGS = (
    "--config=configs/sd15_pretrain_256.py:runlocal",
    "--config.model.unet.block_out_channels=(64,128,128)",
    "--config.model.unet.attention_blocks=(True,True,False)",
    "--config.data.resolution=128",
    "--config.data.num_examples=2000",
    "--config.data.held_out=0",
    f"--config.batch_size={BATCH}",
    "--config.eval_steps=0",
    "--config.sample_steps=0",
    "--config.checkpoint_steps=0",
)
AT_ONCE = ("--config.data.cache_latents=False", "--config.data.cache_text=False")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    options, extra = parser.parse_known_args()
    flags = (*FLAGS, f"--config.total_steps={options.steps}", *extra)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        rounds = []
        for number in range(options.rounds):
            cached, made = _run(folder / f"{number}_cached", *flags, f"--config.data.cache_dir={folder / 'cache'}")
            if number == 0:
                print(f"the cache of 2000 pictures took {made:.1f} s to make", flush=True)
            rounds.append((cached, _run(folder / f"{number}_at_once", *flags, *AT_ONCE)[0]))
            print(f"images/s: {rounds[-1][0]:.1f} cached, {rounds[-1][1]:.1f} at once", flush=True)
    ratios = sorted(cached / at_once for cached, at_once in rounds)
    print(f"cached / at once: {statistics.median(ratios):.2f} (least {ratios[0]:.2f}, most {ratios[-1]:.2f})")


def _run(workdir: pathlib.Path, *flags: str) -> tuple[float, float]:
    """-> images a second of its middle step, and the seconds that its cache took."""
    command = [sys.executable, str(ROOT / "train.py"), *flags, f"--workdir={workdir}"]
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
    steps = [
        sum(row.get(f"seconds_{stage}", 0.0) for stage in ("data", "dispatch", "device", "other"))
        for row in read_rows(workdir)[3:]
    ]
    summary = json.loads((workdir / "summary.json").read_text())
    return BATCH / statistics.median(steps), summary["seconds_by_stage"].get("cache", 0.0)


if __name__ == "__main__":
    main()
