"""A corpus of files that would do harm, or are broken: CASES, each with how to write it and what is to be said of it.

Commands and imports of the corpus leave a file in the folder of canaries when something runs them.
"""

import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from tests.checkpoints.pickles import (
    FLOATS,
    MAGIC,
    TWO,
    call,
    imported,
    legacy,
    number,
    pickled,
    safetensors,
    several,
    storage,
    table,
    tensor,
    text,
    zipped,
)

TRAP = "checkpoint_trap"  # a module that can be imported, and leaves a canary when it is
CANARIES = Path("canaries")  # below the folder that the reader runs in
COMMAND = text(f"touch {CANARIES}/command")
CODE = text(f"open('{CANARIES}/code', 'w').close()")
SYSTEM = call("os", "system", COMMAND)

CASES: dict[str, tuple[Callable[[Path], object], str]] = {}  # name -> (writes the file, what the error says)


def case(name: str, said: str, write: Callable[[Path], object]) -> None:
    assert name not in CASES
    CASES[name] = (write, said)


def both(name: str, said: str, body: bytes, storages: dict[str, bytes] = TWO) -> None:
    """In a zip, and in the legacy format."""
    case(f"{name}_zip.ckpt", said, lambda path: zipped(path, body, storages))
    case(f"{name}_legacy.ckpt", said, lambda path: legacy(path, body, storages))


def in_zip(name: str, said: str, body: bytes, storages: dict[str, bytes] = TWO) -> None:
    case(f"{name}.ckpt", said, lambda path: zipped(path, body, storages))


def raw(name: str, said: str, data: bytes) -> None:
    case(name, said, lambda path: path.write_bytes(data))


# Code: every way to have something called or imported

both("os_system", "hostile: other programs would run os.system", SYSTEM)
both("eval", "hostile: other programs would run builtins.eval", call("builtins", "eval", CODE))
both("exec_beside_tensors", "would run builtins.exec", table({"a": tensor(), "b": call("builtins", "exec", CODE)}))
GETATTR = call("builtins", "getattr", call("importlib", "import_module", text("os")), text("system"))
both("nested_reducers", "would run importlib.import_module", GETATTR + several(COMMAND) + b"R")
in_zip("nested_arguments", "without any tensor", call(TRAP, "run", call(TRAP, "run", call(TRAP, "run"))))
in_zip("import_alone", "without any tensor", imported(TRAP, "anything"))
in_zip("import_as_key", "without any tensor", b"}" + imported(TRAP, "run") + b")RK\x01s")
in_zip("stack_global", "would run posix.system", b"\x8c\x05posix\x8c\x06system\x93" + COMMAND + b"\x85R")
in_zip(
    "stack_global_dotted", "would run os.path.os.system", b"\x8c\x02os\x8c\x0epath.os.system\x93" + COMMAND + b"\x85R"
)
in_zip("inst", "would run os.system", b"(" + COMMAND + b"ios\nsystem\n")
in_zip("obj", "would run os.system", b"(" + imported("os", "system") + COMMAND + b"o")
in_zip(
    "newobj", "would run subprocess.Popen", imported("subprocess", "Popen") + several(b"](" + COMMAND + b"e") + b"\x81"
)
in_zip("newobj_ex", "would run subprocess.run", imported("subprocess", "run") + several(COMMAND) + b"}\x92")
in_zip("build_on_a_global", "without any tensor", imported(TRAP, "Victim") + table({"run": CODE}) + b"b")
in_zip(
    "build_setstate", "without any tensor", call(TRAP, "run") + table({"__setstate__": imported(TRAP, "run")}) + b"b"
)
in_zip("extension", "without any tensor", b"\x82\x01)R")
in_zip("persistent_text", "no storage", b"Pcommand\n")
in_zip("persistent_call", "no storage", several(text("storage"), SYSTEM) + b"Q")
in_zip("storage_of_a_hostile_type", "a storage of type os.system", tensor(
    several(text("storage"), imported("os", "system"), text("0"), text("cpu"), number(4)) + b"Q"
))  # fmt: skip
in_zip("rebuilt_by_a_hostile_function", "would run os.system", call(
    "torch._tensor", "_rebuild_from_type_v2", imported("os", "system"), imported(TRAP, "T"), several(COMMAND), b"}"
))  # fmt: skip
in_zip("load_from_bytes", "without any tensor", call(
    "torch.storage", "_load_from_bytes", b"B" + struct.pack("<I", 9) + b"cos\nexit\n"
))  # fmt: skip
case("last_pickle_of_legacy.ckpt", "damaged torch pickle", lambda path: path.write_bytes(
    legacy(path, tensor(), {}).read_bytes()[: -len(pickled(b"]"))] + pickled(call(TRAP, "run"))
))  # fmt: skip
raw("first_pickle.ckpt", "hostile: other programs would run os.system", pickled(SYSTEM))
raw("plain_pickle_of_protocol_0.pt", "not a safetensors file", b"cos\nsystem\n(S'touch canaries/command'\ntR.")
raw("no_pickle_of_torch.ckpt", "a Python pickle, but not one that torch.save wrote", pickled(table({"a": number(1)})))

