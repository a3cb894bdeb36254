"""What a checkpoint would import if torch.load or pickle opened it: `python -m sd_jax.checkpoints.scan FILE...`

A pickle is a program, and a checkpoint from the web may be one that does more than to describe tensors. This reads it
without running it (see `pickle_machine`) and prints a line for each name that it wants to import:

    model.ckpt: collections.OrderedDict (what torch writes)
    model.ckpt: os.system (UNKNOWN: would have run when unpickled by torch.load)

Exits 0 when all is what torch itself writes, or known as harmless; 1 when something is unknown, or a file cannot be
read, which is one line on stderr. `sd_jax.load` opens either kind, and runs nothing of it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sd_jax.checkpoints import files, read_pickle, torch_pickle
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.imports import verdict
from sd_jax.checkpoints.pickle_machine import Global, Stream
from sd_jax.checkpoints.read_safetensors import open_file
from sd_jax.checkpoints.torch_zip import open_zip


def scan(path: str | Path) -> tuple[list[Global], CheckpointError | None]:
    """(what the file's pickles want to import, in order; what stopped the reading, if anything did).

    What stands before damage is found too: an unpickler runs it before it comes to the damage.
    Raises FileNotFoundError.
    """
    path = Path(path)
    try:
        kind, foreign = files.kind(path), None
    except CheckpointError as error:
        kind, foreign = "legacy", error  # torch.load would unpickle it all the same
    with path.open("rb") as file:
        stream = Stream(str(path), file)
        try:
            if kind == "safetensors":
                open_file(path)
            elif kind == "zip":
                _load_members(path, stream)
            else:
                _load_pickles(stream)
        except CheckpointError as error:
            return list(stream.globals.values()), foreign or error
    return list(stream.globals.values()), None


def _load_members(path: Path, stream: Stream) -> None:
    members = open_zip(path)
    for name, member in members.items():
        if name.endswith((".pkl", ".pickle")):
            stream.file = read_pickle.unpacked(path, member)
            torch_pickle.load(stream, {})
    read_pickle.top_folder(path, members)


def _load_pickles(stream: Stream) -> None:
    first = torch_pickle.load(stream, {})
    for _ in range(4 if first == torch_pickle.MAGIC else 0):
        torch_pickle.load(stream, {})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sd_jax.checkpoints.scan", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="checkpoints: .ckpt, .pt, .pth, .bin, .safetensors")
    failed = False
    for path in parser.parse_args(argv).files:
        try:
            wanted, error = scan(path)
        except OSError as missing:
            wanted, error = [], missing
        for found in wanted:
            said = verdict(found)
            failed = failed or said.startswith("UNKNOWN")
            print(f"{path}: {found} ({said})")
        if error is not None:
            failed = True
            print(f"error: {error}", file=sys.stderr)
        elif not wanted:
            print(f"{path}: holds no code")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
