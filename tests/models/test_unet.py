import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.models.families import SD15
from sd_jax.models.presets import TINY, UNetConfig
from sd_jax.models.remat import POLICIES
from sd_jax.models.unet import UNet
from sd_jax.types import Conditioning, Control

CONFIG = TINY.unet


def example(config=CONFIG, batch=2, height=8, width=16, words=5):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    timesteps = jnp.asarray(np.linspace(20.5, 980.0, batch), jnp.float32)
    conditioning = Conditioning(draw(batch, words, config.cross_attention_dim))
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = jnp.asarray(rng.integers(0, 1024, (batch, 6)), jnp.float32)
        conditioning = conditioning.replace(pooled=draw(batch, pooled), time_ids=sizes)
    if config.num_class_embeds is not None:
        conditioning = conditioning.replace(class_labels=jnp.arange(batch, dtype=jnp.int32))
    if config.time_cond_proj_dim is not None:
        conditioning = conditioning.replace(guidance_scale=jnp.asarray(np.linspace(1.0, 8.5, batch), jnp.float32))
    return draw(batch, height, width, config.in_channels), timesteps, conditioning


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

    plain = value_and_gradient("none")
    for remat in set(POLICIES) - {"none"}:
        assert_trees_close(value_and_gradient(remat), plain)


def test_timestep_and_context_matter_and_the_batch_does_not_mix(params):
    latents, timesteps, conditioning = example()
    both = run(params, (latents, timesteps, conditioning))
    other = run(params, (latents.at[1].add(1.0), timesteps, conditioning))
    np.testing.assert_array_equal(both[0], other[0])
    assert np.abs(run(params, (latents, timesteps + 0.5, conditioning)) - both).max() > 1e-4
    assert np.abs(run(params, (latents, timesteps, Conditioning(conditioning.context + 1.0))) - both).max() > 1e-3


@pytest.mark.parametrize(
    "levels",
    [
        {"attention_blocks": (True, True)},
        {"attention_blocks": (False, True)},
        {"attention_blocks": (False, False)},
        {"attention_blocks": (True, True), "only_cross_attention": (True, False)},
    ],
    ids=["attention_first", "attention_second", "attention_in_the_middle", "no_attention_to_itself"],
)
def test_several_contexts_for_each_picture_are_as_the_picture_several_times(levels, initialise):
    config = dataclasses.replace(CONFIG, block_out_channels=(16, 16), **levels)
    latents, timesteps, conditioning = example(config, batch=4)
    params = initialise(UNet(config), latents, timesteps, conditioning)
    rng = np.random.default_rng(1)
    large, small = (
        lambda h=h, w=w: jnp.asarray(rng.normal(size=(4, h, w, 16)), jnp.float32) for h, w in [(8, 16), (4, 8)]
    )
    first = large() if levels["attention_blocks"][0] else small()
    control = Control((large(), large(), small(), small()), small(), (first, small(), small()))
    apply = jax.jit(UNet(config).apply)
    twice = (jnp.concatenate([x[:2], x[:2]]) for x in (latents, timesteps))
    expected = apply({"params": params}, *twice, conditioning, control)
    found = apply({"params": params}, latents[:2], timesteps[:2], conditioning, control)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(found[:2] - found[2:]).max() > 1e-3


def test_wrong_latents_are_named():
    with pytest.raises(ValueError, match="latents have 3 channels, this U-Net takes 4"):
        UNet(CONFIG).init(jax.random.key(0), jnp.zeros((2, 8, 8, 3)), *example()[1:])


# A small one of each line: what is different in it, and a level that attends as well as one that does not
SD2 = dataclasses.replace(CONFIG, num_attention_heads=(1, 4), attention_blocks=(True, True), use_linear_projection=True)
X4 = dataclasses.replace(
    CONFIG,
    in_channels=7,
    block_out_channels=(32, 32, 64),
    attention_blocks=(False, True, True),
    only_cross_attention=(True, True, False),
    use_linear_projection=True,
    num_class_embeds=20,
)
SDXL = dataclasses.replace(
    CONFIG,
    block_out_channels=(32, 32, 64),
    attention_blocks=(False, True, True),
    num_attention_heads=(1, 2, 4),
    transformer_layers_per_block=(1, 2, 3),
    use_linear_projection=True,
    time_cond_proj_dim=16,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24 + 6 * 8,
)
REFINER = dataclasses.replace(
    SDXL,
    block_out_channels=(32, 64, 64),
    attention_blocks=(False, True, False),
    transformer_layers_per_block=2,
    time_cond_proj_dim=None,
)


