"""The lists of tensors: those that our modules initialise, those of the published models, and the known sizes of SD."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import traverse_util

from sd_jax.checkpoints import CheckpointError, keys_diffusers, layout
from sd_jax.models.families import FAMILIES, SD15, SD_X2_LATENT_UPSCALER, SDXL, TAESD
from sd_jax.models.networks import Networks
from sd_jax.models.presets import SHAPES_64, TINY
from tests.checkpoints.tiny import shapes_only
from tests.reference import diffusers

MODELS = {"tiny": TINY, "shapes_64": SHAPES_64, **FAMILIES, "taesd": dataclasses.replace(SD15, vae=TAESD)}
MODELS["sd_x2_latent_upscaler"] = SD_X2_LATENT_UPSCALER


def different_networks() -> list:
    """Every network of MODELS, those of equal lists once."""
    networks = {}
    for name, spec in MODELS.items():
        for part in spec.parts:
            listed = tuple(layout.LAYOUTS[part](getattr(spec, part)).items())
            networks.setdefault(listed, pytest.param(spec, part, id=f"{name}-{part}"))
    return list(networks.values())


@pytest.mark.parametrize(("spec", "part"), different_networks())
def test_modules_initialise_what_the_layout_lists(spec, part):
    """At true size, without a single weight, and names and shapes find their way back."""
    tree = jax.eval_shape(lambda key: Networks.of(spec).init(part, key), jax.random.key(0))
    ours = {name: leaf.shape for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
    config = getattr(spec, part)
    listed = layout.LAYOUTS[part](config)
    mapped = keys_diffusers.from_diffusers(part, shapes_only(listed), config, "layout")
    assert {name: tensor.shape for name, tensor in mapped.items()} == ours
    back = keys_diffusers.to_diffusers(part, mapped, config, "layout")
    assert {name: tensor.shape for name, tensor in back.items()} == listed


@pytest.mark.parametrize(
    ("spec", "part", "tensors", "parameters"),
    [
        (SD15, "unet", 686, 859_520_964),
        (SD15, "vae", 248, 83_653_863),
        (SD15, "text_encoder", 196, 123_060_480),
        (SD_X2_LATENT_UPSCALER, "unet", 639, 372_560_645),
        (SDXL, "unet", 1680, 2_567_463_684),
        (SDXL, "text_encoder_2", 517, 694_659_840),
    ],
)
def test_known_sizes(spec, part, tensors, parameters):
    shapes = layout.LAYOUTS[part](getattr(spec, part))
    assert (len(shapes), sum(math.prod(shape) for shape in shapes.values())) == (tensors, parameters)


def test_faults_are_listed_ten_at_most():
    tensors = shapes_only(layout.unet(TINY.unet))
    for name in [name for name in tensors if "mid_block" in name][:12]:
        del tensors[name]
    tensors["conv_in.extra"] = tensors["conv_in.bias"]
    tensors["conv_in.weight"] = tensors["conv_in.weight"].reshape(32, 36)
    with pytest.raises(CheckpointError) as error:
        layout.check("unet", tensors, TINY.unet, "file.safetensors")
    text = str(error.value)
    assert text.startswith("file.safetensors: not the U-Net of its config: mid_block.resnets.0.norm1.weight is missing")
    assert text.count("missing") == 10 and text.endswith("; and 4 more") and "\n" not in text

    few = shapes_only(layout.unet(TINY.unet))
    few["conv_in.extra"], few["conv_in.weight"] = few["conv_in.bias"], few["conv_in.weight"].reshape(32, 36)
    with pytest.raises(CheckpointError) as error:
        layout.check("unet", few, TINY.unet, "file")
    assert "conv_in.extra is unexpected" in str(error.value)
    assert "conv_in.weight is (32, 36), not (32, 4, 3, 3)" in str(error.value)
    np.testing.assert_equal(len(few), 1 + len(layout.unet(TINY.unet)))


# Parity with diffusers and transformers: their modules, of the published config.json files

_ATTEND, _PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def _blocks(*attend: bool) -> dict:
    kinds = [_ATTEND if cross else _PLAIN for cross in attend]
    down, up = [kind.format("Down") for kind in kinds], [kind.format("Up") for kind in reversed(kinds)]
    return {"down_block_types": down, "up_block_types": up}


_SD1 = {
    **_blocks(True, True, True, False),
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
_SD2 = {**_SD1, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
_X4 = {
    **_blocks(False, True, True, True),
    "in_channels": 7,
    "block_out_channels": [256, 512, 512, 1024],
    "attention_head_dim": 8,
    "cross_attention_dim": 1024,
    "only_cross_attention": [True, True, True, False],
    "use_linear_projection": True,
    "num_class_embeds": 1000,
}
_X2 = {  # as scripts/convert_k_upscaler_to_diffusers.py makes it of the authors' config
    "down_block_types": ["KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3],
    "up_block_types": [*["KCrossAttnUpBlock2D"] * 3, "KUpBlock2D"],
    "mid_block_type": None,
    "in_channels": 8,
    "out_channels": 5,
    "block_out_channels": [384, 384, 768, 768],
    "layers_per_block": 4,
    "attention_head_dim": 64,
    "cross_attention_dim": 768,
    "time_cond_proj_dim": 896,
    "time_embedding_type": "fourier",
    "timestep_post_act": "gelu",
    "act_fn": "gelu",
    "norm_num_groups": None,
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
}
_SDXL = {
    **_blocks(False, True, True),
    "block_out_channels": [320, 640, 1280],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_REFINER = {
    **_SDXL,
    **_blocks(False, True, True, False),
    "block_out_channels": [384, 768, 1536, 1536],
    "attention_head_dim": [6, 12, 24, 24],
    "transformer_layers_per_block": 4,
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
_TAESD = {
    "encoder_block_out_channels": [64, 64, 64, 64],
    "decoder_block_out_channels": [64, 64, 64, 64],
    "num_encoder_blocks": [1, 3, 3, 3],
    "num_decoder_blocks": [3, 3, 3, 1],
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "projection_dim": 768}
_OPENCLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "projection_dim": 512}
_OPENCLIP_BIGG = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1280}

_LINE_1 = {"vae": _VAE, "text_encoder": _CLIP_L}
_LINE_2 = {"vae": _VAE, "text_encoder": _OPENCLIP_H}
_LINE_XL = {"vae": _VAE, "text_encoder": _CLIP_L, "text_encoder_2": _OPENCLIP_BIGG}
PUBLISHED = {
    "sd15": {"unet": _SD1, **_LINE_1},
    "sd15_inpainting": {"unet": {**_SD1, "in_channels": 9}, **_LINE_1},
    "sd15_lcm": {"unet": {**_SD1, "time_cond_proj_dim": 256}, **_LINE_1},
    "sd2_base": {"unet": _SD2, **_LINE_2},
    "sd2_v": {"unet": {**_SD2, "sample_size": 96}, **_LINE_2},
    "sd2_inpainting": {"unet": {**_SD2, "in_channels": 9}, **_LINE_2},
    "sd2_depth": {"unet": {**_SD2, "in_channels": 5}, **_LINE_2},
    "sd_x4_upscaler": {"unet": _X4, **_LINE_2, "vae": {**_VAE, "block_out_channels": [128, 256, 512]}},
    "sdxl": {"unet": _SDXL, **_LINE_XL},
    "sdxl_turbo": {"unet": {**_SDXL, "sample_size": 64}, **_LINE_XL},
    "sdxl_inpainting": {"unet": {**_SDXL, "in_channels": 9}, **_LINE_XL},
    "sdxl_lcm": {"unet": {**_SDXL, "time_cond_proj_dim": 256}, **_LINE_XL},
    "sdxl_refiner": {"unet": _REFINER, "vae": _VAE, "text_encoder_2": _OPENCLIP_BIGG},
    "sd_x2_latent_upscaler": {"unet": _X2, "vae": _VAE, "text_encoder": _CLIP_L},
    "taesd": {"unet": _SD1, "text_encoder": _CLIP_L, "vae": _TAESD},
}


def shapes_of(part: str, config: dict) -> dict:
    """Of a torch module that is built without memory."""
    library = diffusers()
    import torch
    import transformers

    with torch.device("meta"):
        if part == "unet":
            module = library.UNet2DConditionModel(**config)
        elif part == "vae" and "encoder_block_out_channels" in config:
            module = library.AutoencoderTiny(**config)
        elif part == "vae":
            levels = len(config["block_out_channels"])
            types = {
                "down_block_types": ["DownEncoderBlock2D"] * levels,
                "up_block_types": ["UpDecoderBlock2D"] * levels,
            }
            module = library.AutoencoderKL(**config, **types)
        else:
            kind = "CLIPTextModel" if part == "text_encoder" else "CLIPTextModelWithProjection"
            module = getattr(transformers, kind)(transformers.CLIPTextConfig(**config))
    names = module.state_dict()
    if part == "text_encoder":  # transformers 5 has a level less inside CLIPTextModel than in its files
        names = {name if name.startswith("text_model.") else f"text_model.{name}": t for name, t in names.items()}
    return {name: tuple(tensor.shape) for name, tensor in names.items()}


@pytest.mark.parity
@pytest.mark.parametrize("name", PUBLISHED)
def test_layout_is_that_of_the_published_model(name):
    spec = MODELS[name]
    assert tuple(sorted(PUBLISHED[name])) == tuple(sorted(spec.parts))
    for part, config in PUBLISHED[name].items():
        assert layout.LAYOUTS[part](getattr(spec, part)) == shapes_of(part, config), part


def test_every_family_has_its_published_config():
    assert set(PUBLISHED) == {*FAMILIES, "taesd", "sd_x2_latent_upscaler"}
