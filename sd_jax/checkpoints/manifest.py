"""Size and CRC-32 of every file of a folder, in its manifest.json: what a disk lost or changed is noticed.

Orbax itself notices a file that is too short, but not a flipped bit in an array of hardly compressible numbers.
"""

import concurrent.futures
import functools
import json
import os
import zlib
from pathlib import Path

NAME = "manifest.json"
_CHANGING = "_CHECKPOINT_METADATA"  # Orbax writes the time of its commit into it afterwards, and we read nothing of it
_PIECE = 2**20  # bytes


def write(folder: Path) -> None:
    """Of what is there now; all of it is on the disk, not only on its way there, when this returns. Raises OSError."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (NAME, _CHANGING)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        sums = list(threads.map(functools.partial(_size_and_sum, sync=True), paths))
    files = {path.relative_to(folder).as_posix(): said for path, said in zip(paths, sums, strict=True)}
    with (folder / NAME).open("w", encoding="utf-8") as file:
        json.dump({"files": files}, file)
        file.flush()
        os.fsync(file.fileno())


def damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the folder, None = nothing. `part` of `parts` processes reads its share of the files."""
    try:
        files = json.loads((folder / NAME).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {NAME} cannot be read"

    def look(name: str) -> str | None:
        try:
            if (folder / name).stat().st_size == files[name][0] and _size_and_sum(folder / name) == files[name]:
                return None
        except (OSError, ValueError, TypeError, IndexError):
            return f"{name} cannot be read"
        return f"{name} is not what was written"

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        return next(filter(None, threads.map(look, sorted(files)[part::parts])), None)


def _size_and_sum(path: Path, sync: bool = False) -> list[int]:
    size, crc, piece = 0, 0, memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(piece):
            size, crc = size + read, zlib.crc32(piece[:read], crc)
        if sync:
            os.fsync(file.fileno())
    return [size, crc]
