"""Single files in the CompVis layout (SD 1.x, as A1111 and ComfyUI have them) <-> diffusers' names, both ways.

    model.diffusion_model.*                       U-Net: input, middle and output blocks, counted straight through
    first_stage_model.*                           VAE; its attention's linears are 1x1 convolutions
    cond_stage_model.transformer.text_model.*     CLIP, as transformers calls it
    model_ema.*                                   averaged U-Net: the same names with the dots left out

Sources: CompVis/stable-diffusion `ldm/modules/diffusionmodules/{openaimodel,model}.py`, `ldm/modules/ema.py`.
"""

from collections.abc import Mapping

from sd_jax.checkpoints import layout
from sd_jax.checkpoints.errors import CheckpointError, listing
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.models.presets import CLIPTextConfig, UNetConfig, VAEConfig

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
_OTHER_PREFIXES = {"vae": "vae."}  # read besides, never written
_EMA = "model_ema."

# What trainers leave in a file besides the model: the schedule's tables, counters, losses, CLIP's unused ends
_BAGGAGE = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
    "logvar",
    "scale_factor",
    "global_step",
    "epoch",
    "v_pred",  # read by `load`: the file's marks of v-prediction and of zero terminal signal-to-noise
    "ztsnr",
    "cond_stage_model.logit_scale",
    "cond_stage_model.text_projection",
    "denoiser.sigmas",
}
_BAGGAGE_PREFIXES = (
    "optimizer",
    "lr_schedulers.",
    "callbacks.",
    "loops.",
    "embedding_manager.",
    "first_stage_model.loss.",
    "first_stage_model.model_ema.",
)

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


# Files <-> networks


def split(tensors: Mapping[str, Tensor], where: str, weights: str) -> dict[str, dict[str, Tensor]]:
    """A file's tensors by network, without their prefixes; baggage dropped. weights: "ema" (where there are) or "raw".

    Raises CheckpointError listing tensors that belong to nothing.
    """
    parts, ema, unknown = {part: {} for part in PREFIXES}, {}, []
    for name, tensor in tensors.items():
        part, rest = _belongs_to(name)
        if name in _BAGGAGE or name.startswith(_BAGGAGE_PREFIXES):
            continue
        if name.startswith(_EMA):
            ema[name] = tensor
        elif part:
            parts[part][rest] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"{where}: unexpected in a single file of SD 1.x: {listing(unknown)}")
    if ema and weights == "ema":
        parts["unet"] = _averaged(parts["unet"], ema, where)
    return {part: found for part, found in parts.items() if found}


def _belongs_to(name: str) -> tuple[str | None, str]:
    for prefixes in (PREFIXES, _OTHER_PREFIXES):
        for part, prefix in prefixes.items():
            if name.startswith(prefix):
                return part, name.removeprefix(prefix)
    return None, name


