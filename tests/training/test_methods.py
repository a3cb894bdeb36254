"""What reaches the loss, what the loss is, its gradients, and which configs are refused."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sd_jax import sharding
from sd_jax.config import training_defaults
from sd_jax.diffusion import noise
from sd_jax.diffusion.training_noise import with_pyramid
from sd_jax.models.attention import Attention
from sd_jax.models.networks import Networks
from sd_jax.models.vae import Posterior
from sd_jax.training.context import PYRAMID, Context, EmptyPrompt
from sd_jax.training.methods import METHODS, method_of
from sd_jax.training.state import create
from sd_jax.training.step import train_step
from sd_jax.types import Conditioning, NoiseScheduleConfig
from tests.training import restated, tiny_xl
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


def context_of(spec, remat="none", **diffusion):
    config = training_defaults("full")
    config.batch_size = 8
    config.diffusion.update(diffusion)
    return Context(Networks.of(spec, remat=remat), config, EmptyPrompt(EMPTY))


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
        state = create({p: params[p] for p in trained}, {p: params[p] for p in frozen}, optimizer, (0.9,))
        return train_step(state, batch, loss=loss, optimizer=optimizer, ema_decays=(0.9,), seed=0)

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


# --- the loss is the papers' -----------------------------------------------------------------------------------------

STEP_KEY = jax.random.fold_in(jax.random.key(0), 3)


def loss_of(context, batch, **params):
    keys = noise.example_keys(jax.random.key(0), 3, jnp.asarray(batch["slot"]))
    params = {**restated.PARAMS, **params}
    return METHODS["full"].loss(context, params, jax.tree.map(jnp.asarray, batch), keys)[0]


@pytest.mark.parametrize(
    ("prediction_type", "diffusion"),
    [
        ("epsilon", {}),
        ("v_prediction", {"min_snr_gamma": 5.0, "caption_dropout": 0.5}),
        ("sample", {"timesteps": "logit_normal", "timestep_mean": 0.3, "timestep_scale": 0.8, "min_snr_gamma": 1.0}),
        ("flow", {"timesteps": "mode", "timestep_scale": 1.29, "min_snr_gamma": 5.0}),
        ("epsilon", {"noise_offset": 0.2, "input_perturbation": 0.1, "min_snr_gamma": 5.0}),
        ("v_prediction", {"noise_offset": 0.2, "input_perturbation": 0.1}),
    ],
)
def test_loss_is_the_formula(prediction_type, diffusion):
    context, batch = restated.context_of(NoiseScheduleConfig(prediction_type=prediction_type), **diffusion), None
    batch = restated.batch_of()
    error, weight, _ = restated.errors(STEP_KEY, batch, context)
    np.testing.assert_allclose(loss_of(context, batch), np.mean(error * weight), rtol=1e-6)


def test_loss_with_pyramid_noise():
    """A network that answers nothing to epsilon has the mean square of the noise as its loss."""
    context, batch = restated.context_of(pyramid_discount=0.4), restated.batch_of()
    context = context._replace(networks=context.networks._replace(unet=Silent()))
    keys = noise.example_keys(jax.random.key(0), 3, jnp.asarray(batch["slot"]))
    n = with_pyramid(noise.normal(keys, restated.NOISE, (6, 10, 4)), keys, PYRAMID, 0.4)
    np.testing.assert_allclose(loss_of(context, batch), np.mean(np.asarray(n, np.float64) ** 2), rtol=1e-6)


class Silent:
    def apply(self, variables, x, timesteps, told):
        return jnp.zeros_like(x)


def test_a_part_of_the_batch_draws_what_the_whole_does():
    """Devices and micro-batches see parts: the mean of their losses is the loss of all."""
    context = restated.context_of(noise_offset=0.1, input_perturbation=0.1, timesteps="cosmap", caption_dropout=0.5)
    batch = restated.batch_of()
    parts = [{name: value[i::2] for name, value in batch.items()} for i in range(2)]
    halves = [float(loss_of(context, part)) for part in parts]
    np.testing.assert_allclose(np.mean(halves), loss_of(context, batch), rtol=1e-6)
    assert halves[0] != halves[1]


# --- what a mask leaves out ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masked():
    """(context, a batch of which the left half counts: latents of 6x10, and masks of twice as many pixels)"""
    batch = restated.batch_of()
    batch["mask"] = np.zeros((8, 12, 20), np.uint8)
    batch["mask"][:, :, :10] = 255
    return restated.context_of(masked_loss=True), batch


def test_what_a_mask_leaves_out_has_no_weight(masked):
    context, batch = masked
    before = float(loss_of(context, batch))
    left, right = (batch["moments"].copy() for _ in range(2))
    left[:, :, :5] += 1.0
    right[:, :, 5:] += 1.0
    assert float(loss_of(context, {**batch, "moments": right})) == before
    assert abs(float(loss_of(context, {**batch, "moments": left})) - before) > 0.01


def test_masks_weigh_errors_by_the_share_that_they_leave(masked):
    context, batch = masked
    whole = {**batch, "mask": np.full_like(batch["mask"], 255)}
    plain = float(loss_of(restated.context_of(), restated.batch_of()))
    assert float(loss_of(context, whole)) == pytest.approx(plain, rel=1e-6)
    other = {**batch, "mask": 255 - batch["mask"]}
    assert float(loss_of(context, batch)) + float(loss_of(context, other)) == pytest.approx(plain, rel=1e-6)
    checked = np.zeros_like(batch["mask"])
    checked[:, ::2, ::2] = 255  # one pixel of four, which are one latent
    assert float(loss_of(context, {**batch, "mask": checked})) == pytest.approx(plain / 4, rel=1e-6)


# --- what hypernetworks drop -----------------------------------------------------------------------------------------


class OneAttention(nn.Module):
    """A "U-Net" of one attention, which reads the text."""

    @nn.compact
    def __call__(self, x, timesteps, told):
        return Attention(2, name="attn2")(x.reshape(len(x), -1, x.shape[-1]), told.context).reshape(x.shape)


def hypernetwork_losses(dropout, seed=0, rows=slice(None)):
    """(the loss, the held-out loss) with a hypernetwork on."""
    config = training_defaults("hypernetwork")
    config.batch_size, config.data.cache_text = 8, True
    config.hypernetwork.update(widths=(48,), weight_init="xavier_normal", dropout=dropout)
    context, unet = restated.context_of()._replace(config=config), OneAttention()
    context, method = context._replace(networks=context.networks._replace(unet=unet)), METHODS["hypernetwork"]
    batch = {name: jnp.asarray(value[rows]) for name, value in restated.batch_of().items()}
    told = Conditioning(batch["context"])
    params = {"unet": unet.init(jax.random.key(0), batch["moments"][..., :4], None, told)["params"]}
    params["adapter"] = method.adapting.init(config, context.networks, jax.random.key(1), params)
    keys = noise.example_keys(jax.random.key(seed), 3, batch["slot"])
    return float(method.loss(context, params, batch, keys)[0]), method.held_out(context, params, batch, keys)["loss"][0]


def test_hypernetworks_drop_in_training_alone():
    (plain, held), (dropped, held_with) = hypernetwork_losses(()), hypernetwork_losses((0, 0.5, 0))
    assert abs(dropped - plain) > 1e-5 and held == held_with
    # Another seed draws other noise, too, which is not all that differs
    assert abs((hypernetwork_losses((0, 0.5, 0), 1)[0] - hypernetwork_losses((), 1)[0]) - (dropped - plain)) > 1e-6
    halves = [hypernetwork_losses((0, 0.5, 0), rows=slice(i, None, 2))[0] for i in range(2)]
    assert np.mean(halves) == pytest.approx(dropped, rel=1e-6)  # devices and micro-batches see parts


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients_of(remat, parts):
    """The gradient of the reduced SDXL's U-Net, as `train_step` hands it to the optimiser; its text is cached."""
    context = context_of(tiny_xl.BASE, remat, min_snr_gamma=5.0, caption_dropout=0.2, noise_offset=0.1)
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
    )
    loss = functools.partial(METHODS["full"].loss, context)

    @sharding.jit
    def run(params, batch):
        state = create({"unet": params["unet"]}, {}, keep, (0.9,))
        state, metrics = train_step(
            state, batch, loss=loss, optimizer=keep, ema_decays=(0.9,), seed=0, grad_accumulation=parts
        )
        return state.opt_state, metrics["loss"]

    batch, kept = batch_of(tiny_xl.BASE), restated.batch_of()
    del batch["input_ids"]
    batch |= {name: jnp.asarray(kept[name]) for name in ("context", "pooled")}
    return run(random_params(tiny_xl.BASE), batch)


