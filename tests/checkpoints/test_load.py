"""Opening what people have: families, variants, averages, parts from elsewhere; and what is refused, in one line."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, read
from sd_jax.checkpoints.load import load_checkpoint, open_checkpoint
from sd_jax.checkpoints.native import Checkpoints
from sd_jax.checkpoints.read_safetensors import write
from sd_jax.checkpoints.save import save_checkpoint
from sd_jax.models.families import FAMILIES, SDXL
from sd_jax.models.presets import PARTS, TinyVAEConfig, UNetConfig
from tests.checkpoints.reduced import REDUCED, file_of
from tests.checkpoints.tiny import SPEC, SPECS, assert_same, compvis_file, random_diffusers, random_params
from tests.reference_pipeline import tiny_tokenizer

HEADER = {"sd_jax.spec": json.dumps(SPEC.to_dict())}  # the widths of SPEC are not the family's


@pytest.fixture
def folder(tmp_path, params, tokenizer):
    save_checkpoint(tmp_path / "folder", SPEC, params, tokenizer)
    return tmp_path / "folder"


@pytest.fixture(scope="module")
def contents():
    return compvis_file()


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory, tokenizer):
    """SDXL's, and its parameters."""
    place, params = tmp_path_factory.mktemp("xl") / "folder", random_params(SPECS["sdxl"])
    save_checkpoint(place, SPECS["sdxl"], params, tokenizer)
    return place, params


def refused(path, **arguments) -> str:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, **arguments)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path).rsplit("/", 1)[0])
    return str(error.value)


def renamed(tensors, old, new):
    return {name.replace(old, new, 1) if name.startswith(old) else name: array for name, array in tensors.items()}


def only(params, *parts):
    return {part: params[part] for part in parts}


# Single files


@pytest.mark.parametrize("name", ["sd1_lcm", "sd2", "sdxl", "sdxl_refiner", "upscaler"])
def test_families_told_by_their_shapes(tmp_path, name):
    spec = REDUCED[name]
    write(tmp_path / "a.safetensors", compvis_file(spec))
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert loaded.spec == spec
    assert_same(loaded.params, random_params(spec))
    (note,) = loaded.notes
    assert note.startswith(f"prediction type {spec.noise_schedule.prediction_type}: ")


def test_a_unet_alone_in_each_naming(tmp_path):
    spec = REDUCED["sdxl"]
    config = {**vars(SDXL.unet), **vars(spec.unet), "addition_time_embed_dim": 256}
    spec = dataclasses.replace(
        spec, unet=UNetConfig(**config | {"projection_class_embeddings_input_dim": 1280 + 6 * 256})
    )
    want, prefix = only(random_params(spec, parts=("unet",)), "unet"), "model.diffusion_model."
    file = compvis_file(spec, parts=("unet",))
    theirs = {name: np.asarray(tensor) for name, tensor in random_diffusers("unet", spec).items()}
    for tensors in (file, renamed(file, prefix, "diffusion_model."), renamed(file, prefix, ""), theirs):
        write(tmp_path / "a.safetensors", tensors)
        loaded = load_checkpoint(tmp_path / "a.safetensors")
        assert_same(loaded.params, want)
        assert loaded.spec.unet == spec.unet and loaded.spec.text_encoder_2 == SDXL.text_encoder_2
    write(tmp_path / "a.safetensors", {**theirs, "foo.weight": np.zeros(1)})
    assert "not the U-Net of its config: foo.weight is unexpected" in refused(tmp_path / "a.safetensors")


