"""Which tensors each network has: diffusers' and transformers' names and torch shapes, derived from our configs.

This is what "strict" means in this room: a file must hold exactly these. Linears are (out, in), convolutions are
(out, in, height, width); a norm's scale is called `weight`. A test compares the lists with what our modules initialise.
"""

from collections.abc import Callable, Mapping

from sd_jax.checkpoints.errors import CheckpointError, listing
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.models.presets import CLIPTextConfig, UNetConfig, VAEConfig

Shapes = dict[str, tuple[int, ...]]

PARTS = ("unet", "vae", "text_encoder")
NAMES = {"unet": "U-Net", "vae": "VAE", "text_encoder": "text encoder"}


def unet(config: UNetConfig) -> Shapes:
    """diffusers' UNet2DConditionModel with CrossAttnDownBlock2D and DownBlock2D."""
    widths, layers = config.block_out_channels, config.layers_per_block
    depth, time = len(widths), 4 * widths[0]
    shapes = _conv("conv_in", config.in_channels, widths[0])
    shapes |= _linear("time_embedding.linear_1", widths[0], time) | _linear("time_embedding.linear_2", time, time)
    if config.addition_embed_type is not None:
        shapes |= _text_embedding("add_embedding", config.cross_attention_dim, time)

    def attention(name, width):
        return _transformer(name, width, config.cross_attention_dim)

    def resnet(name, width, out):
        return _resnet(name, width, out, time, config.resnet_time_scale_shift == "scale_shift")

    # Down
    skips, width = [widths[0]], widths[0]
    for i, out in enumerate(widths):
        for j in range(layers):
            shapes |= resnet(f"down_blocks.{i}.resnets.{j}", width, out)
            if config.attention_blocks[i]:
                shapes |= attention(f"down_blocks.{i}.attentions.{j}", out)
            width = out
            skips.append(width)
        if i < depth - 1:
            shapes |= _conv(f"down_blocks.{i}.downsamplers.0.conv", out, out)
            skips.append(out)

    # Middle
    shapes |= resnet("mid_block.resnets.0", width, width) | attention("mid_block.attentions.0", width)
    shapes |= resnet("mid_block.resnets.1", width, width)

    # Up, mirrored
    for i, out in enumerate(reversed(widths)):
        for j in range(layers + 1):
            shapes |= resnet(f"up_blocks.{i}.resnets.{j}", width + skips.pop(), out)
            if config.attention_blocks[depth - 1 - i]:
                shapes |= attention(f"up_blocks.{i}.attentions.{j}", out)
            width = out
        if i < depth - 1:
            shapes |= _conv(f"up_blocks.{i}.upsamplers.0.conv", out, out)
    return shapes | _norm("conv_norm_out", width) | _conv("conv_out", width, config.out_channels)


def vae(config: VAEConfig) -> Shapes:
    """diffusers' AutoencoderKL, its attention as linears."""
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


def text_encoder(config: CLIPTextConfig) -> Shapes:
    """transformers' CLIPTextModel, with the `text_model` level that its files had until transformers 5."""
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
    return shapes | _norm("text_model.final_layer_norm", width)


LAYOUTS: dict[str, Callable[..., Shapes]] = {"unet": unet, "vae": vae, "text_encoder": text_encoder}


def check(
    part: str, tensors: Mapping[str, Tensor], config: UNetConfig | VAEConfig | CLIPTextConfig, where: str
) -> None:
    """Raises CheckpointError listing what is missing, unexpected or of another shape."""
    wanted = LAYOUTS[part](config)
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {tensors[name].shape}, not {shape}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise CheckpointError(f"{where}: not the {NAMES[part]} of its config: {listing(problems)}")


# Layers


def _linear(name: str, features_in: int, features_out: int, bias: bool = True) -> Shapes:
    shapes = {f"{name}.weight": (features_out, features_in)}
    return shapes | {f"{name}.bias": (features_out,)} if bias else shapes


def _conv(name: str, features_in: int, features_out: int, size: int = 3) -> Shapes:
    return {f"{name}.weight": (features_out, features_in, size, size), f"{name}.bias": (features_out,)}


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


def _transformer(name: str, width: int, context: int) -> Shapes:
    """diffusers' Transformer2DModel of one layer, its projections 1x1 convolutions (use_linear_projection=False)."""
    shapes = _norm(f"{name}.norm", width) | _conv(f"{name}.proj_in", width, width, 1)
    block = f"{name}.transformer_blocks.0"
    for attention, keys in (("attn1", width), ("attn2", context)):
        shapes |= _linear(f"{block}.{attention}.to_q", width, width, bias=False)
        shapes |= _linear(f"{block}.{attention}.to_k", keys, width, bias=False)
        shapes |= _linear(f"{block}.{attention}.to_v", keys, width, bias=False)
        shapes |= _linear(f"{block}.{attention}.to_out.0", width, width)
    shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width) | _norm(f"{block}.norm3", width)
    shapes |= _linear(f"{block}.ff.net.0.proj", width, 8 * width) | _linear(f"{block}.ff.net.2", 4 * width, width)
    return shapes | _conv(f"{name}.proj_out", width, width, 1)
