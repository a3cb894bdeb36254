"""Single files in the CompVis and SGM layouts (as A1111 and ComfyUI have them) <-> diffusers' names, both ways.

    model.diffusion_model.*                         U-Net: input, middle and output blocks, counted straight through
    first_stage_model.*                             VAE; its attention's linears are 1x1 convolutions
    cond_stage_model.transformer.text_model.*       SD 1: CLIP, as transformers calls it
    cond_stage_model.model.*                        SD 2: OpenCLIP, by its own names (see `keys_open_clip`)
    conditioner.embedders.0.transformer.*           SDXL: CLIP, and behind it
    conditioner.embedders.1.model.*                 OpenCLIP; the refiner has it alone, as embedders.0
    model_ema.*                                     averaged U-Net: the same names with the dots left out

Sources: CompVis/stable-diffusion `ldm/modules/diffusionmodules/{openaimodel,model}.py`, `ldm/modules/ema.py`;
Stability-AI/stablediffusion; Stability-AI/generative-models `sgm/modules/encoders/modules.py`.
"""

from collections.abc import Mapping

from sd_jax.checkpoints import keys_open_clip, layout
from sd_jax.checkpoints.errors import CheckpointError, listing
from sd_jax.checkpoints.layout import Config
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.models.presets import PARTS, ModelSpec, TinyVAEConfig, UNetConfig, VAEConfig

_NETWORKS = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
_TEXT_ENCODERS = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sdxl_refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
}
PREFIXES = {kind: {**_NETWORKS, **texts} for kind, texts in _TEXT_ENCODERS.items()}  # kind -> part -> prefix
TITLES = {"sd1": "SD 1.x", "sd2": "SD 2", "sdxl": "SDXL", "sdxl_refiner": "the SDXL refiner"}

_OTHER_PREFIXES = {  # read besides, never written
    "sd1": {"vae": "vae."},
    "sd2": {"vae": "vae.", "text_encoder": "conditioner.embedders.0.model."},
    "sdxl": {"vae": "vae."},
    "sdxl_refiner": {"vae": "vae."},
}
_EMA = "model_ema."

# What programs leave in a file besides the model: the schedule's tables, counters, losses, CLIP's unused ends, and
# networks that only prepare the input (depth's MiDaS, the x4 upscaler's noise)
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
    "conditioner.embedders.0.logit_scale",
    "denoiser.sigmas",
    "denoiser.log_sigmas",
}
_BAGGAGE_PREFIXES = (
    "optimizer",
    "lr_schedulers.",
    "callbacks.",
    "loops.",
    "embedding_manager.",
    "first_stage_model.loss.",
    "first_stage_model.model_ema.",
    "depth_model.",
    "low_scale_model.",
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


def kind_of(spec: ModelSpec) -> str:
    """The layout of a model's single file, a key of PREFIXES."""
    if spec.text_encoder_2 is not None:
        return "sdxl" if spec.text_encoder is not None else "sdxl_refiner"
    return "sd2" if spec.unet.use_linear_projection else "sd1"


def split(tensors: Mapping[str, Tensor], kind: str, where: str, weights: str) -> dict[str, dict[str, Tensor]]:
    """A file's tensors by part, without their prefixes; baggage dropped. weights: "ema" (where there are) or "raw".

    Raises CheckpointError listing tensors that belong to nothing.
    """
    parts, ema, unknown = {part: {} for part in PARTS}, {}, []
    for name, tensor in tensors.items():
        part, rest = _belongs_to(name, kind)
        if name in _BAGGAGE or name.startswith(_BAGGAGE_PREFIXES):
            continue
        if name.startswith(_EMA):
            ema[name] = tensor
        elif part:
            parts[part][rest] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"{where}: unexpected in a single file of {TITLES[kind]}: {listing(unknown)}")
    if ema and weights == "ema":
        parts["unet"] = _averaged(parts["unet"], ema, where)
    return {part: found for part, found in parts.items() if found}


