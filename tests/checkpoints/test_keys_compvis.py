"""CompVis names <-> diffusers': names of real files, inverses, averages, and what trainers leave behind."""

import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, keys_compvis, layout
from sd_jax.checkpoints.tensors import lazy
from sd_jax.models.presets import SD15
from tests.checkpoints.tiny import SPEC, compvis_file, random_diffusers

# As they stand in v1-5-pruned-emaonly.safetensors
KNOWN = {
    "unet": {
        "conv_in.weight": "input_blocks.0.0.weight",
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "down_blocks.0.resnets.0.norm1.weight": "input_blocks.1.0.in_layers.0.weight",
        "down_blocks.0.attentions.1.proj_in.weight": "input_blocks.2.1.proj_in.weight",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
        "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_out.0.bias": (
            "input_blocks.8.1.transformer_blocks.0.attn2.to_out.0.bias"
        ),
        "down_blocks.2.downsamplers.0.conv.bias": "input_blocks.9.0.op.bias",
        "down_blocks.3.resnets.1.time_emb_proj.weight": "input_blocks.11.0.emb_layers.1.weight",
        "mid_block.resnets.0.conv2.weight": "middle_block.0.out_layers.3.weight",
        "mid_block.attentions.0.norm.weight": "middle_block.1.norm.weight",
        "mid_block.resnets.1.norm2.bias": "middle_block.2.out_layers.0.bias",
        "up_blocks.0.resnets.2.conv1.weight": "output_blocks.2.0.in_layers.2.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.3.attentions.2.proj_out.bias": "output_blocks.11.1.proj_out.bias",
        "up_blocks.3.resnets.2.conv_shortcut.weight": "output_blocks.11.0.skip_connection.weight",
        "conv_norm_out.weight": "out.0.weight",
        "conv_out.bias": "out.2.bias",
    },
    "vae": {
        "encoder.conv_in.weight": "encoder.conv_in.weight",
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.down_blocks.2.downsamplers.0.conv.bias": "encoder.down.2.downsample.conv.bias",
        "encoder.mid_block.resnets.1.norm2.weight": "encoder.mid.block_2.norm2.weight",
        "encoder.mid_block.attentions.0.to_q.weight": "encoder.mid.attn_1.q.weight",
        "decoder.mid_block.attentions.0.to_out.0.bias": "decoder.mid.attn_1.proj_out.bias",
        "decoder.mid_block.attentions.0.group_norm.weight": "decoder.mid.attn_1.norm.weight",
        "decoder.up_blocks.0.resnets.2.conv1.weight": "decoder.up.3.block.2.conv1.weight",
        "decoder.up_blocks.2.upsamplers.0.conv.weight": "decoder.up.1.upsample.conv.weight",
        "decoder.conv_norm_out.bias": "decoder.norm_out.bias",
        "quant_conv.weight": "quant_conv.weight",
    },
    "text_encoder": {"text_model.final_layer_norm.weight": "text_model.final_layer_norm.weight"},
}


@pytest.mark.parametrize("part", layout.PARTS)
def test_names_of_sd15(part):
    table = keys_compvis.names(part, getattr(SD15, part))
    assert KNOWN[part].items() <= table.items()
    assert len(set(table.values())) == len(table)


@pytest.mark.parametrize("part", layout.PARTS)
def test_there_and_back_is_the_identity(part):
    config, tensors = getattr(SPEC, part), random_diffusers(part)
    file = keys_compvis.from_diffusers(part, tensors, config)
    assert all(name.startswith(keys_compvis.PREFIXES[part]) for name in file)
    back = keys_compvis.to_diffusers(part, keys_compvis.split(file, "test", "ema")[part], config, "test")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name].read().reshape(tensor.shape), tensor.read(), strict=True)


def test_vae_attention_is_written_as_convolutions():
    file = keys_compvis.from_diffusers("vae", random_diffusers("vae"), SPEC.vae)
    assert file["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (32, 32, 1, 1)
    assert file["first_stage_model.encoder.mid.attn_1.q.bias"].shape == (32,)


def ema_of(file):
    """As LitEma names the averages of a U-Net."""
    prefix = "model.diffusion_model."
    flat = {n: "diffusion_model" + n.removeprefix(prefix).replace(".", "") for n in file if n.startswith(prefix)}
    averages = {f"model_ema.{name}": file[source] + 1 for source, name in flat.items()}
    return {**averages, "model_ema.decay": np.float32(0.9999), "model_ema.num_updates": np.int64(7)}


def lazies(file):
    return {name: lazy(np.asarray(array)) for name, array in file.items()}


@pytest.mark.parametrize(("weights", "added"), [("ema", 1), ("raw", 0)])
def test_averages_are_taken_when_asked_for(weights, added):
    file = compvis_file()
    parts = keys_compvis.split(lazies({**file, **ema_of(file)}), "test", weights)
    assert len(parts["unet"]) == len(keys_compvis.names("unet", SPEC.unet))
    for name, tensor in parts["unet"].items():
        np.testing.assert_array_equal(tensor.read(), file[f"model.diffusion_model.{name}"] + added)


def test_half_an_average_is_an_error():
    file = compvis_file()
    ema = ema_of(file)
    del ema["model_ema.diffusion_modelout2bias"]
    with pytest.raises(
        CheckpointError, match="its EMA is not .*weights='raw'.* model_ema.diffusion_modelout2bias is miss"
    ):
        keys_compvis.split(lazies({**file, **ema}), "test", "ema")
    keys_compvis.split(lazies({**file, **ema}), "test", "raw")


def test_names_without_dots_stay_apart():
    names = keys_compvis.names("unet", SD15.unet).values()
    assert len({name.replace(".", "") for name in names}) == len(names)


def test_baggage_is_dropped_and_the_unknown_is_not():
    baggage = dict.fromkeys(
        ["betas", "alphas_cumprod", "posterior_mean_coef1", "logvar", "global_step", "cond_stage_model.logit_scale"],
        np.zeros(3, np.float32),
    )
    baggage |= {"optimizer_states.0": np.zeros(1), "first_stage_model.loss.logvar": np.zeros(1)}
    file = compvis_file()
    parts = keys_compvis.split(lazies({**file, **baggage}), "test", "ema")
    assert sum(len(tensors) for tensors in parts.values()) == len(file)
    with pytest.raises(CheckpointError, match="^a: unexpected in a single file of SD 1.x: hypernetwork.weight"):
        keys_compvis.split(lazies({**file, "hypernetwork.weight": np.zeros(1)}), "a", "ema")


def test_missing_and_unexpected_are_listed_by_the_files_own_names():
    tensors = keys_compvis.split(lazies(compvis_file()), "test", "ema")["unet"]
    tensors["out.3.bias"] = tensors.pop("out.2.bias")
    with pytest.raises(CheckpointError) as error:
        keys_compvis.to_diffusers("unet", tensors, SPEC.unet, "a.safetensors")
    assert "model.diffusion_model.out.2.bias is missing" in str(error.value)
    assert "model.diffusion_model.out.3.bias is unexpected" in str(error.value)
