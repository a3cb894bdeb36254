"""Sizes of networks, as plain data. Field names are those of the config.json files of diffusers and transformers.

Sources: SD15 is `runwayml/stable-diffusion-v1-5` (unet/, vae/, text_encoder/ and scheduler/ config.json). The others
are ours: TINY for tests, SHAPES_32 and SHAPES_64 for pictures of shapes world.
"""

import dataclasses

from sd_jax.types import NoiseScheduleConfig


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """diffusers' UNet2DConditionModel as SD 1.x uses it."""

    sample_size: int = 64  # latents; the size that the model was trained at
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention_blocks: tuple[bool, ...] = (True, True, True, False)  # which down blocks attend; up blocks mirror them
    layers_per_block: int = 2
    num_attention_heads: int = 8  # diffusers' config.json calls it attention_head_dim (their known misnomer)
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    addition_embed_type: str | None = None  # "text": the prompt is pooled and joins the timestep's embedding
    addition_embed_type_num_heads: int = 64
    resnet_time_scale_shift: str = "default"  # "scale_shift": the timestep scales features too, not only shifts them


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """diffusers' AutoencoderKL."""

    sample_size: int = 512  # pixels
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def downscale(self) -> int:
        """Pixels per latent along a side (f8 for SD)."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """transformers' CLIPTextModel."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"  # or "gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407  # the tokenizer's own; the `2` in SD 1.5's config.json is a known mistake
    pad_token_id: int = 49407


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything about a text-to-image model but its weights and its words."""

    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    text_encoder: CLIPTextConfig = CLIPTextConfig()
    noise_schedule: NoiseScheduleConfig = NoiseScheduleConfig()

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict) -> "ModelSpec":
        """Inverse of `to_dict`, also after a trip through JSON (lists become tuples). Unknown keys raise TypeError."""
        parts = {"unet": UNetConfig, "vae": VAEConfig, "text_encoder": CLIPTextConfig}
        parts["noise_schedule"] = NoiseScheduleConfig
        as_tuples = {
            name: {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in dict(data[name]).items()}
            for name in data
        }
        return ModelSpec(**{name: parts[name](**values) for name, values in as_tuples.items()})


SD15 = ModelSpec()

TINY = ModelSpec(
    unet=UNetConfig(
        sample_size=8,
        block_out_channels=(32, 64),
        attention_blocks=(True, False),
        layers_per_block=1,
        num_attention_heads=2,
        cross_attention_dim=32,
        norm_num_groups=8,
    ),
    vae=VAEConfig(sample_size=32, block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8),
    text_encoder=CLIPTextConfig(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=999,
        pad_token_id=999,
    ),
)


def _shapes(resolution: int, vae_channels: tuple[int, ...], latent_channels: int, unet: UNetConfig) -> ModelSpec:
    """A model of shapes world: 24 tokens of a small vocabulary, latents of 8x8, linear betas, v-prediction."""
    return ModelSpec(
        unet=dataclasses.replace(unet, in_channels=latent_channels, out_channels=latent_channels),
        vae=VAEConfig(
            sample_size=resolution,
            block_out_channels=vae_channels,
            latent_channels=latent_channels,
            layers_per_block=1,
            norm_num_groups=8,
        ),
        text_encoder=CLIPTextConfig(
            vocab_size=768,  # at most; the tokenizer that is trained decides
            hidden_size=unet.cross_attention_dim,
            intermediate_size=4 * unet.cross_attention_dim,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=24,
        ),
        noise_schedule=NoiseScheduleConfig(beta_schedule="linear", prediction_type="v_prediction"),
    )


_SHAPES_UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(48, 96),
    attention_blocks=(True, True),
    layers_per_block=1,
    num_attention_heads=2,
    cross_attention_dim=96,
    norm_num_groups=4,
    addition_embed_type="text",
    addition_embed_type_num_heads=2,
    resnet_time_scale_shift="scale_shift",
)
SHAPES_32 = _shapes(
    32,
    vae_channels=(16, 16, 48),
    latent_channels=4,
    # For one object the pooled prompt says enough: words are looked at on the small level alone
    unet=dataclasses.replace(_SHAPES_UNET, attention_blocks=(False, True)),
)
SHAPES_64 = _shapes(64, vae_channels=(16, 16, 32, 64), latent_channels=8, unet=_SHAPES_UNET)
TINY_SHAPES = _shapes(
    32,
    vae_channels=(8, 8, 16),
    latent_channels=4,
    unet=UNetConfig(
        sample_size=8,
        block_out_channels=(16, 32),
        attention_blocks=(True, False),
        layers_per_block=1,
        num_attention_heads=2,
        cross_attention_dim=32,
        norm_num_groups=8,
    ),
)
