"""What reaches the loss: every text encoder, its pooled state, sizes and crops, dropped captions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sd_jax import sharding
from sd_jax.config import training_defaults
from sd_jax.diffusion import noise
from sd_jax.diffusion.losses import denoising_losses
from sd_jax.models.networks import Networks
from sd_jax.training import methods
from sd_jax.training.methods import METHODS, Context
from sd_jax.training.state import create
from sd_jax.training.step import train_step
from sd_jax.types import NoiseScheduleConfig
from tests.training import tiny_xl
from tests.training.tiny_xl import random_params

END = tiny_xl.BASE.text_encoder.eos_token_id
EMPTY = np.full(24, 5, np.int32)
EMPTY[1:] = END


def batch_of(spec, count=8):
    rng = np.random.default_rng(1)
    ids = rng.integers(10, 500, (count, 24)).astype(np.int32)
    ids[:, 12:] = END
    batch = {
        "moments": rng.standard_normal((count, 8, 8, 8)).astype(np.float32),
        "input_ids": ids,
        "slot": np.arange(count, dtype=np.int32),
    }
    if spec.num_time_ids:
        batch["time_ids"] = rng.integers(0, 64, (count, spec.num_time_ids)).astype(np.float32)
    return jax.tree.map(jnp.asarray, batch)


def context_of(spec, **diffusion):
    config = training_defaults("full")
    config.batch_size = 8
    config.diffusion.update(diffusion)
    return Context(Networks.of(spec), config, EMPTY)


def changed(tree, *path):
    """`tree` with one leaf, or all leaves of a branch, moved by noise."""
    rng = np.random.default_rng(2)
    if not path:
        return jax.tree.map(lambda x: x + jnp.asarray(rng.standard_normal(x.shape), x.dtype), tree)
    return {**tree, path[0]: changed(tree[path[0]], *path[1:])}


@pytest.fixture(scope="module")
def base():
    """(params, batch, (params, batch) -> the state after a jitted step and its metrics) of the reduced SDXL.

    Plain gradient descent: what a step takes off a parameter is its gradient.
    """
    context = context_of(tiny_xl.BASE, caption_dropout=0.2, min_snr_gamma=5.0)
    method, spec = METHODS["full"], context.networks.spec
    trained, frozen = method.trainable(context.config, spec), method.frozen(context.config, spec)
    assert trained == ("unet", "text_encoder", "text_encoder_2") and frozen == ("vae",)
    optimizer = optax.sgd(1.0)
    loss = functools.partial(method.loss, context)

    @sharding.jit
    def run(params, batch):
        state = create({p: params[p] for p in trained}, {p: params[p] for p in frozen}, optimizer)
        return train_step(state, batch, loss=loss, optimizer=optimizer, ema_decay=0.9, seed=0)

    return random_params(tiny_xl.BASE), batch_of(tiny_xl.BASE), run


def test_a_step_moves_every_part(base):
    params, batch, run = base
    after, metrics = run(params, batch)
    assert float(metrics["skipped"]) == 0
    moved = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()),
        after.params,
        {p: params[p] for p in after.params},
    )
    for branch in (
        moved["unet"]["add_embedding"],
        moved["unet"]["conv_in"],
        moved["text_encoder"]["text_model"]["embeddings"],
        moved["text_encoder"]["text_model"]["encoder"]["layers_0"]["mlp"],
        moved["text_encoder_2"]["text_model"]["encoder"]["layers_0"]["mlp"],
        moved["text_encoder_2"]["text_model"]["encoder"]["layers_1"]["mlp"],  # through the pooled state alone
        moved["text_encoder_2"]["text_projection"],
    ):
        assert min(jax.tree.leaves(branch)) > 0
    unread = moved["text_encoder"]["text_model"]["encoder"]["layers_1"]  # the context is the last state but one
    assert max(jax.tree.leaves(unread)) == 0


def test_all_that_is_told_reaches_the_loss(base):
    params, batch, run = base
    loss = lambda *arguments: float(run(*arguments)[1]["loss"])  # noqa: E731
    told = loss(params, batch)
    assert np.isfinite(told) and loss(params, dict(batch)) == told
    for number in range(6):
        other = batch["time_ids"].at[:, number].add(7)
        assert loss(params, {**batch, "time_ids": other}) != told
    pooled_alone = changed(params, "text_encoder_2", "text_projection")
    assert abs(loss(pooled_alone, batch) - told) > 1e-6
    for part in ("text_encoder", "text_encoder_2"):
        assert abs(loss(changed(params, part, "text_model", "embeddings"), batch) - told) > 1e-6


def test_text_encoders_may_be_frozen():
    context = context_of(tiny_xl.BASE, train_text_encoder=False)
    method = METHODS["full"]
    assert method.trainable(context.config, tiny_xl.BASE) == ("unet",)
    assert method.frozen(context.config, tiny_xl.BASE) == ("vae", "text_encoder", "text_encoder_2")
    assert method.frozen(context.config, tiny_xl.REFINER) == ("vae", "text_encoder_2")


def test_a_refiner_has_one_text_encoder_and_five_numbers():
    context, params, batch = context_of(tiny_xl.REFINER), random_params(tiny_xl.REFINER), batch_of(tiny_xl.REFINER)
    loss = lambda batch: METHODS["full"].loss(context, params, batch, noise.image_keys(0, 8))[0]  # noqa: E731
    assert set(params) == {"unet", "vae", "text_encoder_2"}
    assert jax.eval_shape(loss, batch).shape == ()
    with pytest.raises(ValueError, match="needs time_ids"):
        jax.eval_shape(loss, {name: value for name, value in batch.items() if name != "time_ids"})


@pytest.mark.parametrize("spec", [tiny_xl.BASE, tiny_xl.REFINER, tiny_xl.SD1], ids=["base", "refiner", "sd1"])
def test_dropped_captions_are_what_sampling_takes_for_no_words(spec):
    context, params, batch = context_of(spec, caption_dropout=0.5), random_params(spec), batch_of(spec)
    keys = noise.example_keys(jax.random.key(0), 0, batch["slot"])

    @sharding.jit
    def encode(params):
        encodings = [context.networks.encode_text(params, ids) for ids in (batch["input_ids"], EMPTY[None])]
        return methods.conditioning(context, params, batch, keys), *encodings

    told, whole, empty = encode(params)
    dropped = np.asarray(noise.uniform(keys, methods.DROPOUT)) < 0.5
    assert 0 < dropped.sum() < 8
    for name in ("context", "pooled"):
        got, kept, nothing = (np.asarray(getattr(c, name)) for c in (told, whole, empty))
        np.testing.assert_allclose(got[~dropped], kept[~dropped], atol=1e-6)
        nothing = np.zeros_like(nothing) if spec.force_zeros_for_empty_prompt else nothing
        np.testing.assert_allclose(got[dropped], np.broadcast_to(nothing, got[dropped].shape), atol=1e-6)
    if spec.num_time_ids:
        np.testing.assert_array_equal(told.time_ids, batch["time_ids"])
    else:
        assert told.time_ids is None


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("name", ["v_prediction", "epsilon", "sample"])
def test_losses_are_finite_down_to_zero_snr(name, gamma):
    cfg = NoiseScheduleConfig(prediction_type=name, rescale_betas_zero_snr=True)
    x0, n = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 4, 2)), jnp.float32)
    timesteps = jnp.asarray([0, 998, 999])

    def loss(scale):
        predict = lambda x, *_: scale * x  # noqa: E731
        error, weight = denoising_losses(predict, x0, n, timesteps, None, cfg, gamma)
        return jnp.mean(error * weight), (error, weight)

    (value, (error, weight)), slope = jax.value_and_grad(loss, has_aux=True)(jnp.float32(0.5))
    assert all(np.isfinite(x).all() for x in (value, error, weight, slope))
    if name == "v_prediction":  # at pure noise the network sees n and should answer -x0
        np.testing.assert_allclose(error[2], np.mean((0.5 * n[2] + x0[2]) ** 2), rtol=2e-3)
