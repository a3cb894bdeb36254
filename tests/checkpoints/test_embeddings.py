"""Embeddings as files: all forms, both ways, to the bit; and what is none."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sd_jax.adapters.textual_inversion import Embedding
from sd_jax.checkpoints import CheckpointError, embeddings, read_safetensors, write_torch
from sd_jax.checkpoints.files import open_any
from tests.checkpoints import pickles

FORMS = [("a1111", ".pt"), ("diffusers", ".bin"), ("diffusers", ".safetensors"), ("sdxl", ".safetensors")]


def rows(count, width, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(dtype)


def an_embedding(format, token="<sks>", count=3, dtype=np.float32):
    vectors = {"text_encoder": rows(count, 768, dtype)}
    if format == "sdxl":
        vectors["text_encoder_2"] = rows(count, 1280, dtype, 1)
    return Embedding(token, vectors)


def assert_same(found, wanted):
    assert found.token == wanted.token and found.vectors.keys() == wanted.vectors.keys()
    for part, array in wanted.vectors.items():
        np.testing.assert_array_equal(found.vectors[part], array, strict=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("format", "ending"), FORMS)
def test_round_trips(tmp_path, format, ending, dtype):
    for count in (1, 4):
        wanted = an_embedding(format, f"sks {count}", count, dtype)
        path = tmp_path / f"sks {count}{ending}"
        embeddings.save(path, jax.tree.map(jnp.asarray, wanted), format)
        assert_same(embeddings.load(path), wanted)
        assert embeddings.is_embedding(open_any(path).tensors)
        first = path.read_bytes()
        embeddings.save(path, embeddings.load(path), format, overwrite=True)
        assert path.read_bytes() == first


def test_the_word_is_where_the_form_has_it(tmp_path):
    wanted = an_embedding("diffusers", "<a.b/c>")
    embeddings.save(tmp_path / "other.safetensors", wanted)
    embeddings.save(tmp_path / "other.bin", wanted)
    for ending in (".safetensors", ".bin"):
        assert_same(embeddings.load(tmp_path / f"other{ending}"), wanted)
    embeddings.save(tmp_path / "sks.pt", an_embedding("a1111", "sks"), "a1111", step=500)
    facts = open_any(tmp_path / "sks.pt").metadata
    assert facts == {"name": "sks", "step": "500"}
    (tmp_path / "sks.pt").rename(tmp_path / "renamed.v2.pt")
    assert embeddings.load(tmp_path / "renamed.v2.pt").token == "renamed.v2"
    for name in ("emb_params", "*"):
        read_safetensors.write(tmp_path / "EasyNegative.safetensors", {name: rows(2, 768)})
        assert embeddings.load(tmp_path / "EasyNegative.safetensors").token == "EasyNegative"


def test_one_vector_may_be_flat(tmp_path):
    read_safetensors.write(tmp_path / "a.safetensors", {"<cat-toy>": rows(1, 1024)[0]})
    assert_same(embeddings.load(tmp_path / "a.safetensors"), Embedding("<cat-toy>", {"text_encoder": rows(1, 1024)}))


@pytest.mark.parametrize("written", [pickles.zipped, pickles.legacy])
def test_files_of_2022(tmp_path, written):
    """A ParameterDict, and an id that is a tensor: what CompVis' and the first of A1111's hold."""
    held = pickles.imported("torch.nn.modules.container", "ParameterDict") + b")R"
    held += pickles.table({"training": b"\x88", "_parameters": pickles.table({"*": pickles.tensor()})}) + b"b"
    identity = pickles.tensor(offset=1, shape=(), strides=())
    body = pickles.table({"string_to_token": pickles.table({"*": identity}), "string_to_param": held})
    found = embeddings.load(written(tmp_path / "old.pt", body))
    assert_same(found, Embedding("old", {"text_encoder": pickles.FLOATS.reshape(2, 2)}))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"<a>": rows(1, 768), "<b>": rows(2, 768)}, "2 embeddings .<a>; <b>.: save each in a file of its own"),
        ({"clip_l": rows(2, 768), "clip_g": rows(3, 1280)}, "clip_l and clip_g are of 2 and 3 vectors"),
        ({"clip_l": rows(2, 768), "t5xxl": rows(2, 4096)}, "no embedding of textual inversion, its tensors are"),
        ({"<a>": np.zeros((2, 3, 4), np.float32)}, "no embedding"),
        ({"lora_te_x.lora_up.weight": rows(4, 8), "lora_te_x.lora_down.weight": rows(4, 8)}, "no embedding"),
        ({"weight": rows(1, 768), "bias": rows(1, 1)[0]}, "no embedding"),  # an aesthetic predictor
        ({"<a>": np.zeros((2, 768), np.int32)}, "<a> is int32 .2, 768., no vectors of words"),
        ({"<a>": np.zeros((0, 768), np.float32)}, "no vectors of words"),
        ({"<a>": np.full((1, 768), np.nan, np.float32)}, "<a> holds numbers that are not finite"),
    ],
)
def test_what_is_none(tmp_path, tensors, said):
    read_safetensors.write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError, match=f"a.safetensors: .*{said}|a.safetensors: {said}") as caught:
        embeddings.load(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


def test_a_hypernetwork_is_none(tmp_path):
    write_torch.write_object(
        tmp_path / "a.pt", {768: ({"linear.0.weight": rows(2, 2)}, {"linear.0.weight": rows(2, 2)})}
    )
    assert not embeddings.is_embedding(open_any(tmp_path / "a.pt").tensors)
    with pytest.raises(FileNotFoundError):
        embeddings.load(tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    ("name", "format", "wanted", "said"),
    [
        ("a.pt", "kohya", "diffusers", "format='kohya' is not one of a1111, diffusers, sdxl"),
        ("sks.bin", "a1111", "a1111", r"embeddings of a1111 are called \*.pt"),
        ("sks.pt", "diffusers", "diffusers", r"are called \*.bin or \*.safetensors"),
        ("cat.pt", "a1111", "a1111", "the file's name is the word: call it <sks>.pt"),
        ("<sks>.pt", "a1111", "sdxl", "is for text_encoder, text_encoder_2: save as sdxl"),
        ("<sks>.safetensors", "sdxl", "a1111", "is for text_encoder: save as a1111 or diffusers"),
    ],
)
def test_what_cannot_be_written(tmp_path, name, format, wanted, said):
    with pytest.raises(ValueError, match=said):
        embeddings.save(tmp_path / name, an_embedding(wanted), format)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    embeddings.save(tmp_path / "a.bin", an_embedding("diffusers"))
    with pytest.raises(FileExistsError):
        embeddings.save(tmp_path / "a.bin", an_embedding("diffusers", count=1))
    assert embeddings.load(tmp_path / "a.bin").count == 3


@pytest.mark.parity
def test_torch_and_safetensors_read_ours(tmp_path):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    wanted = rows(3, 768)
    embeddings.save(tmp_path / "sks.pt", an_embedding("a1111", "sks"), "a1111", step=7)
    found = torch.load(tmp_path / "sks.pt", weights_only=True)
    np.testing.assert_array_equal(found["string_to_param"].pop("*").numpy(), wanted, strict=True)
    facts = {"name": "sks", "step": 7, "sd_checkpoint": None, "sd_checkpoint_name": None}
    assert found == {"string_to_token": {"*": 265}, "string_to_param": {}, **facts}
    embeddings.save(tmp_path / "a.bin", an_embedding("diffusers"))
    np.testing.assert_array_equal(torch.load(tmp_path / "a.bin", weights_only=True)["<sks>"].numpy(), wanted)
    embeddings.save(tmp_path / "<sks>.safetensors", an_embedding("sdxl"), "sdxl")
    found = safetensors.load_file(tmp_path / "<sks>.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {"clip_l": (3, 768), "clip_g": (3, 1280)}


@pytest.mark.parity
@pytest.mark.parametrize("zip", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files_that_torch_wrote(tmp_path, zip):
    torch = pytest.importorskip("torch")
    vectors = torch.from_numpy(rows(2, 768))
    for held in ({"*": vectors}, torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})):
        data = {"string_to_token": {"*": 265}, "string_to_param": held, "name": "x", "step": 3, "sd_checkpoint": None}
        torch.save(data, tmp_path / "sks.pt", _use_new_zipfile_serialization=zip)
        assert_same(embeddings.load(tmp_path / "sks.pt"), Embedding("sks", {"text_encoder": vectors.numpy()}))
    torch.save(vectors, tmp_path / "bare.bin", _use_new_zipfile_serialization=zip)
    assert_same(embeddings.load(tmp_path / "bare.bin"), Embedding("bare", {"text_encoder": vectors.numpy()}))
