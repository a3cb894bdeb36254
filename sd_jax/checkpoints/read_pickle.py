"""What torch.save wrote (`.ckpt`, `.pt`, `.pth`, `.bin`), read without torch and without running what it holds.

Two formats are told apart by their first bytes:
  - zip (torch 1.6 and later, TorchScript too): TOP/data.pkl, a pickle whose persistent ids ("storage", type, key,
    device, elements) name members TOP/data/KEY, which are the storages' bytes; TOP/byteorder says "little" or "big".
    Of a TorchScript archive the tensors of data.pkl are read; its code is not looked at.
  - legacy: five pickles (a magic number, the version 1001, facts of the machine, the object, the list of the storages'
    keys), then for each key 8 bytes of length in elements and the bytes, always little-endian. Persistent ids have a
    sixth field: a view of a part of a storage.
The tar format of torch before 0.1.10 (2017) is not read.

The pickles go through `pickle_machine`, where nothing is imported and nothing is called. What makes a tensor is a view
of a storage: offset, shape and strides in elements. Only what lies within its storage is one; negative numbers, and
shapes with more elements than the storage (strides of 0), are errors.

Which tensors come out, and under which names: those below the top's `state_dict` where there is one (Lightning), else
all; names of nested dicts, and places in lists, are joined by "."; of a pickled torch.nn.Module come the parameters and
buffers, named as its own state_dict() does. Complex tensors are read; sparse and quantised ones are errors.

A file whose pickle names what only an attack needs (os.system, eval, ...: `imports.py`) is refused whole. Other names
that it wants to import are left alone: Lightning's files are full of them.

Memory: opening takes at most 512 MiB, whatever the file says (see `pickle_machine`). All its tensors together have at
most 4 times the bytes of its storages and 64 MiB more, since tensors may share storages; and those have no more bytes
than the file, or 20 times as many (and 64 MiB) where it is compressed. Each tensor is read alone, when it is asked for.

Formats: torch/serialization.py, torch/_utils.py (https://github.com/pytorch/pytorch)
"""

import functools
import io
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sd_jax.checkpoints.errors import CheckpointError, listing, shown
from sd_jax.checkpoints.imports import is_weapon
from sd_jax.checkpoints.pickle_machine import MOST_BYTES, Call, Global, Stream
from sd_jax.checkpoints.read_safetensors import Contents
from sd_jax.checkpoints.tensors import Tensor, stored
from sd_jax.checkpoints.torch_pickle import MAGIC, Storage, View, counts, load
from sd_jax.checkpoints.torch_zip import SMALL, Span, open_zip

MOST_SHARING = 4
_DEEPEST = 100  # dicts within dicts
_MOST_VISITED = 500_000
_MOST_TENSORS = 100_000
_LONGEST_NAME = 500

# Opening a file


def open_zipped(path: Path) -> Contents:
    """A zip archive of torch.save or torch.jit.save; its tensors are read later, one by one. Raises CheckpointError."""
    members = open_zip(path)
    top = top_folder(path, members)
    storages: dict[str, Storage] = {}
    stream = Stream(str(path), unpacked(path, members[f"{top}data.pkl"]))
    root = load(stream, storages)
    _refuse_weapons(stream)
    order = "little"
    if f"{top}byteorder" in members:
        order = unpacked(path, members[f"{top}byteorder"]).read().decode("latin-1")
        if order not in ("little", "big"):
            raise CheckpointError(f"{path}: {top}byteorder is {shown(order)}, neither little nor big")
    spans = {}
    for key, storage in storages.items():
        member = members.get(f"{top}data/{key}")
        if member is not None:
            if member.size != storage.end:
                raise CheckpointError(
                    f"{path}: damaged: {shown(member.name)} has {member.size} bytes, but should have {storage.end}"
                )
            spans[key] = member
    return _contents(path, root, spans, order == "big")


