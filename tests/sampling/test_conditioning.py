"""What families besides SD 1 are told, and what they refuse: SDXL, its refiner, models of LCM and of depth, x4."""

import dataclasses
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sd_jax.models.presets import TINY_SHAPES, CLIPTextConfig, TinyVAEConfig
from sd_jax.sampling import denoising
from sd_jax.sampling.conditioning import time_ids
from sd_jax.sampling.pipeline import Pipeline
from sd_jax.sampling.preview import LatentPreview
from sd_jax.sampling.tiles import choose_tile, peak_bytes
from sd_jax.types import Conditioning, Recipe
from tests.sampling.conftest import random_params

FEW = {"steps": 3, "guidance_scale": 3.0}
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
ONE_LEVEL = {"block_out_channels": (16,), "attention_blocks": (True,)}


def family(tokenizer, texts=1, projection=None, text_parts=("text_encoder",), **unet):
    """A tiny pipeline of one level, whose weights make what it is told matter."""
    text = CLIPTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoders = {"text_encoder": None} | {part: text for part in text_parts}
    if projection is not None:
        encoders["text_encoder_2"] = dataclasses.replace(text, projection_dim=projection, clip_skip=2)
    width = 16 * len([1 for config in encoders.values() if config is not None])
    unet = {"cross_attention_dim": width, **ONE_LEVEL, **unet}
    spec = dataclasses.replace(TINY_SHAPES, unet=dataclasses.replace(TINY_SHAPES.unet, **unet), **encoders)
    params = random_params(spec)
    return Pipeline(spec, {**params, "unet": jax.tree.map(lambda x: 3 * x, params["unet"])}, tokenizer)


def told_sizes(numbers):
    """Of a U-Net that is told so many."""
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 12 + 4 * numbers,
    }


@pytest.fixture(scope="module")
def sdxl(tokenizer):
    pipe = family(tokenizer, projection=12, **told_sizes(6))
    pipe.spec = dataclasses.replace(pipe.spec, force_zeros_for_empty_prompt=True)
    return pipe


@pytest.fixture(scope="module")
def refiner(tokenizer):
    return family(tokenizer, projection=12, text_parts=(), **told_sizes(5))


@pytest.fixture(scope="module")
def lcm(tokenizer):
    return family(tokenizer, time_cond_proj_dim=8)


@pytest.fixture(scope="module")
def depth(tokenizer):
    return family(tokenizer, in_channels=5)


@pytest.fixture(scope="module")
def x4(tokenizer):
    return family(tokenizer, in_channels=7, num_class_embeds=20)


@pytest.fixture
def standing(monkeypatch):
    """Jobs walk on the spot and no U-Net is compiled. The list holds what each walk was given."""
    walks = []

    def stand(params, run, carry, first, last, **static):
        walk = {"told": run.told, "concat": run.concat, "first": int(first), "last": int(last)}
        walks.append(types.SimpleNamespace(**walk, **static))
        return carry

    monkeypatch.setattr(denoising, "_walk", stand)
    return walks


def latents_of(pipe, prompt="a red circle", **given):
    return pipe.text_to_image(prompt, output="latents", **{**FEW, **given})


def differ(a, b):
    return np.abs(a - b).max() > 1e-4


# --- Sizes and scores ------------------------------------------------------------------------------------------------

TOLD = [
    ({}, (64, 48, 0, 0, 64, 48), (64, 48, 0, 0, 6, 2.5)),
    ({"original_size": (100, 90)}, (100, 90, 0, 0, 64, 48), (100, 90, 0, 0, 6, 2.5)),
    ({"crops_coords_top_left": (7, 9), "target_size": (32, 40)}, (64, 48, 7, 9, 32, 40), (64, 48, 7, 9, 6, 2.5)),
    ({"aesthetic_score": 9.5, "negative_aesthetic_score": 1.0}, (64, 48, 0, 0, 64, 48), (64, 48, 0, 0, 9.5, 1)),
]


@pytest.mark.parametrize(("fields", "base", "refined"), TOLD)
def test_time_ids(sdxl, refiner, pipe, fields, base, refined):
    recipe = Recipe(**fields)
    for ids in time_ids(sdxl.spec, recipe, 64, 48):
        np.testing.assert_array_equal(ids, base)
    positive, negative = time_ids(refiner.spec, recipe, 64, 48)
    np.testing.assert_array_equal(positive, refined[:5])
    np.testing.assert_array_equal(negative, (*refined[:4], refined[5]))
    assert time_ids(pipe.spec, recipe, 64, 48) == (None, None)


