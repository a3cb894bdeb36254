"""ControlNets and T2I-Adapters as files and folders <-> their configs and parameters, both ways.

What it is, its tensors say: single files of the authors (`.pth`, `.safetensors`; `keys_control`), of which some lie in
a whole model's file, diffusers' folders, and single files with diffusers' names. A file without a config is of the
family that its shapes are those of (`infer`); a file that we wrote carries its config in its header.

A file with the tensor `difference` holds what was added to a base, and wants that base (ComfyUI `comfy/controlnet.py`).
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sd_jax.adapters import controlnet, t2i_adapter
from sd_jax.adapters.controlnet import EMBEDDING, ControlNetConfig
from sd_jax.adapters.t2i_adapter import T2IAdapterConfig
from sd_jax.checkpoints import components, config_json, config_values, folders, infer, keys_control, keys_diffusers
from sd_jax.checkpoints.aside import aside
from sd_jax.checkpoints.errors import CheckpointError, listing, shown
from sd_jax.checkpoints.files import open_any
from sd_jax.checkpoints.layout import check_shapes
from sd_jax.checkpoints.ldm_yaml import Said
from sd_jax.checkpoints.read_safetensors import write
from sd_jax.checkpoints.tensors import Tensor, lazy
from sd_jax.models.presets import UNetConfig
from sd_jax.types import Params

Config = ControlNetConfig | T2IAdapterConfig
CONFIG_KEY = "sd_jax.control"  # of a safetensors header
FOLDER = "control"  # what a run of ours leaves in its workdir
WEIGHTS = "diffusion_pytorch_model.safetensors"

_TITLES = {ControlNetConfig: "ControlNet", T2IAdapterConfig: "T2I-Adapter"}
_CLASSES = {"ControlNetModel": ControlNetConfig, "T2IAdapter": T2IAdapterConfig}
_LEVELS = 4  # of every T2I-Adapter that was published
# Keys of diffusers' ControlNetModel that its U-Net has not, and those of the U-Net that it has
_OWN = ("conditioning_channels", "conditioning_embedding_out_channels", "global_pool_conditions")
_ORDER = "controlnet_conditioning_channel_order"
_NOT_OF_CONTROLNETS = {"sample_size", "out_channels", "up_block_types", "time_cond_proj_dim", "resnet_skip_time_act"}
_NOT_OF_CONTROLNETS |= {"attention_type", "center_input_sample", "class_embeddings_concat", "conv_in_kernel", "dropout"}
_NOT_OF_CONTROLNETS |= {"conv_out_kernel", "cross_attention_norm", "dual_cross_attention", "resnet_out_scale_factor"}
_NOT_OF_CONTROLNETS |= {"mid_block_only_cross_attention", "reverse_transformer_layers_per_block", "timestep_post_act"}
_NOT_OF_CONTROLNETS |= {"time_embedding_act_fn", "time_embedding_dim", "time_embedding_type"}


class Opened(NamedTuple):
    config: Config
    params: Params  # of Tensors, or arrays
    notes: tuple[str, ...] = ()  # how what the file does not say was decided


def open_control(
    path: str | os.PathLike,  # a file, a folder of diffusers', or the workdir of a run
    base: Params | None = None,  # a U-Net's parameters, for a file of differences
) -> Opened:
    """Raises FileNotFoundError, and CheckpointError listing what is missing, unexpected or of another shape."""
    path = Path(path)
    if (path / FOLDER / "config.json").is_file():
        path = path / FOLDER
    elif (path / f"{FOLDER}.safetensors").is_file():
        path = path / f"{FOLDER}.safetensors"
    if path.is_dir():
        return _open_folder(path)
    contents = open_any(path)
    tensors = _without_prefix(contents.tensors)
    if f"{EMBEDDING}.conv_in.weight" in tensors or "input_hint_block.0.weight" in tensors:
        return _open_controlnet(path, tensors, contents.metadata, base)
    if any(name.startswith("body.") for name in tensors):
        config = _said(contents.metadata, T2IAdapterConfig) or _adapter_of(tensors, str(path))
        return Opened(config, _params(config, _adapter_names(tensors, config), str(path)))
    few = listing([shown(name, 50) for name in tensors], 3)
    raise CheckpointError(f"{path}: neither a ControlNet nor a T2I-Adapter, its tensors are {few}")


def save_control(
    path: str | os.PathLike,
    config: Config,
    params: Params,
    format: str = "diffusers",  # a folder; or "single_file", the authors' layout, as safetensors
    overwrite: bool = False,
) -> None:
    """Raises FileExistsError, and CheckpointError where the parameters are not those of the config."""
    leaves = {"/".join(key): lazy(leaf) for key, leaf in flatten_dict(params).items()}
    tensors = {keys_diffusers.their_name(name): keys_diffusers.their_layout(name, t) for name, t in leaves.items()}
    check_shapes(_shapes(config), tensors, f"the {_TITLES[type(config)]} of its config", path)
    told = {"format": "pt", CONFIG_KEY: json.dumps(_to_json(config))}
    is_adapter = isinstance(config, T2IAdapterConfig)
    if format == "single_file":
        table = (keys_control.t2i_adapter if is_adapter else keys_control.controlnet)(tensors, config)
        prefix = "" if is_adapter else keys_control.PREFIX
        with aside(path, overwrite) as work:
            write(work, {prefix + table[name]: tensor for name, tensor in tensors.items()}, told)
        return
    if format != "diffusers":
        raise ValueError(f"format={format!r} is unknown: use diffusers or single_file")
    prefix = keys_control.ADAPTER_PREFIX if is_adapter else ""
    with aside(path, overwrite) as work:
        work.mkdir()
        write(work / WEIGHTS, {prefix + name: tensor for name, tensor in tensors.items()}, told)
        (work / "config.json").write_text(json.dumps(_to_json(config), indent=2) + "\n", encoding="utf-8")


# -- ControlNets -----------------------------------------------------------------------------------------------------


def _open_controlnet(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str], base: Params | None):
    where, is_difference = str(path), tensors.pop("difference", None) is not None
    compvis = "input_hint_block.0.weight" in tensors
    config, notes = _said(metadata, ControlNetConfig), ()
    if config is None:
        config, notes = _controlnet_of(tensors, path, compvis)
    if compvis:
        table = keys_control.controlnet(_shapes(config), config)
        names = {theirs: name for name, theirs in table.items()}
        tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
    params = _params(config, tensors, where)
    if not is_difference:
        return Opened(config, params, notes)
    if base is None:
        raise CheckpointError(f"{path}: holds the difference to a base model: give that model, as base=")
    return Opened(config, _added(params, base, where), (*notes, "the difference to the base was added to it"))


def _controlnet_of(tensors: Mapping[str, Tensor], path: Path, compvis: bool) -> tuple[ControlNetConfig, tuple]:
    """By shapes."""
    kind = components.kind(tensors)
    unet = infer.unet_of(tensors, kind, None, str(path), Said(), half=True)
    unet = dataclasses.replace(unet, sample_size=UNetConfig.sample_size)
    form = "input_hint_block.{}.weight" if compvis else f"{EMBEDDING}.blocks.{{}}.weight"
    numbers = range(4, 100, 4) if compvis else range(1, 100, 2)
    first = "input_hint_block.0.weight" if compvis else f"{EMBEDDING}.conv_in.weight"
    last = max((n for n in range(100) if f"input_hint_block.{n}.weight" in tensors), default=0)
    halving = [form.format(n) for n in numbers if form.format(n) in tensors and not (compvis and n == last)]
    widths = tuple(tensors[name].shape[0] for name in (first, *halving))
    pools = "shuffle" in path.stem
    notes = ("a shuffle model by its name: residuals are means over the picture",) if pools else ()
    config = ControlNetConfig(unet, widths, tensors[first].shape[1], global_pool_conditions=pools)
    return config, notes


def _added(params: Params, base: Params, where: str) -> Params:
    ours, theirs = flatten_dict(params), flatten_dict(base)
    for key, leaf in ours.items():
        if key in theirs:
            if theirs[key].shape != leaf.shape:
                raise CheckpointError(f"{where}: {'/'.join(key)} is {leaf.shape}, the base's {theirs[key].shape}")
            ours[key] = np.asarray(leaf, np.float32) + np.asarray(theirs[key], np.float32)
    return unflatten_dict(ours)


# -- T2I-Adapters ----------------------------------------------------------------------------------------------------


def _adapter_of(tensors: Mapping[str, Tensor], where: str) -> T2IAdapterConfig:
    """By shapes."""
    light = "conv_in.weight" not in tensors
    first = tensors.get("body.0.in_conv.weight" if light else "conv_in.weight")
    factor = {64: 8, 192: 8, 256: 16, 768: 16}.get(first.shape[1] if first is not None and first.ndim == 4 else 0)
    if factor is None:
        raise CheckpointError(f"{where}: no known T2I-Adapter: it does not read 1 or 3 channels of 8x8 or 16x16 pixels")
    blocks = {name.rsplit(".block1.", 1)[0]: tensor for name, tensor in tensors.items() if ".block1.weight" in name}
    resnets = len(blocks) // _LEVELS
    widths = [tensors.get(f"body.{level}.out_conv.weight") for level in range(_LEVELS)]
    if not light:
        own = "body.{}.resnets.0.block1.weight"
        diffusers = own.format(0) in tensors
        form = own if diffusers else "body.{}.block1.weight"
        widths = [tensors.get(form.format(level * (1 if diffusers else resnets))) for level in range(_LEVELS)]
    if None in widths:
        raise CheckpointError(f"{where}: no known T2I-Adapter: it has not {_LEVELS} levels")
    channels = tuple(width.shape[0] for width in widths)
    kind = "light_adapter" if light else "full_adapter_xl" if factor == 16 else "full_adapter"
    channels = channels[:-1] if light else channels
    return T2IAdapterConfig(kind, first.shape[1] // factor**2, channels, resnets, factor)


def _adapter_names(tensors: Mapping[str, Tensor], config: T2IAdapterConfig) -> dict[str, Tensor]:
    """By diffusers' names."""
    if any(".resnets." in name for name in tensors):
        return dict(tensors)
    names = {theirs: name for name, theirs in keys_control.t2i_adapter(_shapes(config), config).items()}
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


