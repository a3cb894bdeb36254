"""Torch's files through our reader: what torch.save wrote, to the bit, and what is made by hand as it never would."""

import argparse
import collections
import io
import pickletools
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, pickle_machine, read
from sd_jax.checkpoints.files import open_any
from sd_jax.checkpoints.pickle_machine import Call, Global, Stream
from tests.checkpoints.pickles import (
    FLOATS,
    TWO,
    call,
    imported,
    legacy,
    number,
    pickled,
    several,
    storage,
    table,
    tensor,
    text,
    zipped,
)

FORMATS = pytest.mark.parametrize("zip", [True, False], ids=["zip", "legacy"])
WRITERS = pytest.mark.parametrize("write", [zipped, legacy])


# Against torch


def named(value, name=""):
    """torch's own tensors of a nested object, with our names."""
    if hasattr(value, "untyped_storage"):
        return {name: value.detach()}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found = {}
    for key, item in pairs:
        found |= named(item, f"{name}.{key}" if name else str(key))
    return found


def assert_equal(got, want):
    """Names, types, shapes and bits of arrays against torch's tensors."""
    import torch

    assert list(got) == list(want)
    for name, array in got.items():
        expected = want[name].contiguous()
        assert str(expected.dtype) == f"torch.{array.dtype.name}" and tuple(expected.shape) == array.shape, name
        assert array.tobytes() == bytes(expected.reshape(-1).view(torch.uint8).numpy()), name
        assert array.flags.c_contiguous


def tensors(late=True):
    """Of every type (`late`: those of torch 2.1 and later too) and layout."""
    import torch

    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    whole = torch.arange(24)
    dtypes = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128".split()
    lately = "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz uint16 uint32 uint64".split() * late
    return {
        **{name: (base * 100).to(getattr(torch, name)) for name in dtypes[:4] + dtypes[-2:]},
        **{name: (base * 100).to(torch.int64).to(getattr(torch, name)) for name in dtypes[4:-2]},
        **{name: base.abs().to(getattr(torch, name)) for name in lately},
        **{f"{name}.strided": base.abs().to(getattr(torch, name))[:, 1::2] for name in lately},
        "base": base,
        "again": base,
        "transposed": base.T,
        "strided": base[1::2, ::3],
        "row": base[2],
        "offset": base.reshape(-1)[5:11],
        "bf16.transposed": base.bfloat16().T,
        "permuted": torch.randn(2, 3, 4, 5, generator=generator).permute(3, 0, 2, 1),
        "channels_last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "one.wide": whole.as_strided((1, 4), (10**12, 2)),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "empty.inside": whole[3:3],
        "expanded": torch.arange(3).expand(1, 3),
        "parameter": torch.nn.Parameter(base[:2]),
        "frozen": torch.nn.Parameter(base[:2].half(), requires_grad=False),
    }


@pytest.mark.parity
@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_equal_to_torch(tmp_path, zip, protocol):
    import torch

    path = tmp_path / "a.pt"
    torch.save(tensors(late=zip), path, _use_new_zipfile_serialization=zip, pickle_protocol=protocol)
    assert_equal(read(path), named(torch.load(path, weights_only=False)))


@pytest.mark.parity
def test_types_that_torch_writes_in_its_legacy_format_but_cannot_read(tmp_path):
    import torch

    torch.save(tensors(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert_equal(read(tmp_path / "a.pt"), named(tensors()))


class Configuration(argparse.Namespace):
    """What people put into checkpoints: classes of their own."""


@pytest.mark.parity
@FORMATS
def test_lightning_file_gives_its_state_dict(tmp_path, zip):
    import torch

    weights = torch.nn.Linear(3, 4).state_dict()
    path = tmp_path / "a.ckpt"
    recursive = Configuration(learning_rate=1e-4, losses=collections.defaultdict(list, a=[torch.ones(2)]))
    recursive.me = recursive
    saved = {
        "epoch": 5,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": {**weights, "ema": torch.nn.Parameter(torch.randn(3, 2).T)},
        "callbacks": {Configuration: {"best_model_score": torch.tensor(0.1), "at": np.float32(0.5), 3: {1, 2}}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(4, 3)}}, "param_groups": [{"betas": (0.9, 0.99)}]}],
        "hyper_parameters": recursive,
        "rng": np.random.default_rng(0),
    }
    torch.save(saved, path, _use_new_zipfile_serialization=zip)
    contents = open_any(path)
    assert_equal(read(path), named(saved["state_dict"]))
    assert contents.metadata == {"epoch": "5", "global_step": "470000", "pytorch-lightning_version": "1.4.2"}


