"""Which tensors each network has: diffusers' and transformers' names and torch shapes, derived from our configs.

This is what "strict" means in this room: a file must hold exactly these. Linears are (out, in), convolutions are
(out, in, height, width); a norm's scale is called `weight`. A test compares the lists with what our modules initialise.
"""

import os
from collections.abc import Callable, Mapping

from sd_jax.checkpoints.errors import CheckpointError, listing, shown
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.models.presets import CLIPTextConfig, KUNetConfig, TinyVAEConfig, UNetConfig, VAEConfig

Shapes = dict[str, tuple[int, ...]]
Config = UNetConfig | KUNetConfig | VAEConfig | TinyVAEConfig | CLIPTextConfig

NAMES = {"unet": "U-Net", "vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
NAMES["image_encoder"] = "image encoder"


def unet(config: UNetConfig | KUNetConfig) -> Shapes:
    """diffusers' UNet2DConditionModel with CrossAttnDownBlock2D and DownBlock2D, or with K blocks."""
    if isinstance(config, KUNetConfig):
        return _k_unet(config)
    widths, layers = config.block_out_channels, config.layers_per_block
    depth, time = len(widths), 4 * widths[0]
    shapes = _conv("conv_in", config.in_channels, widths[0])
    shapes |= _linear("time_embedding.linear_1", widths[0], time) | _linear("time_embedding.linear_2", time, time)
    if config.time_cond_proj_dim is not None:
        shapes |= _linear("time_embedding.cond_proj", config.time_cond_proj_dim, widths[0], bias=False)
    if config.num_class_embeds is not None:
        shapes["class_embedding.weight"] = (config.num_class_embeds, time)
    if config.addition_embed_type == "text":
        shapes |= _text_embedding("add_embedding", config.cross_attention_dim, time)
    if config.addition_embed_type == "text_time":
        shapes |= _linear("add_embedding.linear_1", config.projection_class_embeddings_input_dim, time)
        shapes |= _linear("add_embedding.linear_2", time, time)

    def attention(name, width, level):
        return _transformer(name, width, config, level)

    def resnet(name, width, out):
        return _resnet(name, width, out, time, config.resnet_time_scale_shift == "scale_shift")

    # Down
    skips, width = [widths[0]], widths[0]
    for i, out in enumerate(widths):
        for j in range(layers):
            shapes |= resnet(f"down_blocks.{i}.resnets.{j}", width, out)
            if config.attention_blocks[i]:
                shapes |= attention(f"down_blocks.{i}.attentions.{j}", out, i)
            width = out
            skips.append(width)
        if i < depth - 1:
            shapes |= _conv(f"down_blocks.{i}.downsamplers.0.conv", out, out)
            skips.append(out)

    # Middle
    shapes |= resnet("mid_block.resnets.0", width, width) | attention("mid_block.attentions.0", width, -1)
    shapes |= resnet("mid_block.resnets.1", width, width)

    # Up, mirrored
    for i, out in enumerate(reversed(widths)):
        for j in range(layers + 1):
            shapes |= resnet(f"up_blocks.{i}.resnets.{j}", width + skips.pop(), out)
            if config.attention_blocks[depth - 1 - i]:
                shapes |= attention(f"up_blocks.{i}.attentions.{j}", out, depth - 1 - i)
            width = out
        if i < depth - 1:
            shapes |= _conv(f"up_blocks.{i}.upsamplers.0.conv", out, out)
    return shapes | _norm("conv_norm_out", width) | _conv("conv_out", width, config.out_channels)


def _k_unet(config: KUNetConfig) -> Shapes:
    widths, layers, context = config.block_out_channels, config.layers_per_block, config.cross_attention_dim
    depth, time = len(widths), 2 * widths[0]
    shapes = _conv("conv_in", config.in_channels, widths[0], 1) | {"time_proj.weight": (widths[0],)}
    shapes |= _linear("time_embedding.cond_proj", config.mapping_cond_dim, time, bias=False)
    shapes |= _linear("time_embedding.linear_1", time, time) | _linear("time_embedding.linear_2", time, time)

    def block(name, level, first, last):  # first, last: channels before the block and behind it
        width, block = widths[level], {}
        for j in range(layers):
            before, behind = first if j == 0 else width, last if j == layers - 1 else width
            resnet = f"{name}.resnets.{j}"
            block |= _linear(f"{resnet}.norm1.linear", time, 2 * before) | _conv(f"{resnet}.conv1", before, width)
            block |= _linear(f"{resnet}.norm2.linear", time, 2 * width) | _conv(f"{resnet}.conv2", width, behind)
            if before != behind:
                block |= _conv(f"{resnet}.conv_shortcut", before, behind, 1, bias=False)
            if level > 0:
                block |= _k_attention(f"{name}.attentions.{j}", behind, context, time, level == depth - 1)
        return block

    for level, width in enumerate(widths):
        shapes |= block(f"down_blocks.{level}", level, widths[max(level - 1, 0)], width)
    for i, level in enumerate(reversed(range(depth))):
        joined = widths[level] if i == 0 else 2 * widths[level]
        shapes |= block(f"up_blocks.{i}", level, joined, widths[max(level - 1, 0)])
    return shapes | _conv("conv_out", widths[0], config.out_channels, 1)


def _k_attention(name: str, width: int, context: int, time: int, to_itself: bool) -> Shapes:
    """diffusers' KAttentionBlock."""
    shapes = {}
    for i, keys in ((1, width), (2, context)) if to_itself else ((2, context),):
        shapes |= _linear(f"{name}.norm{i}.linear", time, 2 * width)
        shapes |= _linear(f"{name}.attn{i}.to_q", width, width) | _linear(f"{name}.attn{i}.to_k", keys, width)
        shapes |= _linear(f"{name}.attn{i}.to_v", keys, width) | _linear(f"{name}.attn{i}.to_out.0", width, width)
    return shapes | _norm(f"{name}.attn2.norm_cross", context)


def vae(config: VAEConfig | TinyVAEConfig) -> Shapes:
    """diffusers' AutoencoderKL, its attention as linears; or AutoencoderTiny."""
    if isinstance(config, TinyVAEConfig):
        return _tiny_vae(config)
    widths, layers, latent = config.block_out_channels, config.layers_per_block, config.latent_channels
    shapes = {}

    def middle(name, width):
        attention = _norm(f"{name}.attentions.0.group_norm", width)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            attention |= _linear(f"{name}.attentions.0.{part}", width, width)
        return attention | _resnet(f"{name}.resnets.0", width, width) | _resnet(f"{name}.resnets.1", width, width)

    # Encoder
    width = widths[0]
    shapes |= _conv("encoder.conv_in", config.in_channels, width)
    for i, out in enumerate(widths):
        for j in range(layers):
            shapes |= _resnet(f"encoder.down_blocks.{i}.resnets.{j}", width, out)
            width = out
        if i < len(widths) - 1:
            shapes |= _conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", out, out)
    shapes |= middle("encoder.mid_block", width) | _norm("encoder.conv_norm_out", width)
    shapes |= _conv("encoder.conv_out", width, 2 * latent)
    shapes |= _conv("quant_conv", 2 * latent, 2 * latent, 1) | _conv("post_quant_conv", latent, latent, 1)

    # Decoder
    shapes |= _conv("decoder.conv_in", latent, width) | middle("decoder.mid_block", width)
    for i, out in enumerate(reversed(widths)):
        for j in range(layers + 1):
            shapes |= _resnet(f"decoder.up_blocks.{i}.resnets.{j}", width, out)
            width = out
        if i < len(widths) - 1:
            shapes |= _conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", out, out)
    return shapes | _norm("decoder.conv_norm_out", width) | _conv("decoder.conv_out", width, config.out_channels)


def _tiny_vae(config: TinyVAEConfig) -> Shapes:
    """diffusers' AutoencoderTiny: flat lists, in which activations and resamplings have numbers too.

    Its levels only fit together where all are of one width.
    """

    def blocks(name, begin, count, width):
        shapes = {}
        for i in range(begin, begin + count):
            for j in (0, 2, 4):
                shapes |= _conv(f"{name}.{i}.conv.{j}", width, width)
        return shapes

    # Encoder
    shapes, index = {}, 0
    for width, count in zip(config.encoder_block_out_channels, config.num_encoder_blocks, strict=True):
        shapes |= _conv(f"encoder.layers.{index}", width if index else config.in_channels, width, bias=not index)
        shapes |= blocks("encoder.layers", index + 1, count, width)
        index += 1 + count
    shapes |= _conv(f"encoder.layers.{index}", width, config.latent_channels)

    # Decoder
    shapes |= _conv("decoder.layers.0", config.latent_channels, config.decoder_block_out_channels[0])
    index = 2
    for level, (width, count) in enumerate(
        zip(config.decoder_block_out_channels, config.num_decoder_blocks, strict=True)
    ):
        if level > 0:
            shapes |= _conv(f"decoder.layers.{index + 1}", width, width, bias=False)
            index += 2
        shapes |= blocks("decoder.layers", index, count, width)
        index += count
    return shapes | _conv(f"decoder.layers.{index}", width, config.out_channels)


def text_encoder(config: CLIPTextConfig) -> Shapes:
    """transformers' CLIPTextModel(WithProjection), with the `text_model` level that files had until transformers 5."""
    width = config.hidden_size
    shapes = {
        "text_model.embeddings.token_embedding.weight": (config.vocab_size, width),
        "text_model.embeddings.position_embedding.weight": (config.max_position_embeddings, width),
    }
    for i in range(config.num_hidden_layers):
        layer = f"text_model.encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{part}", width, width)
        shapes |= _norm(f"{layer}.layer_norm1", width) | _norm(f"{layer}.layer_norm2", width)
        shapes |= _linear(f"{layer}.mlp.fc1", width, config.intermediate_size)
        shapes |= _linear(f"{layer}.mlp.fc2", config.intermediate_size, width)
    if config.projection_dim is not None:
        shapes |= _linear("text_projection", width, config.projection_dim, bias=False)
    return shapes | _norm("text_model.final_layer_norm", width)


