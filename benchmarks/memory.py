"""Peak memory of one SD 1.5 picture, each side in a fresh process. `python -m benchmarks.memory [--pixels=512] ...`

The weights are random and made in place, the peak is that of the process (of the device on GPU), imports and
compilation included. It does not depend on the number of steps.
"""

import sys

from benchmarks import timing


def main(arguments: list[str]) -> None:
    options = timing.parse("benchmarks.sampling", ["--steps=2", *arguments])
    peaks = {}
    for side in options.sides.split(","):
        worker = timing.Worker("benchmarks.sampling", side, options)
        facts = worker.facts()
        worker.stop()
        peaks[side] = facts["memory_gb"]
        print(f"  {side:14}{peaks[side]:6.2f} GB  ({facts['device']}; {facts['version']})", flush=True)
    ours, *others = peaks
    for side in others:
        print(f"  {ours} / {side}: {peaks[ours] / peaks[side]:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
