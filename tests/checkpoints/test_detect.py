"""What a path is, and what a file's tensors are of, by contents."""

import json

import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, components, detect, keys_compvis, layout
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.models.families import TAESD
from tests.checkpoints.reduced import REDUCED, file_of
from tests.checkpoints.tiny import SPEC, shapes_only

_UNET = "model.diffusion_model."


def tensors(*names, shape=(4, 4)):
    return {name: Tensor(shape, np.dtype(np.float32), lambda: np.zeros(1)) for name in names}


def diffusers(part, spec, prefix=""):
    return {prefix + n: t for n, t in shapes_only(layout.LAYOUTS[part](getattr(spec, part))).items()}


@pytest.mark.parametrize(
    ("found", "family"),
    [
        (tensors("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"), "lora"),
        (tensors("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"), "lora"),
        (tensors("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a"), "lora"),
        (tensors("down_blocks.0.attentions.0.processor.to_q_lora.down.weight"), "lora"),
        (tensors("emb_params"), "embedding"),
        (tensors("clip_l", "clip_g"), "embedding"),
        (tensors("string_to_param.*"), "embedding"),
        (tensors("<cat-toy>", shape=(768,)), "embedding"),
        (tensors("<cat-toy>", shape=(769,)), "unknown"),
        (tensors("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "adapter"),
        (tensors("down_blocks.0.motion_modules.0.temporal_transformer.norm.bias"), "motion"),
        (tensors("control_model.input_blocks.0.0.weight"), "controlnet"),
        (tensors("controlnet_cond_embedding.conv_in.weight", "time_embedding.linear_1.weight"), "controlnet"),
        (tensors("double_blocks.0.img_attn.qkv.weight"), "flux"),
        (tensors(f"{_UNET}joint_blocks.0.x_block.attn.qkv.weight"), "sd3"),
        ({**file_of(REDUCED["sdxl"], ("unet",)), **tensors("edm_mean", "edm_std")}, "edm"),
        ({**file_of(REDUCED["sdxl"], ("unet",)), **tensors("edm_vpred.sigma_max")}, "edm"),
        (tensors("model_ema.diffusion_modelout2weight"), "averages"),
        (tensors("foo", "bar"), "unknown"),
        ({}, "unknown"),
    ],
)
def test_what_is_no_model_of_ours(found, family):
    assert detect.family(found) == family
    assert detect.describe(found)


@pytest.mark.parametrize("name", REDUCED)
@pytest.mark.parametrize("prefix", [_UNET, "diffusion_model.", "", "diffusers", "whole"])
def test_models_of_each_family(name, prefix):
    """Whole, and a U-Net alone in each of its namings."""
    spec = REDUCED[name]
    if prefix == "diffusers":
        found = diffusers("unet", spec)
    elif prefix == "whole":
        found = file_of(spec)
    else:
        found = {n.replace(_UNET, prefix, 1): t for n, t in file_of(spec, ("unet",)).items()}
        assert components.unified(found).keys() == file_of(spec, ("unet",)).keys()
    assert detect.family(found) == keys_compvis.kind_of(spec)
    assert components.misplaced(found) is None


@pytest.mark.parametrize(
    ("found", "family", "naming", "prefix"),
    [
        (file_of(REDUCED["sd1"], ("vae",)), "vae", "compvis", "first_stage_model."),
        (diffusers("vae", SPEC), "vae", "diffusers", ""),
        (diffusers("vae", SPEC, "vae."), "vae", "diffusers", "vae."),
        (shapes_only(layout.vae(TAESD)), "vae", "tiny", ""),
        (diffusers("text_encoder", SPEC), "text_encoder", "transformers", ""),
        (
            {n.removeprefix("text_model."): t for n, t in diffusers("text_encoder", SPEC).items()},
            "text_encoder",
            "transformers",
            "",
        ),
        (
            file_of(REDUCED["sd1"], ("text_encoder",)),
            "text_encoder",
            "transformers",
            "cond_stage_model.transformer.",
        ),
        (
            file_of(REDUCED["sdxl"], ("text_encoder_2",)),
            "text_encoder",
            "open_clip",
            "conditioner.embedders.1.model.",
        ),
    ],
)
def test_networks_alone(found, family, naming, prefix):
    assert detect.family(found) == family
    (component,) = components.find(found)
    assert (component.network, component.naming, component.prefix) == (family, naming, prefix)
    assert len(component.tensors(found)) == len(found)
    assert "alone, not a whole model (it can be given as" in detect.describe(found)


def test_the_text_half_of_a_whole_clip():
    text = diffusers("text_encoder", SPEC)
    pictures = tensors("vision_model.embeddings.class_embedding", "visual_projection.weight", "logit_scale")
    (component,) = components.find({**text, **pictures})
    assert component.tensors({**text, **pictures}).keys() == text.keys()
    assert components.find(tensors("visual.transformer.resblocks.0.ln_1.weight")) == []


def test_swapped_components():
    spec = REDUCED["sd1"]
    unet, vae = file_of(spec, ("unet",)), file_of(spec, ("vae",))
    text = file_of(spec, ("text_encoder",))
    swapped = {n.replace("first_stage_model.", _UNET): t for n, t in vae.items()}
    assert "model.diffusion_model.* is a VAE, where the U-Net belongs: two comp" in components.misplaced(swapped)
    swapped = {n.replace(_UNET, "first_stage_model."): t for n, t in unet.items()}
    assert "first_stage_model.* is a U-Net, where the VAE belongs" in components.misplaced(swapped)
    swapped = {n.replace("cond_stage_model.transformer.", "first_stage_model."): t for n, t in text.items()}
    assert "first_stage_model.* is a text encoder, where the VAE belongs" in components.misplaced(swapped)
    both = file_of(REDUCED["sdxl"])
    swap = {"conditioner.embedders.0.transformer.": "conditioner.embedders.1.transformer."}
    swap["conditioner.embedders.1.model."] = "conditioner.embedders.0.model."
    swapped = {next((n.replace(a, b) for a, b in swap.items() if n.startswith(a)), n): t for n, t in both.items()}
    assert "embedders.0.* is OpenCLIP and conditioner.embedders.1.* CLIP" in components.misplaced(swapped)
    assert components.misplaced(both) is None
    video = tensors("conditioner.embedders.3.encoder.decoder.mid.block_1.conv1.weight")  # of Stable Video Diffusion
    assert components.misplaced(video) is None


def test_paths(tmp_path):
    for name in ("any.name", "model.ckpt", "model.bin"):
        (tmp_path / name).write_bytes(b"")
        assert detect.detect(tmp_path / name) == "single_file"

    (tmp_path / "a" / "unet").mkdir(parents=True)
    (tmp_path / "a" / "unet" / "config.json").write_text("{}")
    assert detect.detect(tmp_path / "a") == "diffusers"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model_index.json").write_text("{}")
    assert detect.detect(str(tmp_path / "b")) == "diffusers"

    (tmp_path / "run" / "checkpoints" / "1000" / "state").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    for path in ("run", "run/checkpoints", "run/checkpoints/1000"):
        assert detect.detect(tmp_path / path) == "native"
    assert detect.native_location(tmp_path / "run") == (tmp_path / "run" / "checkpoints", None)
    assert detect.native_location(tmp_path / "run/checkpoints/1000") == (tmp_path / "run" / "checkpoints", 1000)


def test_paths_that_are_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint: .*nowhere is neither a file nor a folder"):
        detect.detect(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint: a folder with neither"):
        detect.detect(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(CheckpointError, match=r"one part of a diffusers folder \(AutoencoderKL\): give the"):
        detect.detect(tmp_path)
    (tmp_path / "run" / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no finished checkpoint is in its checkpoints/ yet"):
        detect.detect(tmp_path / "run")
