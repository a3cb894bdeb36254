"""The published models, each with its source: the config.json files of the named repository (or file).

Stable Diffusion 1 (Rombach et al. 2022), 2 (the same with OpenCLIP-H), XL (Podell et al. 2023), the upscalers, what was
distilled from them, and the tiny autoencoders that stand in for theirs; and CLIP whole (Radford et al. 2021), as
OpenAI and LAION (Cherti et al. 2022) published it.
"""

import dataclasses

from sd_jax.models.presets import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    KUNetConfig,
    ModelSpec,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
)
from sd_jax.types import NoiseScheduleConfig

# Text encoders: OpenAI's ViT-L/14 (openai/clip-vit-large-patch14), OpenCLIP's ViT-H/14 and ViT-bigG/14
CLIP_L = CLIPTextConfig()
OPENCLIP_H = CLIPTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,  # of 24: SD 2 reads the last but one, and its folders leave the last out
    num_attention_heads=16,
    hidden_act="gelu",
    pad_token_id=0,  # "!"
)
OPENCLIP_BIGG = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    pad_token_id=0,
    projection_dim=1280,
    clip_skip=2,
    context_norm=False,
)

# CompVis/stable-diffusion-v1-1 to v1-4, runwayml/stable-diffusion-v1-5: one architecture
SD15 = ModelSpec()
# runwayml/stable-diffusion-inpainting: latents, mask, the masked picture's latents
SD15_INPAINTING = dataclasses.replace(SD15, unet=UNetConfig(in_channels=9))

# stabilityai/stable-diffusion-2-base and 2-1-base
_SD2_UNET = UNetConfig(num_attention_heads=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True)
SD2_BASE = ModelSpec(unet=_SD2_UNET, text_encoder=OPENCLIP_H)
# stabilityai/stable-diffusion-2 and 2-1
SD2_V = ModelSpec(
    unet=dataclasses.replace(_SD2_UNET, sample_size=96),
    vae=VAEConfig(sample_size=768),
    text_encoder=OPENCLIP_H,
    noise_schedule=NoiseScheduleConfig(prediction_type="v_prediction"),
)
# stabilityai/stable-diffusion-2-inpainting and 2-depth (latents and a map of depth)
SD2_INPAINTING = dataclasses.replace(SD2_BASE, unet=dataclasses.replace(_SD2_UNET, in_channels=9))
SD2_DEPTH = dataclasses.replace(SD2_BASE, unet=dataclasses.replace(_SD2_UNET, in_channels=5))

# stabilityai/stable-diffusion-x4-upscaler: latents of f4 and the small picture
SD_X4_UPSCALER = ModelSpec(
    unet=UNetConfig(
        sample_size=128,
        in_channels=7,
        block_out_channels=(256, 512, 512, 1024),
        attention_blocks=(False, True, True, True),
        cross_attention_dim=1024,
        only_cross_attention=(True, True, True, False),
        use_linear_projection=True,
        num_class_embeds=1000,
    ),
    vae=VAEConfig(sample_size=256, block_out_channels=(128, 256, 512), scaling_factor=0.08333),
    text_encoder=OPENCLIP_H,
    noise_schedule=NoiseScheduleConfig(beta_start=0.0001, beta_end=0.02, prediction_type="v_prediction"),
)

# stabilityai/sd-x2-latent-upscaler: latents of SD 1 or 2, twice as large
SD_X2_LATENT_UPSCALER = ModelSpec(
    unet=KUNetConfig(),
    text_encoder=dataclasses.replace(CLIP_L, context_norm=False),
    noise_schedule=NoiseScheduleConfig(prediction_type="edm"),
)

