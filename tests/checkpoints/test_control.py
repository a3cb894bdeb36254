"""ControlNets and T2I-Adapters as files: every layout there and back to the bit, and what is told of others."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sd_jax.adapters import controlnet, t2i_adapter
from sd_jax.adapters.controlnet import ControlNetConfig
from sd_jax.adapters.t2i_adapter import T2IAdapterConfig
from sd_jax.checkpoints import CheckpointError, read_safetensors, write_torch
from sd_jax.checkpoints.control import CONFIG_KEY, open_control, save_control
from sd_jax.checkpoints.files import open_any
from sd_jax.models.families import SD15, SDXL
from sd_jax.models.presets import UNetConfig

# Of shapes that say the rest: 8 heads and 32 groups in SD 1.5's, 64 channels a head in SDXL's
SD = UNetConfig(block_out_channels=(32, 64), attention_blocks=(True, False), layers_per_block=1, cross_attention_dim=48)
XL = UNetConfig(
    block_out_channels=(64, 128),
    attention_blocks=(False, True),
    layers_per_block=1,
    num_attention_heads=(1, 2),
    transformer_layers_per_block=(1, 2),
    cross_attention_dim=112,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=64 + 6 * 256,
)
CONTROLNETS = {"sd15": ControlNetConfig(SD, (4, 8, 8)), "sdxl": ControlNetConfig(XL, (4, 8, 8, 16))}
ADAPTERS = {
    "full": T2IAdapterConfig(channels=(8, 16, 32, 32)),
    "xl": T2IAdapterConfig("full_adapter_xl", channels=(8, 16, 32, 32), downscale_factor=16),
    "light": T2IAdapterConfig("light_adapter", channels=(8, 16, 32), num_res_blocks=4),
    "grey": T2IAdapterConfig(in_channels=1, channels=(8, 16, 32, 32)),
}


def random_of(config):
    module, rng = controlnet if isinstance(config, ControlNetConfig) else t2i_adapter, np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), module.shapes_of(config))


def assert_same(found, wanted):
    found, wanted = flatten_dict(found), flatten_dict(wanted)
    assert found.keys() == wanted.keys()
    for key, leaf in wanted.items():
        np.testing.assert_array_equal(np.asarray(found[key]), leaf, strict=True)


@pytest.mark.parametrize("name", [*CONTROLNETS, *ADAPTERS])
@pytest.mark.parametrize("format", ["diffusers", "single_file"])
def test_round_trips_to_the_bit(tmp_path, name, format):
    config = (CONTROLNETS | ADAPTERS)[name]
    params, suffix = random_of(config), "" if format == "diffusers" else ".safetensors"
    save_control(tmp_path / f"first{suffix}", config, params, format)
    opened = open_control(tmp_path / f"first{suffix}")
    assert opened.config == config
    assert_same(opened.params, params)
    save_control(tmp_path / f"second{suffix}", opened.config, opened.params, format)
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    files = sorted(first.iterdir()) if first.is_dir() else [first]
    for file in files:
        assert file.read_bytes() == (second / file.name if first.is_dir() else second).read_bytes()
    with pytest.raises(FileExistsError):
        save_control(first, config, params, format)


@pytest.mark.parametrize("name", [*CONTROLNETS, *ADAPTERS])
@pytest.mark.parametrize("form", ["safetensors", "pth", "without prefix", "in a whole model", "diffusers' names"])
def test_files_without_a_config_are_known_by_their_shapes(tmp_path, name, form):
    """As their authors' are."""
    config = (CONTROLNETS | ADAPTERS)[name]
    params, steers = random_of(config), isinstance(config, ControlNetConfig)
    if form == "diffusers' names":
        save_control(tmp_path / "folder", config, params)
        tensors = open_any(tmp_path / "folder" / "diffusion_pytorch_model.safetensors").tensors
    else:
        save_control(tmp_path / "ours.safetensors", config, params, "single_file")
        tensors = open_any(tmp_path / "ours.safetensors").tensors
    tensors = {key: np.asarray(tensor) for key, tensor in tensors.items()}
    path = tmp_path / "theirs.safetensors"
    if form == "without prefix":
        tensors = {key.removeprefix("control_model."): tensor for key, tensor in tensors.items()}
    if form == "in a whole model":
        if not steers:
            tensors = {f"adapter.{key}": tensor for key, tensor in tensors.items()}
        tensors["first_stage_model.quant_conv.weight"] = np.zeros((8, 8, 1, 1), np.float32)
    if form == "pth":
        path = tmp_path / "theirs.pth"
        write_torch.write_object(path, {"state_dict": tensors})
    else:
        read_safetensors.write(path, tensors, {})
    opened = open_control(path)
    assert opened.config == config
    assert_same(opened.params, params)


