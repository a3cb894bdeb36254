"""transformers' CLIPModel <-> our names: published sizes, what our modules initialise, what is refused."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import traverse_util

from sd_jax.checkpoints import CheckpointError, keys_clip
from sd_jax.checkpoints.tensors import lazy
from sd_jax.models.clip import CLIP
from sd_jax.models.families import CLIPS
from sd_jax.models.presets import TINY_CLIP
from tests.checkpoints.tiny_clip import random_tensors

# Parameters as OpenAI's and LAION's models have them (open_clip docs/model_profile.csv, in millions there)
PARAMETERS = {
    "clip_vit_b_32": 151_277_313,
    "clip_vit_b_16": 149_620_737,
    "clip_vit_l_14": 427_616_513,
    "clip_vit_l_14_336": 427_944_193,
    "clip_vit_h_14": 986_109_441,
    "clip_vit_g_14": 1_366_678_273,
    "clip_vit_bigg_14": 2_539_567_105,
}
# As they stand in openai/clip-vit-base-patch32's model.safetensors
KNOWN = {
    "vision_model.embeddings.class_embedding": (768,),
    "vision_model.embeddings.patch_embedding.weight": (768, 3, 32, 32),
    "vision_model.embeddings.position_embedding.weight": (50, 768),
    "vision_model.pre_layrnorm.weight": (768,),
    "vision_model.post_layernorm.bias": (768,),
    "vision_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
    "visual_projection.weight": (512, 768),
    "text_projection.weight": (512, 512),
    "text_model.encoder.layers.0.self_attn.k_proj.weight": (512, 512),
    "logit_scale": (),
}


def test_published_sizes():
    assert CLIPS.keys() == PARAMETERS.keys()
    for name, config in CLIPS.items():
        assert sum(map(math.prod, keys_clip.shapes(config).values())) == PARAMETERS[name], name
    assert KNOWN.items() <= keys_clip.shapes(CLIPS["clip_vit_b_32"]).items()
    heads = {name: config.vision_config.hidden_size // config.vision_config.num_attention_heads
             for name, config in CLIPS.items()}  # fmt: skip
    assert list(heads.values()) == [64, 64, 64, 64, 80, 88, 104]


def test_modules_initialise_what_is_listed():
    params = jax.eval_shape(CLIP.of(TINY_CLIP).init, jax.random.key(0))
    ours = {name: leaf.shape for name, leaf in traverse_util.flatten_dict(params, sep="/").items()}
    found = keys_clip.from_transformers(random_tensors(), TINY_CLIP, "test")
    assert {name: tensor.shape for name, tensor in found.items()} == ours


def test_round_trip_and_layouts():
    tensors = random_tensors()
    ours = keys_clip.from_transformers(tensors, TINY_CLIP, "test")
    kernel = tensors["vision_model.embeddings.patch_embedding.weight"].read()
    np.testing.assert_array_equal(
        ours["vision_model/embeddings/patch_embedding/kernel"].read(), kernel.transpose(2, 3, 1, 0), strict=True
    )
    np.testing.assert_array_equal(
        ours["visual_projection/kernel"].read(), tensors["visual_projection.weight"].read().T, strict=True
    )
    back = keys_clip.to_transformers(ours, TINY_CLIP, "test")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name].read(), tensor.read(), strict=True)


def test_what_is_read_besides():
    """Buffers of old files, and a scale of one dimension."""
    tensors = random_tensors()
    scale = tensors["logit_scale"].read()
    tensors["logit_scale"] = lazy(scale[None])
    tensors["vision_model.embeddings.position_ids"] = lazy(np.arange(17)[None])
    tensors["text_model.embeddings.position_ids"] = lazy(np.arange(77)[None])
    ours = keys_clip.from_transformers(tensors, TINY_CLIP, "test")
    np.testing.assert_array_equal(ours["logit_scale"].read(), scale, strict=True)
    assert not any("position_ids" in name for name in ours)


def test_faults_are_named():
    tensors = random_tensors()
    del tensors["vision_model.pre_layrnorm.bias"]
    tensors["vision_model.head.weight"] = lazy(np.zeros(3, np.float32))
    with pytest.raises(
        CheckpointError,
        match=r"^a: not the CLIP of its config: vision_model\.pre_layrnorm\.bias is missing; "
        r"vision_model\.head\.weight is unexpected$",
    ):
        keys_clip.from_transformers(tensors, TINY_CLIP, "a")
    wider = dataclasses.replace(TINY_CLIP, projection_dim=25)
    with pytest.raises(CheckpointError, match=r"text_projection\.weight is \(24, 32\), not \(25, 32\); visual_proj"):
        keys_clip.from_transformers(random_tensors(), wider, "a")
