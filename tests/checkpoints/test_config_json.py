"""config.json files: there and back, SD 1.5's own, and what is refused."""

import dataclasses
import json

import pytest

from sd_jax.checkpoints import CheckpointError, config_json
from sd_jax.models.families import FAMILIES, SD15, SD_X2_LATENT_UPSCALER, SDXL, TAESD
from sd_jax.models.presets import SHAPES_64, TINY
from sd_jax.types import NoiseScheduleConfig

# The files of runwayml/stable-diffusion-v1-5, written by diffusers 0.6 and transformers 4.22
UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


def levels(*attends: bool) -> dict:
    return {
        "down_block_types": [DOWN[attends_too] for attends_too in attends],
        "up_block_types": [UP[attends_too] for attends_too in reversed(attends)],
    }


# What differs from SD 1.5's in the unet/config.json of other published folders
UNETS = {
    "sd15_inpainting": {"in_channels": 9},
    "sd15_lcm": {"time_cond_proj_dim": 256},
    "sd2_v": {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "dual_cross_attention": False,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "sample_size": 96,
        "upcast_attention": True,
        "use_linear_projection": True,
    },
    "sd_x4_upscaler": {
        **levels(False, True, True, True),
        "block_out_channels": [256, 512, 512, 1024],
        "cross_attention_dim": 1024,
        "in_channels": 7,
        "num_class_embeds": 1000,
        "only_cross_attention": [True, True, True, False],
        "sample_size": 128,
        "use_linear_projection": True,
    },
    "sdxl": {
        **levels(False, True, True),
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "mid_block_only_cross_attention": None,
        "num_attention_heads": None,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "upcast_attention": None,
        "use_linear_projection": True,
    },
    "sdxl_refiner": {
        **levels(False, True, True, False),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [6, 12, 24, 24],
        "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560,
        "sample_size": 128,
        "transformer_layers_per_block": 4,
        "use_linear_projection": True,
    },
}
OPENCLIP = {**TEXT, "hidden_act": "gelu", "projection_dim": 512}
OPENCLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
BIGG = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
BIGG |= {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 1280}
TAESD_FILE = {
    "_class_name": "AutoencoderTiny",
    "_diffusers_version": "0.20.0.dev0",
    "act_fn": "relu",
    "block_out_channels": [64, 64, 64, 64],
    "decoder_block_out_channels": [64, 64, 64, 64],
    "encoder_block_out_channels": [64, 64, 64, 64],
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "upsampling_scaling_factor": 2,
}


def test_files_of_sd15():
    assert config_json.unet_from_json(UNET, "") == SD15.unet
    assert config_json.vae_from_json(VAE, "") == SD15.vae
    assert config_json.text_encoder_from_json(TEXT, "") == SD15.text_encoder
    assert config_json.noise_schedule_from_json(SCHEDULER, "") == SD15.noise_schedule


@pytest.mark.parametrize("model", UNETS)
def test_unets_of_other_models(model):
    assert config_json.unet_from_json({**UNET, **UNETS[model]}, "") == FAMILIES[model].unet