def test_each_picture_and_part_is_told(sdxl, standing):
    prompts = ["a star", "a red circle AND a blue square"]
    latents_of(sdxl, prompts, negative_prompt="blue", width=48, batch_size=2, original_size=(8, 9))
    (walk,) = standing
    told = walk.told
    assert told.positive.time_ids.shape == (8, 6) and told.negative.time_ids.shape == (4, 6)
    assert (told.positive.time_ids == (8, 9, 0, 0, 32, 48)).all() and told.batch == 4
    assert told.table.context.shape[2] == 32 and told.table.pooled.shape[1] == 12
    assert told.positive.guidance_scale is None


def test_sizes_matter_and_compile_nothing(sdxl, caplog):
    plain = latents_of(sdxl)
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        changed = [
            latents_of(sdxl, **fields)
            for fields in (
                {"original_size": (8, 9)},
                {"target_size": (64, 64)},
                {"crops_coords_top_left": (4, 8)},
                {"negative_prompt": "blue"},
            )
        ]
        same = latents_of(sdxl, original_size=(32, 32), target_size=(32, 32))
    assert not [r for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    assert all(differ(other, plain) for other in changed)
    np.testing.assert_array_equal(same, plain)
    from_picture = sdxl.image_to_image("a star", image=PICTURE, strength=0.9, output="latents", **FEW)
    cropped = sdxl.image_to_image(
        "a star", image=PICTURE, strength=0.9, output="latents", crops_coords_top_left=(4, 8), **FEW
    )
    assert differ(from_picture, cropped)


def test_conditioning_may_bring_its_own_sizes(sdxl, standing):
    given = sdxl.encode_prompts(["a star", "a circle"])
    assert given.context.shape == (2, 24, 32) and given.pooled.shape == (2, 12) and given.time_ids is None
    latents_of(sdxl, conditioning=given, original_size=(8, 9))
    own = given.replace(time_ids=jnp.asarray([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]], jnp.float32))
    latents_of(sdxl, conditioning=own, original_size=(8, 9))
    recipes, owns = (walk.told for walk in standing)
    assert (recipes.positive.time_ids == (8, 9, 0, 0, 32, 32)).all()
    np.testing.assert_array_equal(owns.positive.time_ids, own.time_ids)
    np.testing.assert_array_equal(owns.negative.time_ids, recipes.negative.time_ids)


def test_predict_tells_the_sizes_of_an_uncropped_picture(sdxl, refiner):
    latents, timesteps = np.ones((2, 8, 12, 4), np.float32), np.asarray([10, 500], np.float32)
    for pipe, ids in ((sdxl, (32, 48, 0, 0, 32, 48)), (refiner, (32, 48, 0, 0, 6))):
        told = pipe.encode_prompts(["a star", "a circle"])
        explicit = told.replace(time_ids=jnp.broadcast_to(jnp.asarray(ids, jnp.float32)[None], (2, len(ids))))
        np.testing.assert_array_equal(
            pipe.predict(latents, timesteps, told), pipe.predict(latents, timesteps, explicit)
        )


# --- The empty negative prompt ---------------------------------------------------------------------------------------


def test_an_empty_negative_prompt_is_zeros_where_the_family_has_it_so(sdxl, refiner, standing):
    for pipe, prompt in ((sdxl, "a star"), (sdxl, "small " * 30), (refiner, "a star")):
        latents_of(pipe, prompt, batch_size=2)
        latents_of(pipe, prompt, negative_prompt="blue", batch_size=2)
    told = [walk.told for walk in standing]
    seen = [np.unique(heard.negative.texts) for heard in told]
    assert all(len(rows) == 1 for rows in seen)
    zeros = [
        not heard.table.context[rows].any() and not heard.table.pooled[rows].any()
        for heard, rows in zip(told, seen, strict=True)
    ]
    assert zeros == [True, False, True, False, False, False]
    assert told[0].table.context.shape == told[1].table.context.shape  # and so it compiles nothing


