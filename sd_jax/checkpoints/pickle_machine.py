"""Pickles of every protocol, read by a machine that only builds: nothing is ever imported and nothing is ever called.

A pickle is a program for a stack machine. This one has no way to run what such a program asks for: a name that it would
import becomes a `Global`, which is two texts; what it would call becomes a `Call`, which is a note of the function and
its arguments. Only functions that the caller names in a table are carried out, by Python functions of the caller.

Whatever the bytes say, the work is bounded: so many bytes and opcodes for all the pickles of one file (a `Stream`), no
allocation by a number that stands in the file, no recursion, and no hashes that the file's author can make collide:
  - a dict's keys become texts ({768: x} is {"768": x}); a key that occurs twice is an error;
  - sets become lists, frozensets tuples; they are never hashed;
  - the memo is a list, and an index that no pickler would reach is an error.
With the bounds below, that is at most 512 MiB of memory.

Opcodes: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

import dataclasses
import io
import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from sd_jax.checkpoints.errors import CheckpointError, shown

MOST_BYTES = 1 << 25  # of all pickles of one file. Stable Diffusion 1 with both weights and its optimiser: under 1 MiB
MOST_OPCODES = 2_000_000  # of the same: 200 thousand there
_LONGEST_INTEGER = 128  # bytes
_LONGEST_KEY = 1000  # characters, of a key that is not a text but is made one, and of an import's name


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """A name that a pickle wants to import."""

    module: str
    name: str

    def __str__(self) -> str:
        return shown(f"{self.module}.{self.name}")


class Call:
    """What a pickle wants to have called, and what it would have done with the result. Compares by identity."""

    __slots__ = ("function", "arguments", "states", "entries", "elements")

    def __init__(self, function: Any, arguments: Any):
        self.function = function  # a Global, as a rule
        self.arguments = arguments  # a tuple, as a rule
        self.states: list[Any] = []  # of each BUILD: a dict of attributes, as a rule
        self.entries: dict[str, Any] = {}  # of each SETITEM(S)
        self.elements: list[Any] = []  # of each APPEND(S)


class Stream:
    """A file's pickles, one behind the other, and how much may still be read and done. `where` names it in errors."""

    def __init__(self, where: str, file: io.BufferedIOBase):
        self.where, self.file = where, file
        self.bytes_left, self.opcodes_left = MOST_BYTES, MOST_OPCODES
        self.globals: dict[tuple[str, str], Global] = {}  # every import wanted so far, in order

    def fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.where}: {what}")

    def take(self, length):
        if length > self.bytes_left:
            self.fail(f"its pickles go beyond {MOST_BYTES >> 20} MiB, or are damaged: download or copy it again")
        data = self.file.read(length)
        if len(data) != length:
            self.fail("cut short within a pickle: download or copy it again")
        self.bytes_left -= length
        return data

    def line(self):
        data = self.file.readline(self.bytes_left)
        self.bytes_left -= len(data)
        if not data.endswith(b"\n"):
            self.fail("cut short within a pickle: download or copy it again")
        return data[:-1]

    def spend(self, opcodes):
        self.opcodes_left -= opcodes
        if self.opcodes_left < 0:
            self.fail(f"its pickles have more than {MOST_OPCODES} opcodes: no checkpoint does")


def load(
    stream: Stream,
    known: Mapping[tuple[str, str], Callable[["Machine", Any], Any]],  # (module, name) -> what its call gives, or None
    persistent: Callable[["Machine", Any], Any],  # persistent id -> what stands for it
) -> Any:
    """The next pickle of the stream: None, numbers, texts, bytes, tuples, lists, dicts, Globals, Calls, and whatever
    `known` and `persistent` made. May contain itself. Raises CheckpointError."""
    return Machine(stream, known, persistent).run()


_ABSENT = object()