def test_other_files_of_other_models():
    upscaler = {"block_out_channels": [128, 256, 512], "scaling_factor": 0.08333, "sample_size": 256}
    upscaler |= {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    assert config_json.vae_from_json({**VAE, **upscaler}, "") == FAMILIES["sd_x4_upscaler"].vae
    sdxl = {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True, "latents_mean": None}
    assert config_json.vae_from_json({**VAE, **sdxl}, "") == SDXL.vae
    assert config_json.vae_from_json(TAESD_FILE, "") == TAESD
    read = config_json.text_encoder_from_json
    assert read({**OPENCLIP, **OPENCLIP_H}, "") == FAMILIES["sd2_v"].text_encoder
    assert read(TEXT, "", in_sdxl=True) == SDXL.text_encoder
    assert read({**OPENCLIP, **BIGG}, "", part="text_encoder_2") == SDXL.text_encoder_2
    unnamed = {**OPENCLIP, **BIGG, "architectures": None}  # the part says enough
    assert read(unnamed, "", part="text_encoder_2") == SDXL.text_encoder_2
    euler = {**SCHEDULER, "_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear"}
    euler |= {"timestep_spacing": "leading", "use_karras_sigmas": False, "prediction_type": "epsilon"}
    assert config_json.noise_schedule_from_json(euler, "") == SDXL.noise_schedule


def test_k_unet():
    data = json.loads(json.dumps(config_json.unet_to_json(SD_X2_LATENT_UPSCALER.unet)))
    assert config_json.unet_from_json(data, "") == SD_X2_LATENT_UPSCALER.unet
    silent = {key: value for key, value in data.items() if key not in ("only_cross_attention", "norm_eps", "dropout")}
    assert config_json.unet_from_json(silent, "") == SD_X2_LATENT_UPSCALER.unet
    for key, value, said in [
        ("act_fn", "silu", "act_fn='silu' is not supported"),
        ("up_block_types", ["KCrossAttnUpBlock2D"] * 4, "up_block_types=.* is not supported: only .*KUpBlock2D"),
        ("time_cond_proj_dim", None, "time_cond_proj_dim=None leaves no room beside the pooled prompt"),
        ("attention_head_dim", 100, "attention_head_dim=100 does not divide 384"),
    ]:
        with pytest.raises(CheckpointError, match=f"file: {said}"):
            config_json.unet_from_json({**data, key: value}, "file")
    for key in ("act_fn", "conv_in_kernel", "norm_num_groups", "time_embedding_type", "timestep_post_act"):
        with pytest.raises(CheckpointError, match=f"{key}=.* is not supported"):
            config_json.unet_from_json({k: v for k, v in data.items() if k != key}, "file")
    noise = config_json.noise_schedule_to_json(SD_X2_LATENT_UPSCALER.noise_schedule)
    assert (noise["_class_name"], noise["prediction_type"]) == ("EulerDiscreteScheduler", "sample")


@pytest.mark.parametrize("model", ["tiny", "shapes_64", "taesd", *FAMILIES])
def test_there_and_back(model):
    spec = {"tiny": TINY, "shapes_64": SHAPES_64, "taesd": dataclasses.replace(SD15, vae=TAESD), **FAMILIES}[model]
    through = lambda data: json.loads(json.dumps(data))  # noqa: E731
    assert config_json.unet_from_json(through(config_json.unet_to_json(spec.unet)), "") == spec.unet
    assert config_json.vae_from_json(through(config_json.vae_to_json(spec.vae)), "") == spec.vae
    for part, config in spec.text_encoders.items():
        text = through(config_json.text_encoder_to_json(config, 0, "float32"))
        read = config_json.text_encoder_from_json(text, "", part, in_sdxl=spec.text_encoder_2 is not None)
        assert {**vars(read), "eos_token_id": 0, "pad_token_id": 0} == {
            **vars(config),
            "eos_token_id": 0,
            "pad_token_id": 0,
        }
    schedule = config_json.noise_schedule_to_json(spec.noise_schedule)
    assert config_json.noise_schedule_from_json(schedule, "") == spec.noise_schedule


def test_only_cross_attention_in_the_middle_too():
    """diffusers takes one True for all blocks, the middle among them, which our U-Net has not."""
    with pytest.raises(CheckpointError, match="^a: only_cross_attention=True in the middle too is not supported"):
        config_json.unet_from_json({**UNET, "only_cross_attention": True}, "a")
    without = config_json.unet_from_json(
        {**UNET, "only_cross_attention": True, "mid_block_only_cross_attention": False}, ""
    )
    assert without == dataclasses.replace(SD15.unet, only_cross_attention=True)
    assert config_json.unet_from_json(config_json.unet_to_json(without), "") == without


def test_numbers_written_as_lists():
    lists = {"attention_head_dim": [8] * 4, "layers_per_block": [2] * 4, "cross_attention_dim": [768] * 4}
    lists |= {"transformer_layers_per_block": [1] * 4, "sample_size": [64, 64], "only_cross_attention": [False] * 4}
    assert config_json.unet_from_json({**UNET, **lists}, "") == SD15.unet


def test_keys_of_later_versions_at_rest_are_let_pass():
    assert config_json.unet_from_json({**UNET, "some_new_feature": None, "another": False}, "") == SD15.unet


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("addition_embed_type", "text_time"),  # without its sizes
        ("addition_embed_type", "image"),
        ("class_embed_type", "projection"),
        ("attention_head_dim", [5, 10, 20]),
        ("transformer_layers_per_block", [1, 2, 10]),
        ("transformer_layers_per_block", [[1, 1], [2, 2], [4, 4], [4, 4]]),
        ("transformer_layers_per_block", 10**9),
        ("reverse_transformer_layers_per_block", [[1, 1, 1]] * 4),
        ("mid_block_type", None),
        ("mid_block_only_cross_attention", True),
        ("resnet_time_scale_shift", "ada_group"),
        ("in_channels", "4"),
        ("in_channels", [4, 4]),
        ("layers_per_block", 2.5),
        ("norm_num_groups", True),
        ("use_linear_projection", 1),
        ("block_out_channels", 320),
        ("block_out_channels", []),
        ("num_class_embeds", "many"),
        ("norm_num_groups", 48),
        ("attention_head_dim", [8, 8, 8, 0]),
        ("attention_head_dim", 7),
        ("down_block_types", ["AttnDownBlock2D"] * 4),
        ("up_block_types", ["UpBlock2D"] * 4),
        ("block_out_channels", [320, 640]),
        ("time_cond_proj_dim", -1),
        ("act_fn", "gelu"),
        ("norm_eps", 1e-6),
        ("some_new_feature", "on"),
        ("_class_name", "UNet2DModel"),
    ],
)
def test_unet_features_that_we_have_not(key, value):
    with pytest.raises(CheckpointError) as error:
        config_json.unet_from_json({**UNET, key: value}, "model/unet/config.json")
    assert str(error.value).startswith("model/unet/config.json: ") and key in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_quant_conv", False),
        ("shift_factor", 0.1159),
        ("mid_block_add_attention", False),
        ("latents_mean", [0.0]),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        ("up_block_types", ["UpDecoderBlock2D"]),
        ("scaling_factor", "big"),
        ("layers_per_block", [2, 3, 2, 2]),
        ("norm_num_groups", 0),
        ("_class_name", "VQModel"),
    ],
)
def test_vae_features_that_we_have_not(key, value):
    with pytest.raises(CheckpointError, match=f"^model/vae/config.json: .*{key}"):
        config_json.vae_from_json({**VAE, key: value}, "model/vae/config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "silu"),
        ("upsampling_scaling_factor", 4),
        ("num_decoder_blocks", [3, 3, 3]),
        ("encoder_block_out_channels", [32, 64, 64, 64]),
        ("latent_magnitude", 6),
    ],
)
def test_tiny_vae_features_that_we_have_not(key, value):
    with pytest.raises(CheckpointError, match=f"^model/vae/config.json: .*{key}"):
        config_json.vae_from_json({**TAESD_FILE, key: value}, "model/vae/config.json")


