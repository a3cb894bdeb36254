import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.models.presets import KUNetConfig, ModelSpec
from sd_jax.models.unet_k import KUNet, double, halve
from sd_jax.types import Conditioning
from tests.checkpoints.tiny import X2_UPSCALER

CONFIG = KUNetConfig(
    block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=16, cross_attention_dim=24, mapping_cond_dim=32
)


def answer_shape(height=4, width=6, channels=8, pooled=24):
    told = None if pooled is None else jnp.zeros((2, pooled))
    inputs = jnp.zeros((2, height, width, channels)), jnp.zeros(2), Conditioning(jnp.zeros((2, 5, 24)), told)
    return jax.eval_shape(lambda key: KUNet(CONFIG).init_with_output(key, *inputs)[0], jax.random.key(0)).shape


def test_the_last_channel_is_left_out():
    assert answer_shape() == (2, 4, 6, 4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"channels": 4}, "latents have 4 channels, this U-Net takes 8"),
        ({"height": 5}, "latents of 6x5: this U-Net takes sides that are multiples of 2"),
        ({"pooled": None}, "this U-Net needs pooled in its conditioning [(]unet.mapping_cond_dim[)]"),
    ],
)
def test_what_does_not_fit_is_named(given, said):
    with pytest.raises(ValueError, match=said):
        answer_shape(**given)


def test_sizes_are_halved_and_doubled_by_one_filter():
    """Of what rises evenly both give the values at the new places; borders mirror it."""
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32)[None, None, :, None], (1, 4, 8, 1))
    for x, axis in ((ramp, 2), (ramp.transpose(0, 2, 1, 3), 1)):
        along = lambda y, axis=axis: np.asarray(y).transpose(0, 3 - axis, axis, 3)[0, 0, :, 0]  # noqa: E731
        np.testing.assert_allclose(along(jax.jit(halve)(x)), [0.75, 2.5, 4.5, 6.25], rtol=1e-6)
        twice = along(jax.jit(double)(x))
        np.testing.assert_allclose(twice, [0.25, *np.arange(0.25, 7, 0.5), 6.75], rtol=1e-6)


def test_spec_survives_json_and_knows_what_it_reads():
    assert ModelSpec.from_dict(X2_UPSCALER.to_dict()) == X2_UPSCALER
    assert X2_UPSCALER.reads_pooled and not dataclasses.replace(ModelSpec()).reads_pooled