@pytest.mark.parity
@FORMATS
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch cannot find the source of a class to store it
def test_pickled_module_gives_its_state_dict(tmp_path, zip):
    import torch

    shared = torch.nn.Linear(3, 3)
    module = torch.nn.Sequential(shared, torch.nn.BatchNorm1d(3), torch.nn.Sequential(shared, torch.nn.PReLU()))
    path = tmp_path / "a.pt"
    torch.save(module, path, _use_new_zipfile_serialization=zip)
    assert_equal(read(path), module.state_dict())


@pytest.mark.parity
@FORMATS
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_textual_inversion_of_a_parameter_dict(tmp_path, zip):
    import torch

    vectors = torch.randn(2, 8)
    saved = {
        "string_to_token": {"*": 265},
        "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)}),
        "name": "cat",
        "step": 500,
    }
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=zip)
    assert_equal(read(tmp_path / "a.pt"), {"string_to_param.*": vectors})
    assert open_any(tmp_path / "a.pt").metadata == {"name": "cat", "step": "500"}


@pytest.mark.parity
@FORMATS
def test_nested_objects_and_bare_tensors(tmp_path, zip):
    import torch

    nested = {768: ({"linear.0.weight": torch.ones(2)}, {"linear.0.weight": torch.zeros(2)}), "list": [torch.ones(1)]}
    torch.save(nested, tmp_path / "a.pt", _use_new_zipfile_serialization=zip)
    assert_equal(read(tmp_path / "a.pt"), named(nested))
    torch.save(torch.ones(3), tmp_path / "b.pt", _use_new_zipfile_serialization=zip)
    assert_equal(read(tmp_path / "b.pt"), {"tensor": torch.ones(3)})


@pytest.mark.parity
@FORMATS
def test_attributes_of_tensors(tmp_path, zip):
    import torch

    tensor, parameter = torch.arange(3), torch.nn.Parameter(torch.ones(2))
    tensor.tag, parameter.tag = "a", "b"
    torch.save({"t": tensor, "p": parameter}, tmp_path / "a.pt", _use_new_zipfile_serialization=zip)
    assert_equal(read(tmp_path / "a.pt"), {"t": tensor, "p": parameter.detach()})


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(tmp_path):
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.jit.script(module).save(str(tmp_path / "a.pt"))
    assert_equal(read(tmp_path / "a.pt"), module.state_dict())


@pytest.mark.parity
def test_zip_without_checksums(tmp_path):
    import torch

    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(5.0)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_equal(read(tmp_path / "a.pt"), {"a": torch.arange(5.0)})


@pytest.mark.parity
@FORMATS
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_of_other_kinds_are_named(tmp_path, zip):
    import torch

    sparse = torch.eye(3).to_sparse()
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    for other, function in ((sparse, "_rebuild_sparse_tensor"), (quantised, "_rebuild_qtensor")):
        path = tmp_path / "a.pt"
        torch.save({"a": {"b": other}, "c": torch.ones(1)}, path, _use_new_zipfile_serialization=zip)
        with pytest.raises(CheckpointError, match=rf"a\.b is made by torch\._utils\.{function}, which is not read"):
            read(path)
        torch.save({"state_dict": {"c": torch.ones(1)}, "a": other}, path, _use_new_zipfile_serialization=zip)
        assert_equal(read(path), {"c": torch.ones(1)})


@pytest.mark.parity
@WRITERS
def test_files_made_by_hand_are_torchs(tmp_path, write):
    import torch

    store = storage(view=b"N" if write is legacy else b"")
    transposed = tensor(store, shape=(2, 2), strides=(1, 2))
    path = write(tmp_path / "a.pt", table({"a": tensor(store), "b": transposed}))
    assert_equal(read(path), named(torch.load(path, weights_only=True)))


# By hand


@WRITERS
def test_by_hand(tmp_path, write):
    body = table({"a": tensor(), "b": tensor(shape=(2,), strides=(2,), offset=1)})
    got = read(write(tmp_path / "a.pt", body))
    assert got["a"].tolist() == [[0, 1], [2, 3]] and got["b"].tolist() == [1, 3]


@pytest.mark.parametrize("top", ["", "v1-5-pruned/", "a/b/"])
def test_any_top_folder(tmp_path, top):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr(f"{top}data.pkl", pickled(table({"a": tensor()})))
        archive.writestr(f"{top}data/0", FLOATS.tobytes())
    assert read(tmp_path / "a.pt")["a"].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "complex64", "bfloat16"])
