"""Names of the LoRA family's tensors as kohya-ss/sd-scripts and LyCORIS have them <-> our layers.

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight       SD 1, SD 2
    lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_up.weight                   SDXL
    lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha                                  SD 1, SD 2
    lora_te1_..., lora_te2_...                                                                  SDXL's two

A module's name, its dots turned into "_", behind a mark of its network; then what the tensor is. SDXL's U-Net is named
as its single file names it, the others as diffusers does.

Read besides, never written: either naming of a U-Net for any model, `lora_te1_` of a sole text encoder, and `lycoris_`
in place of `lora_unet_`.

Sources: kohya-ss/sd-scripts `networks/lora.py`; KohakuBlueleaf/LyCORIS `lycoris/{kohya,wrapper}.py`, `lycoris/modules`.
"""

from collections.abc import Iterator

from sd_jax.checkpoints import keys_compvis, keys_peft
from sd_jax.checkpoints.keys_peft import Layer
from sd_jax.models.presets import ModelSpec

MARKS = ("lora_unet_", "lora_te", "lycoris_")

# What a tensor is in an entry, and how its name ends; the others end as they are called
_ENDS = {"lora_down": "lora_down.weight", "lora_up": "lora_up.weight", "lora_mid": "lora_mid.weight"}
_WHATS = {end: what for what, end in _ENDS.items()}
_WHATS |= {
    name: name
    for name in (
        *("alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm"),
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    )
}


def names(spec: ModelSpec) -> dict[str, Layer]:
    """{"lora_unet_down_blocks_0_attentions_0_proj_in": its layer}, of all layers of the U-Net and the text encoders."""
    return {spellings[0]: layer for spellings, layer in _layers(spec)}


def read_names(spec: ModelSpec) -> dict[str, Layer]:
    """`names`, and those that are only read."""
    return {spelling: layer for spellings, layer in _layers(spec) for spelling in spellings}


def _layers(spec: ModelSpec) -> Iterator[tuple[list[str], Layer]]:
    """Each layer and its names, the one that is written first."""
    kind = keys_compvis.kind_of(spec)
    compvis = keys_compvis.names("unet", spec.unet, kind)
    for theirs, layer in keys_peft.names(spec).items():
        module = theirs.removeprefix(f"{layer.part}.")
        flat = module.replace(".", "_")
        if layer.part == "unet":
            single = compvis.get(f"{module}.weight", "").removesuffix(".weight").replace(".", "_")
            spellings = [f"lora_unet_{flat}", f"lycoris_{flat}", *([f"lora_unet_{single}"] if single else [])]
            if single and kind.startswith("sdxl"):
                spellings.reverse()
        elif kind.startswith("sdxl"):
            spellings = [f"lora_te{1 if layer.part == 'text_encoder' else 2}_{flat}"]
        else:
            spellings = [f"lora_te_{flat}", f"lora_te1_{flat}"]
        yield spellings, layer


def split(name: str) -> tuple[str, str] | None:
    """A tensor's name -> (its module's, as `read_names` has it; what it is in an entry); None for another kind."""
    module, _, end = name.partition(".")
    return (module, _WHATS[end]) if end in _WHATS else None


def joined(module: str, what: str) -> str:
    """The inverse of `split`."""
    return f"{module}.{_ENDS.get(what, what)}"