def test_a_unet_out_of_a_folder_with_its_config(tmp_path, folder, params):
    found = load_checkpoint(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert found.spec.unet == SPEC.unet  # the widths of which no family has
    assert_same(found.params, only(params, "unet"))


def test_averages_in_a_single_file(tmp_path, contents, params):
    prefix = "model.diffusion_model."
    names = [name for name in contents if name.startswith(prefix)]
    ema = {f"model_ema.diffusion_model{n.removeprefix(prefix).replace('.', '')}": contents[n] * 2 for n in names}
    file = {**contents, **ema, "model_ema.num_updates": np.array(3), "betas": np.zeros(1000)}
    write(tmp_path / "a.safetensors", file, HEADER)
    averaged, raw = (load_checkpoint(tmp_path / "a.safetensors", weights=w) for w in ("ema", "raw"))
    assert (averaged.weights, raw.weights) == ("ema", "raw")
    assert_same(raw.params, params)
    assert_same(only(averaged.params, "vae", "text_encoder"), only(params, "vae", "text_encoder"))
    np.testing.assert_array_equal(averaged.params["unet"]["conv_in"]["bias"], 2 * params["unet"]["conv_in"]["bias"])

    # Averages alone: the dots that their names lack are looked up
    alone = {name: array for name, array in file.items() if name not in names}
    write(tmp_path / "b.safetensors", alone, HEADER)
    assert "only averages of a U-Net" in refused(tmp_path / "b.safetensors")
    found = load_checkpoint(tmp_path / "b.safetensors", config=SPEC)
    assert found.weights == "ema"
    assert_same(found.params, averaged.params)


def test_averages_alone_of_a_published_model(tmp_path):
    published = file_of(FAMILIES["sdxl"], ("unet",))
    stem, prefix = "model_ema.diffusion_model", "model.diffusion_model."
    write(
        tmp_path / "a.safetensors",
        {stem + name.removeprefix(prefix).replace(".", ""): np.zeros(t.shape[:1]) for name, t in published.items()},
    )
    assert "is of shape" in refused(tmp_path / "a.safetensors")  # the names are found; these shapes are nothing's


def test_what_our_own_header_and_marks_say(tmp_path, contents):
    v = dataclasses.replace(
        SPEC, noise_schedule=dataclasses.replace(SPEC.noise_schedule, prediction_type="v_prediction")
    )
    write(tmp_path / "a.safetensors", contents, {"sd_jax.spec": json.dumps(v.to_dict())})
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert loaded.notes == ("prediction type v_prediction: said by the header that we wrote",) and loaded.spec == v
    spec = REDUCED["sd1"]
    mark = np.zeros(0, np.float32)
    write(tmp_path / "b.safetensors", {**compvis_file(spec), "v_pred": mark, "ztsnr": mark})
    loaded = load_checkpoint(tmp_path / "b.safetensors")
    schedule = loaded.spec.noise_schedule
    assert (schedule.prediction_type, schedule.rescale_betas_zero_snr) == ("v_prediction", True)
    assert loaded.notes == ("prediction type v_prediction, zero terminal SNR: said by the tensor v_pred",)
    loaded = load_checkpoint(tmp_path / "b.safetensors", prediction_type="epsilon")
    assert loaded.notes == ("prediction type epsilon, zero terminal SNR: said by prediction_type=",)


def test_sd2_with_v_prediction_is_of_768_pixels(tmp_path):
    write(tmp_path / "a.safetensors", compvis_file(REDUCED["sd2"], parts=("unet", "vae")))
    loaded = load_checkpoint(tmp_path / "a.safetensors", prediction_type="v")
    assert (loaded.spec.unet.sample_size, loaded.spec.vae.sample_size) == (96, 384)
    assert load_checkpoint(tmp_path / "a.safetensors").spec.unet.sample_size == 64


@pytest.mark.parametrize("absent", ["vae", "text_encoder"])
def test_parts_that_are_missing(tmp_path, contents, params, absent):
    prefix = {"vae": "first_stage_model.", "text_encoder": "cond_stage_model."}[absent]
    write(tmp_path / "a.safetensors", {n: a for n, a in contents.items() if not n.startswith(prefix)}, HEADER)
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert_same(loaded.params, {part: tree for part, tree in params.items() if part != absent})


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lora_unet_x.lora_down.weight"], "looks like a LoRA, not a whole model"),
        (["first_stage_model.decoder.mid.block_1.conv1.weight"], "looks like a VAE alone, .* as vae="),
        (["text_model.embeddings.token_embedding.weight"], "looks like a CLIP text encoder alone, .* as text_encoder="),
        (["control_model.input_blocks.0.0.weight"], "looks like a ControlNet"),
        (["double_blocks.0.x"], "looks like Flux"),
        (["edm_mean", "edm_std"], "looks like a model of EDM .as Playground 2.5."),
        (["foo", "bar"], r"looks like nothing that is known \(2 tensors: bar, foo\)"),
    ],
)
def test_other_architectures(tmp_path, names, said):
    write(tmp_path / "a.safetensors", dict.fromkeys(names, np.zeros((2, 2), np.float32)))
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(tmp_path / "a.safetensors")


