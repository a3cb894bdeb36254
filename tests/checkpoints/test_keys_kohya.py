"""kohya's names of layers."""

import pytest

from sd_jax.checkpoints import keys_compvis, keys_kohya, keys_peft
from sd_jax.models import families
from tests.checkpoints.tiny import SPECS

# As files of sd-scripts have them (an SD 1.5 and an SDXL LoRA with convolutions, OneTrainer's and SimpleTuner's)
KNOWN = {
    "sd15": {
        "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q": (
            "unet",
            "down_blocks_0/attentions_1/transformer_blocks_0/attn1/to_q",
        ),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0": (
            "unet",
            "mid_block/attentions_0/transformer_blocks_0/attn2/to_out_0",
        ),
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj": (
            "unet",
            "up_blocks_3/attentions_2/transformer_blocks_0/ff/net_0/proj",
        ),
        "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff_net_2": (
            "unet",
            "up_blocks_1/attentions_0/transformer_blocks_0/ff/net_2",
        ),
        "lora_unet_down_blocks_2_downsamplers_0_conv": ("unet", "down_blocks_2/downsamplers_0/conv"),
        "lora_unet_up_blocks_1_resnets_2_conv_shortcut": ("unet", "up_blocks_1/resnets_2/conv_shortcut"),
        "lora_unet_time_embedding_linear_1": ("unet", "time_embedding/linear_1"),
        "lora_te_text_model_encoder_layers_11_self_attn_out_proj": (
            "text_encoder",
            "text_model/encoder/layers_11/self_attn/out_proj",
        ),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": ("text_encoder", "text_model/encoder/layers_0/mlp/fc1"),
    },
    "sdxl": {
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q": (
            "unet",
            "down_blocks_1/attentions_0/transformer_blocks_1/attn1/to_q",
        ),
        "lora_unet_input_blocks_8_1_proj_in": ("unet", "down_blocks_2/attentions_1/proj_in"),
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": (
            "unet",
            "mid_block/attentions_0/transformer_blocks_9/ff/net_0/proj",
        ),
        "lora_unet_output_blocks_5_1_transformer_blocks_0_attn2_to_v": (
            "unet",
            "up_blocks_1/attentions_2/transformer_blocks_0/attn2/to_v",
        ),
        "lora_unet_output_blocks_2_2_conv": ("unet", "up_blocks_0/upsamplers_0/conv"),
        "lora_unet_input_blocks_3_0_op": ("unet", "down_blocks_0/downsamplers_0/conv"),
        "lora_unet_input_blocks_7_0_skip_connection": ("unet", "down_blocks_2/resnets_0/conv_shortcut"),
        "lora_unet_output_blocks_8_0_in_layers_2": ("unet", "up_blocks_2/resnets_2/conv1"),
        "lora_unet_label_emb_0_2": ("unet", "add_embedding/linear_2"),
        "lora_unet_out_2": ("unet", "conv_out"),
        "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_attn2_to_k": (
            "unet",
            "down_blocks_2/attentions_1/transformer_blocks_9/attn2/to_k",
        ),
        "lycoris_up_blocks_0_attentions_2_transformer_blocks_3_attn1_to_out_0": (
            "unet",
            "up_blocks_0/attentions_2/transformer_blocks_3/attn1/to_out_0",
        ),
        "lora_te1_text_model_encoder_layers_11_mlp_fc2": ("text_encoder", "text_model/encoder/layers_11/mlp/fc2"),
        "lora_te2_text_model_encoder_layers_31_self_attn_k_proj": (
            "text_encoder_2",
            "text_model/encoder/layers_31/self_attn/k_proj",
        ),
        "lora_te2_text_projection": ("text_encoder_2", "text_projection"),
    },
}


@pytest.mark.parametrize("family", KNOWN)
def test_known_names(family):
    table = keys_kohya.read_names(families.FAMILIES[family])
    assert {name: table[name][:2] for name in KNOWN[family]} == KNOWN[family]


@pytest.mark.parametrize(("family", "count"), [("sd15", 192), ("sd2_v", 192), ("sdxl", 722)])
def test_the_layers_that_sd_scripts_trains_are_there(family, count):
    """ "create LoRA for U-Net: 192 modules", and 722: the linears and 1x1 convolutions of the transformers."""
    table = keys_kohya.names(families.FAMILIES[family])
    trained = [
        name
        for name, layer in table.items()
        if layer.part == "unet" and "/attentions_" in f"/{layer.path}" and layer.kind == "kernel"
    ]
    assert len(trained) == count
    assert all(name.startswith("lora_unet_") for name in trained)


@pytest.mark.parametrize("kind", SPECS)
def test_one_name_for_each_layer_and_no_name_for_two(kind):
    spec = SPECS[kind]
    layers = list(keys_peft.names(spec).values())
    written, read = keys_kohya.names(spec), keys_kohya.read_names(spec)
    assert sorted(written.values()) == sorted(layers) and len(set(layers)) == len(layers)
    assert written.items() <= read.items()
    single = keys_compvis.names("unet", spec.unet, keys_compvis.kind_of(spec))
    assert all(
        f"lora_unet_{n.removesuffix('.weight').replace('.', '_')}" in read for n in single.values() if "weight" in n
    )
    compvis = [name for name in written if name.startswith(("lora_unet_input_blocks_", "lora_unet_output_blocks_"))]
    assert bool(compvis) == kind.startswith("sdxl")


def test_marks_of_text_encoders():
    marks = {kind: {n.split("_text")[0] for n in keys_kohya.names(s) if "_text" in n} for kind, s in SPECS.items()}
    assert marks["sd1"] == marks["sd2"] == {"lora_te"}
    assert marks["sdxl"] == {"lora_te1", "lora_te2"} and marks["sdxl_refiner"] == {"lora_te2"}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("lora_unet_conv_in.lora_down.weight", ("lora_unet_conv_in", "lora_down")),
        ("lora_unet_conv_in.lora_mid.weight", ("lora_unet_conv_in", "lora_mid")),
        ("lora_te_x.alpha", ("lora_te_x", "alpha")),
        ("lora_te_x.hada_w2_b", ("lora_te_x", "hada_w2_b")),
        ("lora_te_x.lokr_t2", ("lora_te_x", "lokr_t2")),
        ("lora_te_x.diff_b", ("lora_te_x", "diff_b")),
    ],
)
def test_split_and_joined(name, parts):
    assert keys_kohya.split(name) == parts
    assert keys_kohya.joined(*parts) == name


@pytest.mark.parametrize(
    "name", ["lora_unet_conv_in.weight", "lora_unet_conv_in", "lora_te_x.lora_down", "bundle_emb.a.b"]
)
def test_other_tensors_are_not_split(name):
    assert keys_kohya.split(name) is None
