"""The config of a single file, from the shapes of its tensors (CompVis names, as `keys_compvis.split` leaves them).

Shapes say the widths, the depth, where the U-Net attends, and the vocabulary. What they do not say follows the
family: 8 heads in SD 1's U-Net, 12 in CLIP-L, 32 groups per norm, whatever the width; 64x64 latents; a scaling factor
of 0.18215. A file that we wrote carries its config in its header instead.
"""

import dataclasses
import json
from collections.abc import Mapping

from sd_jax.checkpoints import layout
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.keys_compvis import PREFIXES, names
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.models.presets import CLIPTextConfig, ModelSpec, UNetConfig, VAEConfig
from sd_jax.types import NoiseScheduleConfig

SPEC_KEY = "sd_jax.spec"  # of a safetensors header
_PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}

Parts = Mapping[str, Mapping[str, Tensor]]


def infer(parts: Parts, metadata: Mapping[str, str], where: str) -> ModelSpec:
    """The spec of the networks in `parts`; those that are not there stay the preset's.

    Raises CheckpointError where the shapes are those of no SD 1.x network.
    """
    written = _written(parts, metadata)
    if written is not None:
        return written
    found = {part: _INFER[part](_Shapes(tensors, PREFIXES[part], where)) for part, tensors in parts.items()}
    spec = ModelSpec(**found, noise_schedule=_noise_schedule(metadata))
    for part, widths in _divided(spec, found):
        for what, width, by in widths:
            if width % by:
                raise CheckpointError(
                    f"{where}: {layout.NAMES[part]} of {width} channels, which SD 1.x's {by} {what} do not divide: "
                    "open the diffusers folder it came from, whose config.json says the number"
                )
    return dataclasses.replace(
        spec, vae=dataclasses.replace(spec.vae, sample_size=spec.unet.sample_size * spec.vae.downscale)
    )


def _divided(spec: ModelSpec, found: Mapping) -> list:
    """(part, [(what, width, into how many)]) of the networks found."""
    checks = {
        "unet": [("groups", width, spec.unet.norm_num_groups) for width in spec.unet.block_out_channels]
        + [
            ("heads", width, spec.unet.num_attention_heads)
            for width, attends in zip(spec.unet.block_out_channels, spec.unet.attention_blocks, strict=True)
            if attends
        ],
        "vae": [("groups", width, spec.vae.norm_num_groups) for width in spec.vae.block_out_channels],
        "text_encoder": [("heads", spec.text_encoder.hidden_size, spec.text_encoder.num_attention_heads)],
    }
    return [(part, checks[part]) for part in found]


def _written(parts: Parts, metadata: Mapping[str, str]) -> ModelSpec | None:
    """The spec in the header, unless the file has been changed since so that it does not fit."""
    try:
        spec = ModelSpec.from_dict(json.loads(metadata[SPEC_KEY]))
    except (KeyError, ValueError, TypeError):
        return None
    for part, tensors in parts.items():
        config = getattr(spec, part)
        shapes = layout.LAYOUTS[part](config)
        for theirs, name in names(part, config).items():
            tensor = tensors.get(name)
            if tensor is None or tensor.shape[:2] != shapes[theirs][:2]:  # VAE attention: 1x1 convolutions here
                return None
    return spec


def _noise_schedule(metadata: Mapping[str, str]) -> NoiseScheduleConfig:
    said = metadata.get("modelspec.prediction_type", "").lower()
    return NoiseScheduleConfig(prediction_type=_PREDICTIONS.get(said, "epsilon"))


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """A network's tensors, asked for by name."""

    tensors: Mapping[str, Tensor]
    prefix: str
    where: str

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise CheckpointError(f"{self.where}: not a network of SD 1.x: {self.prefix}{name} is missing")
        return self.tensors[name].shape

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def count(self, pattern: str) -> int:
        """How many of pattern.format(0), pattern.format(1), ... are there."""
        n = 0
        while pattern.format(n) in self.tensors:
            n += 1
        return n


def _unet(shapes: _Shapes) -> UNetConfig:
    blocks = _count_blocks(shapes)
    layers = next((i - 1 for i in range(1, blocks) if f"input_blocks.{i}.0.op.weight" in shapes), blocks - 1)
    depth = blocks // (layers + 1)
    firsts = [1 + i * (layers + 1) for i in range(depth)]  # the first layer of each down block
    return UNetConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        block_out_channels=tuple(shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in firsts),
        attention_blocks=tuple(f"input_blocks.{i}.1.norm.weight" in shapes for i in firsts),
        layers_per_block=layers,
        cross_attention_dim=shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
    )


def _count_blocks(shapes: _Shapes) -> int:
    """Input blocks: each begins with a convolution, a resnet or a downsampling."""
    n = 0
    while any(f"input_blocks.{n}.0.{leaf}" in shapes for leaf in ("weight", "in_layers.0.weight", "op.weight")):
        n += 1
    return n


def _vae(shapes: _Shapes) -> VAEConfig:
    depth = shapes.count("encoder.down.{}.block.0.conv1.weight")
    widths = tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(depth))
    return VAEConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=shapes["post_quant_conv.weight"][0],
        block_out_channels=widths,
        layers_per_block=shapes.count("encoder.down.0.block.{}.conv1.weight"),
    )


def _text_encoder(shapes: _Shapes) -> CLIPTextConfig:
    level = "text_model." if "text_model.embeddings.token_embedding.weight" in shapes else ""
    vocab_size, width = shapes[f"{level}embeddings.token_embedding.weight"]
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=shapes[f"{level}encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=shapes.count(f"{level}encoder.layers.{{}}.mlp.fc1.weight"),
        max_position_embeddings=shapes[f"{level}embeddings.position_embedding.weight"][0],
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )


_INFER = {"unet": _unet, "vae": _vae, "text_encoder": _text_encoder}