# Numbers and lengths that ask for memory, and structures that ask for time

in_zip("memo_put_huge", "is no place in its memo", b"Np1000000000000000000\n")
in_zip("memo_put_large", "is no place in its memo", b"Nr\xff\xff\xff\xff")
in_zip("memo_put_negative", "is no place in its memo", b"Np-1\n")
in_zip("memo_get_of_nothing", "nothing is at 7 of its memo", b"h\x07")
in_zip("contains_itself_list", "without any tensor", b"]q\x00h\x00a")
in_zip("contains_itself_dict", "without any tensor", b"}q\x00" + text("a") + b"h\x00s")
LISTS = b"".join(b"]q" + bytes([i]) for i in range(12))
FILLED = b"".join(b"h" + bytes([i]) + b"(" + b"".join(b"h" + bytes([j]) for j in range(12)) + b"e0" for i in range(12))
in_zip("contain_one_another", "in half a million ways", LISTS + FILLED)
in_zip("billion_laughs", "in half a million ways", b"]q\x00" + b"".join(
    b"](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60)
))  # fmt: skip
in_zip("laughs_of_tensors", "share storages so often", tensor(storage(numel=1 << 14), shape=(1 << 14,), strides=(1,))
    + b"q\x00](" + b"h\x00" * 5000 + b"e", {"0": bytes(1 << 16)})  # fmt: skip
FAR = tensor(storage(numel=1 << 14), shape=(2,), strides=((1 << 14) - 1,))  # 8 bytes, but all of them have to be read
in_zip("laughs_of_strides", "share storages so often", FAR + b"q\x00](" + b"h\x00" * 5000 + b"e", {"0": bytes(1 << 16)})
in_zip("deep_lists", "dicts and lists in one another", b"]" * 10**6 + b"a" * (10**6 - 10))
in_zip("deep_tuples", "dicts and lists in one another", b")" + b"\x85" * 200_000)
in_zip("deep_dicts", "dicts and lists in one another", b"".join([b"}U\x01a"] * 100_000) + b"N" + b"s" * 100_000)
in_zip("deep_calls", "without any tensor", imported(TRAP, "run") + b"q\x00" + b"\x85h\x00\x85" * 10 + b")R" * 100_000)
in_zip("calls_of_calls", "without any tensor", imported(TRAP, "run") + b"q\x00" + b")R" * 990_000)
in_zip("deep_states", "dicts and lists in one another", imported(TRAP, "run") + b"q\x000"
    + b"h\x00)R}U\x01a" * 100_000 + b"N" + b"sb" * 100_000)  # fmt: skip
