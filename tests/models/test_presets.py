import functools

import jax
import pytest

from sd_jax.models.families import FAMILIES
from sd_jax.models.networks import Networks
from sd_jax.models.presets import SHAPES_64, ModelSpec, shrink


@pytest.mark.parametrize("name", ["sd15_inpainting", "sd2_v", "sd_x4_upscaler", "sdxl_refiner"])
def test_shrunk_family_is_small_and_of_its_kind(name):
    whole = FAMILIES[name]
    small = shrink(whole)
    networks = Networks.of(small)
    shapes = jax.eval_shape(functools.partial(networks.init, "unet"), jax.random.key(0))
    assert 2e4 < sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 6e5
    assert small.parts == whole.parts and small.num_time_ids == whole.num_time_ids
    assert small.noise_schedule == whole.noise_schedule
    assert small.force_zeros_for_empty_prompt == whole.force_zeros_for_empty_prompt
    for field in ("use_linear_projection", "addition_embed_type", "num_class_embeds", "time_cond_proj_dim"):
        assert getattr(small.unet, field) == getattr(whole.unet, field)
    extra = whole.unet.in_channels - whole.vae.latent_channels  # of masks, depth, small pictures
    assert small.unet.in_channels - small.vae.latent_channels == extra
    assert ModelSpec.from_dict(small.to_dict()) == small


def test_shrunk_sdxl_keeps_its_levels_and_its_two_encoders():
    small = shrink(FAMILIES["sdxl"])
    assert small.unet.attention_blocks == (False, True) and small.unet.transformer_layers_per_block == (1, 2)
    for part, config in small.text_encoders.items():
        whole = getattr(FAMILIES["sdxl"], part)
        assert (config.clip_skip, config.context_norm, config.hidden_act) == (2, False, whole.hidden_act)
    assert small.unet.cross_attention_dim == small.text_encoder.hidden_size + small.text_encoder_2.hidden_size
    assert small.text_encoder_2.projection_dim is not None and small.text_encoder.projection_dim is None


def test_shrunk_sd15_reads_the_bundled_models_frozen_parts():
    small = shrink(FAMILIES["sd15"])
    assert (small.vae, small.text_encoder) == (SHAPES_64.vae, SHAPES_64.text_encoder)
    assert small.unet.attention_blocks == (True, False) and small.unet.num_attention_heads == 2
