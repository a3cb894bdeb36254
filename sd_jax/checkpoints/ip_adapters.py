"""IP-Adapters as files <-> `IPAdapter`, to the bit: h94/IP-Adapter's, `.bin` and `.safetensors`, of SD 1.5 and SDXL.

    image_proj.proj.weight, .norm.weight, ...           what makes tokens of a picture's features, or of its states:
    image_proj.latents, .layers.0.0.to_kv.weight, ...   "base" and "plus" of adapters/ip_adapter.py
    ip_adapter.1.to_k_ip.weight, .to_v_ip.weight        of the U-Net's first cross-attention,
    ip_adapter.3.to_k_ip.weight, ...                    of its second: a number counts self-attentions, too

Attentions are counted as diffusers has them: down, up, middle. In a `.bin` the two are dicts in a dict; what is before
the first dot is their name. Of the kinds that are not read, the names tell: FaceID reads a face's embedding of another
network, and the full-face kind has 257 tokens.

Format: tencent-ailab/IP-Adapter, and diffusers' loaders/unet.py
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sd_jax.adapters import ip_adapter
from sd_jax.adapters.ip_adapter import IPAdapter
from sd_jax.checkpoints import write_torch
from sd_jax.checkpoints.aside import aside
from sd_jax.checkpoints.errors import CheckpointError, listing, shown
from sd_jax.checkpoints.files import open_any
from sd_jax.checkpoints.layout import check_shapes
from sd_jax.checkpoints.read_safetensors import write
from sd_jax.checkpoints.tensors import Tensor, read_finite
from sd_jax.models.presets import UNetConfig

SUFFIXES = (".safetensors", ".bin")
_PROJECTION, _LAYERS = "image_proj", "ip_adapter"
_LEAVES = ("to_k_ip", "to_v_ip")
_OTHERS = {  # a name of theirs -> what they are
    "proj.3.weight": "the full-face kind",
    "proj.0.weight": "a FaceID",
    "perceiver_resampler.proj_in.weight": "a FaceID Plus",
}


def load(path: str | os.PathLike, config: UNetConfig) -> IPAdapter:
    """One file, its arrays as they are in it.

    Raises FileNotFoundError, and CheckpointError for what is no IP-Adapter of this U-Net, listing what is missing,
    unexpected or of another shape.
    """
    path = Path(path)
    tensors = open_any(path).tensors
    if not is_ip_adapter(tensors):
        raise CheckpointError(f"{path}: no IP-Adapter, its tensors are {listing([shown(n, 50) for n in tensors], 5)}")
    own = {name.split(".", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{_PROJECTION}.")}
    for name, what in _OTHERS.items():
        if name in own:
            raise CheckpointError(f"{path}: {what} of the IP-Adapters, which is not read: give a base or a plus one")
    shapes = {f"{_PROJECTION}.{name}": shape for name, shape in _projection(path, own, config).items()}
    names = _names(config)
    for name, (layer, _) in names.items():
        shapes[name] = (ip_adapter.layers_of(config)[layer], config.cross_attention_dim)
    check_shapes(shapes, tensors, "an IP-Adapter for this model", path)
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, (layer, leaf) in names.items():
        layers.setdefault(layer, {})[leaf] = read_finite(tensors[name], f"{path}: {name}")
    return IPAdapter(
        {name: read_finite(tensor, f"{path}: {_PROJECTION}.{name}") for name, tensor in own.items()}, layers
    )


def is_ip_adapter(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are, by their names, the tensors of such a file."""
    return {name.split(".", 1)[0] for name in tensors} == {_PROJECTION, _LAYERS}


def save(path: str | os.PathLike, adapter: IPAdapter, config: UNetConfig, overwrite: bool = False) -> None:
    """The inverse: a .safetensors, or a .bin as torch.save writes it. Strengths of layers are not in it.

    Raises FileExistsError, and ValueError for another ending or an adapter of another U-Net.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: IP-Adapters are called {' or '.join('*' + suffix for suffix in SUFFIXES)}")
    ip_adapter.check_fits(adapter, config)
    own = {name.split(".", 1)[1]: adapter.layers[layer][leaf] for name, (layer, leaf) in _names(config).items()}
    both = {_PROJECTION: adapter.projection, _LAYERS: own}
    with aside(path, overwrite) as work:
        if path.suffix == ".bin":
            write_torch.write_object(work, both)
        else:
            write(work, {f"{part}.{name}": leaf for part, leaves in both.items() for name, leaf in leaves.items()})


def _names(config: UNetConfig) -> dict[str, tuple[str, str]]:
    """{name of a tensor: (path of its cross-attention, which of its leaves)}"""
    return {
        f"{_LAYERS}.{2 * number + 1}.{leaf}.weight": (layer, leaf)
        for number, layer in enumerate(ip_adapter.layers_of(config))
        for leaf in _LEAVES
    }


def _projection(path: Path, own: Mapping[str, Tensor], config: UNetConfig) -> dict[str, tuple[int, ...]]:
    """The shapes that follow from those that a file is free to choose."""
    width = config.cross_attention_dim
    norm = "norm_out" if "latents" in own else "norm"
    free = {"latents": 3, "proj_in.weight": 2} if "latents" in own else {"proj.weight": 2}
    for name, ndim in {**free, f"{norm}.weight": 1}.items():
        if name not in own or own[name].ndim != ndim:
            raise CheckpointError(f"{path}: {_PROJECTION}.{name} is missing or damaged: download it again")
    if own[f"{norm}.weight"].shape[0] != width:
        raise CheckpointError(
            f"{path}: an IP-Adapter beside text states that are {own[f'{norm}.weight'].shape[0]} wide, and this "
            f"model's are {width}: take one that was made for this family"
        )
    pair = lambda name, outputs, inputs: {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}  # noqa: E731
    shapes = {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    if "latents" not in own:
        outputs, inputs = own["proj.weight"].shape
        return shapes | pair("proj", -(-outputs // width) * width, inputs)
    inner, queries = own["latents"].shape[2], own["latents"].shape[1]
    shapes |= {"latents": (1, queries, inner)} | pair("proj_out", width, inner)
    shapes |= pair("proj_in", inner, own["proj_in.weight"].shape[1])
    layers = {name.split(".")[1] for name in own if name.startswith("layers.")}
    for layer in (f"layers.{number}" for number in range(len(layers))):
        heads = own[f"{layer}.0.to_q.weight"].shape[0] if f"{layer}.0.to_q.weight" in own else inner
        wide = own[f"{layer}.1.1.weight"].shape[0] if f"{layer}.1.1.weight" in own else 4 * inner
        heads = -(-heads // ip_adapter.HEAD) * ip_adapter.HEAD
        norms = (f"{layer}.0.norm1", f"{layer}.0.norm2", f"{layer}.1.0")
        shapes |= {f"{norm}.{leaf}": (inner,) for norm in norms for leaf in ("weight", "bias")}
        shapes |= {f"{layer}.0.to_q.weight": (heads, inner), f"{layer}.0.to_kv.weight": (2 * heads, inner)}
        shapes |= {f"{layer}.0.to_out.weight": (inner, heads)}
        shapes |= {f"{layer}.1.1.weight": (wide, inner), f"{layer}.1.3.weight": (inner, wide)}
    return shapes
