"""Files of the LoRA family: read strictly, written back to the bit."""

import hashlib
import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sd_jax.checkpoints import adapters, keys_kohya, keys_peft, write_torch
from sd_jax.checkpoints.adapters import open_adapter, save_adapter
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.files import read
from sd_jax.checkpoints.read_safetensors import open_file, write
from sd_jax.checkpoints.save import save_checkpoint
from tests.checkpoints.tiny import SPECS, compvis_file, random_params
from tests.checkpoints.tiny_adapters import ALGORITHMS, PLAIN, assert_same_layers, random_layers

SPEC = SPECS["sd1"]
QUERY = "down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_q"
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
PEFT = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def array(*shape, dtype=np.float32):
    return np.arange(1, math.prod(shape) + 1, dtype=np.float32).reshape(shape).astype(dtype)


def pair(down=(2, 32), up=(32, 2)):
    return {f"{KOHYA}.lora_down.weight": array(*down), f"{KOHYA}.lora_up.weight": array(*up)}


def opened(tmp_path, tensors, spec=SPEC, metadata=None, name="a.safetensors"):
    write(tmp_path / name, tensors, metadata)
    return open_adapter(tmp_path / name, spec)


def refusal(tmp_path, tensors, spec=SPEC, metadata=None, name="a.safetensors"):
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, tensors, spec, metadata, name)
    message = str(caught.value)
    assert "\n" not in message and name in message
    return message


# Round trips


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "sdxl_refiner"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_written_is_read_to_the_bit(tmp_path, kind, algorithm):
    spec, path = SPECS[kind], tmp_path / "a.safetensors"
    layers = random_layers(spec, algorithm, dtype=np.float16)
    for format in adapters.FORMATS if algorithm in PLAIN else ["kohya"]:
        save_adapter(path, layers, spec, format, overwrite=True)
        back = open_adapter(path, spec)
        assert back.format == format and list(back.layers) == ["unet", *spec.text_encoders]
        assert_same_layers(back.layers, layers)
        save_adapter(tmp_path / "b.safetensors", back.layers, spec, format, overwrite=True)
        first, second = read(path), read(tmp_path / "b.safetensors")
        assert first.keys() == second.keys()
        assert all(first[n].tobytes() == second[n].tobytes() and first[n].dtype == second[n].dtype for n in first)


def test_names_and_shapes_in_the_two_formats(tmp_path):
    layers = {"unet": {QUERY: random_layers(SPEC, "dora")["unet"][QUERY]}}
    save_adapter(tmp_path / "k.safetensors", layers, SPEC)
    save_adapter(tmp_path / "d.safetensors", layers, SPEC, "diffusers")
    shapes = {n: a.shape for n, a in read(tmp_path / "k.safetensors").items()}
    assert shapes == {
        f"{KOHYA}.lora_down.weight": (2, 32),
        f"{KOHYA}.lora_up.weight": (32, 2),
        f"{KOHYA}.alpha": (),
        f"{KOHYA}.dora_scale": (32, 1),
    }
    shapes = {n: a.shape for n, a in read(tmp_path / "d.safetensors").items()}
    assert shapes == {
        f"{PEFT}.lora_A.weight": (2, 32),
        f"{PEFT}.lora_B.weight": (32, 2),
        f"{PEFT}.lora_magnitude_vector.weight": (32,),
    }


def test_alphas_of_diffusers_are_in_the_header(tmp_path):
    layers = random_layers(SPEC, "lora", rank=2, alpha=3.0)
    layers["unet"][QUERY]["alpha"] = np.asarray(0.5, np.float32)
    save_adapter(tmp_path / "a.safetensors", layers, SPEC, "diffusers")
    settings = json.loads(open_file(tmp_path / "a.safetensors").metadata["lora_adapter_metadata"])
    assert settings["unet.r"] == 2 and settings["unet.lora_alpha"] == 3
    assert settings["unet.alpha_pattern"] == {PEFT.removeprefix("unet."): 0.5} and settings["unet.rank_pattern"] == {}
    assert settings["text_encoder.alpha_pattern"] == {}
    assert_same_layers(open_adapter(tmp_path / "a.safetensors", SPEC).layers, layers)