def _averaged(unet: dict[str, Tensor], ema: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    flat = {name: f"{_EMA}diffusion_model{name.replace('.', '')}" for name in unet}
    missing = [f"{name} is missing" for name in flat.values() if name not in ema]
    left_over = set(ema) - set(flat.values()) - {"model_ema.decay", "model_ema.num_updates"}
    problems = missing + [f"{name} is unexpected" for name in sorted(left_over)]
    if problems:
        raise CheckpointError(
            f"{where}: its EMA is not that of its U-Net (weights='raw' goes without): {listing(problems)}"
        )
    return {name: ema[flat[name]] for name in unet}


def to_diffusers(
    part: str,
    tensors: Mapping[str, Tensor],
    config: UNetConfig | VAEConfig | CLIPTextConfig,
    where: str,
) -> dict[str, Tensor]:
    """One network out of `split` by diffusers' names. Raises CheckpointError where names are missing or unexpected."""
    if part == "text_encoder":
        return dict(tensors)  # transformers' own names; `keys_diffusers` is strict about them
    table = names(part, config)
    problems = [f"{PREFIXES[part]}{name} is missing" for name in table.values() if name not in tensors]
    problems += [f"{PREFIXES[part]}{name} is unexpected" for name in tensors.keys() - set(table.values())]
    if problems:
        raise CheckpointError(f"{where}: not a {layout.NAMES[part]} of SD 1.x: {listing(sorted(problems))}")
    return {theirs: tensors[name] for theirs, name in table.items()}


def from_diffusers(
    part: str,
    tensors: Mapping[str, Tensor],
    config: UNetConfig | VAEConfig | CLIPTextConfig,
) -> dict[str, Tensor]:
    """The inverse, prefixes included: what a single file holds of one network."""
    table = names(part, config)
    renamed = {}
    for name, tensor in tensors.items():
        if part == "vae" and ".attentions." in name and tensor.ndim == 2:
            tensor = tensor.reshape(*tensor.shape, 1, 1)
        if name not in table:
            raise CheckpointError(
                f"the CompVis layout has no place for {part}/{name}: write a diffusers folder instead"
            )
        renamed[PREFIXES[part] + table[name]] = tensor
    return renamed


# The tables


def names(part: str, config: UNetConfig | VAEConfig | CLIPTextConfig) -> dict[str, str]:
    """{diffusers' name: CompVis name without its prefix}, of all tensors of a network."""
    wanted = layout.LAYOUTS[part](config)
    if part == "text_encoder":
        return {name: name for name in wanted}
    modules = _unet_modules(config) if part == "unet" else _vae_modules(config)
    return {name: _translate(name, modules) for name in wanted if not name.startswith("add_embedding.")}


def _translate(name: str, modules: dict[str, str]) -> str:
    """By the longest known module that begins the name."""
    for end in reversed([i for i, letter in enumerate(name) if letter == "."]):
        if name[:end] in modules:
            return modules[name[:end]] + name[end:]
    raise KeyError(name)


def _unet_modules(config: UNetConfig) -> dict[str, str]:
    """With L = layers_per_block, input block 1 + i (L + 1) + j is layer j of down block i; j = L halves the size."""
    depth, layers = len(config.block_out_channels), config.layers_per_block
    modules = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    modules |= _inside("mid_block.resnets.0", "middle_block.0", _RESNET)
    modules |= _inside("mid_block.resnets.1", "middle_block.2", _RESNET)
    for i in range(depth):
        for j in range(layers):
            block = f"input_blocks.{1 + i * (layers + 1) + j}"
            modules |= _inside(f"down_blocks.{i}.resnets.{j}", f"{block}.0", _RESNET)
            modules[f"down_blocks.{i}.attentions.{j}"] = f"{block}.1"
        modules[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * (layers + 1)}.0.op"
        for j in range(layers + 1):
            block = f"output_blocks.{i * (layers + 1) + j}"
            modules |= _inside(f"up_blocks.{i}.resnets.{j}", f"{block}.0", _RESNET)
            modules[f"up_blocks.{i}.attentions.{j}"] = f"{block}.1"
        place = 2 if config.attention_blocks[depth - 1 - i] else 1  # behind the attention, if there is one
        modules[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{i * (layers + 1) + layers}.{place}.conv"
    return modules


def _vae_modules(config: VAEConfig) -> dict[str, str]:
    """The decoder's levels are counted from the picture down: up block i is `up.(depth - 1 - i)`."""
    depth, layers = len(config.block_out_channels), config.layers_per_block
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        modules |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_out": f"{half}.conv_out"}
        modules[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        modules |= _inside(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1", _VAE_RESNET)
        modules |= _inside(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2", _VAE_RESNET)
        modules |= _inside(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", _VAE_ATTENTION)
    for i in range(depth):
        k = depth - 1 - i
        for j in range(layers + 1):
            modules |= _inside(f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}", _VAE_RESNET)
            modules |= _inside(f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{k}.block.{j}", _VAE_RESNET)
        modules[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        modules[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{k}.upsample.conv"
    return modules


def _inside(theirs: str, compvis: str, layers: dict[str, str]) -> dict[str, str]:
    """A module whose layers are called otherwise; those that `layers` does not name are called the same."""
    return {theirs: compvis} | {f"{theirs}.{a}": f"{compvis}.{b}" for a, b in layers.items()}
