"""config.json files: there and back, SD 1.5's own, and what is refused."""

import pytest

from sd_jax.checkpoints import CheckpointError, config_json
from sd_jax.models.presets import SD15, SHAPES_64, TINY
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


def test_files_of_sd15():
    assert config_json.unet_from_json(UNET, "") == SD15.unet
    assert config_json.vae_from_json(VAE, "") == SD15.vae
    assert config_json.text_encoder_from_json(TEXT, "") == SD15.text_encoder
    assert config_json.noise_schedule_from_json(SCHEDULER, "") == SD15.noise_schedule


@pytest.mark.parametrize("spec", [SD15, TINY, SHAPES_64], ids=["sd15", "tiny", "shapes_64"])
def test_there_and_back(spec):
    assert config_json.unet_from_json(config_json.unet_to_json(spec.unet), "") == spec.unet
    assert config_json.vae_from_json(config_json.vae_to_json(spec.vae), "") == spec.vae
    text = config_json.text_encoder_to_json(spec.text_encoder, 0, "float32")
    read = config_json.text_encoder_from_json(text, "")
    assert {**vars(read), "eos_token_id": 0, "pad_token_id": 0} == {
        **vars(spec.text_encoder),
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    schedule = config_json.noise_schedule_to_json(spec.noise_schedule)
    assert config_json.noise_schedule_from_json(schedule, "") == spec.noise_schedule


def test_numbers_written_as_lists():
    lists = {"attention_head_dim": [8] * 4, "layers_per_block": [2] * 4, "cross_attention_dim": [768] * 4}
    lists |= {"transformer_layers_per_block": [1] * 4, "sample_size": [64, 64], "only_cross_attention": [False] * 4}
    assert config_json.unet_from_json({**UNET, **lists}, "") == SD15.unet


def test_keys_of_later_versions_at_rest_are_let_pass():
    assert config_json.unet_from_json({**UNET, "some_new_feature": None, "another": False}, "") == SD15.unet


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_linear_projection", True),
        ("addition_embed_type", "text_time"),
        ("class_embed_type", "projection"),
        ("num_class_embeds", 1000),
        ("attention_head_dim", [5, 10, 20, 20]),
        ("transformer_layers_per_block", [1, 2, 10]),
        ("down_block_types", ["AttnDownBlock2D"] * 4),
        ("up_block_types", ["UpBlock2D"] * 4),
        ("block_out_channels", [320, 640]),
        ("time_cond_proj_dim", 256),
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
        ("_class_name", "AutoencoderTiny"),
    ],
)
def test_vae_features_that_we_have_not(key, value):
    with pytest.raises(CheckpointError, match=f"^model/vae/config.json: .*{key}"):
        config_json.vae_from_json({**VAE, key: value}, "model/vae/config.json")


def test_text_encoders():
    assert config_json.text_encoder_from_json({"model_type": "clip", "text_config": TEXT}, "") == SD15.text_encoder
    own = config_json.text_encoder_from_json({**TEXT, "eos_token_id": 40000, "pad_token_id": 0}, "")
    assert (own.eos_token_id, own.pad_token_id) == (40000, 0)
    for key, value in (("model_type", "t5"), ("hidden_act", "relu")):
        with pytest.raises(CheckpointError, match=f"^a: {key}='{value}' is not supported"):
            config_json.text_encoder_from_json({**TEXT, key: value}, "a")


def test_schedules():
    # Where the file is silent, diffusers' defaults hold
    assert config_json.noise_schedule_from_json({}, "") == NoiseScheduleConfig("linear", 0.0001, 0.02)
    for key, value in (
        ("trained_betas", [0.1]),
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "x"),
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
    ):
        with pytest.raises(CheckpointError, match=r"^s\.json: "):
            config_json.noise_schedule_from_json({**SCHEDULER, key: value}, "s.json")
