"""diffusers and transformers themselves: what they save we load, what we save they load, equal to the bit."""

import json
import warnings

import numpy as np
import pytest

from sd_jax.checkpoints import read
from sd_jax.checkpoints.load import load_checkpoint
from sd_jax.checkpoints.save import save_checkpoint
from tests.checkpoints.tiny import assert_same
from tests.reference import diffusers
from tests.reference_pipeline import tiny_diffusers_pipeline

pytestmark = pytest.mark.parity
PARTS = ("unet", "vae", "text_encoder")
# Of SD 1's family but for the widths, so that a single file needs nothing in its header
FAMILY = {
    "unet": {"block_out_channels": (32, 64), "norm_num_groups": 32, "attention_head_dim": 8, "cross_attention_dim": 48},
    "vae": {"block_out_channels": (32, 32), "norm_num_groups": 32, "down_block_types": ("DownEncoderBlock2D",) * 2}
    | {"up_block_types": ("UpDecoderBlock2D",) * 2},
    "text_encoder": {"hidden_size": 48, "num_attention_heads": 12},
}


def open_pipeline(folder):
    """By diffusers. Raises where it warns of missing or unused weights."""
    library = diffusers()
    for part, network in (("unet", library.UNet2DConditionModel), ("vae", library.AutoencoderKL)):
        _, info = network.from_pretrained(folder / part, output_loading_info=True)
        assert not any(info.values()), (part, info)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import CLIPTextModel

        _, info = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
        assert not any(info.values()), info
        pipeline = library.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same_bits(ours, reference):
    """Two torch state dicts."""
    assert ours.keys() == reference.keys()
    for name, tensor in reference.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        assert bool((ours[name] == tensor).all()), name


def assert_same_pipelines(ours, reference):
    for part in PARTS:
        assert_same_bits(getattr(ours, part).state_dict(), getattr(reference, part).state_dict())
    for part in ("unet", "vae"):
        want = {k: v for k, v in getattr(reference, part).config.items() if not k.startswith("_")}
        got = {k: v for k, v in getattr(ours, part).config.items() if k in want}
        as_lists = lambda config: json.loads(json.dumps(config))  # noqa: E731
        assert as_lists(got) == as_lists(want), part
    texts = ["a red circle above the blue square", "naïve 猫!", ""]
    assert ours.tokenizer(texts).input_ids == reference.tokenizer(texts).input_ids
    assert ours.tokenizer.model_max_length == reference.tokenizer.model_max_length
    assert ours.text_encoder.config.eos_token_id == reference.text_encoder.config.eos_token_id


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
