"""A small random model for the tests of this room: trees, single files and shapes, made without torch."""

import dataclasses
import math

import numpy as np
from flax import traverse_util

from sd_jax.checkpoints import keys_compvis, keys_diffusers, layout
from sd_jax.checkpoints.tensors import Tensor, lazy
from sd_jax.models.presets import TINY, KUNetConfig
from sd_jax.types import NoiseScheduleConfig

VOCABULARY = 517  # of `tiny_tokenizer`
SPEC = dataclasses.replace(
    TINY,
    text_encoder=dataclasses.replace(
        TINY.text_encoder, vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1, pad_token_id=VOCABULARY - 1
    ),
)
_OPEN_CLIP = dataclasses.replace(SPEC.text_encoder, hidden_act="gelu", pad_token_id=0)
_SD2 = dataclasses.replace(
    SPEC,
    unet=dataclasses.replace(SPEC.unet, use_linear_projection=True, num_attention_heads=(1, 2)),
    text_encoder=_OPEN_CLIP,
)
_SDXL = dataclasses.replace(
    _SD2,
    unet=dataclasses.replace(
        _SD2.unet,
        attention_blocks=(False, True),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    ),
    text_encoder=dataclasses.replace(SPEC.text_encoder, clip_skip=2, context_norm=False),
    text_encoder_2=dataclasses.replace(_OPEN_CLIP, projection_dim=24, clip_skip=2, context_norm=False),
    force_zeros_for_empty_prompt=True,
)
_REFINER_UNET = {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 24 + 5 * 8}
SPECS = {  # one of each kind of single file, and what some have besides
    "sd1": SPEC,
    "sd1_lcm": dataclasses.replace(SPEC, unet=dataclasses.replace(SPEC.unet, time_cond_proj_dim=16)),
    "sd2": _SD2,
    "sd2_file": dataclasses.replace(  # as single files have it: a last layer that is not read, and a projection
        _SD2, text_encoder=dataclasses.replace(_OPEN_CLIP, num_hidden_layers=3, clip_skip=2, projection_dim=24)
    ),
    "sd2_upscaler": dataclasses.replace(
        _SD2,
        unet=dataclasses.replace(
            _SD2.unet,
            in_channels=7,
            attention_blocks=(False, True),
            only_cross_attention=(True, False),
            num_class_embeds=50,
        ),
    ),
    "sdxl": _SDXL,
    "sdxl_refiner": dataclasses.replace(
        _SDXL,
        unet=dataclasses.replace(_SDXL.unet, transformer_layers_per_block=2, **_REFINER_UNET),
        text_encoder=None,
        force_zeros_for_empty_prompt=False,
    ),
}


X2_UPSCALER = dataclasses.replace(  # which no single file holds
    SPEC,
    unet=KUNetConfig(
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=16,
        cross_attention_dim=32,
        mapping_cond_dim=40,
    ),
    text_encoder=dataclasses.replace(SPEC.text_encoder, context_norm=False),
    noise_schedule=NoiseScheduleConfig(prediction_type="edm"),
)


def kinds_and_parts() -> list:
    return [(name, part) for name, spec in SPECS.items() for part in spec.parts]


def shapes_only(shapes: dict) -> dict[str, Tensor]:
    """Tensors that cannot be read."""
    return {name: Tensor(shape, np.dtype(np.float32), _unreadable) for name, shape in shapes.items()}


def file_shapes(part: str, config, kind: str) -> dict[str, tuple[int, ...]]:
    """{name: torch shape}: what a single file holds of one network."""
    wanted = layout.LAYOUTS[part](config)
    placed = shapes_only({name: wanted[name] for name in keys_compvis.names(part, config, kind)})
    return {name: t.shape for name, t in keys_compvis.from_diffusers(part, placed, config, kind).items()}


def _unreadable():
    raise AssertionError("a tensor was read where its shape should do")


def random_tensors(shapes: dict, dtype=np.float32, seed: int = 0) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    return {
        name: lazy(rng.standard_normal(math.prod(shape), np.float32).reshape(shape).astype(dtype))
        for name, shape in shapes.items()
    }


def random_diffusers(part: str, spec=SPEC, seed: int = 0) -> dict[str, Tensor]:
    """One network by diffusers' names."""
    return random_tensors(layout.LAYOUTS[part](getattr(spec, part)), seed=seed)


def compvis_file(spec=SPEC, seed: int = 0, parts=None) -> dict[str, np.ndarray]:
    """What a single file holds, as arrays."""
    kind, file = keys_compvis.kind_of(spec), {}
    for part in parts or spec.parts:
        file |= keys_compvis.from_diffusers(part, random_diffusers(part, spec, seed), getattr(spec, part), kind)
    return {name: np.asarray(tensor) for name, tensor in file.items()}


def random_params(spec=SPEC, seed: int = 0, parts=None) -> dict:
    params = {}
    for part in parts or spec.parts:
        ours = keys_diffusers.from_diffusers(part, random_diffusers(part, spec, seed), getattr(spec, part), "random")
        params[part] = traverse_util.unflatten_dict({name: np.asarray(t) for name, t in ours.items()}, sep="/")
    return params


def assert_same(ours: dict, reference: dict) -> None:
    """The same names, types and bits."""
    ours, reference = (traverse_util.flatten_dict(tree, sep="/") for tree in (ours, reference))
    assert ours.keys() == reference.keys()
    for name in reference:
        a, b = np.asarray(ours[name]), np.asarray(reference[name])
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), name
