"""The config of a single file, from the names and shapes of its tensors (as `keys_compvis.split` leaves them).

Shapes say the widths, the depth, where the U-Net attends and how deep, what it is told besides, and the vocabulary.
What they do not say follows the family, whatever the width:

    heads               8 in the U-Nets of SD 1 and the x4 upscaler, else 64 channels each; 12 in CLIP-L, 64 channels
                        each in OpenCLIP
    groups per norm     32
    scaling factor      0.18215; SDXL 0.13025; the x4 upscaler 0.08333
    resolution          512; SD 2 with v-prediction 768; SDXL 1024; or what `modelspec.resolution` says
    clip_skip           SDXL: 2, without the final norm. SD 2: 2 where all 24 blocks of OpenCLIP-H are there, the last
                        of which is not used; with any other number of blocks all are (folders of SD 2 leave it out)

A file that we wrote carries its config in its header instead; an A1111 `.yaml` or `config=` says it besides.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from typing import Any

from sd_jax.checkpoints import keys_compvis, keys_diffusers, layout
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.ldm_yaml import Said
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.models.families import OPENCLIP_H, SD2_BASE, SD15, SD_X4_UPSCALER, SDXL, SDXL_REFINER
from sd_jax.models.presets import CLIPTextConfig, ModelSpec, TinyVAEConfig, UNetConfig, VAEConfig
from sd_jax.types import PREDICTION_TYPES

SPEC_KEY = "sd_jax.spec"  # of a safetensors header
MEND = "say the config by config= (a diffusers folder, a .yaml, or a ModelSpec)"

BASES = {"sd1": SD15, "sd2": SD2_BASE, "sdxl": SDXL, "sdxl_refiner": SDXL_REFINER}
_OPENCLIP_BLOCKS = 24  # of ViT-H/14

Parts = Mapping[str, Mapping[str, Tensor]]


def infer(
    parts: Parts,  # {part: its tensors}
    kind: str,  # a key of `keys_compvis.PREFIXES`
    metadata: Mapping[str, str],
    where: str,
    said: Said | None = None,  # by a .yaml
) -> ModelSpec:
    """The spec of the networks in `parts`; those that are not there stay the published model's.

    Its prediction type is the family's usual one (see `prediction_type`).
    Raises CheckpointError where the shapes are those of no such network.
    """
    said = said or Said()
    texts = {part: text_encoder(parts[part], part, kind, where) for part in parts if part.startswith("text_encoder")}
    if said.penultimate is not None and "text_encoder" in texts:
        skip = 2 if said.penultimate else 1
        texts["text_encoder"] = dataclasses.replace(texts["text_encoder"], clip_skip=skip)
    pooled = texts["text_encoder_2"].projection_dim if "text_encoder_2" in texts else None
    unet = unet_of(parts["unet"], kind, pooled, where, said) if "unet" in parts else BASES[kind].unet
    spec = SD_X4_UPSCALER if unet.num_class_embeds is not None else BASES[kind]
    spec = dataclasses.replace(spec, unet=unet, **texts)
    if "vae" in parts:
        found = vae(parts["vae"], where, said.scale_factor or spec.vae.scaling_factor)
        if isinstance(found, VAEConfig):
            found = dataclasses.replace(found, sample_size=spec.vae.sample_size)
        spec = dataclasses.replace(spec, vae=found)
    if said.schedule:
        spec = dataclasses.replace(spec, noise_schedule=dataclasses.replace(spec.noise_schedule, **said.schedule))
    return _sized(spec, metadata)


def written(parts: Parts, kind: str, metadata: Mapping[str, str]) -> ModelSpec | None:
    """The spec in the header, unless there is none or the file has been changed since so that it does not fit."""
    try:
        spec = ModelSpec.from_dict(json.loads(metadata[SPEC_KEY]))
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return spec if _is_sound(spec) and _fits(parts, kind, spec) else None


def _is_sound(spec: ModelSpec) -> bool:
    """Whether values are of their fields' types and of sizes that networks have: anyone may have written the header."""
    configs = [spec.unet, spec.vae, *spec.text_encoders.values(), spec.noise_schedule]
    if not all(dataclasses.is_dataclass(config) for config in configs) or spec.text_encoders.keys() == set():
        return False
    fields = [(field, getattr(config, field.name)) for config in configs for field in dataclasses.fields(config)]
    return spec.noise_schedule.prediction_type in PREDICTION_TYPES and all(_is_like(f, value) for f, value in fields)