# stabilityai/stable-diffusion-xl-base-1.0, sdxl-turbo; ByteDance/SDXL-Lightning
SDXL = ModelSpec(
    unet=UNetConfig(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        attention_blocks=(False, True, True),
        transformer_layers_per_block=(1, 2, 10),
        num_attention_heads=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    vae=VAEConfig(sample_size=1024, scaling_factor=0.13025),
    text_encoder=dataclasses.replace(CLIP_L, clip_skip=2, context_norm=False),
    text_encoder_2=OPENCLIP_BIGG,
    force_zeros_for_empty_prompt=True,
)
SDXL_TURBO = dataclasses.replace(SDXL, unet=dataclasses.replace(SDXL.unet, sample_size=64))
# diffusers/stable-diffusion-xl-1.0-inpainting-0.1
SDXL_INPAINTING = dataclasses.replace(SDXL, unet=dataclasses.replace(SDXL.unet, in_channels=9))
# latent-consistency/lcm-sdxl and SimianLuo/LCM_Dreamshaper_v7: told the guidance scale that they imitate
SDXL_LCM = dataclasses.replace(SDXL, unet=dataclasses.replace(SDXL.unet, time_cond_proj_dim=256))
SD15_LCM = dataclasses.replace(SD15, unet=UNetConfig(time_cond_proj_dim=256))
# stabilityai/stable-diffusion-xl-refiner-1.0
SDXL_REFINER = ModelSpec(
    unet=UNetConfig(
        sample_size=128,
        block_out_channels=(384, 768, 1536, 1536),
        attention_blocks=(False, True, True, False),
        transformer_layers_per_block=4,
        num_attention_heads=(6, 12, 24, 24),
        cross_attention_dim=1280,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2560,
    ),
    vae=SDXL.vae,
    text_encoder=None,
    text_encoder_2=OPENCLIP_BIGG,
)

# madebyollin/taesd and taesdxl: one architecture, other weights
TAESD = TinyVAEConfig()

# Those that single files have a layout for
FAMILIES: dict[str, ModelSpec] = {
    "sd15": SD15,
    "sd15_inpainting": SD15_INPAINTING,
    "sd15_lcm": SD15_LCM,
    "sd2_base": SD2_BASE,
    "sd2_v": SD2_V,
    "sd2_inpainting": SD2_INPAINTING,
    "sd2_depth": SD2_DEPTH,
    "sd_x4_upscaler": SD_X4_UPSCALER,
    "sdxl": SDXL,
    "sdxl_turbo": SDXL_TURBO,
    "sdxl_inpainting": SDXL_INPAINTING,
    "sdxl_lcm": SDXL_LCM,
    "sdxl_refiner": SDXL_REFINER,
}

# CLIP, both towers. OpenAI's: openai/clip-vit-base-patch32, -base-patch16, -large-patch14, -large-patch14-336
CLIP_VIT_B_32 = CLIPConfig()
CLIP_VIT_B_16 = dataclasses.replace(CLIP_VIT_B_32, vision_config=CLIPVisionConfig(patch_size=16))
_VISION_L = CLIPVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
)
CLIP_VIT_L_14 = CLIPConfig(text_config=CLIP_L, vision_config=_VISION_L, projection_dim=768)
CLIP_VIT_L_14_336 = dataclasses.replace(CLIP_VIT_L_14, vision_config=dataclasses.replace(_VISION_L, image_size=336))

# OpenCLIP's: laion/CLIP-ViT-H-14-laion2B-s32B-b79K, -g-14-laion2B-s34B-b88K, -bigG-14-laion2B-39B-b160k
# (mlfoundations/open_clip src/open_clip/model_configs/ViT-{H,g,bigG}-14.json). The heads of their vision towers are 80,
# 88 and 104 channels wide
_TEXT_H = dataclasses.replace(OPENCLIP_H, num_hidden_layers=24)
CLIP_VIT_H_14 = CLIPConfig(
    text_config=_TEXT_H,
    vision_config=CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        hidden_act="gelu",
    ),
    projection_dim=1024,
)
CLIP_VIT_G_14 = CLIPConfig(
    text_config=_TEXT_H,
    vision_config=CLIPVisionConfig(
        hidden_size=1408,
        intermediate_size=6144,
        num_hidden_layers=40,
        num_attention_heads=16,
        patch_size=14,
        hidden_act="gelu",
    ),
    projection_dim=1024,
)
CLIP_VIT_BIGG_14 = CLIPConfig(
    text_config=dataclasses.replace(OPENCLIP_BIGG, clip_skip=1, context_norm=True),
    vision_config=CLIPVisionConfig(
        hidden_size=1664,
        intermediate_size=8192,
        num_hidden_layers=48,
        num_attention_heads=16,
        patch_size=14,
        hidden_act="gelu",
    ),
    projection_dim=1280,
)

CLIPS: dict[str, CLIPConfig] = {
    "clip_vit_b_32": CLIP_VIT_B_32,
    "clip_vit_b_16": CLIP_VIT_B_16,
    "clip_vit_l_14": CLIP_VIT_L_14,
    "clip_vit_l_14_336": CLIP_VIT_L_14_336,
    "clip_vit_h_14": CLIP_VIT_H_14,
    "clip_vit_g_14": CLIP_VIT_G_14,
    "clip_vit_bigg_14": CLIP_VIT_BIGG_14,
}