def test_from_one_format_to_the_other_and_back(tmp_path):
    layers = random_layers(SPECS["sdxl"], "dora")
    path = tmp_path / "a.safetensors"
    for format in ("kohya", "diffusers", "kohya"):
        save_adapter(path, layers, SPECS["sdxl"], format, overwrite=True)
        layers = open_adapter(path, SPECS["sdxl"]).layers
    assert_same_layers(layers, random_layers(SPECS["sdxl"], "dora"))


def test_jax_arrays_and_dtypes(tmp_path):
    layers = jax.tree.map(jnp.asarray, random_layers(SPEC))
    save_adapter(tmp_path / "a.safetensors", layers, SPEC, dtype="bfloat16")
    back = open_adapter(tmp_path / "a.safetensors", SPEC).layers
    entry, reference = back["unet"][QUERY], layers["unet"][QUERY]
    assert entry["lora_down"].dtype == ml_dtypes.bfloat16 and entry["alpha"].dtype == np.float32
    np.testing.assert_array_equal(entry["lora_down"], np.asarray(reference["lora_down"]).astype(ml_dtypes.bfloat16))


def test_what_the_header_says(tmp_path):
    given = {"ss_steps": "100", "modelspec.title": "Stars", "sshs_model_hash": "old", "ss_network_dim": "99"}
    save_adapter(tmp_path / "a.safetensors", random_layers(SPEC), SPEC, metadata=given)
    data = (tmp_path / "a.safetensors").read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    said = open_adapter(tmp_path / "a.safetensors", SPEC).metadata
    assert said["sshs_model_hash"] == digest and said["modelspec.hash_sha256"] == f"0x{digest}"
    assert said["ss_steps"] == "100" and said["modelspec.title"] == "Stars"
    assert said["ss_network_module"] == "networks.lora" and "ss_network_args" not in said
    assert said["ss_network_dim"] == "2" and said["ss_network_alpha"] == "3.0"
    assert said["ss_base_model_version"] == "sd_v1"
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert said["modelspec.implementation"] == "diffusers"
    assert said["modelspec.prediction_type"] == "epsilon" and said["modelspec.resolution"] == "32x32"