def test_zeros_given_by_hand_are_the_empty_negative_prompt(sdxl):
    told = sdxl.encode_prompts([""])
    zeros = jax.tree.map(jnp.zeros_like, told)
    np.testing.assert_array_equal(latents_of(sdxl, negative_conditioning=zeros), latents_of(sdxl))
    assert differ(latents_of(sdxl, negative_conditioning=told), latents_of(sdxl))


# --- The refiner -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "schedule", "steps", "switch", "walked"),
    [
        ("euler", "normal", 20, 0.8, 16),  # timesteps 999, 946.4, ..., 210.3, 157.7
        ("euler", "normal", 10, 0.5, 5),  # 999, 888, ..., 555, 444
        ("ddim", "trailing", 10, 0.8, 8),  # 999, 899, ..., 299, 199
        ("heun", "normal", 4, 0.6, 2),  # 999, 666, 333, 0
        ("euler", "normal", 2, 0.999, 1),  # 999, 0
    ],
)
def test_the_refiner_takes_over_below_a_timestep(sdxl, refiner, standing, sampler, schedule, steps, switch, walked):
    given = {"sampler": sampler, "schedule": schedule, "steps": steps, "refiner_switch": switch, "refiner": refiner}
    called = []
    latents_of(sdxl, aesthetic_score=7.0, **given, callback=lambda step, x, denoised: called.append(step))
    assert called == list(range(steps)) and len(standing) == steps
    assert [walk.networks is refiner.networks for walk in standing] == [i >= walked for i in range(steps)]
    del standing[:]
    latents_of(sdxl, aesthetic_score=7.0, **given)
    first, second = standing
    assert (first.first, first.last, second.first, second.last) == (0, walked, walked, steps)
    assert (second.told.positive.time_ids == (32, 32, 0, 0, 7)).all()
    assert (second.told.negative.time_ids == (32, 32, 0, 0, 2.5)).all()
    assert first.told.table.context.shape[2] == 32 and second.told.table.context.shape[2] == 16
    assert second.told.table.context[second.told.negative.texts[0, 0]].any()


def test_what_the_sampler_remembers_goes_on_across_the_switch(sdxl):
    """A model that refines itself does nothing: of several steps' memory, with noise, and a prompt that changes."""
    given = {"sampler": "dpmpp_2m_sde", "steps": 5, "prompt": "a [red|blue] circle", "apg_momentum": -0.5}
    plain = latents_of(sdxl, **given)
    np.testing.assert_array_equal(latents_of(sdxl, refiner=sdxl, refiner_switch=0.5, **given), plain)


def test_the_refiner_refines(sdxl, refiner):
    seen = {}
    for name, given in {"base": {}, "both": {"refiner": refiner, "refiner_switch": 0.6}}.items():
        seen[name] = []
        latents_of(sdxl, callback=lambda step, x, denoised, name=name: seen[name].append(np.array(denoised)), **given)
    for step, (a, b) in enumerate(zip(*seen.values(), strict=True)):
        assert differ(a, b) == (step == 2)  # timesteps 999, 499.5, 0; the last is below 400


# --- Others ----------------------------------------------------------------------------------------------------------


def test_models_of_lcm_are_told_the_scale(lcm, standing, monkeypatch):
    for given in ({}, {"batch_size": 2}, {"guidance_scale": 1.0}, {"prompt": "a star AND a circle"}):
        latents_of(lcm, **given)
    told = [walk.told for walk in standing]
    assert [heard.negative is None for heard in told] == [True, True, True, False]
    assert [heard.positive.guidance_scale.tolist() for heard in told] == [[3.0], [3.0, 3.0], [1.0], [3.0, 3.0]]


def test_the_scale_that_is_told_matters(lcm):
    plain = latents_of(lcm)
    assert differ(latents_of(lcm, guidance_scale=1.0), plain)
    np.testing.assert_array_equal(latents_of(lcm, negative_prompt="blue"), plain)
    one = latents_of(lcm, "a red circle :1 AND a star :0")
    np.testing.assert_allclose(one, plain, atol=1e-4 * np.abs(plain).max())