class Machine:
    """One run. A method `_name` for each opcode NAME (`BININT1` -> `_binint1`); see pickletools for what each does."""

    def __init__(self, stream, known, persistent):
        self.stream, self.known, self.persistent = stream, known, persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: list[Any] = []
        self.serial = 0  # of keys that have no text

    def run(self):
        stream = self.stream
        try:
            while True:
                stream.spend(1)
                code = stream.take(1)
                if code == b".":
                    return self.stack.pop()
                handler = _HANDLERS.get(code)
                if handler is None:
                    stream.fail(f"its pickle is damaged: {code!r} is no opcode")
                handler(self)
        except CheckpointError:
            raise
        except (ValueError, OverflowError, struct.error, IndexError) as error:  # IndexError: an empty stack
            raise CheckpointError(f"{stream.where}: its pickle is damaged ({shown(str(error))})") from error

    # What opcodes have in common

    def to_mark(self):
        items, self.stack = self.stack, self.marked.pop()
        return items

    def unpack(self, format):
        return struct.unpack(format, self.stream.take(struct.calcsize(format)))[0]

    def remember(self, index):
        if not 0 <= index < MOST_OPCODES:
            self.stream.fail(f"its pickle is damaged or hostile: {index} is no place in its memo")
        if index >= len(self.memo):
            self.memo.extend([_ABSENT] * (index + 1 - len(self.memo)))
        self.memo[index] = self.stack[-1]

    def recall(self, index):
        value = self.memo[index] if 0 <= index < len(self.memo) else _ABSENT
        if value is _ABSENT:
            self.stream.fail(f"its pickle is damaged: nothing is at {index} of its memo")
        self.stack.append(value)

    def imported(self, module, name):
        if type(module) is not str or type(name) is not str or len(module) + len(name) > _LONGEST_KEY:
            self.stream.fail("its pickle is damaged: the name of an import is no text, or endless")
        return self.stream.globals.setdefault((module, name), Global(module, name))

    def call(self, function, arguments):
        """What stands for function(*arguments)."""
        if type(function) is Global and type(arguments) is tuple:
            meaning = self.known.get((function.module, function.name))
            value = None if meaning is None else meaning(self, arguments)
            if value is not None:
                return value
        return Call(function, arguments)

    def key(self, key):
        """A dict's key as a text."""
        kind = type(key)
        if kind is str:
            return key
        if kind is bytes and len(key) <= _LONGEST_KEY:
            return key.decode("latin-1")
        if kind is tuple and len(key) <= 16 and all(type(k) in _ATOMS for k in key):
            return f"({', '.join(str(k)[:_LONGEST_KEY] for k in key)})"
        if kind in _ATOMS:
            return str(key)
        if kind is Call:
            self.serial += 1
            return f"<{key.function if type(key.function) is Global else 'object'} {self.serial}>"
        self.stream.fail(f"its pickle is damaged: a {kind.__name__} is no key of a dict")

    def fill(self, target, pairs):
        """target[key] = value for each of [key, value, key, value, ...]."""
        entries = target.entries if type(target) is Call else target
        if type(entries) is not dict or len(pairs) % 2:
            self.stream.fail("its pickle is damaged: it sets items of what is no dict, or keys without values")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            key = self.key(key)
            if key in entries:
                self.stream.fail(f"its pickle is damaged: the key {shown(key)} occurs twice in a dict")
            entries[key] = value

    def extend(self, target, items):
        elements = target.elements if type(target) is Call else target
        if type(elements) is not list:
            self.stream.fail("its pickle is damaged: it appends to what is no list")
        elements.extend(items)

    # The opcodes

    def _mark(self):
        self.marked.append(self.stack)
        self.stack = []

    def _pop(self):
        if self.stack:
            self.stack.pop()
        else:
            self.stack = self.marked.pop()

    def _pop_mark(self):
        self.to_mark()

    def _dup(self):
        self.stack.append(self.stack[-1])

    def _proto(self):
        version = self.unpack("<B")
        if version > 5:
            self.stream.fail(f"a pickle of protocol {version}, or damaged: 0 to 5 are read")

    def _frame(self):
        self.stream.take(8)

    def _none(self):
        self.stack.append(None)

    def _newtrue(self):
        self.stack.append(True)

    def _newfalse(self):
        self.stack.append(False)

    def _int(self):
        text = self.stream.line()
        self.stack.append({b"00": False, b"01": True}[text] if text in (b"00", b"01") else _integer(text))

    def _long(self):
        self.stack.append(_integer(self.stream.line().removesuffix(b"L")))

    def _float(self):
        self.stack.append(float(self.stream.line()))

    def _string(self):
        """Of Python 2; what it escapes stays as it stands."""
        text = self.stream.line().strip()
        if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
            raise ValueError("a text without quotes")
        self.stack.append(text[1:-1].decode("latin-1"))

    def _unicode(self):
        text = self.stream.line().decode("raw-unicode-escape")
        self.stack.append(text.encode("utf-8", "backslashreplace").decode())

    def _tuple(self):
        items = self.to_mark()
        self.stack.append(tuple(items))

    _frozenset = _tuple

    def _empty_tuple(self):
        self.stack.append(())

    def _tuple1(self):
        self.stack[-1:] = [(self.stack[-1],)]

    def _tuple2(self):
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _tuple3(self):
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _empty_list(self):
        self.stack.append([])

    _empty_set = _empty_list

    def _list(self):
        items = self.to_mark()
        self.stack.append(items)

    def _append(self):
        item = self.stack.pop()
        self.extend(self.stack[-1], [item])

    def _appends(self):
        items = self.to_mark()
        self.extend(self.stack[-1], items)

    _additems = _appends

    def _empty_dict(self):
        self.stack.append({})

    def _dict(self):
        pairs = self.to_mark()
        self.stack.append({})
        self.fill(self.stack[-1], pairs)

    def _setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.fill(self.stack[-1], [key, value])

    def _setitems(self):
        pairs = self.to_mark()
        self.fill(self.stack[-1], pairs)

    def _get(self):
        self.recall(_integer(self.stream.line()))

    def _put(self):
        self.remember(_integer(self.stream.line()))

    def _memoize(self):
        self.remember(len(self.memo))

    def _global(self):
        module, name = self.stream.line().decode(), self.stream.line().decode()
        self.stack.append(self.imported(module, name))

    def _stack_global(self):
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(self.imported(module, name))

    def _inst(self):
        module, name = self.stream.line().decode(), self.stream.line().decode()
        arguments = self.to_mark()
        self.stack.append(self.call(self.imported(module, name), tuple(arguments)))

    def _obj(self):
        function, *arguments = self.to_mark()
        self.stack.append(self.call(function, tuple(arguments)))

    def _reduce(self):
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(function, arguments))

    _newobj = _reduce

    def _newobj_ex(self):
        self.stack.pop()  # the arguments that have names
        self._reduce()

    def _build(self):
        state = self.stack.pop()
        if type(self.stack[-1]) is Call:
            self.stack[-1].states.append(state)

    def _persid(self):
        self.stack.append(self.persistent(self, self.stream.line().decode("latin-1")))

    def _binpersid(self):
        self.stack.append(self.persistent(self, self.stack.pop()))

    def _next_buffer(self):
        self.stream.fail("its pickle keeps data outside of the file, which torch.save never does")

    _readonly_buffer = _next_buffer


