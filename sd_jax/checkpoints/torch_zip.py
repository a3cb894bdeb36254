"""Zip archives as torch.save writes them, read with suspicion: a table of members first, their bytes when asked for.

Everything that two readers could see differently is an error here: members that overlap one another or the directory
(how zip bombs are made of few bytes), names that occur twice, a local header that contradicts the directory, encrypted
members. Compressed members (torch stores; other programs pack again) may unpack to 20 times the file, no more.

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

import dataclasses
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sd_jax.checkpoints.errors import CheckpointError, shown
from sd_jax.checkpoints.tensors import check_unchanged, empty, stamp_of

MOST_MEMBERS = 100_000
MOST_UNPACKED = 20  # times the size of the file, and SMALL more
SMALL = 1 << 26
_LARGEST_DIRECTORY = 1 << 24
_CHUNK = 1 << 22  # bytes that are read, and their checksum taken, at a time

_END = struct.Struct("<4s4H2LH")
_LOCATOR64 = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED, _SIZES_FOLLOW = 0x1, 0x8


@dataclasses.dataclass
class Span:
    """Bytes of a file: as they are, or deflated."""

    path: Path
    name: str  # for errors
    offset: int
    length: int  # in the file
    size: int  # unpacked
    deflated: bool = False
    crc: int | None = None  # of the unpacked bytes; forgotten once it has been found right

    def __post_init__(self):
        self.stamp = stamp_of(self.path)

    def read(self, begin: int, end: int) -> np.ndarray:
        """Bytes [begin, end), in memory of their own. The first read of all takes the checksum of the whole span, so it
        reads all of it; a deflated span is unpacked anew, whole, by each read. Raises CheckpointError."""
        with self.path.open("rb", buffering=0) as file:
            check_unchanged(file, self.path, self.stamp)
            whole = (begin, end) == (0, self.size)
            if self.deflated:
                out = self._inflate(file)
                return out if whole else out[begin:end].copy()
            if self.crc is not None and not whole:
                buffer, crc = np.empty(min(_CHUNK, self.size), np.uint8), 0
                for at in range(0, self.size, _CHUNK):
                    crc = self._into(file, at, buffer[: self.size - at], crc)
                self._compare(crc)
            out, crc = empty((end - begin,), np.dtype(np.uint8)), 0
            for at in range(0, len(out), _CHUNK):
                crc = self._into(file, begin + at, out[at : at + _CHUNK], crc, whole and self.crc is not None)
            if whole:
                self._compare(crc)
            return out

    def _into(self, file, at, out, crc, wanted=True):
        """Bytes from `at` on -> out. Returns the checksum carried on, where it is wanted."""
        file.seek(self.offset + at)
        view = memoryview(out)
        while view:
            got = file.readinto(view)
            if not got:
                self._fail("cut short while it was read, at")
            view = view[got:]
        return zlib.crc32(out, crc) if wanted else crc

    def _inflate(self, file):
        out, filled, left, unpacker = np.empty(self.size, np.uint8), 0, self.length, zlib.decompressobj(-15)
        file.seek(self.offset)
        packed = b""
        try:
            while not unpacker.eof:
                if not packed:
                    packed = file.read(min(left, _CHUNK))
                    left -= len(packed)
                if not packed:
                    self._fail("damaged: less is packed than it says into")
                part = unpacker.decompress(packed, min(_CHUNK, self.size - filled + 1))
                packed = unpacker.unconsumed_tail
                if filled + len(part) > self.size:
                    self._fail("damaged: more is packed than it says into")
                out[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
                filled += len(part)
        except zlib.error as error:
            raise CheckpointError(f"{self.path}: damaged at {shown(self.name)} ({error}): download it again") from error
        if not unpacker.eof or filled != self.size or left or unpacker.unused_data:
            self._fail("damaged: the packed and unpacked sizes contradict each other at")
        self._compare(zlib.crc32(out))
        return out

    def _compare(self, crc):
        if self.crc is not None and crc != self.crc:
            self._fail("damaged: the checksum is wrong of")
        self.crc = None

    def _fail(self, what):
        raise CheckpointError(f"{self.path}: {what} {shown(self.name)}: download or copy it again")


def open_zip(path: Path) -> dict[str, Span]:
    """{name of a member: its bytes}. Raises CheckpointError on anything that is not one sound archive."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            count, begin, end = _directory(file, size, path)
            file.seek(begin)
            directory = file.read(end - begin)
            spans = _members(file, path, list(_entries(directory, count)), begin)
    except struct.error as error:
        raise CheckpointError(f"{path}: a damaged zip archive: download or copy it again") from error
    except _Unsound as error:
        raise CheckpointError(f"{path}: a damaged or hostile zip archive: {error}: download or copy it again") from None
    unpacked = sum(span.size for span in spans.values() if span.deflated)
    if unpacked > MOST_UNPACKED * size + SMALL:
        raise CheckpointError(f"{path}: a zip bomb: its {size} bytes would unpack to {unpacked}")
    return spans


