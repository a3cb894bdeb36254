"""What a path is, and what a single file's tensors are of: told by contents, never by names of files."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.layout import PARTS
from sd_jax.checkpoints.tensors import Tensor

Tensors = Mapping[str, Tensor]
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def detect(path: str | os.PathLike) -> str:
    """-> "native" (a workdir of ours, its checkpoints/ or one step of it), "diffusers" (a folder) or "single_file".

    Raises FileNotFoundError, and CheckpointError for a path that is none of these.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() in _PICKLES:
            raise CheckpointError(
                f"{path}: {path.suffix} files are Python pickles, which are not read yet: save it as .safetensors "
                "first, e.g. by `safetensors.torch.save_file(torch.load(path, weights_only=True)['state_dict'], out)`"
            )
        return "single_file"
    if not path.is_dir():
        raise FileNotFoundError(f"no such checkpoint: {path} is neither a file nor a folder here")
    if native_location(path) is not None:
        return "native"
    if (path / "model_index.json").is_file() or any((path / part / "config.json").is_file() for part in PARTS):
        return "diffusers"
    if (path / "config.json").is_file():
        raise CheckpointError(f"{path}: one part of a diffusers folder ({class_name(path)}): give the folder above it")
    raise CheckpointError(
        f"{path}: no checkpoint: a folder with neither checkpoints/ (ours) nor model_index.json (diffusers) in it"
    )


def native_location(path: str | os.PathLike) -> tuple[Path, int | None] | None:
    """(folder that holds the steps, the step that `path` names or None = the latest), or None where it is not ours."""
    path = Path(path).absolute()
    if path.name.isdigit() and (path / "state").is_dir():
        return path.parent, int(path.name)
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and any(p.name.isdigit() and (p / "state").is_dir() for p in folder.iterdir()):
            return folder, None
    if (path / "checkpoints").is_dir() and not (path / "model_index.json").is_file():
        raise CheckpointError(f"{path}: no finished checkpoint is in its checkpoints/ yet")
    return None


def class_name(folder: Path) -> str:
    """Of one network's folder, as its config.json says."""
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return data.get("_class_name") or (data.get("architectures") or [data["model_type"]])[0]
    except (OSError, ValueError, KeyError, AttributeError):
        return "unknown"


def family(tensors: Tensors) -> str:
    """The first row of `FAMILIES` that fits; "unknown" if none does."""
    return next((name for name, (_, fits) in FAMILIES.items() if fits(tensors)), "unknown")


def describe(tensors: Tensors) -> str:
    """For messages: what a file that is not SD 1.x looks like."""
    name = family(tensors)
    if name != "unknown":
        return FAMILIES[name][0]
    some = ", ".join(list(tensors)[:3])
    return f"nothing that is known ({len(tensors)} tensors: {some}{', ...' if len(tensors) > 3 else ''})"


def _starts(*prefixes: str) -> Callable[[Tensors], bool]:
    return lambda tensors: any(name.startswith(prefixes) for name in tensors)


def _holds(*fragments: str) -> Callable[[Tensors], bool]:
    return lambda tensors: any(fragment in name for name in tensors for fragment in fragments)


_UNET = "model.diffusion_model."
_CONTEXT = f"{_UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
_PROJECTION = f"{_UNET}middle_block.1.proj_in.weight"  # a 1x1 convolution in SD 1, a linear since SD 2


def _is_sd2(tensors: Tensors) -> bool:
    return _starts("cond_stage_model.model.")(tensors) or (_PROJECTION in tensors and tensors[_PROJECTION].ndim == 2)


def _is_embedding(tensors: Tensors) -> bool:
    return len(tensors) <= 4 and bool({"emb_params", "clip_l", "clip_g", "string_to_param"} & set(tensors))


# Family -> (what to call it, does it fit). In order: what SD 1.x shares names with comes before it.
FAMILIES: dict[str, tuple[str, Callable[[Tensors], bool]]] = {
    "lora": (
        "a LoRA, not a whole model",
        _holds("lora_unet_", "lora_te", ".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", "hada_w1", "lokr_w"),
    ),
    "embedding": ("a textual inversion embedding, not a whole model", _is_embedding),
    "adapter": ("an IP-Adapter or T2I-Adapter, not a whole model", _starts("ip_adapter.", "image_proj.", "adapter.")),
    "motion": ("a motion module of AnimateDiff, not a whole model", _holds("motion_modules.")),
    "controlnet": ("a ControlNet", _holds("control_model.", "input_hint_block.", "controlnet_cond_embedding.")),
    "flux": ("Flux", _starts("double_blocks.", f"{_UNET}double_blocks.")),
    "sd3": ("Stable Diffusion 3", _starts("joint_blocks.", f"{_UNET}joint_blocks.")),
    "sdxl": ("Stable Diffusion XL", _starts("conditioner.embedders.1.", f"{_UNET}label_emb.")),
    "sdxl_refiner": ("the Stable Diffusion XL refiner", _starts("conditioner.embedders.0.model.")),
    "sd2": ("Stable Diffusion 2", _is_sd2),
    "sd1": ("Stable Diffusion 1", lambda tensors: _CONTEXT in tensors or _starts(f"{_UNET}input_blocks.")(tensors)),
    "vae": (
        "a VAE alone, not a whole model (it can be given as vae=)",
        lambda t: (
            ("encoder.conv_in.weight" in t and "decoder.conv_in.weight" in t)
            or ("first_stage_model.decoder.conv_in.weight" in t)
        ),
    ),
    "text_encoder": ("a CLIP text encoder alone, not a whole model", _holds("embeddings.token_embedding.weight")),
    "diffusers_part": (
        "one network of a diffusers folder (give the folder), not a whole model",
        _starts("down_blocks.", "unet.down_blocks."),
    ),
}