in_zip("deep_key", "is no key of a dict", b"}" + b")" + b"\x85" * 200_000 + b"Ns")
in_zip("marks", "its pickle is damaged", b"(" * 200_000)
in_zip("opcodes_without_end", "more than 2000000 opcodes", b"N0" * 1_100_000)
LIST = b"](" + b"N" * 300_000 + b"eq\x000" + imported("collections", "OrderedDict") + b"q\x010"
in_zip("dicts_from_one_list", "more than 2000000 opcodes", LIST + b"h\x01h\x00\x85R0" * 100_000)
SHAPE = several(*[b"K\x01"] * 300_000) + b"q\x000"
ENDLESS = call("torch._utils", "_rebuild_tensor", storage(), b"K\x00", b"h\x00", b"h\x00")
in_zip("shapes_of_a_million", "shape or strides are damaged", SHAPE + table({str(i): ENDLESS for i in range(3000)}))
in_zip(
    "keys_of_a_million", "is no key of a dict", several(*[b"K\x01"] * 300_000) + b"q\x00}(" + b"h\x00N" * 1000 + b"u"
)
THOUSAND = tensor(shape=(0,), strides=(1,)) + b"q\x00](" + b"h\x00" * 1000 + b"eq\x010"
NAMES = table({str(i) * 50: b"h\x01" for i in range(200)})
in_zip("names_in_great_number", "more than 100000 tensors", THOUSAND + NAMES)
in_zip("names_without_end", "longer than 500 characters", b"}" + text("x" * 10**6) + b"](" + tensor() + b"es")
in_zip("colliding_integers", "without any tensor", b"}(" + b"".join(
    number(i * (2**61 - 1)) + b"N" for i in range(1, 60_000)
) + b"u")  # fmt: skip
in_zip("bytes_of_2_62", "go beyond 32 MiB", b"\x8e" + struct.pack("<Q", 1 << 62))
in_zip("bytearray_of_2_64", "go beyond 32 MiB", b"\x96" + b"\xff" * 8)
in_zip("text_of_2_63", "go beyond 32 MiB", b"\x8d" + struct.pack("<Q", 1 << 63))
in_zip("text_of_20_million", "cut short within a pickle", b"X" + struct.pack("<I", 20_000_000))
in_zip("text_of_minus_1", "a negative length", b"T\xff\xff\xff\xff")
in_zip("long4_of_2_31", "go beyond 32 MiB", b"\x8b\xff\xff\xff\x7f")
in_zip("long4_of_a_megabyte", "an integer of 1000000 bytes", b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6)
in_zip("long_of_a_million_digits", "an integer of 1000000 digits", b"L" + b"9" * 10**6 + b"L\n")
in_zip("frame_of_2_64", "without any tensor", b"\x95" + b"\xff" * 8 + b"N")
in_zip("unknown_opcode", "is no opcode", b"\xff")
in_zip("no_stop", "cut short within a pickle", b"\x80\x02N")
in_zip("empty_pickle", "its pickle is damaged", b"")
in_zip("protocol_9", "a pickle of protocol 9", b"\x80\x09N.")
in_zip("buffer_outside", "outside of the file", b"\x97")
in_zip("key_twice", "the key a occurs twice", b"}(" + text("a") + tensor() + text("a") + tensor() + b"u")
in_zip("name_twice", "two tensors are called a.b", table({"a.b": tensor(), "a": table({"b": tensor()})}))
in_zip("items_of_no_dict", "sets items of what is no dict", b"]NNs")
in_zip("key_without_value", "keys without values", b"}(Nu")

# Tensors that are not in their storages


def view(name: str, said: str, **what: object) -> None:
    in_zip(f"tensor_{name}", said, table({"a": tensor(**what)}))


view("offset_beyond", "reach out of its storage", offset=1)
view("offset_negative", "offset, shape or strides are damaged", offset=-1)
view("stride_negative", "offset, shape or strides are damaged", strides=(-2, 1))
view("stride_beyond", "reach out of its storage", strides=(3, 1))
view("stride_of_2_61", "reach out of its storage", strides=(1 << 61, 1))
view("stride_of_2_70", "offset, shape or strides are damaged", strides=(1 << 70, 1))
view("stride_0_bomb", "reach out of its storage", shape=(1 << 20, 1 << 20), strides=(0, 0))
view("shape_negative", "offset, shape or strides are damaged", shape=(-2, -2))
view("shape_overflows", "its shape is damaged", shape=(1 << 32, 1 << 32), strides=(0, 0))
view("shape_empty_overflows", "its shape is damaged", shape=(0, 1 << 40, 1 << 40), strides=(0, 0, 0))
view("shape_of_100_axes", "offset, shape or strides are damaged", shape=(1,) * 100, strides=(1,) * 100)
view("strides_too_few", "offset, shape or strides are damaged", strides=(1,))
view("storage_missing", "its storage 7 is not in the file", store=storage("7"))
view("storage_of_other_size", "has 16 bytes, but should have 20", store=storage(numel=5))
view("storage_of_2_61", "bytes, but should have", store=storage(numel=1 << 61))
view("storage_negative", "a storage's key or length", store=storage(numel=-4))
view("storage_unknown", "a storage of type torch.SecretStorage", store=storage(kind="SecretStorage"))
in_zip("tensor_shape_of_texts", "offset, shape or strides are damaged", call(
    "torch._utils", "_rebuild_tensor", storage(), b"K\x00", several(text("2")), several(text("1"))
))  # fmt: skip
in_zip("tensor_without_arguments", "is made by torch._utils._rebuild_tensor", call("torch._utils", "_rebuild_tensor"))
in_zip("storage_of_two_lengths", "has two lengths", table({"a": tensor(), "b": tensor(storage(numel=8))}))
case("legacy_view_outside.pt", "a view reaches out of storage 0", lambda path: legacy(
    path, tensor(storage(view=several(text("1"), number(2), number(3))))
))  # fmt: skip
case("legacy_length.pt", "two lengths of storage 0 contradict", lambda path: legacy(path, tensor(), TWO, itemsize=2))
case("legacy_unknown_key.pt", "storage 9 is not one", lambda path: legacy(path, tensor(), {**TWO, "9": b""}))
case("legacy_cut_short.pt", "cut short", lambda path: path.write_bytes(legacy(path, tensor()).read_bytes()[:-1]))
case(
    "legacy_too_long.pt", "1 bytes too long", lambda path: path.write_bytes(legacy(path, tensor()).read_bytes() + b"x")
)
case("legacy_huge_storage.pt", "cut short", lambda path: legacy(path, tensor(storage(numel=1 << 50))))