def _belongs_to(name: str, kind: str) -> tuple[str | None, str]:
    for prefixes in (PREFIXES[kind], _OTHER_PREFIXES[kind]):
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
    config: Config,
    kind: str,
    where: str,
) -> dict[str, Tensor]:
    """One network out of `split` by diffusers' names. Raises CheckpointError where names are missing or unexpected."""
    if part.startswith("text_encoder") and not _is_open_clip(part, kind):
        return dict(tensors)  # transformers' own names; `keys_diffusers` is strict about them
    prefix, table, ignored = PREFIXES[kind][part], names(part, config, kind), ()
    if _is_open_clip(part, kind):
        tensors, ignored = keys_open_clip.modern(tensors), keys_open_clip.ignored(config)
    problems = [f"{prefix}{name} is missing" for name in dict.fromkeys(table.values()) if name not in tensors]
    problems += [f"{prefix}{name} is unexpected" for name in tensors.keys() - set(table.values()) - set(ignored)]
    if problems:
        title = f"{layout.NAMES[part]} of {TITLES[kind]}"
        raise CheckpointError(f"{where}: not a {title}: {listing(sorted(problems))}")
    if _is_open_clip(part, kind):
        return keys_open_clip.to_transformers(tensors, config, where)
    return {theirs: tensors[name] for theirs, name in table.items()}


def from_diffusers(part: str, tensors: Mapping[str, Tensor], config: Config, kind: str) -> dict[str, Tensor]:
    """The inverse, prefixes included: what a single file holds of one network."""
    table = names(part, config, kind)
    lost = [name for name in tensors if name not in table]
    if lost:
        raise CheckpointError(f"the CompVis layout has no place for {part}/{lost[0]}: write a diffusers folder instead")
    if _is_open_clip(part, kind):
        renamed = keys_open_clip.from_transformers(tensors, config)
    else:
        renamed = {table[name]: _as_in_file(part, name, tensor) for name, tensor in tensors.items()}
    return {PREFIXES[kind][part] + name: tensor for name, tensor in renamed.items()}


def _as_in_file(part: str, name: str, tensor: Tensor) -> Tensor:
    is_vae_linear = part == "vae" and ".attentions." in name and tensor.ndim == 2
    return tensor.reshape(*tensor.shape, 1, 1) if is_vae_linear else tensor


def _is_open_clip(part: str, kind: str) -> bool:
    return part == "text_encoder_2" or (part == "text_encoder" and kind == "sd2")


# The tables


def names(part: str, config: Config, kind: str) -> dict[str, str]:
    """{diffusers' name: the file's name without its prefix}, of all tensors of a network.

    One to one, but that OpenCLIP stacks a layer's q, k and v in one tensor. What the layout has no place for (our
    models' pooled text beside the timestep) is left out. Raises CheckpointError for a tiny VAE, which has none at all.
    """
    if isinstance(config, TinyVAEConfig):
        raise CheckpointError("the CompVis layout has no place for a tiny VAE: write a diffusers folder instead")
    if _is_open_clip(part, kind):
        return keys_open_clip.names(config)
    wanted = layout.LAYOUTS[part](config)
    if part == "text_encoder":
        return {name: name for name in wanted}
    modules = unet_modules(config) if part == "unet" else _vae_modules(config)
    placeless = ("add_embedding.",) if part == "unet" and config.addition_embed_type == "text" else ()
    return {name: translate(name, modules) for name in wanted if not name.startswith(placeless)}


def translate(name: str, modules: dict[str, str]) -> str:
    """A tensor's name, by the longest known module that begins the name."""
    for end in reversed([i for i, letter in enumerate(name) if letter == "."]):
        if name[:end] in modules:
            return modules[name[:end]] + name[end:]
    raise KeyError(name)


def unet_modules(config: UNetConfig) -> dict[str, str]:
    """{diffusers' module: CompVis'}.

    With L = layers_per_block, input block 1 + i (L + 1) + j is layer j of down block i; j = L halves the size.
    """
    depth, layers = len(config.block_out_channels), config.layers_per_block
    modules = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "time_embedding.cond_proj": "time_embed.cond_proj",  # LCM's
        "class_embedding": "label_emb",  # the x4 upscaler's table of noise levels
        "add_embedding.linear_1": "label_emb.0.0",  # SDXL's sizes and pooled prompt
        "add_embedding.linear_2": "label_emb.0.2",
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
