"""OpenAI's and OpenCLIP's CLIP, both towers, <-> transformers' names, both ways. The text tower: `keys_open_clip`.

    visual.conv1.weight (width, 3, patch, patch)  <->  vision_model.embeddings.patch_embedding.weight
    visual.class_embedding                        <->  vision_model.embeddings.class_embedding
    visual.positional_embedding                   <->  vision_model.embeddings.position_embedding.weight
    visual.{ln_pre,ln_post}                       <->  vision_model.{pre_layrnorm,post_layernorm}
    visual.transformer.resblocks.N.*              <->  vision_model.encoder.layers.N.*, as in the text tower
    visual.proj (width, out)                      <->  visual_projection.weight (out, width)

Read besides, never written: buffers of OpenAI's TorchScript archives; `module.` before each name, as OpenCLIP's
training over several devices writes them; `text.` before the names of the text tower (its "custom_text").

Sources: openai/CLIP `clip/model.py`, mlfoundations/open_clip `src/open_clip/{model,transformer}.py`.
"""

from collections.abc import Mapping

from sd_jax.checkpoints import keys_clip, keys_open_clip
from sd_jax.checkpoints.errors import CheckpointError, listing
from sd_jax.checkpoints.tensors import Tensor, joined
from sd_jax.models.presets import CLIPConfig, CLIPTextConfig

# Numbers that OpenAI's archives carry as tensors, and no other file
OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")
_BAGGAGE = (*OPENAI_NUMBERS, "attn_mask")
_NAMES = {
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "visual_projection.weight": "visual.proj",
    "logit_scale": "logit_scale",
}
_MATRICES = ("visual.proj", "text_projection")  # no weights of a layer: (in, out)


def names(config: CLIPConfig) -> dict[str, str]:
    """{transformers' name: theirs}, of all tensors; q, k and v of a layer share one."""
    vision = config.vision_config
    like = CLIPTextConfig(hidden_size=vision.hidden_size, num_hidden_layers=vision.num_hidden_layers)
    layers = {
        name.replace("text_model", "vision_model", 1): f"visual.{theirs}"
        for name, theirs in keys_open_clip.names(like).items()
        if ".encoder." in name
    }
    table = keys_open_clip.names(config.text_config) | layers | _NAMES
    return {name: table[name] for name in keys_clip.shapes(config)}


def modern(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what stands before the names, and what are no parameters."""
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    stripped = {name.removeprefix(prefix).removeprefix("text."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in stripped.items() if name not in _BAGGAGE}


def to_transformers(tensors: Mapping[str, Tensor], config: CLIPConfig, where: str) -> dict[str, Tensor]:
    """Tensors as `modern` leaves them -> by transformers' names. Raises CheckpointError listing what is wrong."""
    table, wanted = names(config), keys_clip.shapes(config)
    stacks: dict[str, list[str]] = {}
    for name, theirs in table.items():
        stacks.setdefault(theirs, []).append(name)
    problems = [f"{theirs} is missing" for theirs in stacks if theirs not in tensors]
    problems += [f"{theirs} is unexpected" for theirs in tensors if theirs not in stacks]
    found = {}
    for theirs, of in stacks.items():
        if theirs not in tensors:
            continue
        tensor, shape = tensors[theirs], wanted[of[0]]
        stacked = (len(of) * shape[0], *shape[1:]) if len(of) > 1 else shape[::-1] if theirs in _MATRICES else shape
        if tensor.shape != stacked and not (theirs == "logit_scale" and tensor.shape == (1,)):
            problems.append(f"{theirs} is {tensor.shape}, not {stacked}")
        elif len(of) > 1:
            found |= {name: tensor.rows(i * shape[0], (i + 1) * shape[0]) for i, name in enumerate(of)}
        else:
            found[of[0]] = tensor.transpose(1, 0) if theirs in _MATRICES else tensor
    if problems:
        raise CheckpointError(f"{where}: not the CLIP of its config: {listing(problems)}")
    return found


def from_transformers(tensors: Mapping[str, Tensor], config: CLIPConfig) -> dict[str, Tensor]:
    """The inverse of `to_transformers`, for tensors that `keys_clip` has found to be whole."""
    stacks: dict[str, list[Tensor]] = {}
    for name, theirs in names(config).items():  # q, k and v in the order in which they are stacked
        tensor = tensors[name]
        stacks.setdefault(theirs, []).append(tensor.transpose(1, 0) if theirs in _MATRICES else tensor)
    return {theirs: stack[0] if len(stack) == 1 else joined(stack) for theirs, stack in stacks.items()}
