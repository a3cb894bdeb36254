"""The ladder of configs/shapes.py: every rung with every seed. `python -m benchmarks.shapes_ladder [--seeds=3]
[--out=DIR]`

Trains, judges and prints a table of means, least and most over the seeds. What is there already is not done again.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

RUNGS = ("plain", "ema", "buckets", "full")
ATTRIBUTES = ("colour", "shape", "size", "position", "background")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rungs", default=",".join(RUNGS))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/shapes_ladder"))
    options = parser.parse_args()
    rungs = options.rungs.split(",")
    for seed in range(options.seeds):  # seed by seed: what is there after an hour is whole
        for rung in rungs:
            _run(rung, seed, options.out / f"{rung}_{seed}")
    reports = {rung: [_report(options.out / f"{rung}_{seed}") for seed in range(options.seeds)] for rung in rungs}
    print(table(reports))


def _run(rung: str, seed: int, workdir: pathlib.Path) -> None:
    if (workdir / "report.json").exists():
        return
    for command in (
        ["train.py", f"--config=configs/shapes.py:{rung},seed={seed}", f"--workdir={workdir}"],
        ["-m", "sd_jax.evals", f"--checkpoint={workdir}", f"--out={workdir}", "--two_objects=0", f"--stages={workdir}"],
    ):
        subprocess.run([sys.executable, *command], check=True)


def _report(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "report.json").read_text())


def accuracy(report: dict) -> dict[str, float]:
    """The share of right answers in a report of sd_jax.evals, by attribute and over all; seen and held out alike."""
    of = {name: statistics.mean(split[name] for split in report["accuracy"].values()) for name in ATTRIBUTES}
    return {**of, "all": statistics.mean(of.values())}


def table(reports: dict[str, list[dict]]) -> str:
    """Rung by rung: each attribute's mean over the seeds and, of all of them, the least and the most; minutes a run."""
    names = (*ATTRIBUTES, "all")
    lines = [f"| rung | {' | '.join(names)} | least, most of all | minutes |", "|" + "---|" * (len(names) + 3)]
    for rung, runs in reports.items():
        of = [accuracy(report) for report in runs]
        means = " | ".join(f"{statistics.mean(run[name] for run in of):.3f}" for name in names)
        spread = f"{min(run['all'] for run in of):.3f}, {max(run['all'] for run in of):.3f}"
        minutes = statistics.mean(report["seconds"]["total"] for report in runs) / 60
        lines.append(f"| {rung} | {means} | {spread} | {minutes:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
