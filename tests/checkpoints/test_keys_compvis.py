"""CompVis names <-> diffusers': names of real files, inverses, averages, and what trainers leave behind."""

import dataclasses

import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, keys_compvis, layout
from sd_jax.checkpoints.tensors import lazy
from sd_jax.models.families import FAMILIES, SD15, SDXL, TAESD
from tests.checkpoints.tiny import (
    SPEC,
    SPECS,
    compvis_file,
    file_shapes,
    kinds_and_parts,
    random_diffusers,
    shapes_only,
)

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


# As they stand in other models' files
KNOWN_BESIDES = {
    "sd2_base": {"mid_block.attentions.0.proj_in.weight": "middle_block.1.proj_in.weight"},
    "sd15_lcm": {"time_embedding.cond_proj.weight": "time_embed.cond_proj.weight"},
    "sd_x4_upscaler": {
        "class_embedding.weight": "label_emb.weight",
        "down_blocks.1.attentions.0.norm.weight": "input_blocks.4.1.norm.weight",
        "up_blocks.3.resnets.0.conv1.weight": "output_blocks.9.0.in_layers.2.weight",
    },
    "sdxl": {
        "add_embedding.linear_1.weight": "label_emb.0.0.weight",
        "add_embedding.linear_2.bias": "label_emb.0.2.bias",
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight": (
            "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight"
        ),
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.2.conv.weight",
        "up_blocks.2.resnets.2.norm1.bias": "output_blocks.8.0.in_layers.0.bias",
    },
    "sdxl_refiner": {
        "down_blocks.1.attentions.0.transformer_blocks.3.norm1.weight": (
            "input_blocks.4.1.transformer_blocks.3.norm1.weight"
        ),
        "up_blocks.0.upsamplers.0.conv.bias": "output_blocks.2.1.conv.bias",
    },
}
# sd_xl_base_1.0.safetensors has 2515 tensors: besides these, CLIP's position_ids and denoiser.sigmas
COUNTS = {"sd15": 1130, "sd2_base": 1214, "sdxl": 2513, "sdxl_refiner": 1857}


@pytest.mark.parametrize("part", SD15.parts)
def test_names_of_sd15(part):
    assert KNOWN[part].items() <= keys_compvis.names(part, getattr(SD15, part), "sd1").items()


@pytest.mark.parametrize("model", FAMILIES)
def test_names_of_the_published_models_are_one_to_one(model):
    """True sizes: no name serves two tensors of a file, and none is lost on the way back."""
    spec = FAMILIES[model]
    kind, file = keys_compvis.kind_of(spec), {}
    assert KNOWN_BESIDES.get(model, {}).items() <= keys_compvis.names("unet", spec.unet, kind).items()
    for part in spec.parts:
        config = getattr(spec, part)
        table = keys_compvis.names(part, config, kind)
        stacked = sum(name.endswith(("q_proj.weight", "q_proj.bias")) for name in table)
        shared = 2 * stacked if any("in_proj" in name for name in table.values()) else 0  # OpenCLIP's q, k and v
        assert len(set(table.values())) == len(table) - shared
        tensors = shapes_only(layout.LAYOUTS[part](config))
        written = keys_compvis.from_diffusers(part, tensors, config, kind)
        assert not file.keys() & written.keys()
        file |= written
        parts = keys_compvis.split(written, kind, "test", "ema")
        back = keys_compvis.to_diffusers(part, parts[part], config, kind, "test")
        assert list(parts) == [part] and back.keys() == tensors.keys()
        for name, tensor in back.items():
            as_convolution = (1, 1) if part == "vae" and ".attentions." in name and tensor.ndim == 4 else ()
            assert tensor.shape == tensors[name].shape + as_convolution
    assert len(file) == COUNTS.get(model, len(file))


def test_kinds():
    kinds = {model: keys_compvis.kind_of(spec) for model, spec in FAMILIES.items()}
    assert all(model.startswith(kind[:3]) for model, kind in kinds.items() if model != "sd_x4_upscaler")
    assert kinds["sd_x4_upscaler"] == "sd2" and kinds["sd15_lcm"] == "sd1"
    assert kinds["sdxl_refiner"] == "sdxl_refiner" and kinds["sdxl_inpainting"] == "sdxl"


@pytest.mark.parametrize(("name", "part"), kinds_and_parts())
def test_there_and_back_is_the_identity(name, part):
    spec = SPECS[name]
    kind, config, tensors = keys_compvis.kind_of(spec), getattr(spec, part), random_diffusers(part, spec)
    file = keys_compvis.from_diffusers(part, tensors, config, kind)
    prefix = keys_compvis.PREFIXES[kind][part]
    assert all(name.startswith(prefix) for name in file)
    assert file_shapes(part, config, kind) == {name: tensor.shape for name, tensor in file.items()}
    parts = keys_compvis.split(file, kind, "test", "ema")
    back = keys_compvis.to_diffusers(part, parts[part], config, kind, "test")
    assert list(parts) == [part] and back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name].read().reshape(tensor.shape), tensor.read(), strict=True)