LAYOUTS: dict[str, Callable[..., Shapes]] = {
    "unet": unet,
    "vae": vae,
    "text_encoder": text_encoder,
    "text_encoder_2": text_encoder,
}


def check(part: str, tensors: Mapping[str, Tensor], config: Config, where: str) -> None:
    """Raises CheckpointError listing what is missing, unexpected or of another shape."""
    check_shapes(LAYOUTS[part](config), tensors, f"the {NAMES[part]} of its config", where)


def check_shapes(wanted: Shapes, tensors: Mapping[str, Tensor], title: str, where: str | os.PathLike) -> None:
    """`check` of any network whose tensors are known; they are "not {title}" where anything is wrong."""
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{shown(name)} is unexpected" for name in tensors if name not in wanted]
    for name, shape in wanted.items():
        if name in tensors and tensors[name].shape != shape:
            problems.append(f"{name} is {tensors[name].shape}, not {shape}")
    if problems:
        raise CheckpointError(f"{where}: not {title}: {listing(problems)}")


# Layers


def _linear(name: str, features_in: int, features_out: int, bias: bool = True) -> Shapes:
    shapes = {f"{name}.weight": (features_out, features_in)}
    return shapes | {f"{name}.bias": (features_out,)} if bias else shapes


def _conv(name: str, features_in: int, features_out: int, size: int = 3, bias: bool = True) -> Shapes:
    shapes = {f"{name}.weight": (features_out, features_in, size, size)}
    return shapes | {f"{name}.bias": (features_out,)} if bias else shapes