def test_strictness(tmp_path, contents):
    path = tmp_path / "a.safetensors"
    write(path, {**contents, "foo.weight": np.zeros(1)}, HEADER)
    assert "unexpected in a single file of SD 1.x: foo.weight" in refused(path)
    for name in ("model.diffusion_model.foo", "cond_stage_model.transformer.text_model.foo"):
        write(path, {**contents, name: np.zeros(1)})
        assert f"{name.removeprefix('cond_stage_model.transformer.')} is unexpected" in refused(path, config=SPEC)
    write(path, {**contents, "model.diffusion_model.out.2.bias": np.zeros(5)})
    assert "conv_out.bias is (5,), not (4,)" in refused(path, config=SPEC)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "cut short" in refused(path)


def test_weights_that_are_no_numbers(tmp_path, contents):
    name = "model.diffusion_model.out.2.bias"
    write(tmp_path / "a.safetensors", {**contents, name: np.array([0, np.nan, 0, 0], np.float32)}, HEADER)
    assert "unet/conv_out/bias" in refused(tmp_path / "a.safetensors")


def test_swapped_components(tmp_path, contents, folder):
    a, b = "model.diffusion_model.", "first_stage_model."
    swapped = {n.replace(a, b, 1) if n.startswith(a) else n.replace(b, a, 1): array for n, array in contents.items()}
    write(tmp_path / "a.safetensors", swapped, HEADER)
    assert "where the" in refused(tmp_path / "a.safetensors") and "two components are swapped" in refused(
        tmp_path / "a.safetensors"
    )
    name = "diffusion_pytorch_model.safetensors"
    (folder / "unet" / name).rename(tmp_path / "aside")
    (folder / "vae" / name).rename(folder / "unet" / name)
    assert f"unet/{name}: a VAE, where the U-Net belongs: two components are swapped" in refused(folder)


# config=


def test_what_config_may_be(tmp_path, contents, folder, params):
    path = tmp_path / "a.safetensors"
    write(path, contents)
    assert "12 heads do not divide: say the config by config= (a diffusers folder" in refused(path)
    for part in PARTS:  # its weights are not needed
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
    for config in (SPEC, folder, str(folder)):
        loaded = load_checkpoint(path, config=config)
        assert loaded.spec == SPEC and loaded.notes == ("prediction type epsilon: said by config=",)
        assert_same(loaded.params, params)
    assert "config= is of SDXL, and the file of SD 1.x" in refused(path, config="sdxl")
    assert "not a U-Net of SD 1.x: model.diffusion_model.i" in refused(path, config="sd15")
    with pytest.raises(ValueError, match="config='sd3' is neither a diffusers folder, nor a .yaml, nor one of sd15, "):
        load_checkpoint(path, config="sd3")
    with pytest.raises(FileNotFoundError, match="no such config: nowhere.yaml"):
        load_checkpoint(path, config="nowhere.yaml")
    with pytest.raises(ValueError, match="config= is for single files"):
        load_checkpoint(folder, config=SPEC)


def test_a_yaml_given_and_beside(tmp_path):
    spec = REDUCED["sd1"]
    write(tmp_path / "a.safetensors", compvis_file(spec), {"modelspec.prediction_type": "epsilon"})
    yaml = "model: {params: {parameterization: v, unet_config: {params: {num_heads: 4}}}}"
    (tmp_path / "other.yaml").write_text(yaml)
    given = load_checkpoint(tmp_path / "a.safetensors", config=tmp_path / "other.yaml")
    assert (given.spec.unet.num_attention_heads, given.spec.noise_schedule.prediction_type) == (4, "v_prediction")
    assert load_checkpoint(tmp_path / "a.safetensors").spec.unet.num_attention_heads == 8
    (tmp_path / "a.yaml").write_text(yaml)
    beside = load_checkpoint(tmp_path / "a.safetensors")
    assert beside.spec == given.spec
    assert beside.notes == (f"prediction type v_prediction: said by parameterization=v in {tmp_path}/a.yaml",)
    assert load_checkpoint(tmp_path / "a.safetensors", config=spec).spec == spec  # which is what the yaml is not


# Eight bits


