"""The published models, each with its source: the config.json files of the named repository (or file).

Stable Diffusion 1 (Rombach et al. 2022), 2 (the same with OpenCLIP-H), XL (Podell et al. 2023), the x4 upscaler, what
was distilled from them, and the tiny autoencoders that stand in for theirs.
"""

import dataclasses

from sd_jax.models.presets import CLIPTextConfig, ModelSpec, TinyVAEConfig, UNetConfig, VAEConfig
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
