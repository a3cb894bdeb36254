"""diffusers and transformers themselves: what they save we load, what we save they load, equal to the bit."""

import dataclasses
import json
import logging
import types
import warnings

import numpy as np
import pytest

from sd_jax.checkpoints import config_json, keys_compvis, layout, read
from sd_jax.checkpoints.load import load_checkpoint
from sd_jax.checkpoints.save import save_checkpoint
from sd_jax.models.families import FAMILIES
from tests.checkpoints.tiny import assert_same, file_shapes
from tests.reference import diffusers
from tests.reference_families import saved_family
from tests.reference_pipeline import tiny_diffusers_pipeline

pytestmark = pytest.mark.parity
PARTS = ("unet", "vae", "text_encoder")
ALL_PARTS = (*PARTS, "text_encoder_2")
# Of SD 1's family but for the widths, so that a single file needs nothing in its header
FAMILY = {
    "unet": {"block_out_channels": (32, 64), "norm_num_groups": 32, "attention_head_dim": 8, "cross_attention_dim": 48},
    "vae": {"block_out_channels": (32, 32), "norm_num_groups": 32, "down_block_types": ("DownEncoderBlock2D",) * 2}
    | {"up_block_types": ("UpDecoderBlock2D",) * 2},
    "text_encoder": {"hidden_size": 48, "num_attention_heads": 12},
}


def open_pipeline(folder, **missing):
    """By diffusers. Raises where it warns of missing or unused weights. missing: parts that are no networks of ours."""
    library = diffusers()
    for part, names in (("unet", ["UNet2DConditionModel"]), ("vae", ["AutoencoderKL", "AutoencoderTiny"])):
        name = json.loads((folder / "model_index.json").read_text())[part][1]
        assert name in names
        _, info = getattr(library, name).from_pretrained(folder / part, output_loading_info=True)
        assert not any(info.values()), (part, info)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        for part, network in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
            if (folder / part).is_dir():
                _, info = network.from_pretrained(folder / part, output_loading_info=True)
                assert not any(info.values()), (part, info)
        pipeline = library.DiffusionPipeline.from_pretrained(folder, **missing)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same_bits(ours, reference):
    """Two torch state dicts."""
    assert ours.keys() == reference.keys()
    for name, tensor in reference.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        assert bool((ours[name] == tensor).all()), name


def parts_of(pipeline):
    return [part for part in ALL_PARTS if getattr(pipeline, part, None) is not None]


def assert_same_pipelines(ours, reference):
    assert type(ours) is type(reference) and parts_of(ours) == parts_of(reference)
    for part in parts_of(reference):
        assert_same_bits(getattr(ours, part).state_dict(), getattr(reference, part).state_dict())
    for part in ("unet", "vae"):
        want = {k: v for k, v in getattr(reference, part).config.items() if not k.startswith("_")}
        got = {k: v for k, v in getattr(ours, part).config.items() if k in want}
        as_lists = lambda config: json.loads(json.dumps(config))  # noqa: E731
        assert as_lists(got) == as_lists(want), part
    texts = ["a red circle above the blue square", "naïve 猫!", ""]
    for tokenizer, part in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        if part in parts_of(reference):
            ids = [getattr(p, tokenizer)(texts, padding="max_length").input_ids for p in (ours, reference)]
            assert ids[0] == ids[1] and len(ids[0][0]) == 77
            eos = [getattr(p, part).config.eos_token_id for p in (ours, reference)]
            assert eos[0] == eos[1]
    np.testing.assert_array_equal(ours.scheduler.alphas_cumprod, reference.scheduler.alphas_cumprod)
    assert ours.scheduler.config.prediction_type == reference.scheduler.config.prediction_type


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_folder_to_folder(tmp_path, reference, dtype):
    folder, pipeline = reference
    if dtype != "float32":
        folder = tmp_path / "theirs"
        pipeline = tiny_diffusers_pipeline(folder, dtype, save={"variant": "fp16"} if dtype == "float16" else None)
    loaded = load_checkpoint(folder)
    assert loaded.spec.unet.num_attention_heads == 2 and loaded.params["unet"]["conv_in"]["bias"].dtype.name == dtype
    save_checkpoint(tmp_path / "ours", loaded.spec, loaded.params, loaded.tokenizer)
    assert_same_pipelines(open_pipeline_of(tmp_path / "ours", dtype), pipeline)