@pytest.fixture(scope="module")
def plain_gradients():
    return gradients_of("none", 1)


@pytest.mark.parametrize(("remat", "parts"), [("blocks", 1), ("none", 4)])
def test_gradients_are_the_plain_ones(plain_gradients, remat, parts):
    (want, loss), (got, other_loss) = plain_gradients, gradients_of(remat, parts)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    flat = lambda tree: np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])  # noqa: E731
    print(f"{np.linalg.norm(flat(got) - flat(want)) / np.linalg.norm(flat(want)):.1e}")
    assert np.linalg.norm(flat(got) - flat(want)) < 1e-6 * np.linalg.norm(flat(want))
    assert min(np.abs(np.asarray(leaf)).max() for leaf in jax.tree.leaves(want)) > 0


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("diffusion", "said"),
    [
        ({"timesteps": "gaussian"}, "config.diffusion.timesteps='gaussian' is unknown: use uniform"),
        ({"timesteps": "mode", "timestep_scale": 3.0}, "config.diffusion.timestep_scale=3"),
        ({"timestep_mean": 0.5}, "config.diffusion.timestep_mean=0.5 is not read by"),
        ({"noise_offset": -0.1}, "config.diffusion.noise_offset=-0.1: give a number from 0"),
        ({"pyramid_discount": 1.5}, "config.diffusion.pyramid_discount=1.5: give a number from 0 .none. to 1"),
        ({"input_perturbation": float("nan")}, "config.diffusion.input_perturbation=nan"),
        ({"min_snr_gamma": -5.0}, "config.diffusion.min_snr_gamma=-5.0"),
        ({"eval_bins": -1}, "config.diffusion.eval_bins=-1"),
        ({"eval_bins": 1001}, "config.diffusion.eval_bins=1001: give a number from 0 .none. to 1000"),
        ({"noise_offset": 0.1, "pyramid_discount": 0.3}, "noise_offset and config.diffusion.pyramid_discount"),
        ({"caption_dropout": 2.0}, "config.diffusion.caption_dropout=2"),
    ],
)
def test_what_cannot_be_is_named(diffusion, said):
    context = restated.context_of(**diffusion)
    with pytest.raises(ValueError, match=said):
        METHODS["full"].check(context.config, context.networks.spec)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
