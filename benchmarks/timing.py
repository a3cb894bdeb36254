"""Programs side by side: each in its own process, taking turns (A B A B ...), ratios taken pair by pair.

Why processes: in one process the thread pools of torch and XLA spin against each other and their memory adds up.
Why turns: the speed of a shared machine drifts by a tenth within minutes; the ratio of two neighbours hardly does.
Why each turn begins with a run that is not timed: while a process waits, a virtual machine's host takes back what it
had freed, and a training step then took twice as long to get it again; in a loop of its own it never waits.
Where other programs run beside it, the wall clock says little (torch's threads wait for each other and suffer most):
there `--cores=1` and the ratio of processor time are what to read.

A benchmark is a module with `DEFAULTS` (its flags), `describe(options)`, `build_sd_jax(options)` and
`build_torch(options)`; both build a `Program`. `main(module)` is its command line.
"""

import argparse
import dataclasses
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

SIDES = ("sd_jax", "torch", "torch.compile")


@dataclasses.dataclass
class Program:
    """What is timed."""

    run: Callable[[], None]  # once, until its result is there
    flops: float = 0.0  # of one run, two for each multiply-add; 0 = not counted
    samples: int = 0  # of one run; printed per second where it is not 0
    note: str = ""  # what else is to be said of this side


# The command line


def main(module_name: str, arguments: list[str] | None = None) -> dict:
    """Runs every side of a benchmark in turns, prints the comparison and returns it."""
    module = importlib.import_module(module_name)
    options = parse(module_name, arguments)
    if options.side:
        _work(module, options)
        return {}
    sides = options.sides.split(",")
    workers = []
    try:
        for side in sides:  # one after the other: building and compiling must not disturb a neighbour
            workers.append(Worker(module_name, side, options))
        rounds = [[worker.time_once() for worker in workers] for _ in range(options.rounds)]
        seconds = {side: [times[i][0] for times in rounds] for i, side in enumerate(sides)}
        processor = {side: [times[i][1] for times in rounds] for i, side in enumerate(sides)}
        facts = {side: worker.facts() for side, worker in zip(sides, workers, strict=True)}
    finally:
        for worker in workers:
            worker.stop()
    result = {
        "benchmark": module_name.rsplit(".")[-1],
        "what": module.describe(options),
        "seconds": seconds,
        "processor": processor,
        "facts": facts,
    }
    _report(result)
    return result


