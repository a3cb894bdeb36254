"""Sizes of networks, as plain data. Field names are those of the config.json files of diffusers and transformers.

The presets with these types are in `families.py` (published models), and below (ours: TINY for tests, SHAPES_32 and
SHAPES_64 for pictures of shapes world).
"""

import dataclasses
from collections.abc import Sequence

from sd_jax.types import NoiseScheduleConfig

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")  # of a model, by the names of a diffusers folder
ALL_PARTS = (*PARTS, "image_encoder")  # and of one that is told pictures in place of text
# What is trained to guide, teach or judge it, lends it its eyes, and makes its pictures larger
BESIDE = ("clip", "features", "perceptual", "aesthetic", "discriminator", "image_encoder", "upscaler")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """diffusers' UNet2DConditionModel as SD 1.x, SD 2.x, SDXL and their kin use it; the defaults are SD 1.5's.

    A field of type `tuple | ...` has one value for all down blocks, or one for each; up blocks mirror them.
    """

    sample_size: int = 64  # latents; the size that the model was trained at
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention_blocks: tuple[bool, ...] = (True, True, True, False)  # which down blocks attend; the middle always does
    layers_per_block: int = 2
    transformer_layers_per_block: tuple[int, ...] | int = 1  # the middle has the last block's number
    num_attention_heads: tuple[int, ...] | int = 8  # config.json's attention_head_dim (their known misnomer)
    cross_attention_dim: int = 768
    only_cross_attention: tuple[bool, ...] | bool = False  # attn1 reads the context too; never in the middle
    use_linear_projection: bool = False  # proj_in and proj_out are linears, not 1x1 convolutions
    norm_num_groups: int = 32
    num_class_embeds: int | None = None  # noise levels of the x4 upscaler, an embedding added to the timestep's
    time_cond_proj_dim: int | None = None  # models distilled by LCM: width of the embedded guidance scale
    addition_embed_type: str | None = None  # "text": the context is pooled and joins the timestep's embedding;
    # "text_time": the pooled state and the embedded time_ids join it (SDXL)
    addition_embed_type_num_heads: int = 64  # of "text"
    addition_time_embed_dim: int | None = None  # of "text_time": sinusoids per number of time_ids
    projection_class_embeddings_input_dim: int | None = None  # of "text_time": pooled and all sinusoids
    resnet_time_scale_shift: str = "default"  # "scale_shift": the timestep scales features too, not only shifts them

    @property
    def told_by_context_alone(self) -> bool:
        """Whether rows that differ in nothing but what they are told are the same until the first cross-attention."""
        return self.num_class_embeds is None and self.time_cond_proj_dim is None and self.addition_embed_type is None

    def of_block(self, field: str, block: int):
        """The value of such a field for a down block (-1: the last, and the middle)."""
        value = getattr(self, field)
        return value[block] if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True)