def test_text_encoders():
    assert config_json.text_encoder_from_json({"model_type": "clip", "text_config": TEXT}, "") == SD15.text_encoder
    own = config_json.text_encoder_from_json({**TEXT, "eos_token_id": 40000, "pad_token_id": 0}, "")
    assert (own.eos_token_id, own.pad_token_id) == (40000, 0)
    for key, value in (("model_type", "t5"), ("hidden_act", "relu")):
        with pytest.raises(CheckpointError, match=f"^a: {key}='{value}' is not supported"):
            config_json.text_encoder_from_json({**TEXT, key: value}, "a")
    for key, value in (
        ("num_hidden_layers", 10**9),
        ("hidden_size", -1),
        ("num_attention_heads", 5),
        ("text_config", [1]),
    ):
        with pytest.raises(CheckpointError, match=f"^a: {key}="):
            config_json.text_encoder_from_json({**TEXT, key: value}, "a")


def test_schedules():
    # Where the file is silent, diffusers' defaults hold
    assert config_json.noise_schedule_from_json({}, "") == NoiseScheduleConfig("linear", 0.0001, 0.02)
    for key, value in (
        ("trained_betas", [0.1]),
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "x"),
        ("beta_start", "0.1"),
        ("num_train_timesteps", 10**12),
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("_class_name", "EDMEulerScheduler"),
    ):
        with pytest.raises(CheckpointError, match=r"^s\.json: "):
            config_json.noise_schedule_from_json({**SCHEDULER, key: value}, "s.json")