def _norm(name: str, features: int) -> Shapes:
    return {f"{name}.weight": (features,), f"{name}.bias": (features,)}


def _resnet(
    name: str, features_in: int, features_out: int, time: int | None = None, scale_shift: bool = False
) -> Shapes:
    shapes = _norm(f"{name}.norm1", features_in) | _conv(f"{name}.conv1", features_in, features_out)
    if time is not None:
        shapes |= _linear(f"{name}.time_emb_proj", time, 2 * features_out if scale_shift else features_out)
    shapes |= _norm(f"{name}.norm2", features_out) | _conv(f"{name}.conv2", features_out, features_out)
    if features_in != features_out:
        shapes |= _conv(f"{name}.conv_shortcut", features_in, features_out, 1)
    return shapes


def _text_embedding(name: str, context: int, time: int) -> Shapes:
    """diffusers' TextTimeEmbedding."""
    shapes = _norm(f"{name}.norm1", context) | {f"{name}.pool.positional_embedding": (1, context)}
    for layer in ("q_proj", "k_proj", "v_proj"):
        shapes |= _linear(f"{name}.pool.{layer}", context, context)
    return shapes | _linear(f"{name}.proj", context, time) | _norm(f"{name}.norm2", time)


def _transformer(name: str, width: int, config: UNetConfig, level: int) -> Shapes:
    """diffusers' Transformer2DModel of a down block, or of the up block that mirrors it (-1: of the middle)."""
    context = config.cross_attention_dim
    only_context = level >= 0 and config.of_block("only_cross_attention", level)

    def project(layer):
        return _linear(layer, width, width) if config.use_linear_projection else _conv(layer, width, width, 1)

    shapes = _norm(f"{name}.norm", width) | project(f"{name}.proj_in")
    for i in range(config.of_block("transformer_layers_per_block", level)):
        block = f"{name}.transformer_blocks.{i}"
        for attention, keys in (("attn1", context if only_context else width), ("attn2", context)):
            shapes |= _linear(f"{block}.{attention}.to_q", width, width, bias=False)
            shapes |= _linear(f"{block}.{attention}.to_k", keys, width, bias=False)
            shapes |= _linear(f"{block}.{attention}.to_v", keys, width, bias=False)
            shapes |= _linear(f"{block}.{attention}.to_out.0", width, width)
        shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width) | _norm(f"{block}.norm3", width)
        shapes |= _linear(f"{block}.ff.net.0.proj", width, 8 * width) | _linear(f"{block}.ff.net.2", 4 * width, width)
    return shapes | project(f"{name}.proj_out")