def parse(module_name: str, arguments: list[str] | None = None):
    """The options of a benchmark."""
    module = importlib.import_module(module_name)
    parser = argparse.ArgumentParser(description=module.__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each side runs")
    parser.add_argument("--cores", type=int, default=0, help="use this many processor cores; 0 = all")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--sides", default="sd_jax,torch", help=f"some of {','.join(SIDES)}; ratios are to the others")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)  # set in a worker
    for name, value in module.DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args(arguments)


def _report(result: dict) -> None:
    seconds, facts = result["seconds"], result["facts"]
    ours, *others = seconds
    peak = max(fact["peak_gflops"] for fact in facts.values())
    # One count for all: torch's, whose formulation is the textbook's (ours leaves some arithmetic out).
    flops = facts.get("torch", facts[ours])["flops"]
    versions = ", ".join(dict.fromkeys(fact["version"] for fact in facts.values()))
    print(f"\n{result['benchmark']}: {result['what']}\n  {facts[ours]['device']}; {versions}")
    for side, times in seconds.items():
        middle, fact = statistics.median(times), facts[side]
        line = f"  {side:14}{middle:9.4g} s (least {min(times):.4g}, most {max(times):.4g})"
        if flops:
            rate = flops / middle / 1e9
            line += f"  {rate:.4g} GFLOP/s, {rate / peak:.0%} of the matrix-product peak of {peak:.4g}"
        if fact["samples"]:
            line += f"  {fact['samples'] / middle:.4g} samples/s"
        print(line + f"  memory {fact['memory_gb']:.2f} GB, ready in {fact['ready_seconds']:.0f} s")
        if fact["note"]:
            print(f"  {'':14}{fact['note']}")
    for side in others:
        for what in ("seconds", "processor"):
            pairs = sorted(a / b for a, b in zip(result[what][ours], result[what][side], strict=True))
            spread = f"(least {pairs[0]:.2f}, most {pairs[-1]:.2f})"
            name = "wall clock" if what == "seconds" else "processor time"
            print(f"  {ours} / {side}: {statistics.median(pairs):.2f} {spread} of {name}", flush=True)


# The worker, seen from outside and from inside


class Worker:
    """A process that holds one side and runs it when told. It has run once when the constructor returns."""

    def __init__(self, module_name: str, side: str, options):
        flags = [f"--{name}={value}" for name, value in vars(options).items() if name != "side"]
        environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false", DIFFUSERS_VERBOSITY="error")
        if options.cores:
            environment["OMP_NUM_THREADS"] = str(options.cores)
        environment.setdefault("JAX_PLATFORMS", "cpu" if options.device == "cpu" else "cuda,cpu")
        self.name = f"{module_name} ({side})"
        self.process = subprocess.Popen(
            [sys.executable, "-m", module_name, f"--side={side}", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.ready = self._receive()

    def _receive(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}: its message is above")
        return json.loads(line)

    def _ask(self, what: str):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._receive()

    def time_once(self) -> tuple[float, float]:
        """Seconds on the wall clock, and of processor time."""
        return self._ask("run")

    def facts(self) -> dict:
        return self.ready | self._ask("facts")

    def stop(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def _work(module, options) -> None:
    if options.cores:  # before the thread pools start, which count the cores that they may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])

    # Answers go to the real standard output; whatever a library prints goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value):
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    start = time.perf_counter()
    program = (module.build_sd_jax if options.side == "sd_jax" else module.build_torch)(options)
    if options.side == "torch":
        program.flops = _count_torch_flops(program.run)
    else:
        program.run()
    told = {"flops": program.flops, "samples": program.samples, "note": program.note}
    answer({"ready_seconds": time.perf_counter() - start, **told})
    for line in sys.stdin:
        if line.strip() == "run":
            program.run()
            start = time.perf_counter(), time.process_time()
            program.run()
            answer((time.perf_counter() - start[0], time.process_time() - start[1]))
        else:
            memory = peak_memory(options)  # before the matrix products add to it
            peak, device, version = (_peak_jax if options.side == "sd_jax" else _peak_torch)(options)
            answer({"memory_gb": memory / 1e9, "peak_gflops": peak, "device": device, "version": version})


def peak_memory(options) -> int:
    """Bytes: of the device on GPU, of the whole process on CPU."""
    if options.device == "gpu" and options.side == "sd_jax":
        import jax

        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    if options.device == "gpu":
        import torch

        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# The matrix-product peak, GFLOP/s: the yardstick that neither side chose


def _best_rate(multiply, size: int) -> float:
    multiply()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e9


def _peak_jax(options):
    import jax
    import jax.numpy as jnp

    size = 2048 if options.device == "cpu" else 8192
    x = jnp.ones((size, size), options.dtype)
    product = jax.jit(jnp.matmul)
    name = _processor() if options.device == "cpu" else jax.devices()[0].device_kind
    return _best_rate(lambda: product(x, x).block_until_ready(), size), name, f"jax {jax.__version__}"


def _peak_torch(options):
    import diffusers
    import torch

    size = 2048 if options.device == "cpu" else 8192
    x = torch.ones((size, size), dtype=getattr(torch, options.dtype), device=torch_device(options))
    name = _processor() if options.device == "cpu" else torch.cuda.get_device_name()

    def multiply():
        torch.matmul(x, x)
        synchronize(options)

    return _best_rate(multiply, size), name, f"torch {torch.__version__}, diffusers {diffusers.__version__}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


# What the builders share


def torch_device(options) -> str:
    return "cpu" if options.device == "cpu" else "cuda"


def synchronize(options) -> None:
    if options.device == "gpu":
        import torch

        torch.cuda.synchronize()


def place_torch(model, options, part: str = "__call__"):
    """A torch model's function, placed and cast as the options say; compiled for the side `torch.compile`."""
    import torch

    model = model.eval().requires_grad_(False).to(torch_device(options), getattr(torch, options.dtype))
    function = getattr(model, part)
    return torch.compile(function) if options.side == "torch.compile" else function


def random_params(init: Callable, dtype: str):
    """Random parameters of the shapes that `init()` would give. numpy draws them: jax.random compiles slowly here."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), dtype)  # noqa: E731
    return jax.tree.map(draw, jax.eval_shape(init)["params"])


def count_flops(function: Callable, *inputs) -> float:
    """Multiplications and additions of the matrix products and convolutions that `function` traces to."""
    from sd_jax import flops

    return flops.count(function, *inputs)


def _count_torch_flops(run: Callable) -> float:
    """The same for what torch does in `run`. Its counter does not know the CPU's attention by itself."""
    import torch
    from torch.utils import flop_counter

    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    known = {
        forward: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v),
        backward: lambda out, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(out, q, k, v),
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=known) as counter:
        run()
    return float(counter.get_total_flops())