@pytest.mark.parametrize("float8", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_eight_bits(tmp_path, contents, float8):
    small = {name: array.astype(float8) for name, array in contents.items()}
    write(tmp_path / "a.safetensors", small, HEADER)
    for dtype, meant in ((None, np.float16), ("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)):
        got = load_checkpoint(tmp_path / "a.safetensors", dtype=dtype).params["unet"]["conv_in"]["bias"]
        want = small["model.diffusion_model.input_blocks.0.0.bias"].astype(meant)
        assert got.dtype == want.dtype and got.tobytes() == want.tobytes()


def test_scaled_eight_bits(tmp_path, contents):
    stem = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q."
    quantised = (contents[stem + "weight"] / 3).astype(ml_dtypes.float8_e4m3fn)
    beside = {stem + "scale_weight": np.array(3, np.float32), stem + "scale_input": np.array(1, np.float32)}
    beside["model.diffusion_model.scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    write(tmp_path / "a.safetensors", {**contents, stem + "weight": quantised, **beside}, HEADER)
    params = load_checkpoint(tmp_path / "a.safetensors").params["unet"]["mid_block"]["attentions_0"]
    got = params["transformer_blocks_0"]["attn1"]["to_q"]["kernel"]
    np.testing.assert_array_equal(got, quantised.astype(np.float32).T * np.float32(3))
    write(tmp_path / "b.safetensors", {**contents, "foo.scale_weight": np.array(3, np.float32)}, HEADER)
    assert "foo.scale_weight is the factor of foo.weight, which is missing" in refused(tmp_path / "b.safetensors")


# Diffusers folders


def test_folders_of_sdxl(xl_folder):
    place, params = xl_folder
    loaded = load_checkpoint(place)
    assert_same(loaded.params, params)
    assert loaded.spec.force_zeros_for_empty_prompt and loaded.tokenizer == str(place / "tokenizer")
    for text, pad in ((loaded.spec.text_encoder, 516), (loaded.spec.text_encoder_2, 0)):
        assert (text.clip_skip, text.context_norm, text.eos_token_id, text.pad_token_id) == (2, False, 516, pad)


def test_folders_of_the_refiner(tmp_path, tokenizer):
    spec = SPECS["sdxl_refiner"]
    save_checkpoint(tmp_path / "a", spec, random_params(spec), tokenizer)
    loaded = load_checkpoint(tmp_path / "a")
    assert loaded.spec == spec and loaded.tokenizer == str(tmp_path / "a" / "tokenizer_2")
    assert_same(loaded.params, random_params(spec))


def test_both_tokenizers_must_know_the_same_words(tmp_path, xl_folder):
    place = tmp_path / "a"
    shutil.copytree(xl_folder[0], place)
    vocabulary = json.loads((place / "tokenizer_2" / "vocab.json").read_text())
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (place / "tokenizer_2" / "vocab.json").write_text(json.dumps(vocabulary))
    assert "tokenizer/ and tokenizer_2/ are of different vocabularies" in refused(place)
    shutil.rmtree(place / "tokenizer_2")
    assert load_checkpoint(place).spec.text_encoder_2.pad_token_id == 0


def test_variants_and_shards(folder, params):
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = folder / part / f"{stem}.safetensors"
        file.rename(folder / part / f"{stem}.fp16.safetensors")
    whole = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = read(whole)
    shards = {name: f"shard-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shards.values()):
        write(folder / "vae" / shard, {name: tensors[name] for name in tensors if shards[name] == shard})
    whole.unlink()
    index = folder / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert_same(load_checkpoint(folder).params, params)

    first = next(iter(shards))
    index.write_text(json.dumps({"weight_map": {**shards, first: "../../elsewhere"}}))
    assert "shards must lie beside it: ../../elsewhere" in refused(folder)
    index.write_text(json.dumps({"weight_map": {**shards, first: "shard-9"}}))
    assert "shards are missing beside it: shard-9" in refused(folder)
    index.write_text(json.dumps({"weight_map": {**shards, "foo": "shard-0.safetensors"}}))
    assert "tensors are not where it says: foo in shard-0.safetensors" in refused(folder)
    index.write_text("{}")
    assert "not an index of shards" in refused(folder)


def test_another_average_of_a_workdir(params, tmp_path):
    more = [
        jax.tree.map(lambda p, add=add: np.asarray(p) + np.asarray(add, p.dtype), params["unet"]) for add in range(3)
    ]
    state = {"params": params, "ema": {"unet": more[1]}, "averages": {"0.99": {"unet": more[2]}}}
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    checkpoints.save(1, state, meta={"spec": SPEC.to_dict()})
    checkpoints.close()
    for weights, want in zip(("raw", "ema", "ema:0.99"), more, strict=True):
        loaded = load_checkpoint(tmp_path / "run", weights=weights)
        assert loaded.weights == weights
        assert_same(loaded.params, {**params, "unet": want})
    with pytest.raises(CheckpointError, match="no average weights='ema:0.5' is in it, only raw, ema, ema:0.99$"):
        load_checkpoint(tmp_path / "run", weights="ema:0.5")


def test_averaged_and_other_weights(folder, params):
    tensors = read(folder / "unet" / "diffusion_pytorch_model.safetensors")

    def bias(weights):
        return load_checkpoint(folder, weights=weights).params["unet"]["conv_in"]["bias"]

    want = params["unet"]["conv_in"]["bias"]
    raw = {name: tensor + 1 for name, tensor in tensors.items()}
    write(folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors", raw)
    np.testing.assert_array_equal(bias("ema"), want)
    np.testing.assert_array_equal(bias("raw"), want + 1)
    averaged = {name: tensor + 2 for name, tensor in tensors.items()}
    write(folder / "unet" / "diffusion_pytorch_model.ema.safetensors", averaged)
    np.testing.assert_array_equal(bias("ema"), want + 2)


def test_folders_that_are_not_whole(folder, params):
    shutil.rmtree(folder / "scheduler")
    shutil.rmtree(folder / "tokenizer")
    shutil.rmtree(folder / "vae")
    loaded = load_checkpoint(folder)
    assert loaded.spec.noise_schedule.beta_schedule == "scaled_linear" and loaded.tokenizer is None
    assert loaded.notes == ("prediction type epsilon: there is no scheduler_config.json",)
    assert_same(loaded.params, only(params, "unet", "text_encoder"))

    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".msgpack"))
    assert "no diffusion_pytorch_model.safetensors in it, only diffusion_pytorch_model.msgpack" in refused(folder)
    (folder / "unet" / "config.json").write_text("{")
    assert f"{folder}/unet/config.json: not JSON" in refused(folder)
    (folder / "unet" / "config.json").unlink()
    assert f"{folder}/unet: no U-Net here: its config.json is missing" in refused(folder)
    shutil.rmtree(folder / "unet")
    assert "no U-Net here: there is no unet/" in refused(folder)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"transformer": ["diffusers", "FluxTransformer2DModel"]}, "FluxPipeline with a transformer/"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "FluxPipeline with a controlnet/"),
        (
            {"text_encoder": [None, None], "image_encoder": ["transformers", "CLIPVisionModel"]},
            "FluxPipeline with a image_encoder/",
        ),
    ],
)
def test_other_pipelines(folder, named, said):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **named}))
    assert said in refused(folder)


