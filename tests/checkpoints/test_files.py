"""Any one file, told by its content whatever it is called."""

import itertools

import numpy as np
import pytest

from sd_jax.checkpoints import read
from sd_jax.checkpoints.files import kind, open_any
from sd_jax.checkpoints.read_safetensors import write
from tests.checkpoints.pickles import FLOATS, MAGIC, legacy, number, pickled, safetensors, table, tensor, zipped

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", "")
MAKERS = {
    "safetensors": lambda path: write(path, {"a": FLOATS.reshape(2, 2)}, {"step": "7"}),
    "zip": lambda path: zipped(path, table({"a": tensor(), "step": number(7)})),
    "legacy": lambda path: legacy(path, table({"a": tensor(), "step": number(7)})),
}


@pytest.mark.parametrize(("name", "suffix"), list(itertools.product(MAKERS, SUFFIXES)))
def test_content_counts_and_not_the_name(tmp_path, name, suffix):
    path = tmp_path / f"model{suffix}"
    MAKERS[name](path)
    assert kind(path) == name
    contents = open_any(str(path))
    assert contents.metadata == {"step": "7"} and contents.tensors["a"].shape == (2, 2)
    assert np.array_equal(read(path)["a"], FLOATS.reshape(2, 2))


def test_plain_numbers_and_texts_of_the_top_are_metadata(tmp_path):
    body = table({"a": tensor(), "i": b"K\x05", "f": b"G?\xf8" + bytes(6), "b": b"\x88", "s": b"\x8c\x02hi", "n": b"N"})
    assert open_any(zipped(tmp_path / "a.pt", body)).metadata == {"i": "5", "f": "1.5", "b": "True", "s": "hi"}


def test_text_pickles_of_protocol_0_are_known_by_their_magic_number(tmp_path):
    path = tmp_path / "a.pt"
    whole = legacy(path, table({"a": tensor()})).read_bytes()
    magic = pickled(number(MAGIC))
    assert whole.startswith(magic)
    path.write_bytes(b"L%dL\n." % MAGIC + whole[len(magic) :])
    assert kind(path) == "legacy" and read(path)["a"].shape == (2, 2)


@pytest.mark.parametrize("length", [0x0280, 0x4B50, 0x3C])  # begin like a pickle, a zip and a web page
def test_length_of_a_header_is_not_taken_for_another_format(tmp_path, length):
    path = safetensors(tmp_path / "a.safetensors", b"{}".ljust(length))
    assert kind(path) == "safetensors" and read(path) == {}


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "a.ckpt", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read(path)
