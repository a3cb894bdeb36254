"""The ladder of configs/shapes.py: every rung with every seed. `python -m benchmarks.shapes_ladder [--seeds=3]
[--rungs=plain,full] [--out=DIR]`

Trains, judges the last weights and the averaged ones, and prints a table of means, least and most over the seeds. What
is there already is not done again.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

RUNGS = {"plain": "centre crops", "buckets": "aspect buckets", "full": "aspect buckets, min-SNR"}
WEIGHTS = {"raw": "last weights", "ema": "averaged weights"}
ATTRIBUTES = ("colour", "shape", "size", "position", "background")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rungs", default=",".join(RUNGS), help="some of them")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/shapes_ladder"))
    options = parser.parse_args()
    rungs = options.rungs.split(",")
    reports = {(rung, weights): [] for rung in rungs for weights in WEIGHTS}
    for seed in range(options.seeds):  # seed by seed: what is there after an hour is whole
        for rung in rungs:
            workdir = options.out / f"{rung}_{seed}"
            cache = options.out / f"cache_{'squares' if rung == 'plain' else 'buckets'}_{seed}"
            for weights in WEIGHTS:
                reports[rung, weights].append(_judged(rung, seed, weights, workdir, cache))
        print(table(reports), flush=True)


def _judged(rung: str, seed: int, weights: str, workdir: pathlib.Path, cache: pathlib.Path) -> dict:
    """The report of one run's weights; trains it where it is not yet done."""
    report = workdir / weights / "report.json"
    if not report.exists():
        flags = (f"--checkpoint={workdir}", f"--weights={weights}", f"--out={report.parent}", "--two_objects=0")
        config = f"--config=configs/shapes.py:{rung},seed={seed}"
        for command in (
            ["train.py", config, f"--workdir={workdir}", f"--config.data.cache_dir={cache}"],
            ["-m", "sd_jax.evals", *flags, f"--stages={workdir}"],
        ):
            subprocess.run([sys.executable, *command], check=True)
    return json.loads(report.read_text())


def accuracy(report: dict) -> dict[str, float]:
    """The share of right answers in a report of sd_jax.evals, by attribute and over all; seen and held out alike."""
    of = {name: statistics.mean(split[name] for split in report["accuracy"].values()) for name in ATTRIBUTES}
    return {**of, "all": statistics.mean(of.values())}


def table(reports: dict[tuple[str, str], list[dict]]) -> str:
    """A row for each rung and its weights: every attribute's mean over the seeds and, of all of them, the least and the
    most; minutes of a run and its evaluation."""
    names = (*ATTRIBUTES, "all")
    lines = [f"| run | weights | {' | '.join(names)} | least, most of all | minutes |", "|" + "---|" * (len(names) + 4)]
    for (rung, weights), runs in reports.items():
        of = [accuracy(report) for report in runs]
        means = " | ".join(f"{statistics.mean(run[name] for run in of):.3f}" for name in names)
        spread = f"{min(run['all'] for run in of):.3f}, {max(run['all'] for run in of):.3f}"
        minutes = statistics.mean(report["seconds"]["total"] for report in runs) / 60
        lines.append(f"| {RUNGS[rung]} | {WEIGHTS[weights]} | {means} | {spread} | {minutes:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
