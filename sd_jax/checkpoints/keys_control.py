"""ControlNets and T2I-Adapters by the names of their authors' files <-> diffusers' names, both ways.

    ControlNet    control_model.input_blocks.*, time_embed.*, middle_block.*     half a U-Net, see `keys_compvis`
                  control_model.input_hint_block.{0, 2, ..., 14}                 what reads the hint
                  control_model.zero_convs.N.0, middle_block_out.0               what is added
    T2I-Adapter   conv_in, body.(level * resnets + N).{block1,block2,in_conv}    full ones
                  body.level.{in_conv,out_conv}, body.level.body.N.*             light ones

Sources: lllyasviel/ControlNet `cldm/cldm.py`; TencentARC/T2I-Adapter `Adapter/models/adapters.py`.
"""

import re
from collections.abc import Mapping

from sd_jax.adapters.controlnet import EMBEDDING, ControlNetConfig
from sd_jax.adapters.t2i_adapter import T2IAdapterConfig
from sd_jax.checkpoints import keys_compvis
from sd_jax.checkpoints.errors import CheckpointError

PREFIX = "control_model."  # of the authors' files; others come without
ADAPTER_PREFIX = "adapter."  # of diffusers' T2I-Adapters, and of some of the authors' files


def controlnet(names: Mapping, config: ControlNetConfig) -> dict[str, str]:
    """{diffusers' name: the authors' without prefix}. Raises CheckpointError for what the layout has no place for."""
    convs = 2 * (len(config.conditioning_embedding_out_channels) - 1)
    modules = keys_compvis.unet_modules(config.unet)
    modules |= {f"{EMBEDDING}.conv_in": "input_hint_block.0", "controlnet_mid_block": "middle_block_out.0"}
    modules |= {f"{EMBEDDING}.blocks.{i}": f"input_hint_block.{2 * (i + 1)}" for i in range(convs)}
    modules[f"{EMBEDDING}.conv_out"] = f"input_hint_block.{2 * (convs + 1)}"
    modules |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(config.num_residuals - 1)}
    if config.unet.addition_embed_type == "text":
        raise CheckpointError("the layout of ControlNet's authors has no place for add_embedding: write diffusers'")
    return {name: keys_compvis.translate(name, modules) for name in names}


def t2i_adapter(names: Mapping, config: T2IAdapterConfig) -> dict[str, str]:
    """{diffusers' name, without its prefix: the authors'}."""
    return {name: _of_adapter(name, config) for name in names}


def _of_adapter(name: str, config: T2IAdapterConfig) -> str:
    found = re.fullmatch(r"body\.(\d+)\.(?:resnets\.(\d+)\.)?(.+)", name)
    if not found:
        return name
    level, resnet, rest = int(found[1]), found[2], found[3]
    if config.adapter_type == "light_adapter":
        return f"body.{level}.{rest}" if resnet is None else f"body.{level}.body.{resnet}.{rest}"
    return f"body.{level * config.num_res_blocks + int(resnet or 0)}.{rest}"
