"""The `.yaml` that LDM, SGM and A1111 keep beside a checkpoint: what it says that shapes do not.

    model.params.parameterization                                    "v" or "eps" (LDM's default)
    model.params.denoiser_config.params.scaling_config.target        ...VScaling, ...EpsScaling (SGM)
    model.params.{unet_config,network_config}.params.num_heads       or num_head_channels; -1 = not said
    model.params.cond_stage_config.params.layer                      "penultimate" or "last", of OpenCLIP
    model.params.scale_factor, linear_start, linear_end, timesteps

Sources: CompVis/stable-diffusion `configs/`, Stability-AI/stablediffusion `configs/`, generative-models `configs/`.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_jax.checkpoints.errors import CheckpointError

_LIMIT = 1_000_000  # bytes; such files have a few thousand


@dataclasses.dataclass(frozen=True)
class Said:
    """What a .yaml says; None = nothing."""

    prediction_type: str | None = None
    prediction_reason: str = ""
    heads: int | None = None
    head_channels: int | None = None
    penultimate: bool | None = None
    scale_factor: float | None = None
    schedule: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields of a NoiseScheduleConfig


def beside(checkpoint: str | os.PathLike) -> Path | None:
    """The .yaml of a checkpoint's own name in its folder."""
    path = Path(checkpoint).with_suffix(".yaml")
    return path if path.is_file() and path != Path(checkpoint) else None


def read(path: str | os.PathLike) -> Said:
    """Raises CheckpointError where it is no such file, or names an objective that is not supported."""
    import yaml

    path = Path(path)
    if path.stat().st_size > _LIMIT:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes are too many for a model's .yaml")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: not YAML of a model ({reason}): mend or remove it") from error
    model = _at(data, "model", "params")
    if not isinstance(model, Mapping):
        raise CheckpointError(f"{path}: not the .yaml of a model (no model.params): mend or remove it")
    try:
        return _said(model, path)
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not the .yaml of a model ({error}): mend or remove it") from error


def _said(model: Mapping[str, Any], path: Path) -> Said:
    prediction, reason = _prediction(model, path)
    network = _at(model, "unet_config", "params") or _at(model, "network_config", "params")
    channels = _positive(_at(network, "num_head_channels"))
    layer = _at(model, "cond_stage_config", "params", "layer")
    schedule = {"beta_start": "linear_start", "beta_end": "linear_end"}
    schedule = {ours: float(model[theirs]) for ours, theirs in schedule.items() if theirs in model}
    if not all(0 < beta < 1 for beta in schedule.values()):
        raise ValueError("linear_start and linear_end are not between 0 and 1")
    if "timesteps" in model:
        schedule["num_train_timesteps"] = int(model["timesteps"])
        if not 0 < schedule["num_train_timesteps"] <= 100_000:
            raise ValueError("timesteps are not between 1 and 100000")
    return Said(
        prediction_type=prediction,
        prediction_reason=reason,
        heads=None if channels else _positive(_at(network, "num_heads")),
        head_channels=channels,
        penultimate={"penultimate": True, "last": False}.get(layer) if isinstance(layer, str) else None,
        scale_factor=_factor(model.get("scale_factor")),
        schedule=schedule,
    )


def _prediction(model: Mapping[str, Any], path: Path) -> tuple[str | None, str]:
    said = model.get("parameterization")
    if said is not None:
        if said not in ("v", "eps", "x0"):
            raise CheckpointError(f"{path}: parameterization={said!r} is not supported: only v, eps and x0")
        meant = {"v": "v_prediction", "eps": "epsilon", "x0": "sample"}[said]
        return meant, f"parameterization={said} in {path}"
    denoiser = _at(model, "denoiser_config", "params")
    for key in ("scaling_config", "weighting_config"):
        scaling = str(_at(denoiser, key, "target") or "").rpartition(".")[2]
        if scaling in ("VScaling", "VScalingWithEDMcNoise"):
            return "v_prediction", f"{scaling} in {path}"
        if scaling == "EpsScaling":
            return "epsilon", f"{scaling} in {path}"
        if scaling == "EDMScaling":
            raise CheckpointError(f"{path}: EDMScaling is not supported: only EpsScaling and VScaling")
    if "unet_config" in model:
        return "epsilon", f"no parameterization in {path}, so LDM's default"
    return None, ""


def _factor(value: Any) -> float | None:
    if value is not None and not 0 < float(value) < 1e6:
        raise ValueError(f"scale_factor={value} is not a factor")
    return None if value is None else float(value)


def _at(data: Any, *keys: str) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