def open_pipeline_of(folder, dtype):
    import torch

    return open_pipeline(folder).to(dtype=getattr(torch, dtype))


def test_shards_are_joined(tmp_path, reference):
    folder, pipeline = reference
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for part in PARTS:
        assert len(list((tmp_path / "shards" / part).glob("*.safetensors"))) > 1, part
    assert_same(load_checkpoint(tmp_path / "shards").params, load_checkpoint(folder).params)


def test_single_file_holds_the_same_bits(tmp_path, reference):
    folder, pipeline = reference
    loaded = load_checkpoint(folder)
    single = tmp_path / "model.safetensors"
    save_checkpoint(single, loaded.spec, loaded.params, format="single_file")
    again = load_checkpoint(single)
    assert again.spec == loaded.spec
    assert_same(again.params, loaded.params)
    save_checkpoint(tmp_path / "ours", again.spec, again.params, loaded.tokenizer)
    assert_same_pipelines(open_pipeline(tmp_path / "ours"), pipeline)


def test_single_file_by_diffusers_own_conversion(tmp_path, reference):
    """Its functions take our file apart into the state dicts that it was made from."""
    folder, pipeline = reference
    import torch
    from diffusers.loaders import single_file_utils

    loaded = load_checkpoint(folder)
    save_checkpoint(tmp_path / "a.safetensors", loaded.spec, loaded.params, format="single_file")
    file = {name: torch.from_numpy(array) for name, array in read(tmp_path / "a.safetensors").items()}
    unet = single_file_utils.convert_ldm_unet_checkpoint(file, dict(pipeline.unet.config))
    assert_same_bits(unet, pipeline.unet.state_dict())
    vae = single_file_utils.convert_ldm_vae_checkpoint(file, dict(pipeline.vae.config))
    assert_same_bits(vae, pipeline.vae.state_dict())
    clip = single_file_utils.convert_ldm_clip_checkpoint(file)
    clip = {name.removeprefix("text_model."): tensor for name, tensor in clip.items()}
    assert_same_bits(clip, {n.removeprefix("text_model."): t for n, t in pipeline.text_encoder.state_dict().items()})
    used = sum(name.startswith(("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")) for name in file)
    assert used == len(file) == len(unet) + len(vae) + len(clip)


def test_single_file_of_reduced_width_without_our_header(tmp_path):
    folder = tmp_path / "theirs"
    pipeline = tiny_diffusers_pipeline(folder, **FAMILY)
    loaded = load_checkpoint(folder)
    save_checkpoint(tmp_path / "a.safetensors", loaded.spec, loaded.params, format="single_file")
    from safetensors.numpy import save_file

    save_file(read(tmp_path / "a.safetensors"), tmp_path / "bare.safetensors", metadata={"format": "pt"})
    bare = load_checkpoint(tmp_path / "bare.safetensors", tokenizer=loaded.tokenizer)
    for part in PARTS:
        ours, theirs = vars(getattr(bare.spec, part)), vars(getattr(loaded.spec, part))
        assert {**ours, "sample_size": 0} == {**theirs, "sample_size": 0}, part
    assert_same(bare.params, loaded.params)
    save_checkpoint(tmp_path / "ours", bare.spec, bare.params, bare.tokenizer)
    for part in PARTS:
        opened = getattr(open_pipeline(tmp_path / "ours"), part)
        assert_same_bits(opened.state_dict(), getattr(pipeline, part).state_dict())


# Other families

