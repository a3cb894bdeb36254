"""transformers' CLIPModel, both towers, <-> our parameter names, by the rule of `keys_diffusers` but for what follows.

    vision_model.embeddings.patch_embedding.weight (out, in, h, w)  <->  .../patch_embedding/kernel (h, w, in, out)
    vision_model.embeddings.class_embedding                         <->  .../class_embedding
    logit_scale                                                     <->  logit_scale, of no dimension

Read besides, never written: buffers of positions, and a logit_scale of one dimension, as OpenCLIP can be told to have.
"""

from collections.abc import Mapping

from sd_jax.checkpoints import keys_diffusers, layout
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.models.presets import CLIPConfig, CLIPTextConfig

_PATCHES = "vision_model.embeddings.patch_embedding.weight"
_PLAIN = ("logit_scale", "vision_model.embeddings.class_embedding")  # parameters that belong to no layer
_PARAMETERS = {name.replace(".", "/"): name for name in _PLAIN} | {_PATCHES.replace(".", "/")[:-6] + "kernel": _PATCHES}
_OURS = {theirs: ours for ours, theirs in _PARAMETERS.items()}
_VISION = ("vision_model.", "visual_projection.")
_BAGGAGE = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


def shapes(config: CLIPConfig) -> layout.Shapes:
    """{transformers' name: torch shape} of all parameters."""
    vision = config.vision_config
    width = vision.hidden_size
    # The layers of both towers are alike
    like = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_hidden_layers,
    )
    layers = {
        name.replace("text_model", "vision_model", 1): shape
        for name, shape in layout.text_encoder(like).items()
        if ".encoder." in name
    }
    norms = {
        f"vision_model.{norm}.{leaf}": (width,)
        for norm in ("pre_layrnorm", "post_layernorm")
        for leaf in ("weight", "bias")
    }
    return {
        **layout.text_encoder(config.text_config),
        _PATCHES: (width, 3, vision.patch_size, vision.patch_size),
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.position_embedding.weight": (vision.patches**2 + 1, width),
        **layers,
        **norms,
        "visual_projection.weight": (config.projection_dim, width),
        "logit_scale": (),
    }


def from_transformers(
    tensors: Mapping[str, Tensor],
    config: CLIPConfig,
    where: str,  # for messages
    vision_alone: bool = False,  # CLIPVisionModelWithProjection
) -> dict[str, Tensor]:
    """-> by our names ("a/b/kernel"), in our layout.

    Raises CheckpointError listing what is missing, unexpected or of another shape.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if name not in _BAGGAGE}
    scale = tensors.get("logit_scale")
    if scale is not None and scale.shape == (1,):
        tensors["logit_scale"] = scale.reshape()
    layout.check_shapes(_wanted(config, vision_alone), tensors, "the CLIP of its config", where)
    return {our_name(name, tensor.ndim): _our_layout(name, tensor) for name, tensor in tensors.items()}


def to_transformers(
    tensors: Mapping[str, Tensor], config: CLIPConfig, where: str, vision_alone: bool = False
) -> dict[str, Tensor]:
    """The inverse, as strict."""
    theirs = {their_name(name): _their_layout(name, tensor) for name, tensor in tensors.items()}
    layout.check_shapes(_wanted(config, vision_alone), theirs, "the CLIP of its config", where)
    return theirs


def to_folder(
    part: str, tensors: Mapping[str, Tensor], config: layout.Config | CLIPConfig, where: str
) -> dict[str, Tensor]:
    """`keys_diffusers.to_diffusers` of any part of a model, the image encoder among them."""
    if isinstance(config, CLIPConfig):
        return to_transformers(tensors, config, where, vision_alone=True)
    return keys_diffusers.to_diffusers(part, tensors, config, where)


def _wanted(config: CLIPConfig, vision_alone: bool) -> layout.Shapes:
    return {name: shape for name, shape in shapes(config).items() if not vision_alone or name.startswith(_VISION)}


def our_name(name: str, ndim: int) -> str:
    return _OURS.get(name) or keys_diffusers.our_name(name, ndim)


def their_name(name: str) -> str:
    return _PARAMETERS.get(name) or keys_diffusers.their_name(name)


def _our_layout(name, tensor):
    if tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0)  # OIHW -> HWIO
    return tensor.transpose(1, 0) if tensor.ndim == 2 and not name.endswith("_embedding.weight") else tensor


def _their_layout(name, tensor):
    if tensor.ndim == 4:
        return tensor.transpose(3, 2, 0, 1)
    return tensor.transpose(1, 0) if tensor.ndim == 2 and name.endswith("/kernel") else tensor