_ATOMS = (type(None), bool, int, float, str, Global)


def _integer(text):
    if len(text) > 2 * _LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _pushing(format: str) -> Callable[[Machine], None]:
    return lambda machine: machine.stack.append(machine.unpack(format))


def _counted(format: str, decode: Callable[[bytes], Any]) -> Callable[[Machine], None]:
    """A length, and so many bytes."""

    def push(machine):
        length = machine.unpack(format)
        if length < 0:
            raise ValueError("a negative length")
        machine.stack.append(decode(machine.stream.take(length)))

    return push


def _binary_integer(data: bytes) -> int:
    if len(data) > _LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(data)} bytes")
    return int.from_bytes(data, "little", signed=True)


def _latin(data: bytes) -> str:
    return data.decode("latin-1")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")  # never half a surrogate pair, which could not be printed


def _extension(format: str) -> Callable[[Machine], None]:
    """A name that is registered, by number, in the process that loads it."""
    return lambda machine: machine.stack.append(machine.imported("copyreg", f"extension {machine.unpack(format)}"))


_BY_NAME: dict[str, Callable[[Machine], None]] = {
    "BININT": _pushing("<i"),
    "BININT1": _pushing("<B"),
    "BININT2": _pushing("<H"),
    "BINFLOAT": _pushing(">d"),
    "LONG1": _counted("<B", _binary_integer),
    "LONG4": _counted("<i", _binary_integer),
    "SHORT_BINSTRING": _counted("<B", _latin),
    "BINSTRING": _counted("<i", _latin),
    "SHORT_BINBYTES": _counted("<B", bytes),
    "BINBYTES": _counted("<I", bytes),
    "BINBYTES8": _counted("<Q", bytes),
    "BYTEARRAY8": _counted("<Q", bytes),
    "SHORT_BINUNICODE": _counted("<B", _text),
    "BINUNICODE": _counted("<I", _text),
    "BINUNICODE8": _counted("<Q", _text),
    "BINGET": lambda machine: machine.recall(machine.unpack("<B")),
    "LONG_BINGET": lambda machine: machine.recall(machine.unpack("<I")),
    "BINPUT": lambda machine: machine.remember(machine.unpack("<B")),
    "LONG_BINPUT": lambda machine: machine.remember(machine.unpack("<I")),
    "EXT1": _extension("<B"),
    "EXT2": _extension("<H"),
    "EXT4": _extension("<i"),
}
_HANDLERS: dict[bytes, Callable[[Machine], None]] = {
    opcode.code.encode("latin-1"): _BY_NAME.get(opcode.name) or getattr(Machine, f"_{opcode.name.lower()}")
    for opcode in pickletools.opcodes
    if opcode.name != "STOP"
}