NO_ESTIMATOR = {"depth_estimator": None, "feature_extractor": None}
FAMILY_NAMES = ["sd15_inpainting", "sd15_lcm", "sd2_v", "sd2_depth", "sd_x4_upscaler", "sdxl", "sdxl_inpainting"]
FAMILY_NAMES += ["sdxl_refiner"]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_families(tmp_path, name):
    """folder -> folder and folder -> file, both opened by diffusers: nothing missing or left over, equal to the bit."""
    folder, pipeline = saved_family(name)
    loaded = load_checkpoint(folder)
    save_checkpoint(tmp_path / "ours", loaded.spec, loaded.params, loaded.tokenizer)
    missing = NO_ESTIMATOR if name == "sd2_depth" else {}
    assert_same_pipelines(open_pipeline(tmp_path / "ours", **missing), pipeline)
    save_checkpoint(tmp_path / "a.safetensors", loaded.spec, loaded.params, format="single_file")
    if name not in ("sd15_lcm", "sd2_depth"):  # diffusers' own conversion has no LCM, and no place for NO_ESTIMATOR
        from_file = open_single_file(type(pipeline), tmp_path / "a.safetensors", tmp_path / "ours")
        assert_same_pipelines(from_file, pipeline)


def test_the_latent_upscaler(tmp_path):
    folder, pipeline = saved_family("sd_x2_latent_upscaler")
    loaded = load_checkpoint(folder)
    save_checkpoint(tmp_path / "ours", loaded.spec, loaded.params, loaded.tokenizer)
    opened = open_pipeline(tmp_path / "ours")
    assert_same_pipelines(opened, pipeline)
    assert type(opened.scheduler).__name__ == "EulerDiscreteScheduler"


def open_single_file(pipeline_class, file, config):
    """By diffusers. Raises where it warns of unused weights or leaves some without a value."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = pipeline_class.from_single_file(str(file), config=str(config), local_files_only=True)
    finally:
        logger.removeHandler(handler)
    assert not [text for text in said if "weights" in text], said
    for part in parts_of(pipeline):
        assert not [n for n, tensor in getattr(pipeline, part).named_parameters() if tensor.is_meta], part
    return pipeline


def test_diffusers_draws_the_same_picture_with_two_text_encoders(tmp_path):
    folder, _ = saved_family("sdxl")
    loaded = load_checkpoint(folder)
    save_checkpoint(tmp_path / "ours", loaded.spec, loaded.params, loaded.tokenizer)
    import torch

    pictures = []
    for place in (folder, tmp_path / "ours"):
        pipeline, seed = open_pipeline(place), torch.Generator().manual_seed(0)
        pictures.append(pipeline("the cat", num_inference_steps=2, generator=seed, output_type="np").images)
    np.testing.assert_array_equal(*pictures)


def test_a_last_layer_that_is_not_read(tmp_path):
    """SD 2's files have 24 blocks and a projection; diffusers reads 23 of them, which is what our folders hold."""
    folder, pipeline = saved_family("sd2_v")
    loaded = load_checkpoint(folder)
    text = loaded.params["text_encoder"]["text_model"]
    layers = {f"layers_{i}": text["encoder"][f"layers_{i % 3}"] for i in range(24)}
    width = loaded.spec.text_encoder.hidden_size
    projection = {"text_projection": {"kernel": np.ones((width, width), np.float32)}}
    params = {**loaded.params, "text_encoder": {"text_model": {**text, "encoder": layers}, **projection}}
    reads = {"num_hidden_layers": 24, "clip_skip": 2, "projection_dim": width}
    spec = dataclasses.replace(loaded.spec, text_encoder=dataclasses.replace(loaded.spec.text_encoder, **reads))
    save_checkpoint(tmp_path / "ours", spec, params, loaded.tokenizer)
    save_checkpoint(tmp_path / "a.safetensors", spec, params, format="single_file")
    from_folder = open_pipeline(tmp_path / "ours")
    assert from_folder.text_encoder.config.num_hidden_layers == 23
    want = pipeline.text_encoder.state_dict()
    got = from_folder.text_encoder.state_dict()
    assert_same_bits({name: got[name] for name in want}, want)
    assert len(got) == len(want) + 20 * 16  # 16 tensors a layer
    assert_same_pipelines(open_single_file(type(pipeline), tmp_path / "a.safetensors", tmp_path / "ours"), from_folder)