def test_features_are_named_by_file_and_key(folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "mid_block_type": "UNetMidBlock2D"}))
    assert f"{folder}/unet/config.json: mid_block_type='UNetMidBlock2D'" in refused(folder)
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    assert "conv_in.weight is (32, 4, 3, 3), not (32, 9, 3, 3)" in refused(folder)


def test_what_a_folder_predicts(folder):
    said = folder / "scheduler" / "scheduler_config.json"
    (note,) = load_checkpoint(folder).notes
    assert note == f"prediction type epsilon: said by {said}"
    loaded = load_checkpoint(folder, prediction_type="v_prediction")
    assert loaded.spec.noise_schedule.prediction_type == "v_prediction"
    assert loaded.notes == ("prediction type v_prediction: said by prediction_type=",)


def test_parts_that_do_not_belong_together(tmp_path, params, tokenizer):
    editing = dataclasses.replace(SPEC, unet=dataclasses.replace(SPEC.unet, in_channels=8))
    save_checkpoint(tmp_path / "a", editing, random_params(editing), tokenizer)
    assert "takes 8 channels (an InstructPix2Pix model) and its VAE has 4" in refused(tmp_path / "a")
    other = dataclasses.replace(SPEC, unet=dataclasses.replace(SPEC.unet, cross_attention_dim=64))
    save_checkpoint(tmp_path / "b", other, random_params(other), tokenizer)
    assert "reads states of width 64 and its text encoder writes 32" in refused(tmp_path / "b")
    spec = SPECS["sdxl"]
    other = dataclasses.replace(spec, text_encoder_2=dataclasses.replace(spec.text_encoder_2, projection_dim=40))
    save_checkpoint(tmp_path / "c", other, random_params(other), tokenizer)
    assert "is told 72 numbers, and its second text encoder's pooled state has 40" in refused(tmp_path / "c")