def test_depth_reaches_the_unet(depth, standing, tmp_path):
    """In the latents' size, near = 1: whatever it is given as."""
    slope = np.broadcast_to(np.linspace(3.0, 7.0, 16)[:, None], (16, 16)).astype(np.float32)
    levels = np.round((slope - 3) / 4 * 65535).astype(np.uint16)
    Image.fromarray(levels).save(file := tmp_path / "depth.png")
    for given in (slope, slope[None, ..., None], Image.fromarray(slope), file, np.dstack([slope] * 3)):
        depth.image_to_image("a star", image=PICTURE, depth=given, strength=1.0, output="latents", **FEW)
    seen = [np.asarray(walk.concat) for walk in standing]
    assert seen[0].shape == (1, 8, 8, 1) and seen[0].min() == -1 and seen[0].max() == 1
    assert (np.diff(seen[0][0, :, 0, 0]) > 0).all()
    for other in seen[1:]:
        np.testing.assert_allclose(other, seen[0], atol=2e-4)
    del standing[:]
    depth.image_to_image("a star", image=PICTURE, depth=np.stack([slope, 2 * slope[::-1]]), batch_size=2, **FEW)
    seen = standing[0].concat
    np.testing.assert_allclose(seen[1], seen[0, ::-1], atol=1e-5)


def test_depth_matters(depth):
    near = np.zeros((8, 8), np.uint8)
    near[:4] = 255
    given = {"image": PICTURE, "output": "latents", **FEW}
    upper, lower, flat = (depth.image_to_image("a star", depth=map, **given) for map in (near, 255 - near, 0 * near))
    assert differ(upper, lower) and np.isfinite(flat).all()


def test_the_x4_upscaler_predicts(x4):
    latents, told = np.ones((2, 8, 8, 7), np.float32), x4.encode_prompts(["a star", "a circle"])
    timesteps = np.asarray([10, 500], np.float32)
    with pytest.raises(ValueError, match="class_labels"):
        x4.predict(latents, timesteps, told)
    first, other = (
        x4.predict(latents, timesteps, told.replace(class_labels=jnp.asarray(labels, jnp.int32)))
        for labels in ([0, 0], [0, 19])
    )
    assert first.shape == (2, 8, 8, 4)
    np.testing.assert_array_equal(first[0], other[0])
    assert differ(first[1], other[1])


def test_half_precision(sdxl, tokenizer):
    half = Pipeline(sdxl.spec, sdxl.params, tokenizer, "bfloat16")
    rough, exact = (latents_of(pipe, negative_prompt="blue") for pipe in (half, sdxl))
    assert rough.dtype == np.float32 and np.abs(rough - exact).mean() < 0.1 * np.abs(exact).mean()


def test_tiles_are_told_the_sizes_of_the_whole(sdxl):
    parts = latents_of(sdxl, width=48, tile=32)
    np.testing.assert_array_equal(latents_of(sdxl, width=48, tile=32, target_size=(32, 48)), parts)
    assert differ(latents_of(sdxl, width=48, tile=32, target_size=(32, 32)), parts)


