"""diffusers' and transformers' names and layouts <-> our parameter names, by rule, both ways.

    down_blocks.0.resnets.0.conv1.weight (out, in, h, w)  <->  down_blocks_0/resnets_0/conv1/kernel (h, w, in, out)
    ...to_out.0.weight (out, in)                          <->  ...to_out_0/kernel (in, out)
    ...norm1.weight                                       <->  ...norm1/scale
    ...token_embedding.weight                             <->  ...token_embedding/embedding

Read besides, never written: the VAE attention's names before diffusers 0.17, its weights as 1x1 convolutions, text
encoders without the `text_model.` level (as transformers 5 writes them), and buffers that are no parameters.
"""

from collections.abc import Mapping

from sd_jax.checkpoints import layout
from sd_jax.checkpoints.layout import Config
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.models.presets import CLIPTextConfig, VAEConfig

# Lists of modules in torch, whose index we join with "_". (`linear_1` is a name of its own, not a list.)
_LISTS = {"down_blocks", "up_blocks", "resnets", "attentions", "transformer_blocks", "downsamplers", "upsamplers"}
_LISTS |= {"to_out", "net", "layers", "conv", "blocks", "controlnet_down_blocks", "body"}

_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# In text encoders' files, but no parameters of CLIPTextModel
_TEXT_BAGGAGE = ("embeddings.position_ids", "logit_scale")
_PROJECTION = "text_projection.weight"  # one of CLIPTextModelWithProjection, beside its text_model


def from_diffusers(
    part: str,
    tensors: Mapping[str, Tensor],
    config: Config,
    where: str,
) -> dict[str, Tensor]:
    """One network's tensors by diffusers' names -> by ours ("a/b/kernel"), in our layout. `where` is for messages.

    Raises CheckpointError listing what is missing, unexpected or of another shape.
    """
    tensors = _modern(tensors, config)
    layout.check(part, tensors, config, where)
    return {our_name(name, tensor.ndim): our_layout(name, tensor) for name, tensor in tensors.items()}


def to_diffusers(
    part: str,
    tensors: Mapping[str, Tensor],
    config: Config,
    where: str,
) -> dict[str, Tensor]:
    """The inverse of `from_diffusers`, as strict."""
    theirs = {their_name(name): their_layout(name, tensor) for name, tensor in tensors.items()}
    layout.check(part, theirs, config, where)
    return theirs


def our_name(name: str, ndim: int) -> str:
    """`ndim` tells a norm's weight (1) from a linear's (2) or a convolution's (4)."""
    *modules, leaf = name.split(".")
    joined = []
    for module in modules:
        if module.isdigit() and joined and joined[-1] in _LISTS:
            joined[-1] = f"{joined[-1]}_{module}"
        else:
            joined.append(module)
    if leaf == "weight":
        leaf = "embedding" if joined[-1].endswith("_embedding") else "scale" if ndim == 1 else "kernel"
    return "/".join([*joined, leaf])


def their_name(name: str) -> str:
    *modules, leaf = name.split("/")
    split = []
    for module in modules:
        stem, _, index = module.rpartition("_")
        split += [stem, index] if stem in _LISTS and index.isdigit() else [module]
    return ".".join([*split, leaf if leaf in ("bias", "positional_embedding") else "weight"])


def our_layout(name: str, tensor: Tensor) -> Tensor:
    """A tensor of diffusers' name, as torch has it, in our layout."""
    if tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0)  # OIHW -> HWIO
    table = name.endswith(("_embedding.weight", "positional_embedding"))
    return tensor.transpose(1, 0) if tensor.ndim == 2 and not table else tensor


def their_layout(name: str, tensor: Tensor) -> Tensor:
    """The inverse, of our name."""
    if tensor.ndim == 4:
        return tensor.transpose(3, 2, 0, 1)
    return tensor.transpose(1, 0) if tensor.ndim == 2 and name.endswith("/kernel") else tensor


def _modern(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Old spellings -> today's."""
    if isinstance(config, CLIPTextConfig):
        return _modern_text_encoder(tensors, config)
    if isinstance(config, VAEConfig):
        return dict(_modern_vae_attention(name, tensor) for name, tensor in tensors.items())
    return dict(tensors)


def _modern_text_encoder(tensors: Mapping[str, Tensor], config: CLIPTextConfig) -> dict[str, Tensor]:
    modern = {}
    for name, tensor in tensors.items():
        if name.endswith(_PROJECTION):
            if config.projection_dim is not None:
                modern[_PROJECTION] = tensor
        elif not name.endswith(_TEXT_BAGGAGE):
            modern[name if name.startswith("text_model.") else f"text_model.{name}"] = tensor
    return modern


def _modern_vae_attention(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    module, _, rest = name.partition(".attentions.0.")
    if not rest or rest.startswith("group_norm"):
        return name, tensor
    layer, _, leaf = rest.rpartition(".")
    if tensor.ndim > 2 and set(tensor.shape[2:]) == {1}:
        tensor = tensor.reshape(*tensor.shape[:2])
    return f"{module}.attentions.0.{_OLD_VAE_ATTENTION.get(layer, layer)}.{leaf}", tensor
