"""Any one file of tensors, told by its content, never by its name: safetensors, or torch's pickles, zip or legacy.

Nothing that a file holds is run, and what opening one can cost is bounded: see `pickle_machine`, `read_pickle` and
`read_safetensors`.
"""

import os
from pathlib import Path

import numpy as np

from sd_jax.checkpoints import read_pickle, torch_pickle
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.read_safetensors import Contents, is_safetensors, open_file, what_else

_TEXT_OF_MAGIC = b"L%dL\n" % torch_pickle.MAGIC  # how pickles of protocol 0 and 1 begin


def open_any(path: str | os.PathLike) -> Contents:
    """{name: Tensor} and {name: text} of one file; a tensor is read when it is asked for.

    Raises FileNotFoundError, and CheckpointError, in one line that names the file and what is wrong with it.
    """
    path = Path(path)
    return _OPEN[kind(path)](path)


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All of one file: {name: array}. Raises as `open_any` does, and CheckpointError on a wrong checksum."""
    return {name: tensor.read() for name, tensor in open_any(path).tensors.items()}


def kind(path: Path) -> str:
    """ "safetensors" | "zip" | "legacy". Raises FileNotFoundError, and CheckpointError for what is none of these."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with path.open("rb") as file:
        start = file.read(1024)
    if not start:
        raise CheckpointError(f"{path}: an empty file: download or copy it again")
    if is_safetensors(start):
        return "safetensors"
    if start[:4] == b"PK\x03\x04":
        return "zip"
    if start[:1] == b"\x80" or start.startswith(_TEXT_OF_MAGIC):
        return "legacy"
    if start[257:262] == b"ustar":
        raise CheckpointError(f"{path}: a tar archive; torch's of before 2017 are not read: save it by a later torch")
    raise CheckpointError(f"{path}: {what_else(start)}")


_OPEN = {"safetensors": open_file, "zip": read_pickle.open_zipped, "legacy": read_pickle.open_legacy}