# Zip archives

GOOD = table({"a": tensor()})


def patched(name: str, said: str, change: Callable[[bytearray], object], method: int = 0) -> None:
    """A good archive with some of its bytes changed."""

    def write(path):
        data = bytearray(zipped(path, GOOD, method=method).read_bytes())
        path.write_bytes(change(data) or data)

    case(f"zip_{name}.ckpt", said, write)


def local(data: bytearray, member: str) -> int:
    return data.index(member.encode()) - 30


def entry(data: bytearray, member: str) -> int:
    return data.rindex(member.encode()) - 46


def put(format: str, at: Callable[[bytearray], int], value: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into(format, data, at(data), value)


def in_both_headers(
    format: str, in_local: int, in_entry: int, value: int, member: str = "archive/data/0"
) -> Callable[[bytearray], None]:
    def change(data):
        struct.pack_into(format, data, local(data, member) + in_local, value)
        struct.pack_into(format, data, entry(data, member) + in_entry, value)

    return change


def end(data: bytearray) -> int:
    return data.rindex(b"PK\x05\x06")


patched("cut_in_half", "cut short", lambda data: data[: len(data) // 2])
patched("cut_at_the_end", "cut short", lambda data: data[: end(data)])
patched("cut_by_a_byte", "damaged", lambda data: data[:-1])
patched(
    "wrong_bytes", "the checksum is wrong of archive/data/0", lambda data: data.replace(TWO["0"], bytes(15) + b"\1")
)
patched("wrong_pickle", "the checksum is wrong of archive/data.pkl", lambda data: data.replace(b"_v2", b"_v9"))
patched("wrong_checksum", "descriptions of archive/data/0", put("<I", lambda d: entry(d, "archive/data/0") + 16, 1))
patched("encrypted", "archive/data/0 is encrypted", in_both_headers("<H", 6, 8, 1))
patched("method_12", "is packed by method 12", in_both_headers("<H", 8, 10, 12))
patched("sizes", "the sizes of archive/data/0 contradict", in_both_headers("<I", 22, 24, 1 << 30))
PICKLE, DEFLATED = "archive/data.pkl", zipfile.ZIP_DEFLATED
patched("packed_too_much", "more is packed", in_both_headers("<I", 22, 24, 9, PICKLE), DEFLATED)
patched("packed_too_little", "contradict each", in_both_headers("<I", 22, 24, 999, PICKLE), DEFLATED)
patched("packed_and_cut", "less is packed", in_both_headers("<I", 18, 20, 9, PICKLE), DEFLATED)
patched("packed_nonsense", "damaged at archive", lambda data: data.replace(data[46:60], b"\xff" * 14), DEFLATED)
patched("offset", "lies outside of it", put("<I", lambda data: entry(data, "archive/data/0") + 42, 1 << 31))
patched("members", "its directory is damaged", put("<H", lambda data: end(data) + 10, 2))
patched("more_members", "a damaged zip", put("<H", lambda data: end(data) + 10, 9))
patched("directory", "its directory is not where", put("<I", lambda data: end(data) + 16, 5))
patched("directory_of_4_gb", "more than any checkpoint", put("<I", lambda data: end(data) + 12, 0xFFFFFFF0))
patched("one_of_several", "one part of several", put("<H", lambda data: end(data) + 4, 1))
patched(
    "two_names",
    "two descriptions of archive/data/0",
    lambda data: data.replace(b"archive/data/0", b"archive/data/1", 1),
)
patched("junk_before", "its directory is not where it should be", lambda data: b"PK\x03\x04" + data)
patched("junk_behind", "its end is not where it should be", lambda data: data + b"junk")


def write_overlapping(path: Path) -> None:
    """Fifield's way to few bytes: every member is the same bytes."""
    data = bytearray(zipped(path, GOOD, {str(i): TWO["0"] for i in range(3)}).read_bytes())
    first = struct.unpack_from("<I", data, entry(data, "archive/data/0") + 42)[0]
    for name in ("archive/data/1", "archive/data/2"):
        struct.pack_into("<I", data, entry(data, name) + 42, first)
    data[first + 30 : first + 44] = b"archive/data/2"
    path.write_bytes(data)


def write_quine(path: Path) -> None:
    """A member that holds the whole archive, its own header too."""
    data = bytearray(zipped(path, GOOD).read_bytes())
    for at in (entry(data, "archive/data/0") + 20, entry(data, "archive/data/0") + 24):
        struct.pack_into("<I", data, at, len(data))
    for at in (local(data, "archive/data/0") + 18, local(data, "archive/data/0") + 22):
        struct.pack_into("<I", data, at, len(data))
    path.write_bytes(data)


def write_twice(path: Path) -> None:
    data = zipped(path, GOOD, {"0": TWO["0"], "1": TWO["0"]}).read_bytes()
    path.write_bytes(data.replace(b"archive/data/1", b"archive/data/0"))


def write_bomb(path: Path, key: str = "0", size: int = 200 << 20) -> None:
    """Deflated zeros: a thousandth of what they unpack to."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()
    body = table({"a": tensor(storage(numel=size // 4), shape=(size // 4,), strides=(1,))})
    data = bytearray(zipped(path, body, {key: packed}, **{"data/x": b""}).read_bytes())
    member = f"archive/data/{key}"
    for at, crc in ((local(data, member), 14), (entry(data, member), 16)):
        struct.pack_into("<H", data, at + (8 if crc == 14 else 10), 8)
        struct.pack_into("<I", data, at + crc + 8, size)
    path.write_bytes(data)


case("zip_overlapping.ckpt", "contradict each other", write_overlapping)
case("zip_quine.ckpt", "overlaps what follows it", write_quine)
case("zip_name_twice.ckpt", "archive/data/0 occurs twice", write_twice)
case("zip_bomb.ckpt", "a zip bomb", write_bomb)
case("zip_bomb_pickle.ckpt", "no checkpoint's pickle", lambda path: zipped(
    path, pickled(b"N" * (40 << 20)), method=zipfile.ZIP_DEFLATED
))  # fmt: skip
case("zip_two_pickles.ckpt", "2 of data.pkl are in it", lambda path: zipped(path, GOOD, **{"b/data.pkl": b""}))
case(
    "zip_of_a_document.pt",
    "not one that torch.save wrote",
    lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "a"),
)
raw("zip_empty.ckpt", "not a safetensors file", b"PK\x05\x06" + bytes(18))
raw("zip_signature_only.ckpt", "cut short", b"PK\x03\x04" + b"\x99" * 4)
case("zip_byteorder.ckpt", "neither little nor big", lambda path: zipped(path, GOOD, byteorder=b"middle\n"))


# Safetensors

F4 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
DATA = FLOATS.tobytes()


def header(name: str, said: str, table: dict | bytes, data: bytes = DATA) -> None:
    encoded = table if isinstance(table, bytes) else json.dumps(table).encode()
    case(f"{name}.safetensors", said, lambda path: safetensors(path, encoded, data))


case(
    "header_longer_than_file.safetensors",
    "cut short within its header",
    lambda path: safetensors(path, b"{}", length=99),
)
case("header_of_2_60.safetensors", "header is damaged", lambda path: safetensors(path, b"{}", length=1 << 60))
case(
    "header_of_30_mb.safetensors",
    "a header of 30000000 bytes",
    lambda path: safetensors(path, b"{}", length=30_000_000),
)
header("overlapping", "overlap", {"a": F4, "b": {**F4, "data_offsets": [8, 24]}}, DATA + DATA)
header("same_bytes_twice", "overlap", {"a": F4, "b": F4})
header("holes", "leave holes", {"a": F4, "b": {**F4, "data_offsets": [20, 36]}}, DATA * 3)
header("data_cut_short", "cut short", {"a": F4}, DATA[:-1])
header("data_too_long", "1 bytes too long", {"a": F4}, DATA + b"x")
header("names_twice", "a name occurs twice", b'{"a": {"dtype": "F32"}, "a": 1}')
header("shape_negative", "entry for a is damaged", {"a": {**F4, "shape": [-4]}})
header("shape_of_minus_times_minus", "entry for a is damaged", {"a": {**F4, "shape": [-2, -2]}})
header("shape_overflows_64_bits", "entry for a is damaged", {"a": {**F4, "shape": [1 << 32, 1 << 32]}})
header("shape_empty_overflows", "damaged", {"a": {**F4, "shape": [0, 1 << 40, 1 << 40], "data_offsets": [0, 0]}}, b"")
header("shape_of_1000_axes", "entry for a is damaged", {"a": {**F4, "shape": [1] * 1000}})
header("shape_of_truths", "entry for a is damaged", {"a": {**F4, "shape": [True, 4]}})
header("shape_of_floats", "entry for a is damaged", {"a": {**F4, "shape": [4.0]}})
header("shape_of_1000_digits", "entry for a is damaged", b'{"a": {"dtype":"F32","shape":[' + b"9" * 1000 + b"]}}")
header("shape_of_10000_digits", "header is damaged", b'{"a": {"dtype":"F32","shape":[' + b"9" * 10_000 + b"]}}")
header("offsets_reversed", "has -16 bytes", {"a": {**F4, "data_offsets": [16, 0]}})
header("offsets_huge", "bytes", {"a": {**F4, "data_offsets": [0, 1 << 61]}})
header("offsets_three", "entry for a is damaged", {"a": {**F4, "data_offsets": [0, 8, 16]}})
header("type_unknown", "is of type F3", {"a": {**F4, "dtype": "F3"}})
header("type_a_list", "entry for a is damaged", {"a": {**F4, "dtype": ["F32"]}})
header("entry_a_number", "entry for a is damaged", {"a": 4})
header("name_of_two_lines", "entry for 'a\\nerror: b' is damaged", {"a\nerror: b": 4})
header("name_of_half_a_pair", "header is damaged", b'{"\\ud800": ' + json.dumps(F4).encode() + b"}")
header("metadata_no_texts", "no table of tensors", {"__metadata__": {"a": {"b": []}}, "a": F4})
header("deep_header", "header is damaged", b'{"a": ' + b"[" * 10**6 + b"]" * 10**6 + b"}")
header("deep_header_of_dicts", "header is damaged", b'{"a": ' * 200_000)
header("many_brackets", "more entries than any checkpoint", b'{"a": [' + b"[]," * 5_000_000 + b"[]]}")
header("many_numbers", "entry for a is damaged", b'{"a": [' + b"999," * 4_100_000 + b"9]}")
header("many_wide_letters", "entry for a is damaged", '{"a": "🄰'.encode() + b"a" * 16_000_000 + b'"}')
header("many_entries", "header is damaged", b'{"a": {' + b",".join(b'"%x":{}' % i for i in range(290_000)) + b"}")
header("nan", "NaN is no number of JSON", b'{"a": {"dtype": "F32", "shape": [NaN]}}')
header("infinity", "is no number of JSON", b'{"a": -Infinity}')
header("no_utf_8", "header is damaged", b'{"\xff\xfe": 1}')
header("utf_16", "header is damaged", '{"a": 1}'.encode("utf-16-le"))
header("zeros", "header is damaged", bytes(64))
header("list", "header is damaged", b"[]")
header("cut_json", "header is damaged", b'{"a": {"dtype":')

# Files of other kinds

raw("empty.safetensors", "an empty file", b"")
raw("empty.ckpt", "an empty file", b"")
raw("five_bytes.safetensors", "not a safetensors file", b"hello")
raw("length_alone.safetensors", "(8 bytes)", bytes(8))
raw("text.safetensors", "not a safetensors file", b"This is not the file that you are looking for.\n" * 9)
raw("page.ckpt", "a web page", b"<!DOCTYPE html>\n<html><body>404: not found</body></html>")
raw("page_of_two_lines.safetensors", "a web page", b"\n\n  <html></html>")
raw(
    "pointer.safetensors",
    "git lfs pull",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265380512\n",
)
raw("quantised.gguf", "a GGUF file", b"GGUF\x03\0\0\0" + bytes(64))
raw("index.json", "an index of shards", b'{"metadata": {"total_size": 1}, "weight_map": {"a": "b.safetensors"}}')
raw("archive.tar", "a tar archive", bytes(257) + b"ustar\x0000" + bytes(300))
raw("noise.ckpt", "not a safetensors file", bytes(range(255, 0, -1)) * 9)
raw("magic_alone.pt", "cut short", pickled(number(MAGIC)))