class KUNetConfig:
    """k-diffusion's U-Net as diffusers has it, of its K blocks; the defaults are the x2 latent upscaler's."""

    sample_size: int = 64  # latents; no file says at which size it was trained
    in_channels: int = 8  # the latents, and beside them the small picture's
    out_channels: int = 5  # the last one, a variance, is read by nothing
    block_out_channels: tuple[int, ...] = (384, 384, 768, 768)
    layers_per_block: int = 4
    attention_head_dim: int = 64  # channels of a head
    cross_attention_dim: int = 768
    mapping_cond_dim: int = 896  # config.json's time_cond_proj_dim: the small picture's noise level, the pooled prompt

    # What is asked of every U-Net, and this one has not
    num_class_embeds = time_cond_proj_dim = addition_embed_type = projection_class_embeddings_input_dim = None
    use_linear_projection = told_by_context_alone = False

    @property
    def attention_blocks(self) -> tuple[bool, ...]:
        """Which down blocks attend: all but the first."""
        return (False,) + (True,) * (len(self.block_out_channels) - 1)

    @property
    def multiple(self) -> int:
        """That the sides of its latents are of."""
        return 2 ** (len(self.block_out_channels) - 1)


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
class TinyVAEConfig:
    """diffusers' AutoencoderTiny (madebyollin/taesd): trained on scaled latents, so scaling_factor is 1."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0

    @property
    def downscale(self) -> int:
        return 2 ** (len(self.num_decoder_blocks) - 1)


@dataclasses.dataclass(frozen=True)
class IdentityConfig:
    """No autoencoder: the U-Net works on pixels in [-1, 1] themselves (Ho et al. 2020). A part without parameters."""

    sample_size: int = 32  # pixels; the size that the model was trained at
    channels: int = 3

    @property
    def in_channels(self) -> int:
        return self.channels

    @property
    def latent_channels(self) -> int:
        return self.channels

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        return (self.channels,)

    downscale = 1
    scaling_factor = 1.0


AutoencoderConfig = VAEConfig | TinyVAEConfig | IdentityConfig


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """transformers' CLIPTextModel, or CLIPTextModelWithProjection where there is a `projection_dim`."""

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
    projection_dim: int | None = None  # the pooled state goes through a linear without bias (text_projection)
    clip_skip: int = 1  # which layer the context is, counted from the end (1 = last), where a recipe does not say
    context_norm: bool = True  # the final layer norm follows the context; the pooled state always has it


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """transformers' CLIPVisionModel, or CLIPVisionModelWithProjection where there is a `projection_dim`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224  # pixels, of a square
    patch_size: int = 32
    hidden_act: str = "quick_gelu"  # or "gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = None  # the pooled state goes through a linear without bias (visual_projection)

    @property
    def patches(self) -> int:
        """Along a side."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """transformers' CLIPModel, and what its image processor normalises with; the defaults are OpenAI's ViT-B/32's.

    The `projection_dim` of the two towers is always that of the whole.
    """

    text_config: CLIPTextConfig = CLIPTextConfig(hidden_size=512, intermediate_size=2048, num_attention_heads=8)
    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of values in [0, 1], by channel
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        for name in ("text_config", "vision_config"):
            tower = dataclasses.replace(getattr(self, name), projection_dim=self.projection_dim)
            object.__setattr__(self, name, tower)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict) -> "CLIPConfig":
        """Inverse of `to_dict`, also after a trip through JSON. Unknown keys raise TypeError."""
        made = {name: tuple(value) if isinstance(value, list | tuple) else value for name, value in data.items()}
        for name, kind in (("text_config", CLIPTextConfig), ("vision_config", CLIPVisionConfig)):
            if name in made:
                made[name] = kind(**made[name])
        return CLIPConfig(**made)


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """A VGG (Simonyan & Zisserman 2015) for perceptual distances; the defaults are VGG16's.

    The words are those of the captions that it learns to find in pictures (Joulin et al. 2016), where we train one.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)  # of the stages
    depths: tuple[int, ...] = (2, 2, 3, 3, 3)  # convolutions in each
    vocab_size: int = 768  # at most; the tokenizer that is trained decides
    max_position_embeddings: int = 77  # tokens of a caption that are read
    eos_token_id: int = 767
    pad_token_id: int = 767

    def __post_init__(self):
        if len(self.widths) != len(self.depths) or min(*self.widths, *self.depths) < 1:
            raise ValueError(f"a VGG of widths {self.widths} and depths {self.depths}: give one of each to a stage")


@dataclasses.dataclass(frozen=True)
class AestheticConfig:
    kind: str = "mlp"  # "linear", "mlp" or "mlp_relu"; see models/aesthetic.py
    width: int = 768  # of the embeddings

    def __post_init__(self):
        if self.kind not in ("linear", "mlp", "mlp_relu") or self.width < 1:
            raise ValueError(
                f"an aesthetic head of kind={self.kind!r}, width={self.width}: use linear, mlp or mlp_relu"
            )


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """The PatchGAN of pix2pix (Isola et al. 2017); the defaults are those of Stable Diffusion's autoencoder."""

    width: int = 64  # of the first convolution; doubles with each, up to 8-fold
    layers: int = 3  # that halve the size: 3 sees patches of 70x70 pixels


@dataclasses.dataclass(frozen=True)
class RRDBConfig:
    """The network of ESRGAN and Real-ESRGAN; the defaults are those of RealESRGAN_x4plus."""

    scale: int = 4  # a power of two
    unshuffle: int = 1  # squares of so many pixels a side become channels first: Real-ESRGAN's x2 has 2, its x1 has 4
    features: int = 64
    blocks: int = 23
    growth: int = 32  # channels that each convolution of a dense block adds

    def __post_init__(self):
        if self.scale not in (1, 2, 4, 8, 16) or self.unshuffle not in (1, 2, 4):
            raise ValueError(
                f"an RRDBNet of scale={self.scale}, unshuffle={self.unshuffle}: scales are 1, 2, 4, 8 or 16, "
                "and 1 (none), 2 or 4 pixels a side become channels"
            )

    @property
    def stages(self) -> int:
        """That double the size."""
        return (self.scale * self.unshuffle).bit_length() - 1