# Parts from elsewhere


def test_vae_of_another_checkpoint(tmp_path, folder, params, tokenizer, contents):
    spec = dataclasses.replace(SPEC, vae=dataclasses.replace(SPEC.vae, block_out_channels=(32, 32), scaling_factor=0.5))
    other = random_params(spec, seed=1)
    save_checkpoint(tmp_path / "other", spec, other, tokenizer)
    save_checkpoint(tmp_path / "native", spec, {"vae": other["vae"]}, format="native")
    save_checkpoint(tmp_path / "single.safetensors", spec, other, format="single_file")
    vae = tmp_path / "other" / "vae"
    for path in ("other", "native", "single.safetensors", vae, vae / "diffusion_pytorch_model.safetensors"):
        loaded = load_checkpoint(folder, vae=tmp_path / path)
        assert_same(loaded.params, {**params, "vae": other["vae"]})
        assert loaded.spec == spec
    write(tmp_path / "x.safetensors", {"foo": np.zeros(1)})
    assert "has no VAE, and vae= is to give one" in refused(folder, vae=tmp_path / "x.safetensors")


def test_vaes_alone_have_their_models_scale(tmp_path):
    """In CompVis' names without their prefix, in diffusers' without their config, and tiny ones."""
    family = dataclasses.replace(REDUCED["sdxl"].vae, sample_size=512)
    spec = dataclasses.replace(REDUCED["sdxl"], vae=family)
    alone = renamed(compvis_file(spec, seed=1, parts=("vae",)), "first_stage_model.", "")
    theirs = {name: np.asarray(t) for name, t in random_diffusers("vae", spec, seed=1).items()}
    write(tmp_path / "model.safetensors", compvis_file(spec, parts=("unet", "text_encoder", "text_encoder_2")))
    for tensors in (alone, {**alone, "loss.logvar": np.zeros(1)}, theirs):
        write(tmp_path / "vae.safetensors", tensors)
        loaded = load_checkpoint(tmp_path / "model.safetensors", vae=tmp_path / "vae.safetensors")
        assert_same(loaded.params["vae"], random_params(spec, seed=1, parts=("vae",))["vae"])
        assert loaded.spec.vae == family and loaded.spec.vae.scaling_factor == 0.13025
    tiny = dataclasses.replace(
        spec,
        vae=TinyVAEConfig(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
    )
    theirs = {n: np.asarray(t) for n, t in random_diffusers("vae", tiny).items()}
    write(tmp_path / "tiny.safetensors", theirs)
    for half, first in (("encoder", 0), ("decoder", 1)):  # as first published
        named = [(n.removeprefix(f"{half}.layers.").partition("."), a) for n, a in theirs.items() if n.startswith(half)]
        write(tmp_path / f"taesd_{half}.safetensors", {f"{int(i) + first}.{rest}": a for (i, _, rest), a in named})
    for file in ("tiny", "taesd_encoder", "taesd_decoder"):
        loaded = load_checkpoint(tmp_path / "model.safetensors", vae=tmp_path / f"{file}.safetensors")
        assert loaded.spec.vae == tiny.vae
        assert_same(loaded.params["vae"], random_params(tiny, parts=("vae",))["vae"])
    assert "half of a tiny VAE (it can be given as vae=" in refused(tmp_path / "taesd_encoder.safetensors")
    assert "a VAE alone" in refused(tmp_path / "vae.safetensors")


def test_text_encoders_from_elsewhere(tmp_path, tokenizer):
    spec = REDUCED["sdxl"]
    texts = ("text_encoder", "text_encoder_2")
    want = random_params(spec, seed=1, parts=texts)
    write(tmp_path / "model.safetensors", compvis_file(spec, parts=("unet", "vae")))
    write(tmp_path / "whole.safetensors", compvis_file(spec, seed=1))
    first, second = (
        {name: np.asarray(tensor) for name, tensor in random_diffusers(part, spec, seed=1).items()} for part in texts
    )
    write(tmp_path / "l.safetensors", {name.removeprefix("text_model."): array for name, array in first.items()})
    write(tmp_path / "g.safetensors", second)
    bare = renamed(compvis_file(spec, seed=1, parts=texts[1:]), "conditioner.embedders.1.model.", "")
    write(tmp_path / "open_clip.safetensors", {**bare, "logit_scale": np.zeros(())})
    save_checkpoint(tmp_path / "folder", spec, random_params(spec, seed=1), _as_large(tmp_path / "words"))
    one = tmp_path / "whole.safetensors"
    for given in (
        one,
        (one, one),
        [tmp_path / "l.safetensors", tmp_path / "g.safetensors"],
        [tmp_path / "l.safetensors", tmp_path / "open_clip.safetensors"],
        tmp_path / "folder",
        (tmp_path / "folder" / "text_encoder", tmp_path / "folder" / "text_encoder_2" / "model.safetensors"),
    ):
        loaded = load_checkpoint(tmp_path / "model.safetensors", config=spec, text_encoder=given)
        assert_same(only(loaded.params, *texts), want)
        assert {
            part: dataclasses.replace(text, eos_token_id=599) for part, text in loaded.spec.text_encoders.items()
        } == (spec.text_encoders)
    model = tmp_path / "model.safetensors"
    assert "has no text encoder, and text_encoder= is to give" in refused(model, config=spec, text_encoder=model)
    given = [tmp_path / "open_clip.safetensors", tmp_path / "g.safetensors"]
    assert "an OpenCLIP text encoder, where SDXL has CLIP-L first" in refused(model, config=spec, text_encoder=given)
    with pytest.raises(ValueError, match="text_encoder= is 1 paths, and .* has 2 text encoders"):
        load_checkpoint(model, config=spec, text_encoder=[one])


def _as_large(folder):
    """A tokenizer whose end token is the last of REDUCED's 600."""
    tiny_tokenizer(folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary["<|endoftext|>"] = 599
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return folder


def test_tokenizer_decides_the_special_ids(tmp_path, folder, contents):
    marks = {"eos_token": "e</w>", "pad_token": {"content": "!", "special": True}, "bos_token": "<|startoftext|>"}
    tiny_tokenizer(tmp_path / "own")
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(marks))
    vocabulary = json.loads((tmp_path / "own" / "vocab.json").read_text())
    write(tmp_path / "a.safetensors", contents, HEADER)
    for path in (folder, tmp_path / "a.safetensors"):
        loaded = load_checkpoint(path, tokenizer=tmp_path / "own")
        assert loaded.tokenizer == str(tmp_path / "own")
        assert loaded.spec.text_encoder.eos_token_id == vocabulary["e</w>"]
        assert loaded.spec.text_encoder.pad_token_id == 0
    (tmp_path / "own" / "vocab.json").write_text(json.dumps({**vocabulary, "e</w>": 49407}))
    assert "not this model's: its eos_token is 49407" in refused(folder, tokenizer=tmp_path / "own")


def test_tokenizers_from_elsewhere_leave_open_clip_its_padding(tmp_path, tokenizer):
    write(tmp_path / "a.safetensors", compvis_file(REDUCED["sdxl"]))
    spec = load_checkpoint(tmp_path / "a.safetensors", tokenizer=tokenizer).spec
    assert (spec.text_encoder.eos_token_id, spec.text_encoder.pad_token_id) == (516, 516)
    assert (spec.text_encoder_2.eos_token_id, spec.text_encoder_2.pad_token_id) == (516, 0)


def test_arguments(folder):
    assert (
        load_checkpoint(str(folder), tokenizer="openai/clip-vit-large-patch14").tokenizer
        == "openai/clip-vit-large-patch14"
    )
    for wrong, said in (
        ({"weights": "best"}, "weights='best' is neither 'ema' nor 'raw', nor 'ema:' and a decay"),
        ({"weights": "ema:0.999"}, "weights='ema:0.999' is for workdirs of ours, and .* is none"),
        ({"dtype": "int8"}, "dtype='int8' is not one of"),
        ({"prediction_type": "noise"}, "prediction_type='noise' is not one of"),
    ):
        with pytest.raises(ValueError, match=said):
            open_checkpoint(folder, **wrong)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(folder, vae=folder / "nowhere")
