"""What a U-Net predicts, and who said so: the decision that goes wrong most, so it is told (`Checkpoint.notes`).

In this order:

    1. the argument `prediction_type=`; then `config=`, if it is a whole config
    2. a `.yaml`, given or beside the file
    3. the header: `modelspec.prediction_type`, or the spec that we write
    4. marks: the tensor `v_pred`; or `ztsnr`, a schedule whose last step is pure noise, where epsilon would say nothing
    5. the x4 upscaler: v. SD 2 with 4 channels: epsilon at global step 875000 (2-base's), else v where the bias of a
       norm in the last attention deviates by more than 0.09 (ComfyUI's finding)
    6. epsilon
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from sd_jax.checkpoints.ldm_yaml import Said
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.models.presets import ModelSpec
from sd_jax.types import PREDICTION_TYPES, NoiseScheduleConfig

_SHORT = {"v": "v_prediction", "eps": "epsilon"}
_PROBE = (
    "output_blocks.11.1.transformer_blocks.0.norm1.bias",
    "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
)
_SPREAD = 0.09
_SD2_BASE_STEPS = 875_000


def checked(given: str | None) -> str | None:
    """The argument, by its full name. Raises ValueError for one that is unknown."""
    if given is None or _SHORT.get(given, given) in PREDICTION_TYPES:
        return _SHORT.get(given, given)
    raise ValueError(f"prediction_type={given!r} is not one of {', '.join(PREDICTION_TYPES)}")


def note(schedule: NoiseScheduleConfig, reason: str) -> str:
    """The line that a person reads."""
    zero = ", zero terminal SNR" if schedule.rescale_betas_zero_snr else ""
    return f"prediction type {schedule.prediction_type}{zero}: {reason}"


def overridden(spec: ModelSpec, given: str | None, reason: str) -> tuple[ModelSpec, str]:
    """A spec that is decided (by `reason`), unless the argument says otherwise. -> it, and the reason."""
    if given is None:
        return spec, reason
    schedule = dataclasses.replace(spec.noise_schedule, prediction_type=given)
    return dataclasses.replace(spec, noise_schedule=schedule), "said by prediction_type="


def decide(
    spec: ModelSpec,  # as `infer` leaves it
    file: Mapping[str, Tensor],
    unet: Mapping[str, Tensor] | None,  # the U-Net's without their prefix
    kind: str,
    metadata: Mapping[str, str],
    said: Said | None,
) -> tuple[NoiseScheduleConfig, str]:
    """-> the schedule with its prediction type, and the reason."""
    found, reason = _decide(spec, file, unet, kind, metadata, said)
    zero_snr = "ztsnr" in file or spec.noise_schedule.rescale_betas_zero_snr
    return dataclasses.replace(spec.noise_schedule, prediction_type=found, rescale_betas_zero_snr=zero_snr), reason


def _decide(spec, file, unet, kind, metadata, said) -> tuple[str, str]:
    if said is not None and said.prediction_type is not None:
        return said.prediction_type, f"said by {said.prediction_reason}"
    header = metadata.get("modelspec.prediction_type", "").lower()
    header = _SHORT.get(header, header)
    if header in PREDICTION_TYPES:
        return header, "said by modelspec.prediction_type in the header"
    for mark in ("v_pred", "ztsnr"):
        if mark in file:
            return "v_prediction", f"said by the tensor {mark}"
    if spec.unet.num_class_embeds is not None:
        return spec.noise_schedule.prediction_type, "the x4 upscaler's"
    if kind == "sd2" and unet is not None:
        return _of_sd2(spec, file, unet, metadata)
    return "epsilon", "nothing says otherwise"


def _of_sd2(spec, file, unet, metadata) -> tuple[str, str]:
    if spec.unet.in_channels != spec.vae.latent_channels:
        return "epsilon", "as all of SD 2 but its plain model for text to image"
    if _global_step(file, metadata) == _SD2_BASE_STEPS:
        return "epsilon", f"its global step is {_SD2_BASE_STEPS}, Stable Diffusion 2 base's"
    for name in _PROBE:
        if name in unet:
            spread = float(np.std(np.asarray(unet[name]).astype(np.float64)))
            found = "v_prediction" if spread > _SPREAD else "epsilon"
            return found, f"guessed: {name} deviates by {spread:.3f}, v above {_SPREAD}"
    return "epsilon", "nothing says otherwise"


def _global_step(file: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int | None:
    if metadata.get("global_step", "").isdigit():
        return int(metadata["global_step"])
    if "global_step" in file and file["global_step"].shape in ((), (1,)):
        return int(np.asarray(file["global_step"]).reshape(()))
    return None
