"""The job of upscalers: what their U-Net sees and is told, sizes, noise, compilations, refusals, and its door."""

import dataclasses
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax import media
from sd_jax.diffusion import noise
from sd_jax.models.presets import IdentityConfig, KUNetConfig
from sd_jax.sampling import canvas, denoising, upscale
from sd_jax.sampling.command import Order, carry_out
from sd_jax.sampling.pipeline import Pipeline
from sd_jax.sampling.recipe import read_record
from sd_jax.types import NoiseScheduleConfig, Recipe
from tests.sampling.conftest import random_params
from tests.sampling.test_conditioning import family

SMALL = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
FEW = {"steps": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def x4(tokenizer):
    return family(tokenizer, in_channels=7, num_class_embeds=60)


@pytest.fixture(scope="module")
def on_pixels(x4):
    unet = dataclasses.replace(x4.spec.unet, in_channels=6, out_channels=3)
    return Pipeline(dataclasses.replace(x4.spec, vae=IdentityConfig(16), unet=unet), x4.params, x4.tokenizer)


@pytest.fixture(scope="module")
def x2(x4):
    """Twice as large in latents, with its words and its autoencoder."""
    spec = dataclasses.replace(
        x4.spec,
        unet=KUNetConfig(
            block_out_channels=(32, 32),
            layers_per_block=1,
            attention_head_dim=16,
            cross_attention_dim=16,
            mapping_cond_dim=24,
        ),
        noise_schedule=NoiseScheduleConfig(prediction_type="edm"),
    )
    return Pipeline(spec, {**x4.params, "unet": random_params(spec)["unet"]}, x4.tokenizer)


@pytest.fixture
def standing(monkeypatch):
    """Jobs walk on the spot and no U-Net is compiled. The list holds what each walk was given."""
    walks = []

    def stand(params, run, carry, first, last, **static):
        walks.append(types.SimpleNamespace(told=run.told, concat=np.asarray(run.concat)))
        return carry

    monkeypatch.setattr(denoising, "_walk", stand)
    return walks


def shown(small, n, level):
    abar = np.cumprod(1 - np.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2)[level]
    return np.sqrt(abar) * (small / 127.5 - 1) + np.sqrt(1 - abar) * n


def of_seeds(*seeds):
    keys = jnp.concatenate([noise.image_keys(seed, 1) for seed in seeds])
    return noise.normal(keys, noise.SMALL_PICTURE, (8, 8, 3))


# --- What is seen ----------------------------------------------------------------------------------------------------


def test_every_half_sees_the_noised_picture_and_its_level(x4, standing):
    for fields, level in (({}, 20), ({"noise_level": 0}, 0), ({"noise_level": 59}, 59)):
        x4.upscale(SMALL[0], "a star AND a circle", seed=5, output="latents", **FEW, **fields)
        walk = standing.pop()
        assert walk.concat.shape == (1, 8, 8, 3)
        np.testing.assert_allclose(walk.concat, shown(SMALL[:1], of_seeds(5), level), atol=1e-5)
        assert (walk.told.positive.class_labels == level).all() and walk.told.positive.class_labels.shape == (2,)
        assert (walk.told.negative.class_labels == level).all() and walk.told.negative.class_labels.shape == (1,)
    x4.upscale(SMALL[0], "a star", image_noise=np.ones((1, 8, 8, 3)), noise_level=7, output="latents", **FEW)
    np.testing.assert_allclose(standing.pop().concat, shown(SMALL[:1], 1.0, 7), atol=1e-5)


def test_pictures_have_noise_of_their_own(x4, standing):
    given = {"seed": 5, "output": "latents", **FEW}
    x4.upscale(SMALL[0], "a star", batch_size=2, **given)
    x4.upscale(SMALL[:2], "a star", **given)
    x4.upscale(SMALL[:2], ["a star", "a circle"], **given)
    x4.upscale(SMALL[0], "a star", batch_size=2, variation_strength=0.5, **given)
    one, two, prompts, varied = (walk.concat for walk in standing)
    np.testing.assert_allclose(one, shown(SMALL[[0, 0]], of_seeds(5, 6), 20), atol=1e-5)
    np.testing.assert_allclose(two, shown(SMALL[:2], of_seeds(5, 6), 20), atol=1e-5)
    np.testing.assert_array_equal(prompts, two)
    np.testing.assert_array_equal(varied, one[[0, 0]])


@pytest.mark.parametrize(
    ("fields", "height", "width"), [({}, 32, 32), ({"width": 48}, 32, 48), ({"height": 64}, 64, 32)]
)
def test_size_is_that_of_the_small_picture_times_the_autoencoders(x4, standing, fields, height, width):
    made = x4.upscale(SMALL[0], "a star", output="latents", **FEW, **fields)
    assert made.shape == (1, height // 4, width // 4, 4)
    assert standing[0].concat.shape == (1, height // 4, width // 4, 3)


def test_on_pixels_the_small_picture_is_enlarged(on_pixels, standing):
    grey = np.full((8, 6, 3), 191, np.uint8)
    given = {"image_noise": np.zeros((1, 8, 6, 3)), "output": "latents", **FEW}
    made = on_pixels.upscale(grey, "a star", height=24, width=20, **given)
    assert made.shape == (1, 24, 20, 3) and standing[0].concat.shape == (1, 24, 20, 3)
    np.testing.assert_allclose(standing[0].concat, shown(191, 0.0, 20), atol=1e-5)
    with pytest.raises(ValueError, match="height= is needed: a model that works on pixels does not say how much"):
        on_pixels.upscale(grey, "a star", width=20, **given)


# --- What is made ----------------------------------------------------------------------------------------------------


def test_another_picture_prompt_or_level_matters_and_compiles_nothing(x4, caplog):
    fields = {"seed": 1, "output": "latents", **FEW}
    plain = x4.upscale(SMALL[0], "a star", **fields)
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        others = [
            x4.upscale(SMALL[0], "a star", noise_level=50, **fields),
            x4.upscale(SMALL[1], "a star", **fields),
            x4.upscale(SMALL[0], "a red circle", **fields),
        ]
        again = x4.upscale(SMALL[0], "a star", noise_level=20, **fields)
    assert not [r for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    np.testing.assert_array_equal(again, plain)
    for other in others:
        assert np.abs(other - plain).max() > 1e-3
    steps = []
    made = x4.make(Recipe("a star", seed=1, **FEW), SMALL[0], callback=lambda step, *_: steps.append(step))
    np.testing.assert_array_equal(made, x4.finish(plain))
    assert steps == [0, 1, 2] and x4.steps_of(Recipe("a star", **FEW), SMALL[0]) == 3


def test_its_door(x4, tmp_path):
    x4.save(tmp_path / "model")
    media.write_png(tmp_path / "small.png", SMALL[0], {})
    fields = {"prompt": "a star", "seed": 1, **FEW}
    order = {"loading": {"checkpoint": str(tmp_path / "model")}, "image": str(tmp_path / "small.png")}
    first, _ = carry_out(Order(fields, out=tmp_path / "out", **order))
    record = read_record(first)
    assert record.origin.job == "upscale" and record.recipe.noise_level == 20
    assert (record.recipe.width, record.recipe.height, record.recipe.strength) == (32, 32, None)
    again, _ = carry_out(Order(recipe=str(first), out=tmp_path / "again"))
    assert again.read_bytes() == first.read_bytes()


# --- What cannot be made ---------------------------------------------------------------------------------------------

REFUSED = [
    ({"noise_level": 60}, "noise_level=60: this model knows levels 0 to 59"),
    ({"noise_level": -1}, "noise_level=-1: this model knows"),
    ({"strength": 0.5}, "enlarger=, scale= and strength= are for method='redraw': leave them out"),
    ({"second_steps": 5}, "second_steps=5 is for hires_fix, not for upscale"),
    ({"image_noise": np.zeros((8, 8, 3))}, r"image_noise has the shape \(8, 8, 3\), small pictures \(1, 8, 8, 3\)"),
    ({"image": SMALL[:2], "batch_size": 3}, "image holds 2 pictures, the prompts ask for 3"),
    ({"image": SMALL, "batch_size": 2}, "image holds 4 pictures, the prompts ask for 2"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED)
def test_what_cannot_be_made_is_refused_in_one_line(x4, fields, words):
    with pytest.raises(ValueError, match=words) as refused:
        x4.upscale(**{"image": SMALL[0], "prompt": "a star", **FEW, **fields})
    assert "\n" not in str(refused.value)


def test_models_do_what_they_are_made_for(pipe, x4):
    with pytest.raises(ValueError, match="no upscaler: load one, such as stabilityai/stable-diffusion-x4-upscaler"):
        pipe.upscale(SMALL[0], "a star", method="model", **FEW)
    with pytest.raises(ValueError, match="takes 7 channels, not 4: it is for upscaling, use it to upscale"):
        x4.text_to_image("a star", **FEW)
    with pytest.raises(ValueError, match="noise_level=3 is for upscale, not for image_to_image"):
        pipe.image_to_image("a star", image=SMALL[0], noise_level=3, **FEW)


# --- Drawn again, larger ---------------------------------------------------------------------------------------------


class Doubling:
    """An enlarger, which notes the tiles that it was asked for."""

    scale = 2

    def __init__(self):
        self.tiles = []

    def __call__(self, images, tile=None):
        self.tiles.append(tile)
        return images.repeat(2, axis=1).repeat(2, axis=2)


def test_any_model_draws_a_picture_again_larger(pipe):
    again = pipe.upscale(SMALL[:1], "a star", scale=1.5, **FEW)
    assert again.shape == (1, 12, 12, 3)
    by_hand = pipe.image_to_image("a star", image=canvas.resize(SMALL[:1], 12, 12), strength=0.35, **FEW)
    np.testing.assert_array_equal(again, by_hand)
    enlarger = Doubling()
    again = pipe.upscale(SMALL[:1], "a star", method="redraw", enlarger=enlarger, scale=3.0, strength=0.6, **FEW)
    twice = canvas.resize(SMALL[:1].repeat(4, axis=1).repeat(4, axis=2), 24, 24)
    np.testing.assert_array_equal(again, pipe.image_to_image("a star", image=twice, strength=0.6, **FEW))
    assert enlarger.tiles == [None, None]


def test_an_enlarger_alone(pipe):
    enlarger = Doubling()
    made = pipe.upscale(SMALL, method="enlarger", enlarger=enlarger, tile=4)
    np.testing.assert_array_equal(made, SMALL.repeat(2, axis=1).repeat(2, axis=2))
    assert enlarger.tiles == [4]
    assert pipe.upscale(SMALL, method="enlarger", enlarger=enlarger, scale=2.5).shape == (4, 20, 20, 3)


def test_hires_fix_with_an_enlarger(pipe):
    fields = {**FEW, "width": 8, "height": 8, "seed": 2}
    first = pipe.text_to_image("a star", **fields)
    made = pipe.hires_fix("a star", enlarger=Doubling(), scale=2.0, strength=0.5, **fields)
    larger = first.repeat(2, axis=1).repeat(2, axis=2)
    by_hand = pipe.image_to_image("a star", image=larger, strength=0.5, steps=3, guidance_scale=3.0, seed=2)
    np.testing.assert_array_equal(made, by_hand)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "model"}, "this model is no upscaler: load one"),
        ({"method": "magic"}, "method='magic' is unknown: use model, redraw, enlarger"),
        ({"method": "enlarger"}, "by enlarger= alone: give sd_jax.load_upscaler"),
        ({"scale": 1.0}, "scale=1: more than 1 is needed"),
        ({"noise_level": 20}, "image_noise= and noise_level= are for models that were trained to enlarge"),
    ],
)
def test_what_is_not_drawn_again(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        pipe.upscale(SMALL, "a star", **given, **FEW)


def test_an_upscaler_is_not_told_how_to_draw_again(x4):
    for given in ({"scale": 2.0}, {"strength": 0.5}, {"enlarger": Doubling()}):
        with pytest.raises(ValueError, match="enlarger=, scale= and strength= are for method='redraw'"):
            x4.upscale(SMALL, "a star", **given, **FEW)
    with pytest.raises(ValueError, match="method='redraw' is for models that make pictures of prompts alone"):
        x4.upscale(SMALL, "a star", method="redraw", **FEW)


def test_its_door_draws_again_what_was_enlarged(pipe, tmp_path):
    pipe.save(tmp_path / "model", format="native")
    media.write_png(tmp_path / "small.png", SMALL[0], {})
    fields = {"prompt": "a star", "scale": 2.0, **FEW}
    loading, image = {"checkpoint": str(tmp_path / "model")}, str(tmp_path / "small.png")
    made, _ = carry_out(Order(fields, loading, image=image, out=tmp_path / "a"))
    wanted = pipe.upscale(SMALL[:1], **fields)
    np.testing.assert_array_equal(media.decode_image(made), wanted[0])
    record = read_record(made)
    assert record.origin.job == "upscale" and record.recipe.strength == 0.35
    text = media.read_text(made)["parameters"]
    assert "Denoising strength: 0.35" in text and "Size: 16x16" in text and "Hires" not in text
    again, _ = carry_out(Order(recipe=str(made), out=tmp_path / "b"))
    np.testing.assert_array_equal(media.decode_image(again), wanted[0])


# --- The x2 latent upscaler ------------------------------------------------------------------------------------------

SMALL_LATENTS = np.random.default_rng(1).standard_normal((2, 3, 5, 4)).astype(np.float32)


def twice(latents):
    return np.asarray(latents).repeat(2, axis=1).repeat(2, axis=2)


def test_latents_are_seen_twice_as_large(x2, standing):
    made = x2.upscale(SMALL_LATENTS, ["a star", "a circle"], output="latents", **FEW)
    walk = standing.pop()
    assert made.shape == (2, 6, 10, 4) and walk.told.positive.class_labels is None
    np.testing.assert_array_equal(walk.concat, twice(SMALL_LATENTS))
    for half in (walk.told.positive, walk.told.negative):
        assert walk.told.table.pooled[half.texts[:, 0]].shape == (2, 16)


def test_pictures_are_enlarged_as_latents(x2, standing, monkeypatch):
    seen = []

    def encode(pipe, pixels, tile=None):
        seen.append(pixels)
        return pixels[:, ::4, ::4, :1].repeat(4, axis=-1).astype(np.float32)

    monkeypatch.setattr(upscale, "encoded", encode)
    for fields, pixels in (({}, SMALL), ({"width": 24, "height": 8}, canvas.resize(SMALL, 4, 12))):
        x2.upscale(SMALL, "a star", output="latents", **FEW, **fields)
        np.testing.assert_array_equal(seen.pop(), pixels)
        np.testing.assert_array_equal(standing.pop().concat, twice(encode(x2, pixels)))
    odd = x2.upscale(np.zeros((1, 14, 9, 3)), "a star", output="latents", **FEW)  # a size that its U-Net does not take
    assert odd.shape == (1, 6, 4, 4) and seen[-1].shape == (1, 12, 8, 3)


def test_what_the_latent_upscaler_is_shown_and_told_matters(x2):
    fields = {"seed": 1, "output": "latents", **FEW}
    plain = x2.upscale(SMALL_LATENTS[:1], "a star", **fields)
    for other in (
        x2.upscale(SMALL_LATENTS[1:], "a star", **fields),
        x2.upscale(SMALL_LATENTS[:1], "a red circle", **fields),
        x2.upscale(SMALL_LATENTS[:1], "a star", **{**fields, "seed": 2}),
    ):
        assert np.isfinite(other).all() and np.abs(other - plain).max() > 1e-3
    assert x2.steps_of(Recipe("a star", **FEW), SMALL[0]) == 3


def test_what_each_kind_of_model_takes_by_itself(pipe, x4, x2):
    assert [upscale.defaults(each.spec) for each in (pipe, x4, x2)] == [{"strength": 0.35}, {"noise_level": 20}, {}]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"noise_level": 0}, "image_noise= and noise_level=: this model sees the small picture as it is"),
        ({"image": SMALL_LATENTS[:, :, :, :2]}, "image has the shape"),
        ({"width": 32}, "width=, height=: of these latents it makes 40x24 pixels, leave them out"),
        ({"batch_size": 3}, "image holds 2 pictures, the prompts ask for 3"),
        ({"method": "redraw"}, "method='redraw' is for models that make pictures of prompts alone"),
    ],
)
def test_what_the_latent_upscaler_does_not_do(x2, given, words):
    with pytest.raises(ValueError, match=words):
        x2.upscale(**{"image": SMALL_LATENTS, "prompt": "a star", **FEW, **given})


def test_the_latent_upscaler_is_for_upscaling_alone(x2, tmp_path):
    with pytest.raises(ValueError, match="takes 8 channels, not 4: it is for upscaling, use it to upscale"):
        x2.text_to_image("a star", **FEW)
    with pytest.raises(ValueError, match="adapters are not for the x2 latent upscaler"):
        x2.with_adapter(tmp_path / "lora.safetensors")