def test_a_tiny_autoencoder_stands_in(pipe, tokenizer):
    tiny = TinyVAEConfig(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    spec = dataclasses.replace(pipe.spec, vae=tiny)
    params = {**pipe.params, "vae": random_params(spec)["vae"]}
    other = Pipeline(spec, params, tokenizer)
    latents = other.encode_image(PICTURE[None])
    assert latents.shape == (1, 8, 8, 4)
    np.testing.assert_allclose(latents, other.encode_image(PICTURE[None] / np.float32(127.5) - 1), atol=1e-6)
    assert other.finish(latents).shape == (1, 32, 32, 3)
    assert LatentPreview(other)(latents).shape == (1, 32, 32, 3)
    assert choose_tile(tiny, 512, 512, 1, peak_bytes(tiny, 512, 512)) is None
    assert choose_tile(tiny, 512, 512, 1, peak_bytes(tiny, 512, 512) - 1) == 96


# --- What cannot be made ---------------------------------------------------------------------------------------------

REFUSED = [
    ("pipe", {"original_size": (8, 8)}, r"original_size=\(8, 8\) is for SDXL and its refiner, which this model is not"),
    ("pipe", {"crops_coords_top_left": (1, 0)}, r"crops_coords_top_left=\(1, 0\) is for SDXL and its refiner"),
    ("sdxl", {"aesthetic_score": 7.0}, "aesthetic_score=7.0 is for SDXL's refiner, which this model is not"),
    ("sdxl", {"negative_aesthetic_score": 1.0}, "negative_aesthetic_score=1.0 is for SDXL's refiner"),
    ("refiner", {"target_size": (8, 8)}, r"target_size=\(8, 8\) is for SDXL, which"),
    ("sdxl", {"refiner_switch": 0.7}, "refiner_switch=0.7 is for a refiner: give it"),
    ("sdxl", {"refiner": "refiner", "refiner_switch": 1.0}, "refiner_switch=1: more than 0 and less than 1"),
    ("sdxl", {"refiner": "refiner", "sampler": "restart", "steps": 25}, "sampler='restart' goes up again"),
    ("sdxl", {"refiner": "depth"}, "takes 5 channels, not 4: give it image_to_image with depth="),
    ("sdxl", {"refiner": "refiner", "negative_conditioning": "none"}, "conditioning is for one model"),
    ("sdxl", {"conditioning": "none"}, "conditioning has no pooled state, which this model reads"),
    ("depth", {}, "takes 5 channels, not 4: give it image_to_image with depth="),
    ("x4", {}, "takes 7 channels, not 4: it is for upscaling"),
]


@pytest.mark.parametrize(("name", "fields", "words"), REFUSED)
def test_what_cannot_be_made_is_refused_in_one_line(request, name, fields, words):
    given = {
        "refiner": lambda other: request.getfixturevalue(other),
        "conditioning": lambda _: Conditioning(jnp.zeros((1, 24, 32))),
        "negative_conditioning": lambda _: Conditioning(jnp.zeros((1, 24, 32))),
    }
    fields = {field: given[field](value) if field in given else value for field, value in fields.items()}
    with pytest.raises(ValueError, match=words) as refused:
        request.getfixturevalue(name).text_to_image("a star", **{**FEW, **fields})
    assert "\n" not in str(refused.value)


def test_inputs_that_a_job_has_no_use_for(pipe, depth, refiner):
    with pytest.raises(ValueError, match="takes 5 channels, not 4: give it image_to_image with depth="):
        depth.image_to_image("a star", image=PICTURE, **FEW)
    with pytest.raises(ValueError, match="depth= is for models that see depth"):
        pipe.image_to_image("a star", image=PICTURE, depth=PICTURE[..., 0], **FEW)
    with pytest.raises(ValueError, match=r"depth has the shape \(4,\)"):
        depth.image_to_image("a star", image=PICTURE, depth=np.zeros(4), **FEW)
    with pytest.raises(ValueError, match="depth has numbers that are not finite"):
        depth.image_to_image("a star", image=PICTURE, depth=np.full((8, 8), np.nan), **FEW)
    with pytest.raises(ValueError, match="depth is for image_to_image, not for text_to_image"):
        pipe.make(Recipe("a star"), depth=PICTURE)
    for use in (pipe.make, pipe.steps_of):
        with pytest.raises(ValueError, match="refiner is for text_to_image, not for hires_fix"):
            use(Recipe("a star", scale=2.0), refiner=refiner)


def test_parts_that_are_missing_are_named_at_first_use(sdxl):
    only = Pipeline(sdxl.spec, {"unet": sdxl.params["unet"]}, sdxl.tokenizer)
    told = sdxl.encode_prompts(["a star"])
    only.text_to_image(conditioning=told, output="latents", **FEW)
    for use, words in {
        lambda: only.text_to_image("a star", **FEW): "no text_encoder: give another checkpoint's, as text_encoder=",
        lambda: only.text_to_image(conditioning=told, **FEW): "no vae: give another checkpoint's, as vae=",
        lambda: only.encode_image(PICTURE[None]): "no vae: .*--vae=",
    }.items():
        with pytest.raises(ValueError, match=words):
            use()
    bare = Pipeline(sdxl.spec, {part: tree for part, tree in sdxl.params.items() if part != "unet"}, sdxl.tokenizer)
    with pytest.raises(ValueError, match="no unet: load a whole one"):
        bare.text_to_image("a star", **FEW)


def test_the_tokenizer_must_fit_both_encoders(sdxl, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "words")
    second = dataclasses.replace(sdxl.spec.text_encoder_2, vocab_size=100)
    pipe = Pipeline(dataclasses.replace(sdxl.spec, text_encoder_2=second), sdxl.params, tmp_path / "words")
    with pytest.raises(ValueError, match="vocab_size=100: they do not belong together"):
        pipe.encode_prompts(["a star"])