def test_what_has_no_place():
    with pytest.raises(CheckpointError, match="no place for a tiny VAE"):
        keys_compvis.names("vae", TAESD, "sd1")
    pooled = dataclasses.replace(SPEC.unet, addition_embed_type="text")
    assert "add_embedding.proj.weight" not in keys_compvis.names("unet", pooled, "sd1")


def test_vae_attention_is_written_as_convolutions():
    file = keys_compvis.from_diffusers("vae", random_diffusers("vae"), SPEC.vae, "sd1")
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
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_averages_are_taken_when_asked_for(kind, weights, added):
    file = compvis_file(SPECS[kind], parts=["unet"])
    parts = keys_compvis.split(lazies({**file, **ema_of(file)}), kind, "test", weights)
    assert len(parts["unet"]) == len(keys_compvis.names("unet", SPECS[kind].unet, kind))
    for name, tensor in parts["unet"].items():
        np.testing.assert_array_equal(tensor.read(), file[f"model.diffusion_model.{name}"] + added)


def test_half_an_average_is_an_error():
    file = compvis_file()
    ema = ema_of(file)
    del ema["model_ema.diffusion_modelout2bias"]
    with pytest.raises(
        CheckpointError, match="its EMA is not .*weights='raw'.* model_ema.diffusion_modelout2bias is miss"
    ):
        keys_compvis.split(lazies({**file, **ema}), "sd1", "test", "ema")
    keys_compvis.split(lazies({**file, **ema}), "sd1", "test", "raw")


def test_names_without_dots_stay_apart():
    names = keys_compvis.names("unet", SDXL.unet, "sdxl").values()
    assert len({name.replace(".", "") for name in names}) == len(names)


BAGGAGE = {
    "sd1": [
        *["betas", "alphas_cumprod", "posterior_mean_coef1", "logvar", "global_step", "cond_stage_model.logit_scale"],
        *["optimizer_states.0", "first_stage_model.loss.logvar", "v_pred", "ztsnr"],
    ],
    "sd2": ["depth_model.model.scratch.weight", "low_scale_model.sqrt_alphas_cumprod", "alphas_cumprod_prev"],
    "sdxl": ["denoiser.sigmas", "conditioner.embedders.0.logit_scale"],
    "sdxl_refiner": ["denoiser.sigmas"],
}


@pytest.mark.parametrize("kind", BAGGAGE)
def test_baggage_is_dropped_and_the_unknown_is_not(kind):
    file = compvis_file(SPECS[kind])
    baggage = dict.fromkeys(BAGGAGE[kind], np.zeros(3, np.float32))
    parts = keys_compvis.split(lazies({**file, **baggage}), kind, "test", "ema")
    assert sum(len(tensors) for tensors in parts.values()) == len(file)
    title = keys_compvis.TITLES[kind]
    with pytest.raises(CheckpointError, match=f"^a: unexpected in a single file of {title}: hypernetwork.weight"):
        keys_compvis.split(lazies({**file, "hypernetwork.weight": np.zeros(1)}), kind, "a", "ema")


def test_files_of_sd2_in_sgm_form():
    """SD-Turbo's: the text encoder stands where the refiner has it."""
    spec, prefix = SPECS["sd2"], keys_compvis.PREFIXES["sd2"]["text_encoder"]
    file = {
        name.replace(prefix, "conditioner.embedders.0.model."): tensor for name, tensor in compvis_file(spec).items()
    }
    parts = keys_compvis.split(lazies(file), "sd2", "test", "ema")
    wanted = file_shapes("text_encoder", spec.text_encoder, "sd2")
    assert {prefix + name for name in parts["text_encoder"]} == wanted.keys()


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_missing_and_unexpected_are_listed_by_the_files_own_names(kind):
    tensors = keys_compvis.split(lazies(compvis_file(SPECS[kind])), kind, "test", "ema")["unet"]
    tensors["out.3.bias"] = tensors.pop("out.2.bias")
    with pytest.raises(CheckpointError, match="^a.safetensors: not a U-Net of SD") as error:
        keys_compvis.to_diffusers("unet", tensors, SPECS[kind].unet, kind, "a.safetensors")
    assert "model.diffusion_model.out.2.bias is missing" in str(error.value)
    assert "model.diffusion_model.out.3.bias is unexpected" in str(error.value)
