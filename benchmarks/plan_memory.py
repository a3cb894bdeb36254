"""What `--plan=cpu:8` says of memory, against what a run of the same config takes: python -m benchmarks.plan_memory

The plan's figure is "the steps add": the temporaries of all devices, and what their kernels take. The run's is its peak
of resident memory less what was resident before its first step, both from summary.json. Flags of train.py may follow,
e.g. --config.batch_size=32. Prints the ratio of the two and ends with status 1 where it is further than a tenth from 1.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
DEVICES = 8
# Eight images of 128x128 a device: some 400 MB of temporaries each, beside which threads and caches matter little
FLAGS = (
    "--config=configs/demo.py:autoencoder",
    "--config.data.resolution=128",
    "--config.data.num_examples=128",
    "--config.data.held_out=0",
    "--config.data.num_workers=0",
    "--config.batch_size=64",
    "--config.optimizer.name=adamw",
    "--config.optimizer.learning_rate=1e-3",
    "--config.optimizer.warmup_steps=1",
    "--config.total_steps=4",
    "--config.eval_steps=0",
    "--config.sample_steps=0",
    "--config.checkpoint_steps=0",
)


def _train(*flags: str) -> str:
    devices = f"--xla_force_host_platform_device_count={DEVICES}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def main(extra: list[str]) -> int:
    said = _train(*FLAGS, *extra, f"--plan=cpu:{DEVICES}")
    value, unit = re.search(r"the steps add +([\d.]+) (GB|MB)", said).groups()
    planned = float(value) * {"GB": 1e9, "MB": 1e6}[unit]
    with tempfile.TemporaryDirectory() as workdir:
        _train(*FLAGS, *extra, f"--workdir={workdir}")
        summary = json.loads((pathlib.Path(workdir) / "summary.json").read_text())
    before, peak = summary["rss_before_first_step"], summary["peak_rss"]
    ratio = (peak - before) / planned
    print(f"planned: the steps add {planned / 1e9:.3f} GB on {DEVICES} devices")
    print(f"run: {(peak - before) / 1e9:.3f} GB ({peak / 1e9:.3f} GB at its peak, {before / 1e9:.3f} GB before)")
    print(f"run / planned: {ratio:.3f}")
    return int(abs(ratio - 1) > 0.1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
