"""Torch's files made by hand, opcode by opcode, so that they can be wrong in any way; torch is not needed."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np

FLOATS = np.arange(4, dtype=np.float32)
TWO = {"0": FLOATS.tobytes()}  # the storage of `tensor()`
MAGIC = 0x1950A86A20F9469CFC6C


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def several(*items: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def imported(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return imported(module, name) + several(*arguments) + b"R"


def storage(key: str = "0", numel: int = 4, kind: str = "FloatStorage", view: bytes = b"") -> bytes:
    return several(text("storage"), imported("torch", kind), text(key), text("cpu"), number(numel), view) + b"Q"


def tensor(store: bytes = b"", offset: int = 0, shape: tuple = (2, 2), strides: tuple = (2, 1)) -> bytes:
    return call(
        "torch._utils",
        "_rebuild_tensor_v2",
        store or storage(),
        number(offset),
        several(*map(number, shape)),
        several(*map(number, strides)),
        b"\x89",
        call("collections", "OrderedDict"),
    )


def table(entries: dict[str, bytes]) -> bytes:
    """A dict."""
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def zipped(path: Path, body: bytes, storages: dict[str, bytes] = TWO, method: int = 0, **more: bytes) -> Path:
    """TOP/data.pkl, which is the pickle of `body`, or is it where it starts as one; the storages; and other members."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", body if body.startswith(b"\x80") else pickled(body))
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        for name, data in {"version": b"3\n", **more}.items():
            archive.writestr(f"archive/{name}", data)
    return path


def legacy(path: Path, body: bytes, storages: dict[str, bytes] = TWO, itemsize: int = 4) -> Path:
    """Torch's five pickles, the fourth of `body`, and the storages."""
    out = io.BytesIO()
    for value in (MAGIC, 1001, {"little_endian": True}):
        out.write(pickle.dumps(value, 2))
    out.write(body if body.startswith(b"\x80") else pickled(body))
    out.write(pickle.dumps(list(storages), 2))
    for data in storages.values():
        out.write(struct.pack("<q", len(data) // itemsize) + data)
    path.write_bytes(out.getvalue())
    return path


def safetensors(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path