def _is_like(field: dataclasses.Field, value: Any) -> bool:
    allowed = str(field.type)
    if isinstance(value, tuple):
        return 0 < len(value) <= 16 and "tuple" in allowed and all(_is_like(field, entry) for entry in value)
    if value is None or isinstance(value, bool | str):
        return ("None" if value is None else type(value).__name__) in allowed
    if isinstance(value, float):
        return "float" in allowed and 0 < value < 1e6
    is_count = any(word in field.name for word in ("layers", "blocks"))
    low, high = 0 if "_id" in field.name else 1, 256 if is_count else 2**24
    return isinstance(value, int) and ("int" in allowed or "float" in allowed) and low <= value <= high


def _fits(parts: Parts, kind: str, spec: ModelSpec) -> bool:
    try:
        for part, tensors in parts.items():
            config = getattr(spec, part)
            if config is None:
                return False
            theirs = keys_compvis.to_diffusers(part, tensors, config, kind, "")
            keys_diffusers.from_diffusers(part, theirs, config, "")
    except CheckpointError:
        return False
    return True


def _sized(spec: ModelSpec, metadata: Mapping[str, str]) -> ModelSpec:
    """With the resolution of the header, if it is a square."""
    width, _, height = metadata.get("modelspec.resolution", "").partition("x")
    if spec.unet.num_class_embeds is not None or isinstance(spec.vae, TinyVAEConfig):
        return spec
    is_said = width.isdigit() and width == height and 64 <= int(width) <= 8192
    return resized(spec, int(width) // spec.vae.downscale if is_said else spec.unet.sample_size)


def resized(spec: ModelSpec, sample_size: int) -> ModelSpec:
    """For latents of another size."""
    unet = dataclasses.replace(spec.unet, sample_size=sample_size)
    if isinstance(spec.vae, TinyVAEConfig):
        return dataclasses.replace(spec, unet=unet)
    vae = dataclasses.replace(spec.vae, sample_size=sample_size * spec.vae.downscale)
    return dataclasses.replace(spec, unet=unet, vae=vae)


# Shapes by name


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """A network's tensors, asked for by name."""

    tensors: Mapping[str, Tensor]
    what: str
    where: str

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise CheckpointError(f"{self.where}: not the {self.what} of a known family: {name} is missing")
        return self.tensors[name].shape

    def size(self, name: str, axis: int) -> int:
        shape = self[name]
        if axis >= len(shape):
            raise CheckpointError(f"{self.where}: not the {self.what} of a known family: {name} is of shape {shape}")
        return shape[axis]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def count(self, pattern: str) -> int:
        """How many of pattern.format(0), pattern.format(1), ... are there."""
        n = 0
        while pattern.format(n) in self.tensors:
            n += 1
        return n

    def divide(self, width: int, by: int, what: str) -> int:
        if by < 1 or width % by or width < by:
            raise CheckpointError(
                f"{self.where}: a {self.what} of {width} channels, which the family's {what} do not divide: {MEND}"
            )
        return width // by


# U-Net


@dataclasses.dataclass(frozen=True)
class _UNetNames:
    """Where the two namings have what the config follows from."""

    conv_in: str
    conv_out: str
    layers: int
    widths: tuple[str, ...]  # a convolution of each down block
    attentions: tuple[str, ...]  # the first attention of each down block
    middle: str
    classes: str
    sizes: str
    guidance: str


def _compvis(shapes: _Shapes) -> _UNetNames:
    blocks = 0  # each begins with a convolution, a resnet or a downsampling
    while any(f"input_blocks.{blocks}.0.{x}" in shapes for x in ("weight", "in_layers.0.weight", "op.weight")):
        blocks += 1
    layers = next((i - 1 for i in range(1, blocks) if f"input_blocks.{i}.0.op.weight" in shapes), blocks - 1)
    firsts = [1 + i * (layers + 1) for i in range(blocks // (layers + 1))]
    return _UNetNames(
        conv_in="input_blocks.0.0.weight",
        conv_out="out.2.weight",
        layers=layers,
        widths=tuple(f"input_blocks.{i}.0.out_layers.3.weight" for i in firsts),
        attentions=tuple(f"input_blocks.{i}.1." for i in firsts),
        middle="middle_block.1.",
        classes="label_emb.weight",
        sizes="label_emb.0.0.weight",
        guidance="time_embed.cond_proj.weight",
    )


def _diffusers(shapes: _Shapes) -> _UNetNames:
    depth = shapes.count("down_blocks.{}.resnets.0.conv1.weight")
    return _UNetNames(
        conv_in="conv_in.weight",
        conv_out="conv_out.weight",
        layers=shapes.count("down_blocks.0.resnets.{}.conv1.weight"),
        widths=tuple(f"down_blocks.{i}.resnets.0.conv2.weight" for i in range(depth)),
        attentions=tuple(f"down_blocks.{i}.attentions.0." for i in range(depth)),
        middle="mid_block.attentions.0.",
        classes="class_embedding.weight",
        sizes="add_embedding.linear_1.weight",
        guidance="time_embedding.cond_proj.weight",
    )


def unet_of(
    tensors: Mapping[str, Tensor],  # by CompVis' or diffusers' names
    kind: str,
    pooled: int | None,  # the width of the pooled text; None = unknown
    where: str,
    said: Said,
    half: bool = False,  # of a ControlNet
) -> UNetConfig:
    """Raises CheckpointError where the shapes are those of no U-Net that is known."""
    shapes = _Shapes(tensors, layout.NAMES["unet"], where)
    names = _compvis(shapes) if "input_blocks.0.0.weight" in shapes else _diffusers(shapes)
    widths = tuple(shapes.size(name, 0) for name in names.widths)
    if not widths:
        raise CheckpointError(f"{where}: not the U-Net of a known family: it has no blocks")
    attends = tuple(f"{prefix}norm.weight" in shapes for prefix in names.attentions)
    classes = shapes.size(names.classes, 0) if names.classes in shapes else None
    context = shapes.size(f"{names.middle}transformer_blocks.0.attn2.to_k.weight", 1)

    layers = tuple(shapes.count(f"{prefix}transformer_blocks.{{}}.norm1.weight") for prefix in names.attentions)
    middle = shapes.count(f"{names.middle}transformer_blocks.{{}}.norm1.weight")
    unused = 1 if kind == "sdxl" else middle  # what the published configs say of blocks that do not attend
    layers = tuple(n or unused for n in (*layers[:-1], layers[-1] or middle))  # the middle has the last block's number

    only_context = []
    for i, (prefix, width) in enumerate(zip(names.attentions, widths, strict=True)):
        keys = shapes.size(f"{prefix}transformer_blocks.0.attn1.to_k.weight", 1) if attends[i] else width
        usual = classes is not None and i < len(widths) - 1  # the x4 upscaler's, where both are of one width
        only_context.append(usual if keys == width == context or not attends[i] else keys == context != width)

    for width in widths:
        shapes.divide(width, 32, "32 groups")
    xl = {}
    if names.sizes in shapes:
        numbers = 5 if kind == "sdxl_refiner" else 6
        told = shapes.size(names.sizes, 1)
        xl = {
            "addition_embed_type": "text_time",
            "projection_class_embeddings_input_dim": told,
            "addition_time_embed_dim": _sinusoids(told, pooled, numbers, where),
        }
    return UNetConfig(
        sample_size=SD_X4_UPSCALER.unet.sample_size if classes is not None else BASES[kind].unet.sample_size,
        in_channels=shapes.size(names.conv_in, 1),
        out_channels=shapes.size(names.conv_in, 1) if half else shapes.size(names.conv_out, 0),
        block_out_channels=widths,
        attention_blocks=attends,
        layers_per_block=names.layers,
        transformer_layers_per_block=layers[0] if len(set(layers)) == 1 else layers,
        num_attention_heads=_heads(shapes, widths, attends, kind if classes is None else "upscaler", said),
        cross_attention_dim=context,
        only_cross_attention=tuple(only_context) if any(only_context) else False,
        use_linear_projection=len(shapes[f"{names.middle}proj_in.weight"]) == 2,
        num_class_embeds=classes,
        time_cond_proj_dim=shapes.size(names.guidance, 1) if names.guidance in shapes else None,
        **xl,
    )


def _sinusoids(told: int, pooled: int | None, numbers: int, where: str) -> int:
    """How many there are per number, of what SDXL's U-Net is told besides the pooled text. None = of unknown width."""
    if pooled is None:
        each = SDXL.unet.addition_time_embed_dim
        rest = told - numbers * each
    else:
        each, rest = divmod(told - pooled, numbers)
        rest = -1 if rest else each
    if rest <= 0:
        beside = "" if pooled is None else f" beside a pooled text of {pooled}"
        raise CheckpointError(
            f"{where}: a U-Net that is told {told} values{beside}, which are not {numbers} sizes: {MEND}"
        )
    return each


def _heads(shapes: _Shapes, widths: tuple, attends: tuple, kind: str, said: Said) -> tuple[int, ...] | int:
    """Of each block; the last one's are the middle's too."""
    used = [width for width, has in zip(widths, (*attends[:-1], True), strict=True) if has]
    if said.head_channels is None and (said.heads is not None or kind in ("sd1", "upscaler")):
        heads = said.heads or 8
        for width in used:
            shapes.divide(width, heads, f"{heads} heads")
        return heads
    channels = said.head_channels or 64
    for width in used:
        shapes.divide(width, channels, f"heads of {channels} channels")
    heads = tuple(max(width // channels, 1) for width in widths)
    return heads[0] if len(set(heads)) == 1 else heads


# VAE


def vae(tensors: Mapping[str, Tensor], where: str, scaling_factor: float) -> VAEConfig | TinyVAEConfig:
    """By CompVis' or diffusers' names, of 512x512 pixels until its U-Net says more; or of a tiny one."""
    shapes = _Shapes(tensors, layout.NAMES["vae"], where)
    if "decoder.layers.0.weight" in shapes:
        return _tiny_vae(shapes)
    form = "encoder.down_blocks.{}.resnets.{}.conv1.weight"
    form = form if form.format(0, 0) in shapes else "encoder.down.{}.block.{}.conv1.weight"
    firsts = list(itertools.takewhile(shapes.__contains__, (form.format(i, 0) for i in itertools.count())))
    if not firsts:
        raise CheckpointError(f"{where}: not the VAE of a known family: it has no blocks")
    widths = tuple(shapes.size(first, 0) for first in firsts)
    for width in widths:
        shapes.divide(width, 32, "32 groups")
    return VAEConfig(
        in_channels=shapes.size("encoder.conv_in.weight", 1),
        out_channels=shapes.size("decoder.conv_out.weight", 0),
        latent_channels=shapes.size("post_quant_conv.weight", 0),
        block_out_channels=widths,
        layers_per_block=shapes.count(form.format(0, "{}")),
        scaling_factor=scaling_factor,
    )


def _tiny_vae(shapes: _Shapes) -> TinyVAEConfig:
    """Blocks between convolutions, which change the size; counted from the numbers of the layers."""

    def levels(half: str) -> tuple[tuple[int, ...], tuple[int, ...], list[int]]:
        stem = f"{half}.layers."
        names = {n.removeprefix(stem).split(".")[0] for n in shapes.tensors if n.startswith(stem)}
        numbers = {int(n) for n in names if n.isdecimal() and len(n) < 4}
        plain = sorted(n for n in numbers if f"{stem}{n}.weight" in shapes)
        if len(plain) < 2:
            raise CheckpointError(f"{shapes.where}: not the VAE of a known family: its {half} has no layers")
        blocks = sorted(numbers - set(plain))
        spans = list(zip(plain[:-1], plain[1:], strict=True))
        counts = tuple(sum(begin < n < end for n in blocks) for begin, end in spans)
        return tuple(shapes.size(f"{stem}{n}.weight", 0) for n in plain), counts, plain

    encoder, encoder_blocks, first = levels("encoder")
    decoder, decoder_blocks, last = levels("decoder")
    return TinyVAEConfig(
        in_channels=shapes.size(f"encoder.layers.{first[0]}.weight", 1),
        out_channels=decoder[-1],
        latent_channels=shapes.size(f"decoder.layers.{last[0]}.weight", 1),
        encoder_block_out_channels=encoder[:-1],
        decoder_block_out_channels=decoder[:-1],
        num_encoder_blocks=encoder_blocks,
        num_decoder_blocks=decoder_blocks,
    )


# Text encoders


def text_encoder(tensors: Mapping[str, Tensor], part: str, kind: str, where: str) -> CLIPTextConfig:
    """By transformers' or OpenCLIP's names. Which it is follows its place: OpenCLIP, but in SD 1 and first in SDXL."""
    shapes = _Shapes(tensors, layout.NAMES[part], where)
    if "transformer.resblocks.0.ln_1.weight" in shapes:
        token, position = "token_embedding.weight", "positional_embedding"
        layer = "transformer.resblocks.{}.mlp.c_fc.weight"
        projection = shapes.size("text_projection", 1) if "text_projection" in shapes else None
    else:
        level = "text_model." if "text_model.embeddings.token_embedding.weight" in shapes else ""
        token, position = (f"{level}embeddings.{name}_embedding.weight" for name in ("token", "position"))
        layer = f"{level}encoder.layers.{{}}.mlp.fc1.weight"
        projection = shapes.size("text_projection.weight", 0) if "text_projection.weight" in shapes else None
    vocab_size, width, blocks = shapes.size(token, 0), shapes.size(token, 1), shapes.count(layer)
    first = part == "text_encoder" and kind in ("sd1", "sdxl")
    is_xl = kind in ("sdxl", "sdxl_refiner")
    if first:
        shapes.divide(width, 12, "12 heads")
        family = {"num_attention_heads": 12, "hidden_act": "quick_gelu", "pad_token_id": vocab_size - 1}
    else:
        heads = shapes.divide(width, 64, "heads of 64 channels")
        family = {"num_attention_heads": heads, "hidden_act": "gelu", "pad_token_id": OPENCLIP_H.pad_token_id}
    if part == "text_encoder_2":
        if projection is None:
            raise CheckpointError(f"{where}: not the {layout.NAMES[part]} of SDXL: text_projection is missing")
        family["projection_dim"] = projection
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=shapes.size(layer.format(0), 0),
        num_hidden_layers=blocks,
        max_position_embeddings=shapes.size(position, 0),
        eos_token_id=vocab_size - 1,
        clip_skip=2 if is_xl or (kind == "sd2" and blocks == _OPENCLIP_BLOCKS) else 1,
        context_norm=not is_xl,
        **family,
    )