@dataclasses.dataclass(frozen=True)
class SRVGGConfig:
    """Real-ESRGAN's compact network; the defaults are those of realesr-general-x4v3."""

    scale: int = 4
    features: int = 64
    convolutions: int = 32  # between the first and the last

    unshuffle = 1

    def __post_init__(self):
        if self.scale < 1:
            raise ValueError(f"a compact upscaler of scale={self.scale}: give 1 or more")


UpscalerConfig = RRDBConfig | SRVGGConfig


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything about a text-to-image model, and what is trained beside it, but its weights and its words."""

    unet: UNetConfig | KUNetConfig = UNetConfig()
    vae: AutoencoderConfig = VAEConfig()
    # None: SDXL's refiner, which has the second one alone; or `sees_pictures`
    text_encoder: CLIPTextConfig | None = CLIPTextConfig()
    text_encoder_2: CLIPTextConfig | None = None  # SDXL: its states are joined to the first's, its pooled one is used
    noise_schedule: NoiseScheduleConfig = NoiseScheduleConfig()
    # SDXL base, and where it `sees_pictures`: an empty negative prompt is zeros, not its encoding
    force_zeros_for_empty_prompt: bool = False
    # BESIDE: in the runs that train them and those that learn from them
    clip: CLIPConfig | None = None
    features: FeaturesConfig | None = None  # a trunk for `perceptual`, and the words that it learns by
    perceptual: FeaturesConfig | None = None  # LPIPS
    aesthetic: AestheticConfig | None = None
    discriminator: DiscriminatorConfig | None = None
    image_encoder: CLIPConfig | None = None  # of which there is the vision tower alone
    upscaler: UpscalerConfig | None = None

    @property
    def text_encoders(self) -> dict[str, CLIPTextConfig]:
        """By part, in the order in which their states are joined."""
        named = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {part: config for part, config in named.items() if config is not None}

    @property
    def sees_pictures(self) -> bool:
        """Whether the U-Net is told pictures in place of text: the image encoder's features, one token a picture."""
        return self.image_encoder is not None and not self.text_encoders

    def told_pictures(self, image_encoder: CLIPConfig) -> "ModelSpec":
        """The same that is told pictures."""
        texts = dict.fromkeys(("text_encoder", "text_encoder_2"))
        return dataclasses.replace(self, **texts, image_encoder=image_encoder, force_zeros_for_empty_prompt=True)

    @property
    def positions(self) -> int:
        """Tokens that the text encoders read at once."""
        return min(config.max_position_embeddings for config in self.text_encoders.values())

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that such a model has, of ALL_PARTS; what has no parameters is none."""
        vae = () if isinstance(self.vae, IdentityConfig) else ("vae",)
        return ("unet", *vae, *(("image_encoder",) if self.sees_pictures else self.text_encoders))

    @property
    def num_time_ids(self) -> int:
        """Numbers that the U-Net is told besides (of "text_time"): 6 sizes, or 5 with a score; else 0."""
        unet = self.unet
        if unet.addition_embed_type != "text_time":
            return 0
        pooled = self.text_encoder_2.projection_dim if self.text_encoder_2 else 0
        return (unet.projection_class_embeddings_input_dim - pooled) // unet.addition_time_embed_dim

    @property
    def reads_pooled(self) -> bool:
        """The U-Net is told the pooled state of the prompt."""
        return self.unet.addition_embed_type == "text_time" or isinstance(self.unet, KUNetConfig)

    def readers(self, parts: Sequence[str]) -> tuple[str, ...]:
        """Those of `parts` that read captions."""
        return tuple(part for part in parts if part in (*self.text_encoders, "clip", "features"))

    def words_of(self, part: str) -> CLIPTextConfig | FeaturesConfig:
        """The description of a part that reads captions, with its vocabulary and number of positions."""
        return self.clip.text_config if part == "clip" else getattr(self, part)

    def with_vocabulary(self, part: str, **values: int) -> "ModelSpec":
        """With another vocab_size, eos_token_id or pad_token_id in `words_of(part)`."""
        words = dataclasses.replace(self.words_of(part), **values)
        changed = dataclasses.replace(self.clip, text_config=words) if part == "clip" else words
        return dataclasses.replace(self, **{part: changed})

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict) -> "ModelSpec":
        """Inverse of `to_dict`, also after a trip through JSON (lists become tuples). Unknown keys raise TypeError."""
        keys = data.get("vae") or {}
        vae = TinyVAEConfig if "num_decoder_blocks" in keys else IdentityConfig if "channels" in keys else VAEConfig
        unet = KUNetConfig if "mapping_cond_dim" in (data.get("unet") or {}) else UNetConfig
        kinds = {"unet": unet, "vae": vae, "text_encoder": CLIPTextConfig, "text_encoder_2": CLIPTextConfig}
        kinds |= {"noise_schedule": NoiseScheduleConfig, "features": FeaturesConfig, "perceptual": FeaturesConfig}
        kinds |= {"aesthetic": AestheticConfig, "discriminator": DiscriminatorConfig}
        kinds["upscaler"] = RRDBConfig if "blocks" in (data.get("upscaler") or {}) else SRVGGConfig
        made = {}
        for name, value in data.items():
            if name in ("clip", "image_encoder") and value is not None:
                made[name] = CLIPConfig.from_dict(dict(value))
            elif name in kinds and value is not None:
                fields = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in dict(value).items()}
                made[name] = kinds[name](**fields)
            else:
                made[name] = value
        return ModelSpec(**made)


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

TINY_CLIP = CLIPConfig(
    text_config=TINY.text_encoder,
    vision_config=CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=32,
        patch_size=8,
    ),
    projection_dim=24,
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


# Beside the models of shapes world: they read pictures of 32 pixels
SHAPES_CLIP = CLIPConfig(
    text_config=CLIPTextConfig(
        vocab_size=768,  # at most; the tokenizer that is trained decides
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    ),
    vision_config=CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=32,
        patch_size=4,
    ),
    projection_dim=64,
)
SHAPES_FEATURES = FeaturesConfig(widths=(24, 48, 64), depths=(2, 2, 2), max_position_embeddings=32)


def shrink(spec: ModelSpec) -> ModelSpec:
    """A model of the same kind with some hundred thousand parameters, for trying out everything but its quality.

    Of the U-Net the first and the last level are left, with what is particular to them and to the family; the
    autoencoder is that of SHAPES_64, and so is the text encoder where there is one; of two, both are small.
    """
    unet, vae = spec.unet, SHAPES_64.vae
    text, second = SHAPES_64.text_encoder, None
    if spec.text_encoder_2 is not None:
        width = {"vocab_size": 768, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        small = {**width, "num_attention_heads": 2, "max_position_embeddings": text.max_position_embeddings}
        text = spec.text_encoder and dataclasses.replace(spec.text_encoder, **small)
        second = dataclasses.replace(spec.text_encoder_2, **small, projection_dim=24)

    def ends(value):
        return (value[0], value[-1]) if isinstance(value, tuple) else value

    layers = ends(unet.transformer_layers_per_block)
    told = {}
    if unet.addition_embed_type == "text_time":
        told["addition_time_embed_dim"] = 8
        told["projection_class_embeddings_input_dim"] = second.projection_dim + 8 * spec.num_time_ids
    unet = dataclasses.replace(
        unet,
        sample_size=8,
        in_channels=unet.in_channels - spec.vae.latent_channels + vae.latent_channels,
        out_channels=vae.latent_channels,
        block_out_channels=(16, 32),
        attention_blocks=ends(unet.attention_blocks),
        layers_per_block=1,
        transformer_layers_per_block=tuple(min(n, 2) for n in layers) if isinstance(layers, tuple) else min(layers, 2),
        num_attention_heads=(1, 2) if isinstance(unet.num_attention_heads, tuple) else 2,
        cross_attention_dim=sum(config.hidden_size for config in (text, second) if config is not None),
        only_cross_attention=ends(unet.only_cross_attention),
        norm_num_groups=4,
        **told,
    )
    return dataclasses.replace(spec, unet=unet, vae=vae, text_encoder=text, text_encoder_2=second)
