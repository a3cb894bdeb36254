"""Opening a single file of SD 1.5, 4.27 GB, float32. `python -m benchmarks.loading [--rounds=3] [--dtype=bfloat16]`

Each side runs in a fresh process, in turns, and says when it has come so far, from the call on (imports apart):

    opened   the model is described, each tensor has its name and shape; nothing needs to have been read.
             sd_jax.load, which leaves large parts to their first use; `from_single_file`, which maps the file
    read     every tensor has been read once: what the first use of the weights costs beyond `opened`
    own      the weights are the process's own memory, laid out for its convolutions, and no page of the file is needed.
             sd_jax: `Pipeline.read`, which checks them too; torch: a copy of each parameter

Peak memory is that of the whole process, with all its imports. `read` is free of copies in torch on CPU: there the
mapped pages of the file are the weights. Before each run the file is read, and as much memory as the weights take is
written to and freed, for a virtual machine's memory is slow when it is touched first.

`--merge` measures the memory that merging two files of 1.3 GB takes.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STATES = ("opened", "read", "own")


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="to load in")
    parser.add_argument("--stored", choices=("float32", "bfloat16", "float16"), default="float32", help="in the file")
    parser.add_argument("--sides", default="sd_jax,torch", help="some of them; ratios are to the second")
    parser.add_argument("--merge", action="store_true", help="measure the memory of merging instead")
    parser.add_argument("--folder", help="where the files are written for a while; default: the temporary folder")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # set in a worker
    options = parser.parse_args(arguments)
    if options.side:
        print(json.dumps(_WORK[options.side](Path(options.folder), options)), file=sys.__stdout__)
        return {}
    with tempfile.TemporaryDirectory(prefix="sd_jax_loading_", dir=options.folder) as folder:
        return (_measure_merging if options.merge else _compare)(Path(folder), options)


def _compare(folder: Path, options) -> dict:
    file = folder / "model.safetensors"
    write_model(file, options.stored)
    write_configs(folder / "configs")
    sides = options.sides.split(",")
    rounds = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side in sides:
            _work("prepare", folder, options)  # by a process of its own: a child begins with its parent's peak
            rounds[side].append(_work(side, folder, options))
    size = file.stat().st_size
    print(f"\nloading: SD 1.5, {size / 1e9:.2f} GB of {options.stored}, as {options.dtype}; {_machine()}")
    for side, found in rounds.items():
        middle = lambda what, found=found: statistics.median(one[what] for one in found)  # noqa: E731
        line = "".join(f"  {state} {middle(state):.2f} s ({middle(state + '_processor'):.2f})" for state in STATES)
        peak = max(one["peak"] for one in found)
        print(
            f"  {side:8}{line}  imports {middle('imports'):.1f} s  peak {peak / 1e9:.2f} GB = {peak / size:.2f} files"
        )
    for state in STATES if len(sides) == 2 else ():
        ratios = []
        for what, unit in (
            ("", "wall clock"),
            ("_with_imports", "wall clock with imports"),
            ("_processor", "processor"),
        ):
            pairs = sorted(a[state + what] / b[state + what] for a, b in zip(*rounds.values(), strict=True))
            ratios.append(f"{statistics.median(pairs):.2f} (least {pairs[0]:.2f}, most {pairs[-1]:.2f}) of {unit}")
        print(f"  {' / '.join(sides)}, {state}: {'; '.join(ratios)}", flush=True)
    return {"size": size, "rounds": rounds}


def _work(side: str, folder: Path, options) -> dict:
    flags = [f"--side={side}", f"--folder={folder}", f"--dtype={options.dtype}"]
    done = subprocess.run([sys.executable, "-m", "benchmarks.loading", *flags], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _prepare(folder: Path, options) -> dict:
    """The file is in the page cache, and as much memory as its weights take has been had from the host."""
    import numpy as np

    file, buffer = folder / "model.safetensors", np.empty(2**24, np.uint8)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass
    blocks = [np.empty(2**26, np.uint8) for _ in range(76)]  # 5.1 GB; in float32 the weights take 4.3
    for block in blocks:
        block[::4096] = 1
    return {}


class _Clock:
    """What has passed since it was made, by state; and the peak of memory."""

    def __init__(self, imports: float):
        self.start = time.perf_counter(), time.process_time()
        self.said = {"imports": imports}

    def at(self, *states: str) -> None:
        for state in states:
            self.said[state] = time.perf_counter() - self.start[0]
            self.said[f"{state}_with_imports"] = self.said["imports"] + self.said[state]
            self.said[f"{state}_processor"] = time.process_time() - self.start[1]
        self.said["peak"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _load_sd_jax(folder: Path, options) -> dict:
    start = time.perf_counter()
    import jax

    import sd_jax

    load = sd_jax.load
    jax.devices()
    clock = _Clock(time.perf_counter() - start)
    pipe = load(folder / "model.safetensors", dtype=options.dtype)
    clock.at("opened")
    pipe.read()
    clock.at("read", "own")
    assert sum(array.size for array in jax.tree.leaves(pipe.params)) > 1e9
    return clock.said


def _load_torch(folder: Path, options) -> dict:
    start = time.perf_counter()
    sys.stdout = sys.stderr  # whatever a library prints
    import diffusers
    import torch

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    load = diffusers.StableDiffusionPipeline.from_single_file
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    clock = _Clock(time.perf_counter() - start)
    pipe = load(
        str(folder / "model.safetensors"),
        config=str(folder / "configs"),
        local_files_only=True,
        torch_dtype=getattr(torch, options.dtype),
        tokenizer=None,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
    )
    clock.at("opened")
    parameters = [p for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()]
    assert sum(parameter.numel() for parameter in parameters) > 1e9
    with torch.no_grad():
        for parameter in parameters:
            parameter.reshape(-1)[:: 4096 // parameter.element_size()].sum()
        clock.at("read")
        for parameter in parameters:
            parameter.data = parameter.data.clone()
    clock.at("own")
    return clock.said


# Merging


def _measure_merging(folder: Path, options) -> dict:
    import dataclasses

    from sd_jax.models.families import SD15

    spec = dataclasses.replace(SD15, unet=dataclasses.replace(SD15.unet, block_out_channels=(192, 384, 768, 768)))
    for name in "ab":
        largest = write_model(folder / f"{name}.safetensors", options.stored, spec, ("unet",))
    found = _work("merge", folder, options)
    size = (folder / "a.safetensors").stat().st_size
    print(f"\nmerging: two files of {size / 1e9:.2f} GB of {options.stored}, as {options.dtype}; {_machine()}")
    print(f"  peak {found['peak'] / 1e9:.2f} GB, {found['imported'] / 1e9:.2f} of it the imports; the rest is")
    print(f"  {(found['peak'] - found['imported']) / largest:.1f} of the largest tensor's {largest / 1e9:.3f} GB")
    print(f"  {found['own']:.1f} s, {found['own_processor']:.1f} s of processor time")
    return found


def _merge(folder: Path, options) -> dict:
    start = time.perf_counter()
    import jax

    from sd_jax.checkpoints.merge import merge

    jax.devices()
    clock = _Clock(time.perf_counter() - start)
    clock.at()
    clock.said["imported"] = clock.said["peak"]
    merge([folder / "a.safetensors", folder / "b.safetensors"], folder / "merged.safetensors", dtype=options.dtype)
    clock.at("own")
    return clock.said


_WORK = {"prepare": _prepare, "sd_jax": _load_sd_jax, "torch": _load_torch, "merge": _merge}


# What is loaded


def write_model(path: Path, dtype: str, spec=None, parts: tuple[str, ...] = ("unet", "vae", "text_encoder")) -> int:
    """A single file of random weights, from the shapes alone. Returns the bytes of its largest tensor."""
    import numpy as np

    from sd_jax.checkpoints import infer, keys_compvis, layout
    from sd_jax.checkpoints.read_safetensors import write
    from sd_jax.checkpoints.tensors import Tensor, dtype_of
    from sd_jax.models.families import SD15

    spec, dtype = spec or SD15, dtype_of(dtype)
    noise = (0.02 * np.random.default_rng(0).standard_normal(2**22, np.float32)).astype(dtype)
    random = lambda shape: Tensor(shape, dtype, lambda: np.resize(noise, shape))  # noqa: E731
    tensors = {}
    for part in parts:
        config = getattr(spec, part)
        named = {name: random(shape) for name, shape in layout.LAYOUTS[part](config).items()}
        tensors |= keys_compvis.from_diffusers(part, named, config, keys_compvis.kind_of(spec))
    write(path, tensors, {"format": "pt", infer.SPEC_KEY: json.dumps(spec.to_dict())})
    return max(math.prod(tensor.shape) * dtype.itemsize for tensor in tensors.values())


def write_configs(folder: Path) -> None:
    """What diffusers reads beside a single file when there is no network."""
    from sd_jax.checkpoints import config_json
    from sd_jax.models.families import SD15

    configs = {
        "unet": config_json.unet_to_json(SD15.unet),
        "vae": config_json.vae_to_json(SD15.vae),
        "text_encoder": config_json.text_encoder_to_json(SD15.text_encoder, 49406, "float32"),
    }
    libraries = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": config_json.DIFFUSERS_VERSION, **libraries}
    for name, config in configs.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def _machine() -> str:
    from benchmarks.timing import _processor

    return _processor()


if __name__ == "__main__":
    main()