@pytest.mark.parametrize(
    ("kind", "algorithm", "said"),
    [
        ("sdxl", "lora", {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_module": "networks.lora"}),
        ("sdxl", "lora", {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}),
        ("sdxl", "lora", {"modelspec.implementation": "https://github.com/Stability-AI/generative-models"}),
        ("sd2", "loha", {"ss_base_model_version": "sd_v2", "ss_network_args": '{"algo": "loha"}'}),
        ("sd1", "lokr", {"ss_network_module": "lycoris.kohya", "ss_network_dim": "2", "ss_network_alpha": "4.0"}),
        ("sd1", "dora", {"ss_network_args": '{"algo": "lora", "dora_wd": "True"}'}),
        ("sd1", "whole", {"ss_network_args": '{"algo": "full"}'}),
    ],
)
def test_headers_by_model_and_algorithm(tmp_path, kind, algorithm, said):
    save_adapter(tmp_path / "a.safetensors", random_layers(SPECS[kind], algorithm), SPECS[kind])
    found = open_file(tmp_path / "a.safetensors").metadata
    assert {name: found[name] for name in said} == said


def test_ranks_that_differ_are_called_dynamic(tmp_path):
    layers = {"unet": dict(random_layers(SPEC, rank=2)["unet"])}
    layers["unet"][QUERY] = random_layers(SPEC, rank=1, alpha=1.0)["unet"][QUERY]
    save_adapter(tmp_path / "a.safetensors", layers, SPEC)
    said = open_file(tmp_path / "a.safetensors").metadata
    assert said["ss_network_dim"] == said["ss_network_alpha"] == "Dynamic"


# Reading what others write


def test_a_missing_alpha_is_the_rank_and_so_is_zero(tmp_path):
    for tensors in (pair(), {**pair(), f"{KOHYA}.alpha": np.float16(0)}):
        alpha = opened(tmp_path, tensors).layers["unet"][QUERY]["alpha"]
        assert alpha.shape == () and float(alpha) == 2.0 and alpha.dtype == np.float32


@pytest.mark.parametrize("alpha", [np.asarray(3), np.asarray([3.0], np.float16), np.asarray(3.0, ml_dtypes.bfloat16)])
def test_alphas_of_other_types(tmp_path, alpha):
    found = opened(tmp_path, {**pair(), f"{KOHYA}.alpha": alpha}).layers["unet"][QUERY]["alpha"]
    assert found.shape == () and float(found) == 3.0
    assert found.dtype == (np.float32 if alpha.dtype == np.int64 else alpha.dtype)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_linears_written_as_convolutions_and_the_reverse(tmp_path, kind):
    """SD 1 projects by 1x1 convolutions, SD 2 by linears: files have either for either."""
    spec, other = SPECS[kind], SPECS["sd2" if kind == "sd1" else "sd1"]
    path = "down_blocks_0/attentions_0/proj_in"
    for algorithm in ("dora", "lokr", "whole"):
        layers = {"unet": {path: random_layers(other, algorithm)["unet"][path]}}
        save_adapter(tmp_path / "a.safetensors", layers, other, overwrite=True)
        entry = open_adapter(tmp_path / "a.safetensors", spec).layers["unet"][path]
        fits = random_layers(spec, algorithm)["unet"][path]
        if algorithm != "lokr":
            assert {n: a.shape for n, a in entry.items()} == {n: a.shape for n, a in fits.items()}
        for name, there in layers["unet"][path].items():
            np.testing.assert_array_equal(entry[name].reshape(-1), there.reshape(-1))


def test_sdxl_by_either_naming(tmp_path):
    spec = SPECS["sdxl"]
    layers = random_layers(spec)
    save_adapter(tmp_path / "a.safetensors", layers, spec)
    written = read(tmp_path / "a.safetensors")
    assert any(name.startswith("lora_unet_input_blocks_") for name in written)
    single = {layer: name for name, layer in keys_kohya.names(spec).items()}
    renamed = {}
    for theirs, layer in keys_peft.names(spec).items():
        if layer.path in layers[layer.part]:
            flat = theirs.split(".", 1)[1].replace(".", "_")
            mark = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[layer.part]
            for what in ("lora_down.weight", "lora_up.weight", "alpha"):
                renamed[f"{mark}_{flat}.{what}"] = written[f"{single[layer]}.{what}"]
    assert renamed.keys() != written.keys()
    assert_same_layers(opened(tmp_path, renamed, spec, name="b.safetensors").layers, layers)


def test_files_of_torch(tmp_path):
    write_torch.write(tmp_path / "a.pt", pair())
    found = open_adapter(tmp_path / "a.pt", SPEC)
    np.testing.assert_array_equal(found.layers["unet"][QUERY]["lora_up"], array(32, 2))
    write_torch.write(
        tmp_path / "pytorch_lora_weights.bin",
        {f"{PEFT}.lora.down.weight": array(2, 32), f"{PEFT}.lora.up.weight": array(32, 2)},
    )
    found = open_adapter(tmp_path, SPEC)
    assert found.format == "diffusers" and list(found.layers["unet"]) == [QUERY]


@pytest.mark.parametrize(
    "name", ["adapter.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.safetensors"]
)
def test_folders(tmp_path, name):
    write(tmp_path / name, pair())
    assert list(open_adapter(tmp_path, SPEC).layers["unet"]) == [QUERY]


def test_a_folder_of_peft_says_its_alpha_beside(tmp_path):
    bare = PEFT.removeprefix("unet.")
    tensors = {
        f"base_model.model.{bare}.lora_A.weight": array(2, 32),
        f"base_model.model.{bare}.lora_B.weight": array(32, 2),
    }
    write(tmp_path / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "alpha_pattern": {}, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert float(open_adapter(path, SPEC).layers["unet"][QUERY]["alpha"]) == 8
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match="adapter_config.json: an adapter by 'IA3' of PEFT"):
        open_adapter(tmp_path, SPEC)


def test_notes_count_the_layers_of_each_part(tmp_path):
    save_adapter(tmp_path / "a.safetensors", random_layers(SPEC), SPEC)
    (note,) = open_adapter(tmp_path / "a.safetensors", SPEC).notes
    count = {part: len(entries) for part, entries in random_layers(SPEC).items()}
    counts = f"{count['unet']} of the U-Net, {count['text_encoder']} of the text encoder"
    assert note == f"LoRA by the names of kohya; layers: {counts}"


# What is refused


def test_a_missing_file_and_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_adapter(tmp_path / "a.safetensors", SPEC)
    with pytest.raises(CheckpointError, match="no adapter in it"):
        open_adapter(tmp_path, SPEC)


def test_unknown_tensors_are_listed(tmp_path):
    message = refusal(tmp_path, {**pair(), "lora_unet_nowhere.alpha": array(1), "epoch": array(1)})
    assert "2 of its 4 tensors have no place in the model: epoch; lora_unet_nowhere.alpha" in message


@pytest.mark.parametrize(
    ("theirs", "ours", "title"),
    [("sdxl", "sd1", "SDXL"), ("sdxl", "sd2", "SDXL"), ("sd1", "sdxl", "SD 1.x"), ("sd2", "sdxl", "SD 2")],
)
@pytest.mark.parametrize("format", adapters.FORMATS)
def test_an_adapter_of_another_family(tmp_path, theirs, ours, title, format):
    save_adapter(tmp_path / "a.safetensors", random_layers(SPECS[theirs]), SPECS[theirs], format)
    with pytest.raises(CheckpointError) as caught:
        open_adapter(tmp_path / "a.safetensors", SPECS[ours])
    message = str(caught.value)
    if format == "kohya" or theirs == "sdxl":
        assert f"a.safetensors: it is an adapter for {title}, and the model is " in message
    assert "have no place in the model" in message or "does not fit" in message


@pytest.mark.parametrize(("width", "title"), [(1024, "SD 2"), (2048, "SDXL"), (1280, "the SDXL refiner")])
def test_the_width_of_the_text_tells_the_family(tmp_path, width, title):
    names = KOHYA.replace("attn1_to_q", "attn2_to_k")
    tensors = {f"{names}.lora_down.weight": array(2, width), f"{names}.lora_up.weight": array(32, 2)}
    message = refusal(tmp_path, tensors)
    assert f"it is an adapter for {title}, and the model is SD 1.x: does not fit the model: {names}: " in message
    assert f"lora_down is (2, {width}), not (2, 32)" in message
    peft = PEFT.replace("attn1.to_q", "attn2.to_k")
    tensors = {f"{peft}.lora_A.weight": array(2, width), f"{peft}.lora_B.weight": array(32, 2)}
    assert f"it is an adapter for {title}, and the model is SD 1.x: " in refusal(tmp_path, tensors)


def test_flux(tmp_path):
    message = refusal(tmp_path, {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": array(2, 8)})
    assert "it is an adapter for Flux or Stable Diffusion 3, and the model is SD 1.x: " in message


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair(down=(2, 31)), "lora_down is (2, 31), not (2, 32)"),
        (pair(up=(32, 3)), "lora_up is (32, 3), not (32, 2)"),
        ({**pair(), f"{KOHYA}.alpha": array(2)}, "alpha is (2,), not ()"),
        ({f"{KOHYA}.lora_down.weight": array(2, 32)}, "lora_up is missing"),
        ({f"{KOHYA}.alpha": array(1)}, "alpha has no meaning here"),
        (pair(down=(0, 32)), "lora_down is (0, 32), and a factor has two axes or four"),
        (pair(down=(2,)), "lora_down is (2,), and a factor has two axes or four"),
        ({**pair(), f"{KOHYA}.hada_w1_a": array(32, 2)}, "hada_w1_a has no meaning here"),
        ({**pair(), f"{KOHYA}.diff_b": array(32)}, "diff_b has no meaning here"),  # a layer without a bias
        ({f"{KOHYA}.w_norm": array(32)}, "w_norm has no meaning here"),
        ({**pair(), f"{KOHYA}.dora_scale": array(2, 1)}, "dora_scale is (2, 1), not (1, 32)"),
        ({**pair(), f"{KOHYA}.lora_down.weight": array(2, 32).astype(np.int32)}, "is of int32"),
        ({**pair(), f"{KOHYA}.lora_down.weight": np.full((2, 32), np.nan, np.float32)}, "not finite"),
        ({**pair(), f"{KOHYA.replace('lora_unet', 'lycoris')}.lora_up.weight": array(32, 2)}, "says again"),
        ({f"{KOHYA}.lokr_w1": array(5, 2), f"{KOHYA}.lokr_w2": array(6, 16)}, "lokr_w2 is (6, 16), not (0, 16)"),
        ({f"{KOHYA}.lokr_w1": array(2, 2)}, "lokr_w2 is missing"),
        ({f"{KOHYA}.hada_w1_b": array(2, 32)}, "hada_w1_a is missing"),
        ({"lora_unet_conv_norm_out.lora_up.weight": array(32, 2)}, "LoRA is for linears and convolutions alone"),
    ],
)
def test_entries_that_do_not_fit(tmp_path, tensors, message):
    assert message in refusal(tmp_path, tensors)


def test_biases_beside_a_lora(tmp_path):
    """As programs write them that extract LoRAs with the biases' differences."""
    name = "lora_unet_conv_in"
    tensors = {f"{name}.lora_down.weight": array(2, 4, 3, 3), f"{name}.lora_up.weight": array(32, 2, 1, 1)}
    entry = opened(tmp_path, {**tensors, f"{name}.diff_b": array(32)}).layers["unet"]["conv_in"]
    assert entry.keys() == {"lora_down", "lora_up", "alpha", "diff_b"}


def test_norms_and_embeddings(tmp_path):
    norm, table = "lora_unet_conv_norm_out", "lora_te_text_model_embeddings_token_embedding"
    shape = (SPEC.text_encoder.vocab_size, 32)
    found = opened(tmp_path, {f"{norm}.diff": array(32), f"{norm}.b_norm": array(32), f"{table}.diff": array(*shape)})
    assert found.layers["unet"]["conv_norm_out"].keys() == {"diff", "b_norm"}
    assert found.layers["text_encoder"]["text_model/embeddings/token_embedding"]["diff"].shape == shape


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        (f"{KOHYA}.on_input", "IA3"),
        (f"base_model.model.{PEFT}.ia3_l", "IA3"),
        (f"{KOHYA}.a1.weight", "GLoRA"),
        (f"{KOHYA}.oft_blocks", "OFT or BOFT"),
        (f"{PEFT}.boft_R", "BOFT"),
        (f"{PEFT}.oft_R.weight", "OFT or BOFT"),
    ],
)
def test_algorithms_that_are_not_read_are_named(tmp_path, name, algorithm):
    message = refusal(tmp_path, {f"{KOHYA}.alpha": array(1), name: array(4)})
    assert f"an adapter by {algorithm} ({name}), which is not read" in message