def open_legacy(path: Path) -> Contents:
    """A file of torch.save before 1.6, or told to write as before; tensors are read later. Raises CheckpointError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        stream = Stream(str(path), file)
        storages: dict[str, Storage] = {}
        if load(stream, storages) != MAGIC:
            _refuse_weapons(stream)
            stream.fail("a Python pickle, but not one that torch.save wrote")
        version, _, root, keys = (load(stream, storages) for _ in range(4))
        _refuse_weapons(stream)
        if version != 1001 or type(keys) is not list or not all(type(key) is str for key in keys):
            stream.fail("a damaged torch pickle: download or copy it again")
        spans: dict[str, Span] = {}
        for key in keys:
            if key not in storages or key in spans:
                stream.fail(f"a damaged torch pickle: storage {shown(key)} is not one, or is there twice")
            storage, head = storages[key], file.read(8)
            begin = file.tell()
            if begin + storage.end > size or len(head) < 8:
                stream.fail(f"cut short: {size} of at least {begin + storage.end} bytes are there: download it again")
            if struct.unpack("<q", head)[0] * storage.dtype.itemsize != storage.end:
                stream.fail(f"a damaged torch pickle: two lengths of storage {shown(key)} contradict each other")
            spans[key] = Span(path, f"storage {key}", begin, storage.end, storage.end)
            file.seek(storage.end, io.SEEK_CUR)
        if file.tell() < size:
            stream.fail(f"{size - file.tell()} bytes too long: download or copy it again")
    return _contents(path, root, spans, False)


def top_folder(path: Path, members: dict[str, Span]) -> str:
    """ "archive/", say: what data.pkl lies in."""
    found = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(found) != 1:
        what = "no data.pkl is" if not found else f"{len(found)} of data.pkl are"
        raise CheckpointError(f"{path}: a zip archive, but not one that torch.save wrote ({what} in it)")
    return found[0].removesuffix("data.pkl")


def unpacked(path: Path, member: Span) -> io.BytesIO:
    """A small member. Raises CheckpointError where it is not small."""
    if member.size > MOST_BYTES:
        raise CheckpointError(f"{path}: {shown(member.name)} has {member.size} bytes: no checkpoint's pickle does")
    return io.BytesIO(member.read(0, member.size).data)


def _refuse_weapons(stream: Stream) -> None:
    """Nothing of it has been run or ever will be here, but it is no checkpoint to trust, or to open elsewhere."""
    weapons = [str(wanted) for wanted in stream.globals.values() if is_weapon(wanted)]
    if weapons:
        stream.fail(f"hostile: other programs would run {listing(weapons)} on opening it (not run here): delete it")


# From the object to tensors by name


def _contents(path: Path, root: Any, spans: dict[str, Span], swap: bool) -> Contents:
    metadata = {}
    if type(root) is dict:
        metadata = {name: str(value) for name, value in root.items() if type(value) in (str, int, float, bool)}
        if type(root.get("state_dict")) in (dict, Call):
            root = root["state_dict"]
    views = _views(path, root)
    if not views:
        raise CheckpointError(f"{path}: a torch pickle without any tensor")
    tensors, work = {}, 0
    for name, view in views.items():
        tensors[name], cost = _lazy(path, name, view, spans.get(view.storage.key), swap)
        work += cost
    if work > MOST_SHARING * sum(span.size for span in spans.values()) + SMALL:
        raise CheckpointError(f"{path}: its tensors share storages so often that they are {work} bytes: save it anew")
    return Contents(tensors, metadata)


def _views(path: Path, root: Any) -> dict[str, View]:
    """Tensors by name. Walks, without recursion, down every path, so that what is shared has all of its names."""
    views: dict[str, View] = {}
    trail: list[tuple[str, int, Iterator[tuple[str, Any]]]] = [("", 0, iter([("", root)]))]
    inside: set[int] = set()  # what the trail leads through; it is not entered again
    visited = 0
    while trail:
        prefix, identity, entries = trail[-1]
        key, value = next(entries, (None, None))
        if key is None:
            trail.pop()
            inside.discard(identity)
            continue
        visited += 1
        if visited > _MOST_VISITED:
            raise CheckpointError(f"{path}: a torch pickle that refers to its own parts in half a million ways")
        below = _entries(value)
        if (below is None and type(value) not in (View, Call)) or id(value) in inside:
            continue
        if len(prefix) + len(key) > _LONGEST_NAME:
            raise CheckpointError(f"{path}: a tensor's name is longer than {_LONGEST_NAME} characters: {shown(key)}")
        name = f"{prefix}.{key}" if prefix else key
        if type(value) is View:
            name = name or "tensor"
            if len(views) == _MOST_TENSORS:
                raise CheckpointError(f"{path}: more than {_MOST_TENSORS} tensors: no checkpoint has so many")
            if name in views:
                raise CheckpointError(f"{path}: two tensors are called {shown(name)}")
            views[name] = value
        elif below is None:
            raise CheckpointError(f"{path}: {shown(name)} is made by {value.function}, which is not read")
        else:
            if len(trail) > _DEEPEST:
                raise CheckpointError(f"{path}: a torch pickle of more than {_DEEPEST} dicts and lists in one another")
            inside.add(id(value))
            trail.append((name, id(value), below))
    return views


def _entries(value: Any) -> Iterator[tuple[str, Any]] | None:
    """What lies in a container. None = it is none, or a Call that makes a tensor of a kind that is not read."""
    if type(value) is dict:
        return iter(value.items())
    if type(value) in (list, tuple):
        return ((str(i), item) for i, item in enumerate(value))
    if type(value) is not Call:
        return None
    function = value.function
    if type(function) is Global and function.module in ("torch._utils", "torch._tensor"):
        return None
    return _attributes(value)


def _attributes(call: Call) -> Iterator[tuple[str, Any]]:
    """Of a torch.nn.Module its parameters, buffers and modules, of another object all that it was given."""
    for state in call.states:
        if type(state) is dict and type(state.get("_parameters")) in (dict, Call):
            for kind in ("_parameters", "_buffers", "_modules"):
                entries = state.get(kind)
                entries = entries.entries if type(entries) is Call else entries
                yield from entries.items() if type(entries) is dict else ()
        elif type(state) is dict:
            yield from state.items()
        elif type(state) is tuple:  # attributes, and slots
            yield from (item for part in state if type(part) is dict for item in part.items())
    yield from call.entries.items()
    yield from ((str(i), item) for i, item in enumerate(call.elements))


def _lazy(path: Path, name: str, view: View, span: Span | None, swap: bool) -> tuple[Tensor, int]:
    """A view that has been found to lie within its storage, and how many bytes have to be read, or unpacked, for it."""
    where, storage = f"{path}: {shown(name)}", view.storage
    if span is None:
        raise CheckpointError(f"{where}: its storage {shown(storage.key)} is not in the file")
    sound = counts([view.offset]) and counts(view.shape) and counts(view.strides)
    if not sound or len(view.shape) != len(view.strides):
        raise CheckpointError(f"{where}: its offset, shape or strides are damaged")
    shape, itemsize = tuple(view.shape), view.dtype.itemsize
    count = math.prod(shape)
    if math.prod(max(n, 1) for n in shape) * itemsize >= 1 << 62:
        raise CheckpointError(f"{where}: its shape is damaged")
    # A stride along an axis of length 1 says nothing, and is often nonsense
    strides = tuple(stride if n > 1 else 0 for n, stride in zip(shape, view.strides, strict=True))
    last = view.offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    there = (storage.end - storage.begin) // itemsize
    if count and (last >= there or count > there):
        raise CheckpointError(f"{where}: its {count} elements reach out of its storage of {there}")
    begin, end = (storage.begin + itemsize * at for at in (view.offset, last + 1)) if count else (0, 0)
    cost = span.size if span.deflated else end - begin
    if span.crc is None and not span.deflated and not swap and strides == _dense(shape):
        return stored(path, shown(name), shape, view.dtype, span.offset + begin), cost
    read = functools.partial(_read, span, begin, end, view.dtype, shape, strides, swap)
    return Tensor(shape, view.dtype, read), cost


def _read(
    span: Span,
    begin: int,  # bytes
    end: int,
    dtype: np.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],  # elements
    swap: bool,  # the file has the other order of bytes
) -> np.ndarray:
    flat = span.read(begin, end)
    if swap:
        part = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
        flat = flat.view(f"u{part}").byteswap()
    flat = flat.view(dtype)
    if flat.size == 0 or strides == _dense(shape):
        return flat.reshape(shape)
    return np.ascontiguousarray(np.ndarray(shape, dtype, flat, 0, tuple(stride * dtype.itemsize for stride in strides)))


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of an array without gaps; 0 along an axis of length 1."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step if n > 1 else 0)
        step *= n
    return tuple(reversed(strides))
