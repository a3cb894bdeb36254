"""What a path is, and what a single file's tensors are of: told by contents, never by names of files."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from sd_jax.checkpoints import components, keys_taesd
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.models.presets import PARTS

Tensors = Mapping[str, Tensor]


def detect(path: str | os.PathLike) -> str:
    """-> "native" (a workdir of ours, its checkpoints/ or one step of it), "diffusers" (a folder) or "single_file".

    Raises FileNotFoundError, and CheckpointError for a path that is none of these.
    """
    path = Path(path)
    if path.is_file():
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
    return next((name for name, (_, _, fits) in FAMILIES.items() if fits(tensors)), "unknown")


def describe(tensors: Tensors) -> str:
    """For messages: what a file that is not opened looks like."""
    name = family(tensors)
    if name != "unknown":
        title, hint, _ = FAMILIES[name]
        return title + hint
    some = ", ".join(list(tensors)[:3])
    return f"nothing that is known ({len(tensors)} tensors: {some}{', ...' if len(tensors) > 3 else ''})"


def _starts(*prefixes: str) -> Callable[[Tensors], bool]:
    return lambda tensors: any(name.startswith(prefixes) for name in tensors)


def _holds(*fragments: str) -> Callable[[Tensors], bool]:
    return lambda tensors: any(fragment in name for name in tensors for fragment in fragments)


def _kind(name: str) -> Callable[[Tensors], bool]:
    return lambda tensors: components.kind(tensors) == name


def _network(network: str) -> Callable[[Tensors], bool]:
    return lambda tensors: components.find_one(tensors, network) is not None


_UNET = "model.diffusion_model."
_LORAS = (
    "lora_unet_",
    "lora_te",
    ".lora_down.",
    ".lora_up.",
    ".lora_A.",
    ".lora_B.",
    "hada_w1",
    "lokr_w",
    "_lora.down.",
)
_WIDTHS = (768, 1024, 1280)  # of CLIP's states, and so of an embedding's rows


def _is_embedding(tensors: Tensors) -> bool:
    if len(tensors) == 1:  # diffusers calls the one tensor as the word that it teaches
        (tensor,) = tensors.values()
        if tensor.ndim in (1, 2) and tensor.shape[-1] in _WIDTHS:
            return True
    return len(tensors) <= 4 and any(
        name in ("emb_params", "clip_l", "clip_g") or name.startswith("string_to_param") for name in tensors
    )


def _is_playground(tensors: Tensors) -> bool:
    return {"edm_mean", "edm_std"} <= set(tensors) or _starts("edm_vpred.")(tensors)


# Family -> (its title, what to add in a message, does it fit). What shares names with another comes before it.
FAMILIES: dict[str, tuple[str, str, Callable[[Tensors], bool]]] = {
    "lora": ("LoRA", ", not a whole model", _holds(*_LORAS)),
    "embedding": ("textual inversion embedding", ", not a whole model", _is_embedding),
    "adapter": ("IP-Adapter or T2I-Adapter", ", not a whole model", _starts("ip_adapter.", "image_proj.", "adapter.")),
    "motion": ("motion module of AnimateDiff", ", not a whole model", _holds("motion_modules.")),
    "controlnet": ("ControlNet", "", _holds("control_model.", "input_hint_block.", "controlnet_cond_embedding.")),
    "flux": ("Flux", "", _starts("double_blocks.", f"{_UNET}double_blocks.")),
    "sd3": ("Stable Diffusion 3", "", _starts("joint_blocks.", f"{_UNET}joint_blocks.")),
    "edm": ("model of EDM (as Playground 2.5)", "", _is_playground),
    "sdxl": ("Stable Diffusion XL base", "", _kind("sdxl")),
    "sdxl_refiner": ("Stable Diffusion XL refiner", "", _kind("sdxl_refiner")),
    "sd2": ("Stable Diffusion 2", "", _kind("sd2")),
    "sd1": ("Stable Diffusion 1", "", _kind("sd1")),
    "taesd": (
        "half of a tiny VAE",
        " (it can be given as vae=, its other half beside it)",
        lambda tensors: keys_taesd.half_of(tensors) is not None,
    ),
    "averages": ("U-Net's averages alone", "", _starts("model_ema.diffusion_model")),
    "vae": ("VAE", " alone, not a whole model (it can be given as vae=)", _network("vae")),
    "text_encoder": (
        "CLIP text encoder",
        " alone, not a whole model (it can be given as text_encoder=)",
        _network("text_encoder"),
    ),
}
