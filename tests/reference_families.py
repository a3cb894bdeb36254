"""A tiny random pipeline of diffusers for each published family, saved as people's folders are.

The sizes keep what single files do not say and readers take from the family: 8 heads in SD 1's U-Net and the x4
upscaler's, 64 channels a head in the others; 12 heads in CLIP-L, 64 channels a head in OpenCLIP; 32 groups a norm.
"""

import copy
import functools
import tempfile
import warnings
from pathlib import Path

from tests.reference import diffusers
from tests.reference_pipeline import tiny_tokenizer

# What a family has besides the rest of its line
_SD1_UNET = {"block_out_channels": (32, 64), "attention_head_dim": 8, "cross_attention_dim": 48}
_SD2_UNET = {
    "block_out_channels": (64, 128),
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 64,
    "use_linear_projection": True,
}
_SDXL_UNET = {
    **_SD2_UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 48 + 64,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64 + 6 * 8,
}
_REFINER_UNET = {
    **_SDXL_UNET,
    "block_out_channels": (64, 128, 128),
    "attention_head_dim": (1, 2, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 2,
    "cross_attention_dim": 64,
    "projection_class_embeddings_input_dim": 64 + 5 * 8,
}
_X4_UNET = {
    **_SD2_UNET,
    "in_channels": 7,
    "attention_head_dim": 8,
    "only_cross_attention": (True, False),
    "num_class_embeds": 50,
}
_X2_UNET = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
    "up_block_types": ("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
    "mid_block_type": None,
    "layers_per_block": 2,
    "in_channels": 8,
    "out_channels": 5,
    "attention_head_dim": 16,
    "cross_attention_dim": 48,
    "cross_attention_norm": "layer_norm",
    "time_cond_proj_dim": 128 + 48,
    "time_embedding_type": "fourier",
    "timestep_post_act": "gelu",
    "act_fn": "gelu",
    "norm_num_groups": None,
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
    "resnet_time_scale_shift": "scale_shift",
}
_V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

FAMILIES = {  # name -> (pipeline, U-Net, scheduler, text encoders)
    "sd15": ("StableDiffusionPipeline", _SD1_UNET, {}, "l"),
    "sd15_inpainting": ("StableDiffusionInpaintPipeline", {**_SD1_UNET, "in_channels": 9}, {}, "l"),
    "sd15_lcm": ("StableDiffusionPipeline", {**_SD1_UNET, "time_cond_proj_dim": 16}, {}, "l"),
    "sd2_base": ("StableDiffusionPipeline", _SD2_UNET, {}, "h"),
    "sd2_v": ("StableDiffusionPipeline", _SD2_UNET, _V, "h"),
    "sd2_inpainting": ("StableDiffusionInpaintPipeline", {**_SD2_UNET, "in_channels": 9}, {}, "h"),
    "sd2_depth": ("StableDiffusionDepth2ImgPipeline", {**_SD2_UNET, "in_channels": 5}, {}, "h"),
    "sd_x4_upscaler": (
        "StableDiffusionUpscalePipeline",
        _X4_UNET,
        {"beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "v_prediction"},
        "h",
    ),
    "sd_x2_latent_upscaler": ("StableDiffusionLatentUpscalePipeline", _X2_UNET, {"prediction_type": "sample"}, "l"),
    "sdxl": ("StableDiffusionXLPipeline", _SDXL_UNET, {}, "lg"),
    "sdxl_inpainting": ("StableDiffusionXLInpaintPipeline", {**_SDXL_UNET, "in_channels": 9}, {}, "lg"),
    "sdxl_lcm": ("StableDiffusionXLPipeline", {**_SDXL_UNET, "time_cond_proj_dim": 16}, {}, "lg"),
    "sdxl_refiner": ("StableDiffusionXLImg2ImgPipeline", _REFINER_UNET, {}, "g"),
}
IN_SINGLE_FILES = [name for name in FAMILIES if name != "sd_x2_latent_upscaler"]
_SCALING = {"sd_x4_upscaler": 0.08333}


def saved_family(name: str) -> tuple[Path, object]:
    """(folder, pipeline) of `tiny_family`, built once for a test run's process. The pipeline is a copy: adapters that a
    test puts on leave marks in it."""
    folder, pipeline = _built(name)
    return folder, copy.deepcopy(pipeline)


@functools.cache
def _built(name: str) -> tuple[Path, object]:
    folder = Path(tempfile.mkdtemp(prefix="sd_jax_family_")) / name
    return folder, tiny_family(name, folder)


def tiny_family(name: str, folder: str | Path):
    """Builds the pipeline, saves it into `folder` and returns it. Every parameter is random, norms and biases too.

    Latents are 8x8 of 32x32 pixels (f4). Skips the test where torch, diffusers or transformers is not installed.
    """
    library = diffusers()
    pipeline_name, unet_config, scheduler_config, encoders = FAMILIES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import CLIPTokenizer

        folder = Path(folder)
        vocabulary = tiny_tokenizer(folder / "words")
        marks = {"l": "<|endoftext|>", "h": "!", "g": "!"}
        tokenizers = {kind: CLIPTokenizer.from_pretrained(vocabulary, pad_token=marks[kind]) for kind in encoders}
        texts = {kind: _text_encoder(kind, tokenizers[kind]) for kind in encoders}
        unet = library.UNet2DConditionModel(
            **{
                "sample_size": 8,
                "layers_per_block": 1,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                **unet_config,
            }
        )
        vae = library.AutoencoderKL(
            sample_size=32,
            block_out_channels=(32, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            scaling_factor=_SCALING.get(name, 0.13025 if "sdxl" in name else 0.18215),
        )
        schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
        schedule |= {"clip_sample": False, "set_alpha_to_one": False, **scheduler_config}
        for part in (unet, vae, *texts.values()):
            _randomise(part)

        parts = {"unet": unet, "vae": vae, "scheduler": library.DDIMScheduler(**schedule)}
        if "sdxl" in name:
            parts |= {"text_encoder": texts.get("l"), "tokenizer": tokenizers.get("l")}
            parts |= {"text_encoder_2": texts["g"], "tokenizer_2": tokenizers["g"]}
            parts["force_zeros_for_empty_prompt"] = name != "sdxl_refiner"
            parts |= {"requires_aesthetics_score": True} if name == "sdxl_refiner" else {}
        else:
            (kind,) = encoders
            parts |= {"text_encoder": texts[kind], "tokenizer": tokenizers[kind]}
            parts |= _beside(library, name)
        pipeline = getattr(library, pipeline_name)(**parts)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(folder)
    return pipeline


def _beside(library, name: str) -> dict:
    """What pipelines ask for that no test uses."""
    if name == "sd2_depth":
        return {"depth_estimator": None, "feature_extractor": None}
    if name == "sd_x2_latent_upscaler":
        return {}
    if name == "sd_x4_upscaler":
        return {"low_res_scheduler": library.DDPMScheduler(), "max_noise_level": 35}
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def _text_encoder(kind: str, tokenizer):
    import transformers

    sizes = {"l": (48, 12, "quick_gelu"), "h": (64, 1, "gelu"), "g": (64, 1, "gelu")}
    width, heads, activation = sizes[kind]
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=heads,
        hidden_act=activation,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.CLIPTextModelWithProjection(config) if kind == "g" else transformers.CLIPTextModel(config)


def _randomise(part) -> None:
    import torch

    part.eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in part.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") and parameter.ndim == 1 else 0.0
        parameter.data = centre + 0.1 * torch.randn(parameter.shape, generator=generator)