# -- Both ------------------------------------------------------------------------------------------------------------


def _open_folder(path: Path) -> Opened:
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: no ControlNet or T2I-Adapter here: its config.json is missing")
    config = _from_json(folders.read_json(file), str(file))
    there = {p.name for p in path.iterdir() if p.is_file()}
    chosen = folders.choose_weights(there, "unet", "raw")
    if chosen is None:
        raise CheckpointError(f"{path}: no {WEIGHTS} in it")
    weights = path / chosen
    tensors = folders.open_shards(weights) if chosen.endswith(".json") else open_any(weights).tensors
    tensors = _without_prefix(tensors)
    if isinstance(config, T2IAdapterConfig):
        tensors = _adapter_names(tensors, config)
    return Opened(config, _params(config, tensors, str(weights)))


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the network alone, where a file holds a whole model besides."""
    for prefix in (keys_control.PREFIX, keys_control.ADAPTER_PREFIX):
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if found:
            return found | {name: tensors[name] for name in ("difference",) if name in tensors}
    return dict(tensors)


@functools.cache
def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Of all tensors, by diffusers' names, as torch has them."""
    module = controlnet if isinstance(config, ControlNetConfig) else t2i_adapter
    shapes = {"/".join(key): leaf.shape for key, leaf in flatten_dict(module.shapes_of(config)).items()}
    tensors = {name: Tensor(shape, np.dtype(np.float32), _nothing) for name, shape in shapes.items()}
    return {
        keys_diffusers.their_name(name): keys_diffusers.their_layout(name, tensor).shape
        for name, tensor in tensors.items()
    }