def test_big_endian_zip(tmp_path, dtype):
    kinds = {
        "float32": "Float",
        "float16": "Half",
        "int64": "Long",
        "complex64": "ComplexFloat",
        "bfloat16": "BFloat16",
    }
    array = (np.arange(4) * 1.5).astype(getattr(ml_dtypes, dtype, dtype))
    part = array.dtype.itemsize // (2 if dtype == "complex64" else 1)
    swapped = array.view(f"u{part}").byteswap().tobytes()
    body = table({"a": tensor(storage(kind=f"{kinds[dtype]}Storage"))})
    path = zipped(tmp_path / "a.pt", body, {"0": swapped}, byteorder=b"big")
    assert np.array_equal(read(path)["a"].reshape(-1), array)
    with pytest.raises(CheckpointError, match="neither little nor big"):
        read(zipped(tmp_path / "b.pt", body, {"0": swapped}, byteorder=b"middle"))


def test_zip_that_was_packed_again(tmp_path):
    array = np.arange(60_000, dtype=np.float32) % 100
    whole = tensor(storage(numel=60_000), shape=(60_000,), strides=(1,))
    part = tensor(storage(numel=60_000), shape=(3,), strides=(100,), offset=7)
    path = zipped(tmp_path / "a.pt", table({"a": whole, "b": part}), {"0": array.tobytes()}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < array.nbytes // 2
    got = read(path)
    assert np.array_equal(got["a"], array) and got["b"].tolist() == [7, 7, 7]


def test_archive_of_more_than_4_gb(tmp_path):
    """A storage behind a hole of 5 GiB, which takes no room on the disk; its place stands in 8 bytes."""
    path = zipped(tmp_path / "a.pt", table({"a": tensor()}))
    data, name, far = path.read_bytes(), b"archive/data/0", 5 << 30
    record, entry, directory = data.index(name) - 30, data.rindex(name) - 46, data.index(b"PK\1\2")
    end_of_directory = data.index(b"PK\5\6")
    fields = list(struct.unpack_from("<4s6H3L5H2L", data, entry))
    fields[11], fields[16] = 12, 0xFFFFFFFF  # bytes of the extra field, and a place that is in it
    large = struct.pack("<4s6H3L5H2L", *fields) + name + struct.pack("<2HQ", 1, 8, far)
    listed = data[directory:entry] + large + data[entry + 46 + len(name) : end_of_directory]
    with path.open("r+b") as file:
        file.truncate(far)
        file.seek(far)
        begin = far + file.write(data[record : record + 30 + len(name) + 16])
        end = begin + file.write(listed)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, len(listed), begin))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, len(listed), 0xFFFFFFFF, 0))
    assert read(path)["a"].tolist() == [[0, 1], [2, 3]]
    with zipfile.ZipFile(path) as archive:  # Python's own reader takes it for the same
        assert archive.read("archive/data/0") == TWO["0"]


def test_view_of_a_part_of_a_legacy_storage(tmp_path):
    view = several(text("1"), number(1), number(3))  # its own key, where it begins, its length
    store = storage(view=view)
    path = legacy(tmp_path / "a.pt", table({"a": tensor(store, shape=(2,), strides=(1,), offset=1)}))
    assert read(path)["a"].tolist() == [2, 3]
    with pytest.raises(CheckpointError, match="3 elements reach out of its storage of 3"):
        read(legacy(tmp_path / "b.pt", table({"a": tensor(store, shape=(3,), strides=(1,), offset=1)})))


def test_objects_as_python_2_wrote_them(tmp_path):
    pairs = several(b"](" + b"](" + b"U\x01a" + tensor() + b"e" + b"](" + b"S'b'\n" + tensor() + b"e" + b"e")
    path = legacy(tmp_path / "a.pt", imported("collections", "OrderedDict") + pairs + b"R")
    assert list(read(path)) == ["a", "b"]


def test_a_tensor_is_read_only_when_asked_for(tmp_path):
    """And of a file that lacks the bytes of another, or has them wrong."""
    storages = {"0": FLOATS.tobytes(), "1": (FLOATS + 1).tobytes()}
    body = table({"a": tensor(), "b": tensor(storage("1"))})
    for write in (zipped, legacy):
        path = write(tmp_path / "a.pt", body, storages)
        data = path.read_bytes()
        path.write_bytes(data.replace(storages["1"], bytes(16)))
        tensors = open_any(path).tensors
        assert tensors["a"].read().tolist() == [[0, 1], [2, 3]]
        if write is zipped:
            with pytest.raises(CheckpointError, match="checksum is wrong of archive/data/1"):
                tensors["b"].read()
        path.write_bytes(data[: data.index(storages["1"]) + 8])
        with pytest.raises(CheckpointError, match="changed since it was opened"):
            tensors["b"].read()


