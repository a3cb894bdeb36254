"""Every benchmark on one GPU, within 8 minutes. `python -m benchmarks.gpu_suite [--seconds=480]`

In order of worth, so that a slow machine loses the last ones. A side that cannot run here (torch without CUDA) is left
out and named.
"""

import argparse
import subprocess
import sys
import time

ITEMS = (
    ("text_to_image_step", "--dtype=bfloat16", "--model=sd2", "--size=512", "--batch=32", "--cached=1"),
    ("unet", "--dtype=bfloat16"),
    ("train_step", "--dtype=bfloat16", "--model=sd15", "--batch=4", "--size=64"),
    ("lora_step", "--dtype=bfloat16", "--model=sd15", "--batch=4", "--size=64", "--remat=blocks"),
    ("lora_step", "--dtype=bfloat16", "--model=sdxl", "--batch=1", "--size=128", "--remat=blocks"),
    ("sampling", "--dtype=bfloat16", "--steps=20"),
    ("vae", "--dtype=bfloat16"),
    ("text_encoder", "--dtype=bfloat16"),
    ("unet", "--dtype=float16"),
    ("unet", "--dtype=float32"),
    ("vae", "--dtype=bfloat16", "--part=encode"),
)
# Compared with torch.compile too, which takes minutes to compile
COMPILED = {"text_to_image_step", "unet", "sampling"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=480, help="no benchmark runs beyond this")
    end = time.monotonic() + parser.parse_args().seconds

    if not _prints_true("import jax; print(any(d.platform == 'gpu' for d in jax.devices()))"):
        print("jax sees no GPU: install the extra `cuda`, or run a single benchmark with --device=cpu")
        return 1
    sides = ["sd_jax"]
    if _prints_true("import torch, diffusers; print(torch.cuda.is_available())"):
        sides.append("torch")
    else:
        print("torch sees no GPU, or diffusers is missing: sd_jax is timed alone")

    failed = []
    for name, *flags in ITEMS:
        compiled = ["torch.compile"] if name in COMPILED and "torch" in sides and "--dtype=bfloat16" in flags else []
        command = [sys.executable, "-m", f"benchmarks.{name}", "--device=gpu", f"--sides={','.join(sides + compiled)}"]
        left = end - time.monotonic()
        try:
            ok = left > 20 and subprocess.run([*command, *flags], timeout=left).returncode == 0
        except subprocess.TimeoutExpired:
            ok = False
        if not ok:
            failed.append(" ".join([name, *flags]))
    if failed:
        print(f"\nnot finished: {'; '.join(failed)}")
    return 0 if len(failed) < len(ITEMS) else 1


def _prints_true(code: str) -> bool:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return result.stdout.strip().endswith("True")


if __name__ == "__main__":
    sys.exit(main())