def test_zero_terminal_snr_is_not_for_epsilon(prediction_type):
    schedule = NoiseScheduleConfig(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    context = restated.context_of(schedule)
    check = functools.partial(METHODS["full"].check, context.config, context.networks.spec)
    if prediction_type == "epsilon":
        with pytest.raises(ValueError, match="rescale_betas_zero_snr needs prediction_type 'v_prediction'"):
            check()
        return
    check()
    assert np.isfinite(loss_of(context, {**restated.batch_of(), "slot": np.full(8, 7, np.int32)}))


def test_methods_say_which_there_are():
    config = training_defaults("full")
    assert method_of(config) is METHODS["full"]
    config.method = "lora2"
    with pytest.raises(ValueError, match="config.method='lora2' is unknown: use full, dreambooth, lora"):
        method_of(config)


# --- autoencoder -----------------------------------------------------------------------------------------------------


class Linear:
    """A "VAE" whose latents are the image's first channel, stretched and moved."""

    def apply(self, variables, image, method):
        return Posterior(variables["params"] * image[..., :1] + 3, jnp.zeros_like(image[..., :1]))

    def clone(self, config):
        return self


def test_scaling_factor_gives_unit_variance():
    """Over all held-out latents, however they lie in batches."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    pixels[4:] //= 4
    networks = Networks.of(tiny_xl.SD1)._replace(vae=Linear())
    batches = [{"pixels": pixels[:4]}, {"pixels": pixels[4:]}]
    context = Context(networks, training_defaults("autoencoder"), None)
    after = METHODS["autoencoder"].finish(context, {"vae": jnp.float32(0.7)}, batches)
    z = 0.7 * (pixels[..., 0].astype(np.float64) / 127.5 - 1) + 3
    np.testing.assert_allclose(after.spec.vae.scaling_factor, 1 / z.std(), rtol=2e-6)
    assert after.spec == dataclasses.replace(tiny_xl.SD1, vae=after.spec.vae)
    context.config.trainable = "vae/(decoder|post_quant_conv)/"
    assert METHODS["autoencoder"].finish(context, {"vae": jnp.float32(0.7)}, batches) is networks
