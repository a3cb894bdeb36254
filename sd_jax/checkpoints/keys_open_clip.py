"""OpenCLIP's text transformers, as single files of SD 2 and SDXL have them <-> transformers' names, both ways.

    transformer.resblocks.N.attn.in_proj_weight (3 width, width)  <->  layers.N.self_attn.{q,k,v}_proj.weight, stacked
    transformer.resblocks.N.{ln_1,ln_2,mlp.c_fc,mlp.c_proj}       <->  layers.N.{layer_norm1,layer_norm2,mlp.fc1,fc2}
    text_projection (width, out)                                  <->  text_projection.weight (out, width)

Read besides, never written: the projection by transformers' name and layout, as ComfyUI had it for a while.

Source: mlfoundations/open_clip `src/open_clip/{model,transformer}.py`.
"""

import re
from collections.abc import Mapping

from sd_jax.checkpoints import layout
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.tensors import Tensor, joined
from sd_jax.models.presets import CLIPTextConfig

_BAGGAGE = ("logit_scale", "attn_mask", "transformer.text_model.embeddings.position_ids")

_NAMES = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_LAYERS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")  # in the order in which they are stacked


def names(config: CLIPTextConfig) -> dict[str, str]:
    """{transformers' name: OpenCLIP's}, of all tensors; q, k and v of a layer share one."""
    return {name: _name(name) for name in layout.LAYOUTS["text_encoder"](config)}


def ignored(config: CLIPTextConfig) -> tuple[str, ...]:
    """What a file may hold besides: buffers, and the projection where the model has no use for it (SD 2)."""
    return _BAGGAGE if config.projection_dim else (*_BAGGAGE, "text_projection")


def modern(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Other spellings -> OpenCLIP's."""
    projection = "text_projection.weight"
    kept = {name: tensor for name, tensor in tensors.items() if name != projection}
    return kept | ({"text_projection": _transposed(tensors[projection])} if projection in tensors else {})


def _name(name: str) -> str:
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return _NAMES[name]
    block, module, leaf = layer.groups()
    if module.endswith(_PROJECTIONS):
        return f"transformer.resblocks.{block}.attn.in_proj_{leaf}"
    return f"transformer.resblocks.{block}.{_LAYERS[module]}.{leaf}"


def to_transformers(tensors: Mapping[str, Tensor], config: CLIPTextConfig, where: str) -> dict[str, Tensor]:
    """Tensors by OpenCLIP's names, all that `names` lists. Raises CheckpointError where q, k and v are no three."""
    found = {}
    for theirs, name in names(config).items():
        tensor = tensors[name]
        if name.endswith(("in_proj_weight", "in_proj_bias")):
            width, third = config.hidden_size, [part in theirs for part in _PROJECTIONS].index(True)
            if tensor.shape[:1] != (3 * width,):
                raise CheckpointError(f"{where}: {name} is {tensor.shape}: it should stack 3 times {width} rows")
            tensor = tensor.rows(third * width, (third + 1) * width)
        found[theirs] = _transposed(tensor) if name == "text_projection" else tensor
    return found


def from_transformers(tensors: Mapping[str, Tensor], config: CLIPTextConfig) -> dict[str, Tensor]:
    """The inverse. Raises KeyError for a tensor that is missing."""
    stacks: dict[str, list[Tensor]] = {}
    for theirs, name in names(config).items():  # the layout's order is that of _PROJECTIONS
        tensor = tensors[theirs]
        stacks.setdefault(name, []).append(_transposed(tensor) if name == "text_projection" else tensor)
    return {name: stack[0] if len(stack) == 1 else joined(stack) for name, stack in stacks.items()}


def _transposed(tensor: Tensor) -> Tensor:
    """A damaged one stays as it is: `keys_diffusers` names its shape."""
    return tensor.transpose(1, 0) if tensor.ndim == 2 else tensor
