"""What a path is, by its contents."""

import json

import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, detect, keys_compvis, layout
from sd_jax.checkpoints.tensors import Tensor
from tests.checkpoints.tiny import SPEC, compvis_file, shapes_only

_UNET = "model.diffusion_model."


def tensors(*names, ndim=2):
    return {name: Tensor((4,) * ndim, np.dtype(np.float32), lambda: np.zeros(1)) for name in names}


@pytest.mark.parametrize(
    ("found", "family"),
    [
        (tensors("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"), "lora"),
        (tensors("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"), "lora"),
        (tensors("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a"), "lora"),
        (tensors("emb_params"), "embedding"),
        (tensors("clip_l", "clip_g"), "embedding"),
        (tensors("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "adapter"),
        (tensors("down_blocks.0.motion_modules.0.temporal_transformer.norm.bias"), "motion"),
        (tensors("control_model.input_blocks.0.0.weight"), "controlnet"),
        (tensors("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.norm1.bias"), "controlnet"),
        (tensors("double_blocks.0.img_attn.qkv.weight"), "flux"),
        (tensors(f"{_UNET}joint_blocks.0.x_block.attn.qkv.weight"), "sd3"),
        (tensors("conditioner.embedders.1.model.ln_final.bias", f"{_UNET}input_blocks.0.0.weight"), "sdxl"),
        (tensors(f"{_UNET}label_emb.0.0.weight", f"{_UNET}input_blocks.0.0.weight"), "sdxl"),
        (tensors("conditioner.embedders.0.model.ln_final.bias"), "sdxl_refiner"),
        (tensors("cond_stage_model.model.ln_final.bias", f"{_UNET}input_blocks.0.0.weight"), "sd2"),
        (tensors(f"{_UNET}middle_block.1.proj_in.weight", f"{_UNET}input_blocks.0.0.weight"), "sd2"),
        (tensors(f"{_UNET}middle_block.1.proj_in.weight", f"{_UNET}input_blocks.0.0.weight", ndim=4), "sd1"),
        (tensors("encoder.conv_in.weight", "decoder.conv_in.weight"), "vae"),
        (tensors("first_stage_model.decoder.conv_in.weight"), "vae"),
        (tensors("text_model.embeddings.token_embedding.weight"), "text_encoder"),
        (shapes_only(layout.unet(SPEC.unet)), "diffusers_part"),
        (tensors("foo", "bar"), "unknown"),
        ({}, "unknown"),
    ],
)
def test_families(found, family):
    assert detect.family(found) == family
    assert detect.describe(found)


def test_a_whole_model_of_sd1():
    file = {}
    for part in layout.PARTS:
        shapes = shapes_only(layout.LAYOUTS[part](getattr(SPEC, part)))
        file |= keys_compvis.from_diffusers(part, shapes, getattr(SPEC, part))
    assert detect.family(file) == "sd1" and file.keys() == compvis_file().keys()


def test_paths(tmp_path):
    (tmp_path / "any.name").write_bytes(b"")
    assert detect.detect(tmp_path / "any.name") == "single_file"

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


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_not_read_yet(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickles, which are not read yet: save it as .safetensors first"):
        detect.detect(path)


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
