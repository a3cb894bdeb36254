"""The upscaler's training: its loss, how the discriminator joins, what is refused, and whole runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sd_jax
from configs import upscaler as upscaler_config
from sd_jax import media
from sd_jax.checkpoints import files, read_safetensors
from sd_jax.config import training_defaults
from sd_jax.diffusion import noise
from sd_jax.models.networks import Networks
from sd_jax.models.presets import DiscriminatorConfig, ModelSpec, RRDBConfig, SRVGGConfig
from sd_jax.models.vae import to_image
from sd_jax.training.context import Context
from sd_jax.training.esrgan import ESRGAN
from sd_jax.training.loop import train
from sd_jax.training.metrics import read_rows
from tests.checkpoints import tiny_upscalers

SPEC = ModelSpec(upscaler=SRVGGConfig(2, 4, 1), discriminator=DiscriminatorConfig(width=4, layers=2))
LAST = "body_4"
BATCH = {
    "pixels": jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3)), jnp.uint8),
    "slot": jnp.arange(2, dtype=jnp.int32),
}
KEYS = noise.example_keys(jax.random.key(0), jnp.zeros((), jnp.int32), BATCH["slot"])


def context_of(**changes) -> Context:
    config = training_defaults("esrgan")
    config.esrgan.update(changes)
    return Context(Networks.of(SPEC), config, None)


@pytest.fixture(scope="module")
def params():
    rng, networks = np.random.default_rng(1), Networks.of(SPEC)
    init = lambda key: {part: networks.init(part, key) for part in ("upscaler", "discriminator")}  # noqa: E731
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)


def test_loss_is_of_what_is_made_of_means_of_squares(params):
    context, image = context_of(l2_weight=0.5), np.asarray(to_image(BATCH["pixels"]))
    small = image.reshape(2, 8, 2, 12, 2, 3).mean((2, 4))
    made = np.asarray(context.networks.upscaler.apply({"params": params["upscaler"]}, jnp.asarray(small)))
    expected = np.abs(made - image).mean() + 0.5 * np.square(made - image).mean()
    loss, measured = ESRGAN.loss(context, params, BATCH, KEYS)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert measured.keys() == {"l1", "l2"}
    sums = ESRGAN.held_out(context, params, BATCH, KEYS)
    psnr = 10 * np.log10(4 / np.square(np.clip(made, -1, 1) - image).mean((1, 2, 3)))
    np.testing.assert_allclose(sums["loss"][0] / 2, expected, rtol=1e-5)
    np.testing.assert_allclose(sums["psnr"][0], psnr.sum(), rtol=1e-5)


def test_the_discriminator_joins_at_its_start_and_pulls_as_the_likeness_does(params):
    """At the last kernel its pull is `discriminator_weight` times as long as that of all else (Eq. 2)."""
    context = context_of(discriminator_weight=0.5, discriminator_start=10)
    of = jax.jit(jax.grad(lambda p, step: ESRGAN.loss(context, p, {**BATCH, "step": step}, KEYS)[0]))
    before, after = (of(params, jnp.int32(step)) for step in (9, 10))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(before["discriminator"]))
    assert np.any(after["discriminator"]["main_0"]["kernel"])
    rec, both = (grads["upscaler"][LAST]["kernel"] for grads in (before, after))
    np.testing.assert_allclose(np.linalg.norm(both - rec), 0.5 * np.linalg.norm(rec), rtol=1e-2)


def test_what_is_called_last_makes_the_picture():
    for config in (RRDBConfig(2, features=4, blocks=1, growth=2), SRVGGConfig(2, 4, 3)):
        networks = Networks.of(ModelSpec(upscaler=config))
        tree = jax.eval_shape(lambda key, of=networks: of.init("upscaler", key), jax.random.key(0))
        assert tree[networks.upscaler.last]["kernel"].shape[-1] == (3 if isinstance(config, RRDBConfig) else 12)


@pytest.mark.parametrize(
    ("upscaler", "changes", "said"),
    [
        (None, {}, "config.model.upscaler, or config.init_upscaler"),
        (RRDBConfig(1, 4), {}, "config.model.upscaler.scale=1: .* give 2 or more"),
        (RRDBConfig(2, 2), {"data.resolution": 30}, "config.data.resolution=30: .* multiples of 4 pixels"),
        (SRVGGConfig(3), {"data.resolution": 33, "data.buckets.step": 8}, "config.data.buckets.step=8: .* of 3 pixels"),
        (SRVGGConfig(2), {"esrgan.l1_weight": -1.0}, "config.esrgan.l1_weight=-1.0: give 0"),
        (SRVGGConfig(2), {"esrgan.perceptual_weight": 1.0}, "config.esrgan.perceptual_weight=1.0 needs a network"),
        (SRVGGConfig(2), {"esrgan.discriminator_weight": 1.0}, "needs config.model.discriminator"),
    ],
)
def test_refused(upscaler, changes, said):
    config = training_defaults("esrgan")
    ESRGAN.check(config, SPEC)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=said) as refused:
        ESRGAN.check(config, dataclasses.replace(SPEC, upscaler=upscaler, discriminator=None))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("network", "made"),
    [
        ("compact", SRVGGConfig(2, 8, 1)),
        pytest.param("rrdb", RRDBConfig(2, features=8, blocks=1, growth=4), marks=pytest.mark.slow),
    ],
)
def test_a_run_leaves_an_upscaler_that_other_programs_read(tmp_path, network, made):
    config = upscaler_config.get_config(f"{network},runlocal")
    config.esrgan.discriminator_start = 1
    train(config, tmp_path / "run")
    before, after = read_rows(tmp_path / "run")
    assert before["discriminator_weight"] == 0 < after["discriminator_weight"] and np.isfinite(after["loss"])
    assert after["held_out_psnr"] > 0
    sheet = media.decode_image(tmp_path / "run" / "samples" / "0000002.png")
    assert sheet.shape[0] > 3 * 32  # small, made and true
    upscaler = sd_jax.load_upscaler(tmp_path / "run")
    upscaler.save(tmp_path / "upscaler.safetensors")
    again = sd_jax.load_upscaler(tmp_path / "upscaler.safetensors")
    small = np.asarray(BATCH["pixels"])
    assert upscaler.scale == again.scale == 2 and upscaler.config == again.config == made
    np.testing.assert_array_equal(upscaler(small), again(small))


def test_a_run_goes_on_from_a_file(tmp_path):
    """Without steps to speak of, what comes out is the file, to the bit."""
    theirs = tiny_upscalers.compact(SRVGGConfig(4, 6, 1))
    read_safetensors.write(tmp_path / "a.safetensors", theirs)
    config = upscaler_config.get_config("compact,adversarial=False,runlocal")
    config.init_upscaler, config.optimizer.learning_rate = str(tmp_path / "a.safetensors"), 0.0
    config.sample_steps = config.eval_steps = 0
    train(config, tmp_path / "run")
    sd_jax.load_upscaler(tmp_path / "run").save(tmp_path / "b.pth")
    found = files.read(tmp_path / "b.pth")
    assert found.keys() == {f"params.{name}" for name in theirs}
    for name, array in theirs.items():
        np.testing.assert_array_equal(found[f"params.{name}"], array)