def test_tiny_vaes(tmp_path, reference):
    library, (folder, _) = diffusers(), reference
    import torch

    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    vae = library.AutoencoderTiny(**sizes, num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1))
    generator = torch.Generator().manual_seed(0)
    for parameter in vae.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    vae.save_pretrained(tmp_path / "tiny")
    loaded = load_checkpoint(folder, vae=tmp_path / "tiny")
    assert loaded.spec.vae.downscale == 2
    save_checkpoint(tmp_path / "ours", loaded.spec, loaded.params, loaded.tokenizer)
    opened = open_pipeline(tmp_path / "ours")
    assert_same_bits(opened.vae.state_dict(), vae.state_dict())
    want = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    assert json.dumps({key: opened.vae.config[key] for key in want}) == json.dumps(want)


# Published sizes


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("sd15_lcm", "sdxl_lcm", "sdxl_turbo", "sd2_v")])
def test_single_files_of_the_published_models(name):
    """diffusers' own conversions, of tensors that have a shape only, give diffusers' names and shapes."""
    diffusers()
    import torch
    from diffusers.loaders import single_file_utils

    spec, file = FAMILIES[name], {}
    kind = keys_compvis.kind_of(spec)
    for part in spec.parts:
        for tensor, shape in file_shapes(part, getattr(spec, part), kind).items():
            file[tensor] = torch.empty(shape, device="meta")
    found = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(dict(file), config_json.unet_to_json(spec.unet)),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(dict(file), config_json.vae_to_json(spec.vae)),
    }
    for part, config in spec.text_encoders.items():
        prefix = keys_compvis.PREFIXES[kind][part]
        if prefix.endswith(".model."):
            model = types.SimpleNamespace(config=types.SimpleNamespace(hidden_size=config.hidden_size))
            found[part] = single_file_utils.convert_open_clip_checkpoint(model, dict(file), prefix)
        else:
            found[part] = single_file_utils.convert_ldm_clip_checkpoint(dict(file), prefix)
    for part in spec.parts:
        wanted = layout.LAYOUTS[part](getattr(spec, part))
        assert {tensor: tuple(value.shape) for tensor, value in found[part].items()} == wanted, part


# Ours


def test_pooled_text_beside_the_timestep(tmp_path):
    folder = tmp_path / "theirs"
    unet = {"addition_embed_type": "text", "addition_embed_type_num_heads": 4}
    pipeline = tiny_diffusers_pipeline(folder, unet=unet)
    loaded = load_checkpoint(folder)
    save_checkpoint(tmp_path / "ours", loaded.spec, loaded.params, loaded.tokenizer)
    assert_same_pipelines(open_pipeline(tmp_path / "ours"), pipeline)


def test_diffusers_draws_the_same_picture(tmp_path, reference):
    """The whole folder works: tokenizer, scheduler and networks, not only their tensors."""
    folder, _ = reference
    loaded = load_checkpoint(folder)
    save_checkpoint(tmp_path / "ours", loaded.spec, loaded.params, loaded.tokenizer)
    import torch

    library = diffusers()
    pictures = []
    for place in (folder, tmp_path / "ours"):
        pipeline = open_pipeline(place)
        pipeline.scheduler = library.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        seed = torch.Generator().manual_seed(0)
        pictures.append(pipeline("the cat", num_inference_steps=2, generator=seed, output_type="np").images)
    np.testing.assert_array_equal(*pictures)


def test_default_names_of_text_encoders(reference):
    """transformers 5 leaves out the `text_model.` level that its own older files have; both are read."""
    folder, pipeline = reference
    names = read(folder / "text_encoder" / "model.safetensors").keys()
    assert not any(name.startswith("text_model.") for name in names)
    assert "text_model" in load_checkpoint(folder).params["text_encoder"]