def _nothing() -> np.ndarray:
    return np.zeros(0, np.float32)


def _params(config: Config, tensors: Mapping[str, Tensor], where: str) -> Params:
    check_shapes(_shapes(config), tensors, f"the {_TITLES[type(config)]} of its config", where)
    ours = {
        tuple(keys_diffusers.our_name(name, tensor.ndim).split("/")): keys_diffusers.our_layout(name, tensor)
        for name, tensor in tensors.items()
    }
    return unflatten_dict(ours)


def _said(metadata: Mapping[str, str], kind: type) -> Any:
    """The config in the header of a file that we wrote; None where there is none."""
    try:
        config = _from_json(json.loads(metadata[CONFIG_KEY]), CONFIG_KEY)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError, CheckpointError):
        return None
    return config if isinstance(config, kind) else None


def _from_json(data: Mapping[str, Any], where: str) -> Config:
    name = data.get("_class_name")
    if name not in _CLASSES:
        raise CheckpointError(f"{where}: _class_name={name!r}: only {' and '.join(_CLASSES)} are controls")
    fields = {field.name: field.default for field in dataclasses.fields(T2IAdapterConfig)}
    if name == "T2IAdapter":
        values = config_values.read_keys(data, fields, where)
        if values["adapter_type"] not in t2i_adapter.KINDS:
            raise CheckpointError(f"{where}: adapter_type={values['adapter_type']!r} is not supported")
        return T2IAdapterConfig(**{key: config_values.as_tuple(value) for key, value in values.items()})
    own = {field.name: field.default for field in dataclasses.fields(ControlNetConfig) if field.name in _OWN}
    own |= {_ORDER: "rgb"}
    values = config_values.read_keys(data, own, where)
    if values[_ORDER] not in ("rgb", "bgr"):
        raise CheckpointError(f"{where}: {_ORDER}={values[_ORDER]!r} is not supported: only rgb and bgr are")
    down = data.get("down_block_types") or config_json.DOWN_BLOCK_TYPES
    mirrored = [kind.replace("Down", "Up") for kind in reversed(down)]
    unet = {key: value for key, value in data.items() if key not in own}
    unet |= {"_class_name": "UNet2DConditionModel", "up_block_types": mirrored}
    unet["out_channels"] = data.get("in_channels") or 4
    return ControlNetConfig(
        config_json.unet_from_json(unet, where),
        tuple(values["conditioning_embedding_out_channels"]),
        values["conditioning_channels"],
        values[_ORDER],
        values["global_pool_conditions"],
    )


def _to_json(config: Config) -> dict[str, Any]:
    version = {"_diffusers_version": config_json.DIFFUSERS_VERSION}
    if isinstance(config, T2IAdapterConfig):
        values = {key: config_values.as_list(value) for key, value in dataclasses.asdict(config).items()}
        return {"_class_name": "T2IAdapter", **version, **values}
    unet = config_json.unet_to_json(config.unet)
    unet = {key: value for key, value in unet.items() if key not in _NOT_OF_CONTROLNETS}
    own = {key: config_values.as_list(getattr(config, key)) for key in _OWN}
    return {**unet, "_class_name": "ControlNetModel", **own, _ORDER: config.conditioning_channel_order}
