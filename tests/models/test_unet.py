import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.models.presets import SD15, TINY, UNetConfig
from sd_jax.models.unet import UNet

CONFIG = TINY.unet


def example(config=CONFIG, batch=2, height=8, width=16, words=5):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    timesteps = jnp.asarray(np.linspace(20.5, 980.0, batch), jnp.float32)
    return draw(batch, height, width, config.in_channels), timesteps, draw(batch, words, config.cross_attention_dim)


@pytest.fixture(scope="module")
def params(initialise):
    return initialise(UNet(CONFIG), *example())


def run(params, inputs, **types):
    return jax.jit(UNet(CONFIG, **types).apply)({"params": params}, *inputs)


def test_shape_follows_the_latents(params):
    for height, width in [(8, 8), (8, 16), (2, 6), (9, 13), (1, 3)]:
        out = jax.eval_shape(UNet(CONFIG).apply, {"params": params}, *example(height=height, width=width))
        assert out.shape == (2, height, width, 4)


def test_sd15_has_its_860_million_parameters():
    shapes = jax.eval_shape(UNet(SD15.unet).init, jax.random.key(0), *example(SD15.unet, 1, 8, 8))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 859_520_964


def test_dtypes_of_computation_and_parameters(params):
    full, half = run(params, example()), run(params, example(), dtype=jnp.bfloat16)
    assert full.dtype == jnp.float32 and half.dtype == jnp.bfloat16
    assert np.linalg.norm(half.astype(jnp.float32) - full) < 0.05 * np.linalg.norm(full)
    shapes = jax.eval_shape(UNet(CONFIG, param_dtype=jnp.bfloat16).init, jax.random.key(0), *example())
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}


def test_remat_changes_neither_output_nor_gradient(initialise, assert_trees_close):
    config = dataclasses.replace(CONFIG, block_out_channels=(16,), attention_blocks=(True,))
    inputs = example(config)
    params = initialise(UNet(config), *inputs)

    def value_and_gradient(remat):
        loss = lambda p: jnp.square(UNet(config, remat=remat).apply({"params": p}, *inputs)).mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    assert_trees_close(value_and_gradient(True), value_and_gradient(False))


def test_timestep_and_context_matter_and_the_batch_does_not_mix(params):
    latents, timesteps, context = example()
    both = run(params, (latents, timesteps, context))
    other = run(params, (latents.at[1].add(1.0), timesteps, context))
    np.testing.assert_array_equal(both[0], other[0])
    assert np.abs(run(params, (latents, timesteps + 0.5, context)) - both).max() > 1e-4
    assert np.abs(run(params, (latents, timesteps, context + 1.0)) - both).max() > 1e-3


def test_wrong_latents_are_named():
    with pytest.raises(ValueError, match="latents have 3 channels, this U-Net takes 4"):
        UNet(CONFIG).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), jnp.zeros((1, 5, 32)))


# Parity with diffusers


def reference(config: UNetConfig):
    """diffusers' model of this config, with random weights."""
    import torch
    from diffusers import UNet2DConditionModel

    names = {True: ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), False: ("DownBlock2D", "UpBlock2D")}
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.block_out_channels,
        down_block_types=tuple(names[attend][0] for attend in config.attention_blocks),
        up_block_types=tuple(names[attend][1] for attend in reversed(config.attention_blocks)),
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.num_attention_heads,
        cross_attention_dim=config.cross_attention_dim,
        norm_num_groups=config.norm_num_groups,
    )
    return model.eval()


def parity_error(config, inputs, from_torch, relative_error):
    import torch

    model = reference(config)
    latents, timesteps, context = inputs
    with torch.no_grad():
        as_torch = [torch.tensor(np.asarray(x)) for x in (latents.transpose(0, 3, 1, 2), timesteps, context)]
        expected = model(*as_torch).sample.permute(0, 2, 3, 1).numpy()
    ours = jax.jit(UNet(config).apply)({"params": from_torch("unet", model, config)}, *inputs)
    return relative_error(ours, expected)


DEEP = dataclasses.replace(
    CONFIG, block_out_channels=(16, 32, 32, 48), attention_blocks=(True, True, True, False), layers_per_block=2
)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("config", "size"),
    [(CONFIG, (8, 8)), (CONFIG, (8, 16)), (DEEP, (24, 8)), (CONFIG, (9, 13)), (DEEP, (9, 13))],
)
def test_equals_diffusers(config, size, from_torch, relative_error):
    assert parity_error(config, example(config, 2, *size), from_torch, relative_error) < 1e-5


@pytest.mark.parity
@pytest.mark.slow
def test_equals_diffusers_at_full_size(from_torch, relative_error):
    config = SD15.unet
    assert parity_error(config, example(config, 1, 32, 48, words=77), from_torch, relative_error) < 1e-5
