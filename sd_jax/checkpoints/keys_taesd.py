"""The tiny autoencoders as first published (madebyollin/taesd), in two files -> diffusers' names.

    taesd_encoder.safetensors   N.weight, N.conv.M.weight   ->  encoder.layers.N.*
    taesd_decoder.safetensors   N.weight, N.conv.M.weight   ->  decoder.layers.(N - 1).*

(There the decoder's layer 0 bounds the latents.) Source: madebyollin/taesd `taesd.py`. Read, never written.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.tensors import Tensor

_FIRST = {"encoder": 0, "decoder": 1}  # the number of the first layer with weights
_OTHER = {"encoder": "decoder", "decoder": "encoder"}


def half_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Which of the two files it is: "encoder" or "decoder"; None = neither."""
    numbers = {name.partition(".")[0] for name in tensors}
    if not numbers or not all(number.isdecimal() for number in numbers):
        return None
    first = min(int(number) for number in numbers)
    is_taesd = any(".conv." in name for name in tensors) and f"{first}.weight" in tensors
    return next((half for half, begin in _FIRST.items() if begin == first), None) if is_taesd else None


def whole(
    path: Path, tensors: Mapping[str, Tensor], open_file: Callable[[Path], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """One of the two files, and the other one beside it -> an AutoencoderTiny by diffusers' names; others as they are.

    Raises CheckpointError where the other one is missing or is none.
    """
    half = half_of(tensors)
    if half is None:
        return dict(tensors)
    other = _OTHER[half]
    place = path.with_name(path.name.replace(half, other))
    if place == path or not place.is_file():
        raise CheckpointError(f"{path}: the {half} of a tiny VAE, without its {other} beside it ({place.name})")
    rest = open_file(place)
    if half_of(rest) != other:
        raise CheckpointError(f"{place}: not the {other} of a tiny VAE, as its name says")
    return _renamed(half, tensors) | _renamed(other, rest)


def _renamed(half: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    split = [(name.partition("."), tensor) for name, tensor in tensors.items()]
    return {f"{half}.layers.{int(number) - _FIRST[half]}.{rest}": tensor for (number, _, rest), tensor in split}