def shape_of(config, inputs):
    return jax.eval_shape(lambda key: UNet(config).init_with_output(key, *inputs)[0], jax.random.key(0)).shape


@pytest.mark.parametrize(
    ("config", "field", "setting"),
    [
        (SDXL, "pooled", "unet.addition_embed_type=text_time"),
        (SDXL, "time_ids", "unet.addition_embed_type=text_time"),
        (SDXL, "guidance_scale", "unet.time_cond_proj_dim"),
        (X4, "class_labels", "unet.num_class_embeds"),
    ],
)
def test_what_the_family_needs_and_is_not_told_is_named(config, field, setting):
    latents, timesteps, conditioning = example(config)
    assert shape_of(config, (latents, timesteps, conditioning)) == (2, 8, 16, 4)
    with pytest.raises(ValueError, match=f"this U-Net needs {field} in its conditioning [(]{setting}[)]"):
        shape_of(config, (latents, timesteps, conditioning.replace(**{field: None})))


def test_what_the_family_does_not_read_does_not_matter(params):
    """So that a batch of prompts may carry everything that some model of it reads."""
    latents, timesteps, conditioning = example()
    more = conditioning.replace(pooled=jnp.ones((2, 3)), class_labels=jnp.ones(2, jnp.int32))
    plain = run(params, (latents, timesteps, conditioning))
    np.testing.assert_array_equal(run(params, (latents, timesteps, more)), plain)


# Parity with diffusers


SAME_NAME = (
    "cross_attention_dim",
    "norm_num_groups",
    "transformer_layers_per_block",
    "only_cross_attention",
    "use_linear_projection",
    "num_class_embeds",
    "time_cond_proj_dim",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)


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
        **{field: getattr(config, field) for field in SAME_NAME},
    )
    return model.eval()


def told(conditioning, config):
    """Keyword arguments of diffusers' model."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    given = {name: torch.tensor(np.asarray(value)) for name, value in vars(conditioning).items() if value is not None}
    keywords = {"encoder_hidden_states": given["context"], "class_labels": given.get("class_labels")}
    if config.addition_embed_type == "text_time":
        keywords["added_cond_kwargs"] = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
    if config.time_cond_proj_dim is not None:
        embed = StableDiffusionXLPipeline.get_guidance_scale_embedding
        keywords["timestep_cond"] = embed(None, given["guidance_scale"] - 1, config.time_cond_proj_dim)
    return keywords


def parity_error(config, inputs, from_torch, relative_error):
    import torch

    model = reference(config)
    latents, timesteps, conditioning = inputs
    with torch.no_grad():
        as_torch = [torch.tensor(np.asarray(x)) for x in (latents.transpose(0, 3, 1, 2), timesteps)]
        expected = model(*as_torch, **told(conditioning, config)).sample.permute(0, 2, 3, 1).numpy()
    ours = jax.jit(UNet(config).apply)({"params": from_torch("unet", model, config)}, *inputs)
    return relative_error(ours, expected)


DEEP = dataclasses.replace(
    CONFIG, block_out_channels=(16, 32, 32, 48), attention_blocks=(True, True, True, False), layers_per_block=2
)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("config", "size"),
    [(CONFIG, (8, 16)), (DEEP, (24, 8)), (CONFIG, (9, 13)), (DEEP, (9, 13))],
)
def test_equals_diffusers(config, size, from_torch, relative_error):
    assert parity_error(config, example(config, 2, *size), from_torch, relative_error) < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize("config", [SD2, X4, SDXL, REFINER], ids=["sd2", "x4", "sdxl", "refiner"])
def test_every_family_equals_diffusers(config, from_torch, relative_error):
    assert parity_error(config, example(config, 2, 8, 8), from_torch, relative_error) < 1e-5


@pytest.mark.parity
@pytest.mark.slow
def test_equals_diffusers_at_full_size(from_torch, relative_error):
    config = SD15.unet
    assert parity_error(config, example(config, 1, 32, 48, words=77), from_torch, relative_error) < 1e-5