def test_other_files_are_told_for_what_they_are(tmp_path):
    assert "it looks like textual inversion embedding" in refusal(tmp_path, {"emb_params": array(2, 768)})
    assert "it looks like Stable Diffusion 1" in refusal(tmp_path, compvis_file())
    lokr = {f"{PEFT}.lokr_w1": array(2, 2), f"{PEFT}.lokr_w2": array(16, 16)}
    assert "by kohya's or diffusers' names: it looks like LoRA" in refusal(tmp_path, lokr)
    (tmp_path / "b.safetensors").write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="a web page"):
        open_adapter(tmp_path / "b.safetensors", SPEC)


# Writing is refused


def test_what_diffusers_has_no_names_for(tmp_path):
    for algorithm, what in (("loha", "hada_w1_a"), ("lokr", "lokr_w1"), ("whole", "diff"), ("tucker", "lora_mid")):
        with pytest.raises(
            CheckpointError, match=f"diffusers has no names for .*{what}.*: write it with format='kohya'"
        ):
            save_adapter(tmp_path / "a.safetensors", random_layers(SPEC, algorithm), SPEC, "diffusers")
    with pytest.raises(CheckpointError, match="no DoRA by rows of inputs"):
        save_adapter(tmp_path / "a.safetensors", random_layers(SPEC, "dora_by_inputs"), SPEC, "diffusers")
    mixed = random_layers(SPEC, "dora")
    mixed["unet"][QUERY] = random_layers(SPEC)["unet"][QUERY]
    with pytest.raises(CheckpointError, match="attn1.to_q: no DoRA, while .* is one"):
        save_adapter(tmp_path / "a.safetensors", mixed, SPEC, "diffusers")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "an adapter of no layers"),
        ({"unet": {"nowhere": {}}}, "unet/nowhere is no layer of the model"),
        ({"vae": {QUERY: {}}}, "is no layer of the model"),
        ({"unet": {QUERY: {"lora_down": array(2, 32), "lora_up": array(32, 2)}}}, "alpha is missing"),
        (
            {"unet": {QUERY: {"lora_down": array(2, 5), "lora_up": array(32, 2), "alpha": np.float32(1)}}},
            r"lora_down is \(2, 5\)",
        ),
        ({"unet": {"conv_in": {"diff_b": array(32), "strength": np.float32(1)}}}, "strength has no meaning here"),
    ],
)
def test_what_does_not_fit_is_not_written(tmp_path, layers, message):
    with pytest.raises(CheckpointError, match=message):
        save_adapter(tmp_path / "a.safetensors", layers, SPEC)
    assert not list(tmp_path.iterdir())


