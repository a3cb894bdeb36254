"""10,000 inputs that are nearly files, made by chance from seeds: `read` reads them or says what is wrong, and soon."""

import itertools
import pickletools
import re
import time

import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, read
from sd_jax.checkpoints.read_safetensors import write
from sd_jax.checkpoints.scan import scan
from tests.checkpoints.pickles import (
    FLOATS,
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

MOST_SECONDS = 2  # of one processor, for one input of a few hundred bytes
STORAGES = {"0": FLOATS.tobytes(), "1": b"\1\0\1\0"}
BODY = table(
    {
        "state_dict": table({"a": tensor(), "b": tensor(storage("1", 4, "BoolStorage"), shape=(4,), strides=(1,))}),
        "step": number(470000),
        "extra": call("m", "Configuration") + table({"x": several(text("y"), b"N")}) + b"b",
    }
)
ODD = [b"\0", b"\1", b"\x7f", b"\x80", b"\xff", b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"PK\1\2", b"PK\5\6"]
# What pickles are made of, arguments and all; some of it again and again, as in pickles
PIECES = [
    *(bytes([code]) for code in b"(0123.abedlopstuNRQ]})\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x97\x98"),
    *(b"h" + bytes([i]) for i in range(4)),
    *(b"q" + bytes([i]) for i in range(4)),
    *(b"K" + bytes([i]) for i in range(4)),
    *(text(key) for key in ("state_dict", "storage", "cpu", "0", "a", "_parameters", "_modules", "module")),
    *(imported("torch._utils", f"_rebuild_{name}") for name in ("tensor_v2", "tensor_v3", "parameter", "qtensor")),
    *(imported("torch", name) for name in ("FloatStorage", "UntypedStorage", "float16", "Size")),
    *(imported("collections", "OrderedDict"), imported("m", "f"), imported("torch._tensor", "_rebuild_from_type_v2")),
    *(b"M\xff\xff", b"J\xff\xff\xff\xff", number(1 << 62), number(-(1 << 62)), b"L99999999999999999999L\n", b"I01\n"),
    *(b"G\x7f\xf8\0\0\0\0\0\0", b"F1e400\n", b"S'a'\n", b"Va\n", b"C\2ab", b"\x8c\1a", b"p1\n", b"g1\n", b"Pa\n"),
    *(b"\x82\1", b"im\nf\n", storage(), storage("1", 4, "BoolStorage"), tensor(), several(), BODY),
]


JSON = [
    *(b"-1", b"0", b"1", b"16", b"1e9", b"1.0", b"18446744073709551616", b"true", b"null", b"NaN", b"[]", b"{}"),
    *(b'"F64"', b'"a"', b'"b"', b'"__metadata__"', b'"\\ud800"', b'"\\n"', b'"shape"', b'"dtype":1,', b",", b":", b"]"),
]


def mutated(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """`data` after one to three changes; `other` is where foreign pieces come from."""
    for _ in range(rng.integers(1, 4)):
        begin, end = sorted(rng.integers(0, len(data) + 1, 2).tolist())
        near = min(len(data), begin + int(rng.integers(1, 9)))
        at, to = sorted(rng.integers(0, len(other) + 1, 2).tolist())
        odd = ODD[rng.integers(len(ODD))]
        changed = [
            data[:begin] + rng.bytes(near - begin) + data[near:],
            data[:begin] + odd + data[begin + len(odd) :],
            data[:begin] + odd + data[begin:],
            data[:near],
            data[:begin] + data[near:],
            data[:begin] + data[end:],
            data[:end] + data[begin:end][:200] + data[end:],
            data[:begin] + other[at : min(to, at + 100)] + data[near:],
        ]
        data = changed[rng.integers(0, len(changed), 2).min()] or b"\0"  # the first, which keep lengths, more often
    return data


def with_others(rng: np.random.Generator, parts: list[bytes], others: list[bytes]) -> bytes:
    """`parts` together, but for one or two: left out, repeated, or another one instead or before."""
    parts = list(parts)
    for _ in range(rng.integers(1, 3)):
        at, other = rng.integers(len(parts)), others[rng.integers(len(others))]
        parts[at] = [other, other, other + parts[at], parts[at] + parts[at], b""][rng.integers(5)]
    return b"".join(parts)


def random_pickle(rng: np.random.Generator) -> bytes:
    return pickled(b"".join(PIECES[i] for i in rng.integers(0, len(PIECES), rng.integers(1, 40))))


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Good files of each format, and what goes into them."""
    folder = tmp_path_factory.mktemp("seeds")
    write(folder / "a", {"a": FLOATS, "b": np.ones((2, 3), np.float16)}, {"format": "pt"})
    whole = (folder / "a").read_bytes()
    starts = [position for _, _, position in pickletools.genops(pickled(BODY))][1:]  # behind its protocol
    return {
        "zip": zipped(folder / "a", BODY, STORAGES).read_bytes(),
        "packed": zipped(folder / "a", BODY, STORAGES, method=8).read_bytes(),
        "legacy": legacy(folder / "a", BODY, STORAGES, itemsize=1)
        .read_bytes()
        .replace(b"\x10" + bytes(7) + STORAGES["0"], b"\x04" + bytes(7) + STORAGES["0"]),
        "safetensors": whole,
        "header": whole[8:-28],
        "pickle": pickled(BODY),
        "opcodes": [pickled(BODY)[a:b] for a, b in itertools.pairwise(starts)],
    }


# Kind -> (how many, what writes one to `path`). Pickles and headers are changed within files that are sound otherwise.
KINDS = {
    "zip": (2000, lambda path, rng, seeds: path.write_bytes(mutated(rng, seeds["zip"], seeds["packed"]))),
    "packed": (1000, lambda path, rng, seeds: path.write_bytes(mutated(rng, seeds["packed"], seeds["zip"]))),
    "legacy": (1000, lambda path, rng, seeds: path.write_bytes(mutated(rng, seeds["legacy"], seeds["zip"]))),
    "safetensors": (1500, lambda path, rng, seeds: path.write_bytes(mutated(rng, seeds["safetensors"], seeds["zip"]))),
    "header": (1000, lambda path, rng, seeds: safetensors(
        path, with_others(rng, re.findall(rb'"[^"]*"|\d+|.', seeds["header"]), JSON), bytes(28)
    )),
    "pickle": (1000, lambda path, rng, seeds: zipped(
        path, b"\x80" + mutated(rng, seeds["pickle"][1:], random_pickle(rng)), STORAGES
    )),
    "opcode": (1500, lambda path, rng, seeds: zipped(
        path, pickled(with_others(rng, seeds["opcodes"], PIECES)), STORAGES
    )),
    "opcodes": (1000, lambda path, rng, seeds: zipped(path, random_pickle(rng), STORAGES)),
}  # fmt: skip


def test_there_are_10_000():
    assert sum(count for count, _ in KINDS.values()) == 10_000


@pytest.mark.parametrize("kind", KINDS)
def test_read_reads_or_says_what_is_wrong(tmp_path, seeds, kind):
    count, write_one = KINDS[kind]
    path, outcomes, slowest = tmp_path / "a.ckpt", {"read": 0, "refused": 0}, 0.0
    for seed in range(count):
        write_one(path, np.random.default_rng([seed, count]), seeds)
        started = time.process_time()
        try:
            arrays = read(path)
            assert all(type(array) is np.ndarray for array in arrays.values())
            outcomes["read"] += 1
        except CheckpointError as error:
            said = str(error)
            assert said.startswith(str(path)) and len(said.splitlines()) == 1, (seed, said)
            outcomes["refused"] += 1
        if seed % 5 == 0:
            scan(path)
        slowest = max(slowest, time.process_time() - started)
    assert slowest < MOST_SECONDS
    assert min(outcomes.values()) > 0, outcomes