def test_published_ones_have_the_published_sizes():
    sizes = {
        ControlNetConfig(SD15.unet): (361_279_120, 13),  # control_v11p_sd15_canny
        ControlNetConfig(SDXL.unet): (1_251_014_160, 10),  # controlnet-canny-sdxl-1.0
    }
    for config, (numbers, residuals) in sizes.items():
        shapes = controlnet.shapes_of(config)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == numbers
        assert config.num_residuals == residuals
        assert sum(name.startswith("controlnet_down_blocks_") for name in shapes) == residuals - 1
    adapter = t2i_adapter.shapes_of(T2IAdapterConfig())
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == 77_369_280  # t2iadapter_canny_sd15v2


def test_a_difference_wants_its_base(tmp_path):
    config = CONTROLNETS["sd15"]
    params = random_of(config)
    base = {name: tree for name, tree in params.items() if not name.startswith("controlnet_")}
    base = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), base)
    wanted = params | jax.tree.map(np.add, {name: params[name] for name in base}, base)
    save_control(tmp_path / "a.safetensors", config, params, "single_file")
    opened = open_any(tmp_path / "a.safetensors")
    tensors = {name: np.asarray(tensor) for name, tensor in opened.tensors.items()}
    read_safetensors.write(
        tmp_path / "b.safetensors", {**tensors, "difference": np.zeros(0, np.float32)}, opened.metadata
    )
    with pytest.raises(
        CheckpointError, match=r"b\.safetensors: holds the difference to a base model: give .* as base="
    ):
        open_control(tmp_path / "b.safetensors")
    assert_same(open_control(tmp_path / "b.safetensors", base).params, wanted)


def test_a_shuffle_model_is_known_by_its_name(tmp_path):
    save_control(tmp_path / "ours.safetensors", CONTROLNETS["sd15"], random_of(CONTROLNETS["sd15"]), "single_file")
    tensors = {name: np.asarray(t) for name, t in open_any(tmp_path / "ours.safetensors").tensors.items()}
    read_safetensors.write(tmp_path / "control_v11e_sd15_shuffle.safetensors", tensors, {})
    opened = open_control(tmp_path / "control_v11e_sd15_shuffle.safetensors")
    assert opened.config.global_pool_conditions and "shuffle" in opened.notes[0]


def test_what_is_no_control_is_told(tmp_path):
    config = CONTROLNETS["sd15"]
    save_control(tmp_path / "a.safetensors", config, random_of(config), "single_file")
    opened = open_any(tmp_path / "a.safetensors")
    tensors = {name: np.asarray(tensor) for name, tensor in opened.tensors.items()}
    lost = {name: tensor for name, tensor in tensors.items() if "zero_convs.1" not in name}
    read_safetensors.write(
        tmp_path / "b.safetensors", {**lost, "control_model.more": np.zeros(1, np.float32)}, opened.metadata
    )
    with pytest.raises(
        CheckpointError, match=r"b\.safetensors: .*controlnet_down_blocks\.1\.weight is missing.*more is unexpected"
    ):
        open_control(tmp_path / "b.safetensors")
    read_safetensors.write(tmp_path / "c.safetensors", {"lora_up": np.zeros((2, 2), np.float32)}, {})
    with pytest.raises(
        CheckpointError, match=r"c\.safetensors: neither a ControlNet nor a T2I-Adapter, its tensors are lora_up"
    ):
        open_control(tmp_path / "c.safetensors")
    with pytest.raises(FileNotFoundError):
        open_control(tmp_path / "nothing.safetensors")
    save_control(tmp_path / "folder", config, random_of(config))
    file = tmp_path / "folder" / "config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "controlnet_conditioning_channel_order": "hsv"}))
    with pytest.raises(
        CheckpointError, match=r"config\.json: controlnet_conditioning_channel_order='hsv' is not supported"
    ):
        open_control(tmp_path / "folder")
    file.write_text(json.dumps({**said, "_class_name": "UNet2DConditionModel"}))
    with pytest.raises(CheckpointError, match="only ControlNetModel and T2IAdapter are controls"):
        open_control(tmp_path / "folder")
    # A header that lies is not believed
    wrong = dataclasses.replace(config, unet=dataclasses.replace(config.unet, layers_per_block=2))
    save_control(tmp_path / "wrong", wrong, random_of(wrong))
    header = {CONFIG_KEY: (tmp_path / "wrong" / "config.json").read_text()}
    read_safetensors.write(tmp_path / "d.safetensors", tensors, header)
    with pytest.raises(CheckpointError, match=r"d\.safetensors: not the ControlNet of its config"):
        open_control(tmp_path / "d.safetensors")
