"""Which networks a file's tensors are of, whatever their prefix and naming; told by names and shapes alone.

Whole files have each network under its prefix (see `keys_compvis`). Files of one network alone have it under any:

    model.diffusion_model.*  diffusion_model.*  *      a U-Net, by CompVis' names; or by diffusers', as in its folder
    first_stage_model.*  vae.*  *                      a VAE, by CompVis' or diffusers' names; a tiny one by diffusers'
    cond_stage_model.*  conditioner.embedders.N.*  *   a text encoder, by transformers' or OpenCLIP's names
"""

import dataclasses
from collections.abc import Mapping

from sd_jax.checkpoints.tensors import Tensor

Tensors = Mapping[str, Tensor]

# (network, naming) -> a tensor that each such network has, and no other
_MARKS = {
    ("unet", "compvis"): "input_blocks.0.0.weight",
    ("unet", "diffusers"): "time_embedding.linear_1.weight",
    ("vae", "compvis"): "decoder.mid.block_1.conv1.weight",
    ("vae", "diffusers"): "decoder.mid_block.resnets.0.conv1.weight",
    ("vae", "tiny"): "decoder.layers.2.conv.0.weight",
    ("text_encoder", "transformers"): "embeddings.token_embedding.weight",
    ("text_encoder", "open_clip"): "transformer.resblocks.0.ln_1.weight",
}
_BY_MARK = {mark: found for found, mark in _MARKS.items()}
_BELONGS = {  # what a prefix promises
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "unet.": "unet",
    "first_stage_model.": "vae",
    "vae.": "vae",
    "cond_stage_model.": "text_encoder",
    "conditioner.embedders.0.": "text_encoder",
    "conditioner.embedders.1.": "text_encoder",
    "text_encoder": "text_encoder",
}
_UNET = "model.diffusion_model."
_UNET_MODULES = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
_IMAGES = ("vision_model.", "visual.", "visual_projection.", "logit_scale")
TITLES = {"unet": "U-Net", "vae": "VAE", "text_encoder": "text encoder"}


@dataclasses.dataclass(frozen=True)
class Component:
    """One network of a file."""

    network: str  # "unet" | "vae" | "text_encoder"
    naming: str  # "compvis" | "diffusers" | "tiny" | "transformers" | "open_clip"
    prefix: str

    def tensors(self, file: Tensors) -> dict[str, Tensor]:
        """Its tensors without the prefix."""
        cut = len(self.prefix)
        found = {name[cut:]: tensor for name, tensor in file.items() if name.startswith(self.prefix)}
        return without_images(found) if self.network == "text_encoder" else found


def without_images(tensors: Tensors) -> dict[str, Tensor]:
    """A text encoder without the other half of a whole CLIP, which reads pictures."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_IMAGES)}


def find(tensors: Tensors) -> list[Component]:
    """All networks that are in a file."""
    found = []
    for name in tensors:
        for mark, (network, naming) in _BY_MARK.items():
            if name == mark or name.endswith(f".{mark}"):
                prefix = name.removesuffix(mark).removesuffix("text_model.")
                if not prefix.endswith("visual."):
                    found.append(Component(network, naming, prefix))
    return found


def find_one(tensors: Tensors, network: str) -> Component | None:
    return next((component for component in find(tensors) if component.network == network), None)


def misplaced(tensors: Tensors) -> str | None:
    """What is wrong, in words, where a network stands under the prefix of another; else None."""
    found = find(tensors)
    for component in found:
        for prefix, network in _BELONGS.items():
            if component.prefix.startswith(prefix) and network != component.network:
                return (
                    f"{component.prefix}* is a {TITLES[component.network]}, where the {TITLES[network]} belongs: two "
                    "components are swapped"
                )
    naming = {component.prefix[:24]: component.naming for component in found}
    first, second = (naming.get(f"conditioner.embedders.{i}.") for i in (0, 1))
    if (first, second) == ("open_clip", "transformers"):
        return "conditioner.embedders.0.* is OpenCLIP and conditioner.embedders.1.* CLIP: the two are swapped"
    return None


def kind(tensors: Tensors) -> str | None:
    """The family of a file with a U-Net, a key of `keys_compvis.PREFIXES`; None where there is no U-Net.

    What stands beside the U-Net says it; a U-Net alone is SDXL's if it is told sizes (the refiner's, where its last
    level does not attend), and SD 2's if it projects by linears.
    """
    unet = find_one(tensors, "unet")
    if unet is None:
        return None

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in tensors)

    compvis = unet.naming == "compvis"
    named = {name: tensors[unet.prefix + name] for name in unet.tensors(tensors)}
    is_xl = ("label_emb.0.0.weight" if compvis else "add_embedding.linear_1.weight") in named
    if has("conditioner.embedders.1."):
        return "sdxl"
    if has("conditioner.embedders.0.model."):
        return "sdxl_refiner" if is_xl else "sd2"
    if is_xl:
        return "sdxl" if _last_level_attends(named, compvis) else "sdxl_refiner"
    if has("cond_stage_model.model."):
        return "sd2"
    project = named.get("middle_block.1.proj_in.weight" if compvis else "mid_block.attentions.0.proj_in.weight")
    return "sd2" if project is not None and project.ndim == 2 else "sd1"


def _last_level_attends(unet: Tensors, compvis: bool) -> bool:
    form = "input_blocks.{}.1.norm.weight" if compvis else "down_blocks.{}.attentions.0.norm.weight"
    first = "input_blocks.{}.0.in_layers.0.weight" if compvis else "down_blocks.{}.resnets.0.norm1.weight"
    last = max((i for i in range(64) if first.format(i) in unet), default=0)
    return form.format(last) in unet


def unified(tensors: Tensors) -> dict[str, Tensor]:
    """A U-Net alone by CompVis' names, under the prefix that it has in whole files; other files as they are."""
    unet = find_one(tensors, "unet")
    if unet is None or unet.naming != "compvis" or unet.prefix not in ("", "diffusion_model."):
        return dict(tensors)
    begin = tuple(unet.prefix + module for module in _UNET_MODULES)
    return {
        _UNET + name.removeprefix(unet.prefix) if name.startswith(begin) else name: tensor
        for name, tensor in tensors.items()
    }