class _Unsound(Exception):
    pass


def _directory(file: io.BufferedIOBase, size: int, path: Path) -> tuple[int, int, int]:
    """(members, begin and end of the list of them)."""
    begin_of_tail = max(0, size - _END.size - 0xFFFF)
    file.seek(begin_of_tail)
    tail = file.read(size - begin_of_tail)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise CheckpointError(f"{path}: a zip archive that is cut short: download or copy it again")
    _, disk, first_disk, _, count, length, begin, comment = _END.unpack_from(tail, at)
    end = begin_of_tail + at
    if end + _END.size + comment != size:
        raise _Unsound("its end is not where it should be")
    if end >= _LOCATOR64.size:
        file.seek(end - _LOCATOR64.size)
        signature, _, place, _ = _LOCATOR64.unpack(file.read(_LOCATOR64.size))
        if signature == b"PK\x06\x07":
            file.seek(min(place, size))
            signature, _, _, _, disk, first_disk, _, count, length, begin = _END64.unpack(file.read(_END64.size))
            if signature != b"PK\x06\x06" or place > end - _LOCATOR64.size - _END64.size:
                raise _Unsound("its end is not where it should be")
            end = place
    if disk or first_disk:
        raise _Unsound("it is one part of several")
    if count > MOST_MEMBERS or length > _LARGEST_DIRECTORY:
        raise _Unsound(f"{count} members are more than any checkpoint has")
    if begin + length != end:
        raise _Unsound("its directory is not where it should be")
    return count, begin, end


def _entries(directory: bytes, count: int) -> Iterator[tuple[str, bytes, int, int, int, int, int, int]]:
    """(name, its bytes, flags, method, checksum, packed size, size, offset of the local header) of each."""
    at = 0
    for _ in range(count):
        fields = _ENTRY.unpack_from(directory, at)
        signature, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment_length = fields[:13]
        offset = fields[16]
        if signature != b"PK\x01\x02":
            raise _Unsound("its directory is damaged")
        at += _ENTRY.size
        raw = directory[at : at + name_length]
        extra = directory[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        size, packed, offset = _large(extra, size, packed, offset)
        yield (
            raw.decode("utf-8" if flags & 0x800 else "cp437", "replace"),
            raw,
            flags,
            method,
            crc,
            packed,
            size,
            offset,
        )
    if at != len(directory):
        raise _Unsound("its directory is damaged")


def _large(extra: bytes, *values: int) -> tuple[int, ...]:
    """Numbers of 4 bytes that are all ones stand, as 8 bytes, in an extra field, in this order."""
    at, more = 0, b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            more = extra[at + 4 : at + 4 + length]
        at += 4 + length
    found = []
    for value in values:
        if value == 0xFFFFFFFF and more:
            (value,) = struct.unpack_from("<Q", more)
            more = more[8:]
        found.append(value)
    return tuple(found)


def _members(file: io.BufferedIOBase, path: Path, entries: list, begin_of_directory: int) -> dict[str, Span]:
    spans, occupied = {}, []
    for name, raw, flags, method, crc, packed, size, offset in entries:
        called = shown(name)
        if name in spans:
            raise _Unsound(f"{called} occurs twice")
        if flags & _ENCRYPTED:
            raise _Unsound(f"{called} is encrypted")
        if method not in (0, 8):
            raise _Unsound(f"{called} is packed by method {method}; only 0 (stored) and 8 (deflated) are read")
        if method == 0 and packed != size:
            raise _Unsound(f"the sizes of {called} contradict each other")
        if offset + _LOCAL.size + len(raw) > begin_of_directory:
            raise _Unsound(f"{called} lies outside of it")
        file.seek(offset)
        header = file.read(_LOCAL.size + len(raw))
        signature, _, local_flags, local_method, _, _, *sizes, name_length, extra_length = _LOCAL.unpack_from(header)
        agree = signature == b"PK\x03\x04" and header[_LOCAL.size :] == raw and name_length == len(raw)
        if not local_flags & _SIZES_FOLLOW:
            large = 0xFFFFFFFF
            agree = agree and all(a in (b, large) for a, b in zip(sizes, (crc, packed, size), strict=True))
        if not agree or local_method != method or (local_flags ^ flags) & _ENCRYPTED:
            raise _Unsound(f"two descriptions of {called} contradict each other")
        data = offset + _LOCAL.size + name_length + extra_length
        occupied.append((offset, data + packed, called))
        # torch.save can be told to leave the checksum out, and then writes 0
        spans[name] = Span(path, name, data, packed, size, method == 8, crc or None)
    occupied.sort()
    for (_, end, called), begin in zip(occupied, [o[0] for o in occupied[1:]] + [begin_of_directory], strict=True):
        if end > begin:
            raise _Unsound(f"{called} overlaps what follows it")
    return spans