def test_files_are_not_overwritten_and_wishes_are_checked(tmp_path):
    layers, path = random_layers(SPEC), tmp_path / "a.safetensors"
    save_adapter(path, layers, SPEC)
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        save_adapter(path, random_layers(SPEC, seed=1), SPEC)
    assert path.read_bytes() == before
    save_adapter(path, random_layers(SPEC, seed=1), SPEC, overwrite=True)
    assert path.read_bytes() != before
    with pytest.raises(ValueError, match="format='a1111' is not one of kohya, diffusers"):
        save_adapter(tmp_path / "b.safetensors", layers, SPEC, "a1111")
    with pytest.raises(ValueError, match=r"is called \*.safetensors"):
        save_adapter(tmp_path / "b.pt", layers, SPEC)
    large = {"unet": {"conv_in": {"diff_b": np.full(32, 1e6, np.float32)}}}
    with pytest.raises(CheckpointError, match="beyond float16"):
        save_adapter(tmp_path / "b.safetensors", large, SPEC, dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# The command


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two checkpoints that differ by a LoRA of rank 2 at two layers, and at a 3x3 convolution; and the LoRA."""
    folder = tmp_path_factory.mktemp("bases")
    params = random_params()
    save_checkpoint(folder / "a.safetensors", SPEC, params, None, "single_file")
    layers = random_layers(SPEC)
    paths = {"unet": QUERY, "text_encoder": "text_model/encoder/layers_1/mlp/fc1"}
    layers = {part: {path: layers[part][path]} for part, path in paths.items()}
    tuned = jax.tree.map(np.array, params)
    for part, path in paths.items():
        node = tuned[part]
        for name in path.split("/"):
            node = node[name]
        entry = layers[part][path]
        node["kernel"] += (1.5 * entry["lora_up"] @ entry["lora_down"]).T
    tuned["unet"]["conv_in"]["bias"] += 1
    tuned["unet"]["conv_in"]["kernel"] += 1
    save_checkpoint(folder / "b.safetensors", SPEC, tuned, None, "single_file")
    save_adapter(folder / "lora.safetensors", layers, SPEC)
    return folder, layers


def deltas(layers):
    return {
        (part, path): float(e["alpha"]) / len(e["lora_down"]) * (e["lora_up"] @ e["lora_down"])
        for part, entries in layers.items()
        for path, e in entries.items()
    }


def assert_same_deltas(ours, reference):
    assert ours.keys() == reference.keys()
    for at, wanted in reference.items():
        assert np.abs(ours[at] - wanted).max() < 1e-5 * np.abs(wanted).max(), at


def test_extracting_gives_the_lora_that_was_merged(bases, tmp_path, capsys):
    folder, layers = bases
    a, b, out = (str(p) for p in (folder / "a.safetensors", folder / "b.safetensors", tmp_path / "out.safetensors"))
    assert adapters.main(["extract", f"--base={a}", f"--tuned={b}", "--rank=2", f"--out={out}"]) == 0
    assert "layers: 1 of the U-Net, 1 of the text encoder -> " in capsys.readouterr().out
    assert_same_deltas(deltas(open_adapter(out, SPEC).layers), deltas(layers))
    assert adapters.main(["extract", f"--base={a}", f"--tuned={a}", "--rank=2", f"--out={out}", "--overwrite"]) == 1
    assert "error: the two models have the same weights" in capsys.readouterr().err
    arguments = [f"--base={a}", f"--tuned={b}", "--rank=2", "--conv_rank=1", f"--out={out}"]
    assert adapters.main(["extract", *arguments, "--overwrite", "--dtype=float16"]) == 0
    found = open_adapter(out, SPEC).layers["unet"]
    assert found["conv_in"]["lora_down"].shape == (1, 4, 3, 3) and found["conv_in"]["lora_up"].dtype == np.float16


def test_checkpoints_of_two_architectures_have_no_lora_between_them(bases, tmp_path, capsys):
    save_checkpoint(tmp_path / "sd2.safetensors", SPECS["sd2"], random_params(SPECS["sd2"]), None, "single_file")
    base, out = f"--base={bases[0] / 'a.safetensors'}", f"--out={tmp_path / 'out.safetensors'}"
    assert adapters.main(["extract", base, f"--tuned={tmp_path / 'sd2.safetensors'}", "--rank=2", out]) == 1
    assert "is of another architecture than" in capsys.readouterr().err


def test_resizing_and_merging(bases, tmp_path, capsys):
    folder, layers = bases
    base, lora, out = f"--base={folder / 'a.safetensors'}", folder / "lora.safetensors", tmp_path / "out.safetensors"
    assert adapters.main(["resize", f"--adapter={lora}", base, "--rank=1", f"--out={out}"]) == 0
    assert {len(e["lora_down"]) for p in open_adapter(out, SPEC).layers.values() for e in p.values()} == {1}
    arguments = ["merge", f"--adapter={lora}:0.25", f"--adapter={lora}", base, f"--out={out}", "--overwrite"]
    assert adapters.main([*arguments, "--format=diffusers"]) == 0
    merged = open_adapter(out, SPEC)
    assert merged.format == "diffusers"
    assert_same_deltas(deltas(merged.layers), {at: 1.25 * delta for at, delta in deltas(layers).items()})
    assert adapters.main(["resize", f"--adapter={lora}", base, "--rank=0", f"--out={tmp_path / 'x.safetensors'}"]) == 1
    assert "error: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        adapters.main(["resize", f"--adapter={lora}", base, f"--out={tmp_path / 'x.safetensors'}"])
    assert "one of the arguments --rank --share is required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("a:0.5", ("a", 0.5)),
        ("a", ("a", 1.0)),
        ("c:/a:b", ("c:/a:b", 1.0)),
        ("a:-1", ("a", -1.0)),
        ("a/b:2", ("a/b", 2.0)),
    ],
)
def test_strengths_behind_files(text, pair):
    assert adapters._with_strength(text) == pair
