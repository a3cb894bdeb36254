"""Preparing data: speed, memory, and what a kill costs. `python -m benchmarks.preparation [--pictures=100000]`

The data are scenes of shapes world as JPEG, PNG and WebP, in tars, parquet files and a folder, with scores as LAION's
columns have them; 1 % are broken, 1 % are there twice. Three things are measured:

whole     a run undisturbed: what it keeps against what it must keep, its memory (all processes) early and late
killed    the same, its processes killed (SIGKILL) `--kills` times and gone on with: equal to the byte?
speed     images/s against Pillow alone as img2dataset uses it, in turns: tars -> decode, resize to cover the same size
          (Lanczos), JPEG of quality 95 -> tars, a whole shard to a process, with as many processes. `prepare` does
          besides: sharpness, blockiness, two perceptual hashes, a digest, filters, histograms, a sheet of the best
          and worst, a report. At 64 and 512 pixels.

Beside other programs the processor time is what to read.
"""

import argparse
import hashlib
import io
import itertools
import json
import os
import pathlib
import resource
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parents[1]
FORMATS = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))
FILTERS = "aesthetic=5,watermark=0.5"
SHARD = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timed", type=int, default=6000, help="pictures of a round at 64 pixels; at 512 a twelfth")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", default="", help="keep data and results here; empty = nowhere")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        good = _whole_and_killed(options, folder) if options.pictures else True
        for side, count in ((64, options.timed), (512, options.timed // 12)):
            if count:
                _speed(options, folder / f"timed_{side}", side, count)
    sys.exit(not good)


# -- Whole and killed ------------------------------------------------------------------------------------------------


def _whole_and_killed(options, folder: pathlib.Path) -> bool:
    begun = time.perf_counter()
    data, truth = _make(folder / "in", options.pictures)
    print(f"{options.pictures} pictures made in {time.perf_counter() - begun:.0f} s", flush=True)
    command = ("--filters=" + FILTERS, "--resolution=48", "--bucket_step=8", "--shrink", f"--shard_size={SHARD}")
    command += (f"--workers={options.workers}", *(f"--data={path}" for path in data))

    whole, seconds, memory = folder / "whole", time.perf_counter(), []
    _run(command, whole, memory=memory)
    seconds = time.perf_counter() - seconds
    report = json.loads((whole / "report.json").read_text())
    print(f"whole: {seconds:.0f} s, {options.pictures / seconds:.0f} images/s", flush=True)
    parts = [memory[len(memory) * part // 10 : len(memory) * (part + 1) // 10] for part in (1, 5, 9)]
    print("  memory of all processes, most in the second, sixth and last tenth of the time:", end=" ")
    print(", ".join(f"{max(part, default=0) / 2**20:.0f} MiB" for part in parts))
    found = {"bad": report["bad"], "kept": report["kept"], "doubles": report["duplicates"]["exact"]}
    kept = _kept(whole)
    same = found == {name: truth[name] for name in found} and kept == truth["keys"]
    print(f"  {found}, as it must be: {same}", flush=True)

    killed, seconds = folder / "killed", time.perf_counter()
    for kill in range(options.kills):
        done = _run(command, killed, until=(kill + 1) * report["shards"] // (options.kills + 1))
        print(f"  killed with {done} of {report['shards']} shards finished", flush=True)
    _run(command, killed)
    equal = _files(whole) == _files(killed)
    print(
        f"killed {options.kills} times: {time.perf_counter() - seconds:.0f} s, equal to the byte: {equal}", flush=True
    )
    return same and equal


def _make(root: pathlib.Path, count: int) -> tuple[list[str], dict]:
    """Draws the data; -> (values of --data, what must come of them)."""
    import numpy as np
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    from sd_jax.data import shards
    from sd_jax.data.shapes import ShapesWorld

    world = ShapesWorld(64, count, two_objects=0.5, aspects=(0.75, 1.0, 4 / 3))
    rng = np.random.default_rng(0)
    scores, marks, breaks = rng.uniform(3, 8, count), rng.uniform(0, 0.7, count), rng.integers(0, 100, count) == 0
    kinds, again = rng.integers(0, len(FORMATS), count), rng.integers(0, 100, count) == 0
    truth = {"bad": 0, "kept": 0, "doubles": 0, "keys": set()}
    good, earlier = {"tars": [], "parquet": [], "pictures": []}, b""
    for name in good:
        (root / name).mkdir(parents=True, exist_ok=True)
    for begin in range(0, count, SHARD):
        place = ("tars", "parquet", "tars", "parquet", "pictures")[begin // SHARD % 5]
        rows = []
        for i in range(begin, min(begin + SHARD, count)):
            record = world[i]
            out = io.BytesIO()
            format, ending = FORMATS[kinds[i]]
            Image.fromarray(record["pixels"]).save(out, format, **({"quality": 90} if format != "PNG" else {}))
            content = earlier if again[i] and earlier else out.getvalue()
            columns = {"key": f"{i:07d}", "AESTHETIC_SCORE": float(scores[i]), "pwatermark": float(marks[i])}
            if breaks[i]:
                content = (content[: len(content) // 2], b"\0" * 500, b"")[i % 3]
                truth["bad"] += 1
            elif scores[i] > 5 and marks[i] < 0.5:
                good[place].append((columns["key"], hashlib.sha256(content).digest()))
                earlier = content
            rows.append((f"{i:07d}", ending, content, record["caption"], columns))
        if place == "tars":
            with shards.TarWriter(root / place / f"{begin:07d}.tar") as tar:
                for key, ending, content, caption, columns in rows:
                    tar.add_member(f"{key}.{ending}", content)
                    tar.add_member(f"{key}.txt", caption.encode())
                    tar.add_member(f"{key}.json", json.dumps(columns).encode())
        elif place == "parquet":
            table = [{"image": content, "text": caption, **columns} for _, _, content, caption, columns in rows]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), root / place / f"{begin:07d}.parquet")
        else:
            for key, ending, content, caption, columns in rows:
                (root / place / f"{key}.{ending}").write_bytes(content)
                (root / place / f"{key}.txt").write_text(caption)
                (root / place / f"{key}.json").write_text(json.dumps(columns))
    seen = set()
    for key, digest in itertools.chain.from_iterable(good.values()):  # as they are read: the first of equal ones stays
        truth["doubles" if digest in seen else "kept"] += 1
        truth["keys"] |= set() if digest in seen else {key}
        seen.add(digest)
    return [str(root / name) for name in good if any((root / name).iterdir())], truth


def _run(arguments: tuple[str, ...], out: pathlib.Path, until: int | None = None, memory: list | None = None) -> int:
    """Runs `prepare`; kills it and its processes once `until` shards are finished; -> how many were."""
    command = [sys.executable, "-m", "sd_jax.data.prepare", *arguments, f"--out={out}"]
    with open(out.with_suffix(".log"), "a") as log:
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(0.2)
            if memory is not None:
                memory.append(_memory(process.pid))
            if until is not None and len(list(out.glob("*_stats.json"))) >= until:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return len(list(out.glob("*_stats.json")))
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{out.with_suffix('.log').read_text()[-2000:]}")
    return len(list(out.glob("*_stats.json")))


def _memory(session: int) -> int:
    """Bytes that the processes of a session hold (RSS)."""
    total = 0
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if os.getsid(int(entry.name)) == session:
                total += int((entry / "statm").read_text().split()[1]) * resource.getpagesize()
        except (OSError, IndexError):  # it has ended
            pass
    return total


def _kept(out: pathlib.Path) -> set[str] | None:
    """The keys that the records had where they came from; None where one is there twice."""
    keys = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            keys += [json.loads(tar.extractfile(m).read())["key"] for m in tar if m.name.endswith(".json")]
    return set(keys) if len(set(keys)) == len(keys) else None


def _files(out: pathlib.Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


# -- Speed -----------------------------------------------------------------------------------------------------------


def _speed(options, folder: pathlib.Path, side: int, count: int) -> None:
    from PIL import Image

    from sd_jax.data import shards
    from sd_jax.data.shapes import ShapesWorld

    world = ShapesWorld(side, count, two_objects=0.5)
    (folder / "in").mkdir(parents=True, exist_ok=True)
    each = -(-count // 6)
    for begin in range(0, count, each):
        with shards.TarWriter(folder / "in" / f"{begin:06d}.tar") as tar:
            for i in range(begin, min(begin + each, count)):
                out, record = io.BytesIO(), world[i]
                Image.fromarray(record["pixels"]).save(out, "JPEG", quality=90)
                tar.add_member(f"{i:06d}.jpg", out.getvalue())
                tar.add_member(f"{i:06d}.txt", record["caption"].encode())
    to = side * 3 // 4
    found = sorted((folder / "in").glob("*.tar"))
    rounds = []
    for number in range(options.rounds):
        ours = _timed(
            lambda out: _run(
                (f"--data={folder / 'in'}", f"--resolution={to}", "--bucket_step=0", "--shrink", "--rank=sharpness")
                + (f"--workers={options.workers}",),
                out,
            ),
            folder / f"ours_{number}",
        )
        theirs = _timed(lambda out: _pillow(found, out, to, options.workers), folder / f"pillow_{number}")
        rounds.append([count / seconds for seconds in (*ours, *theirs)])
    ours, ours_cpu, theirs, theirs_cpu = (statistics.median(of) for of in zip(*rounds, strict=True))
    ratios, cpu = (sorted(of[i] / of[i + 2] for of in rounds) for i in (0, 1))
    print(f"{side}x{side} JPEG -> {to}x{to}, {count} pictures, {options.workers} processes, starting included:")
    print(f"  images/s: prepare {ours:.0f}, Pillow alone {theirs:.0f}; ratio {statistics.median(ratios):.2f}", end=" ")
    print(f"(least {ratios[0]:.2f}, most {ratios[-1]:.2f})")
    print(
        f"  images per second of processor: {ours_cpu:.0f}, {theirs_cpu:.0f}; ratio {statistics.median(cpu):.2f}",
        end=" ",
    )
    print(f"(least {cpu[0]:.2f}, most {cpu[-1]:.2f})", flush=True)


def _timed(run, out: pathlib.Path) -> tuple[float, float]:
    """-> (seconds, seconds of the processor in all processes)."""
    before, begun = _processor(), time.perf_counter()
    run(out)
    return time.perf_counter() - begun, _processor() - before


def _processor() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(of.ru_utime + of.ru_stime for of in used)


def _pillow(found: list[pathlib.Path], out: pathlib.Path, side: int, workers: int) -> None:
    out.mkdir(exist_ok=True)
    import multiprocessing

    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_resize_shard, found, [out / path.name for path in found], [side] * len(found)))


def _resize_shard(path: pathlib.Path, target: pathlib.Path, side: int) -> None:
    from PIL import Image

    with tarfile.open(path) as tar, tarfile.open(target, "w") as out:
        for member in tar:
            content = tar.extractfile(member).read()
            if member.name.endswith(".jpg"):
                image = Image.open(io.BytesIO(content)).convert("RGB")
                scale = side / min(image.size)
                image = image.resize(
                    (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
                )
                encoded = io.BytesIO()
                image.save(encoded, "JPEG", quality=95, subsampling=0)
                content = encoded.getvalue()
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main()