def test_checksum_is_taken_of_the_whole_storage_at_the_first_part(tmp_path):
    body = table({name: tensor(shape=(1,), strides=(1,), offset=i) for i, name in enumerate("abcd")})
    path = zipped(tmp_path / "a.pt", body)
    assert read(path)["c"].tolist() == [2]
    path.write_bytes(path.read_bytes().replace(TWO["0"], TWO["0"][:-1] + b"\1"))  # in "d" alone
    with pytest.raises(CheckpointError, match="checksum"):
        open_any(path).tensors["a"].read()


def test_shared_containers_have_all_of_their_names(tmp_path):
    inner = b"}q\x05" + text("w") + tensor() + b"s"
    path = zipped(tmp_path / "a.pt", table({"a": inner, "b": b"h\x05", "c": b"](h\x05h\x05e"}))
    assert list(read(path)) == ["a.w", "b.w", "c.0.w", "c.1.w"]


def test_what_contains_itself_is_walked_once(tmp_path):
    body = b"}q\x05(" + text("me") + b"h\x05" + text("w") + tensor() + b"u"
    assert list(read(zipped(tmp_path / "a.pt", body))) == ["w"]


# The machine


def run(data, known=None):
    return pickle_machine.load(Stream("file", io.BytesIO(data)), known or {}, lambda machine, identity: identity)


def test_every_opcode_has_a_handler():
    assert len(pickle_machine._HANDLERS) == len(pickletools.opcodes) - 1  # without STOP


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_of_every_protocol(protocol):
    import pickle

    value = {
        "none": None,
        "numbers": [0, 1, -1, 255, 65536, -(2**31), 2**40, -(2**70), 2**800, True, False, 1.5, float("inf")],
        "texts": ["", "naïve", "日本", "a\nb", "\\", "x" * 300],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "nested": [[[{"a": ({},)}]]],
    }
    value["again"] = value["nested"]
    got = run(pickle.dumps(value, protocol))
    assert got == value and got["again"] is got["nested"]


@pytest.mark.parametrize("protocol", range(3, 6))
def test_bytes_sets_and_bytearrays(protocol):
    import pickle

    got = run(pickle.dumps([b"ab", b"x" * 300, {3}, frozenset([3]), bytearray(b"ab")], protocol))
    assert got[:2] == [b"ab", b"x" * 300]
    if protocol >= 4:
        assert got[2:4] == [[3], (3,)]
    if protocol == 5:
        assert got[4] == b"ab"


def test_keys_become_texts():
    got = run(b"}(K\x01K\x02\x88K\x03G?\xf8\0\0\0\0\0\0K\x04NK\x05C\x01aK\x06K\x07K\x08\x86K\x09cm\nC\nK\x0au.")
    assert got == {"1": 2, "True": 3, "1.5": 4, "None": 5, "a": 6, "(7, 8)": 9, "m.C": 10}
    first, second = run(b"}(cm\nC\n)RK\x01cm\nC\n)RK\x02u.")
    assert first == "<m.C 1>" and second == "<m.C 2>"


@pytest.mark.parametrize(
    "data",
    [
        b"cm\nf\n(K\x01tR.",  # GLOBAL, REDUCE
        b"\x8c\x01m\x8c\x01f\x93K\x01\x85R.",  # STACK_GLOBAL
        b"(K\x01im\nf\n.",  # INST
        b"(cm\nf\nK\x01o.",  # OBJ
        b"cm\nf\nK\x01\x85\x81.",  # NEWOBJ
        b"cm\nf\nK\x01\x85}\x92.",  # NEWOBJ_EX
    ],
)
def test_calls_become_notes_of_them(data):
    made = run(data)
    assert type(made) is Call and made.function == Global("m", "f") and made.arguments == (1,)
    assert run(data, {("m", "f"): lambda machine, arguments: [*arguments, "known"]}) == [1, "known"]


def test_what_is_done_to_the_result_of_a_call_is_noted():
    made = run(b"cm\nf\n)R}X\x01\0\0\0aK\x01sbX\x01\0\0\0bK\x02s](K\x03e0K\x04a.")
    assert made.states == [{"a": 1}] and made.entries == {"b": 2} and made.elements == [4]


def test_extension_registry_is_not_asked():
    assert run(b"\x82\x01.") == Global("copyreg", "extension 1")
    assert run(call("m", "f", b"\x84\x01\0\0\0") + b".").arguments == (Global("copyreg", "extension 1"),)
