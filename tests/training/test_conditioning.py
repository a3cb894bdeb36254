"""What the U-Net is told of a picture's caption: in chunks, by either way, dropped, and as sampling encodes it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax import sharding
from sd_jax.config import training_defaults
from sd_jax.diffusion import noise
from sd_jax.models.networks import Networks
from sd_jax.prompts.chunks import CaptionTokenizer
from sd_jax.prompts.tokenize import load_tokenizer, train_tokenizer
from sd_jax.sampling.pipeline import Pipeline
from sd_jax.training.conditioning import check, conditioning, encode_captions, make_empty
from sd_jax.training.context import DROPOUT, Context
from tests.training import tiny_xl
from tests.training.tiny_xl import random_params

WORDS = "a photo of a red circle, a blue square and a small green star on the left of a cat"
CAPTIONS = [
    "",
    "a red circle",
    "cat " * 30,
    "cat " * 15 + ", " + "red " * 14,  # the first chunk ends at the comma
    "a small green star, " * 9,
    "red " * 66,
    "blue " * 70,  # cut
    "a cat",
]
SPECS = {"base": tiny_xl.BASE, "refiner": tiny_xl.REFINER, "sd1": tiny_xl.SD1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer([WORDS] * 4, folder, 700, 24)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    """name of SPECS -> (spec with the tokenizer's words, random parameters, the tokenizer, padding as it wants)."""
    made = {}

    def model(name):
        if name not in made:
            tokenizer = load_tokenizer(folder)
            ids = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id}
            pads = {"text_encoder": tokenizer.pad_token_id, "text_encoder_2": 0}
            texts = {
                p: dataclasses.replace(c, **ids, pad_token_id=pads[p]) for p, c in SPECS[name].text_encoders.items()
            }
            spec = dataclasses.replace(SPECS[name], **texts)
            tokenizer.pad_as(next(iter(texts.values())))
            made[name] = spec, random_params(spec), tokenizer
        return made[name]

    return model


def config_of(dtype="float32", **diffusion):
    config = training_defaults("full")
    config.dtype = dtype
    config.diffusion.update(diffusion)
    return config


def both_ways(spec, params, tokenizer, config):
    """(what ids say, what kept states say, which captions are dropped) of CAPTIONS."""
    tokenize = CaptionTokenizer(tokenizer, 24, config.diffusion.text_chunks)
    networks, ids = Networks.of(spec, config.dtype), tokenize(CAPTIONS)
    keys = noise.example_keys(jax.random.key(0), 0, jnp.arange(len(CAPTIONS), dtype=jnp.int32))

    @sharding.jit
    def told(params, batch, empty):
        return conditioning(Context(networks, config, empty), params, batch, keys)

    sizes = {"time_ids": jnp.ones((len(CAPTIONS), 6), jnp.float32)}
    empty = make_empty(tokenize, networks, params, config)
    assert empty.states is None
    now = told(params, {"input_ids": jnp.asarray(ids), **sizes}, empty)
    config.data.cache_text = True
    context, pooled = encode_captions(networks, params, ids, config)
    kept = {"context": context, **sizes, **({} if pooled is None else {"pooled": pooled})}
    empty = make_empty(tokenize, networks, params, config)
    assert empty.ids is None
    later = told({}, kept, empty)  # no parameter of an encoder is read
    return now, later, np.asarray(noise.uniform(keys, DROPOUT)) < config.diffusion.caption_dropout


@pytest.mark.parametrize(("name", "chunks"), [("base", 3), ("refiner", 1), ("sd1", 2)])
def test_kept_states_say_what_ids_say(model, name, chunks):
    spec, params, tokenizer = model(name)
    now, later, dropped = both_ways(spec, params, tokenizer, config_of(caption_dropout=0.5, text_chunks=chunks))
    assert 0 < dropped.sum() < len(CAPTIONS) and now.context.shape[1] == 24 * chunks
    np.testing.assert_allclose(later.context, now.context, atol=1e-6)
    np.testing.assert_array_equal(later.time_ids, now.time_ids)
    if name == "sd1":
        assert later.pooled is None  # its U-Net does not read it
    else:
        np.testing.assert_allclose(later.pooled, now.pooled, atol=1e-6)
    empty = np.asarray(now.context)[dropped]
    assert np.ptp(empty, axis=0).max() < 1e-6  # all the same
    assert (np.abs(empty).max() == 0) == spec.force_zeros_for_empty_prompt


def test_kept_states_are_those_of_the_dtype_of_the_run(model):
    spec, params, tokenizer = model("base")
    config = config_of("bfloat16", caption_dropout=0.5, text_chunks=2)
    now, later, dropped = both_ways(spec, params, tokenizer, config)
    assert later.context.dtype == later.pooled.dtype == now.context.dtype == jnp.bfloat16
    for a, b in ((later.context, now.context), (later.pooled, now.pooled)):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=2**-7 * np.abs(b).max())
        assert np.abs(a[dropped]).max() == 0 < np.abs(a[~dropped]).max()


@pytest.mark.parametrize(("name", "chunks", "clip_skip"), [("base", 2, 1), ("refiner", 1, 0), ("sd1", 3, 2)])
def test_a_caption_is_encoded_as_sampling_encodes_a_prompt(model, name, chunks, clip_skip):
    spec, params, tokenizer = model(name)
    pipe = Pipeline(spec, params, tokenizer)
    config = config_of(text_chunks=chunks, clip_skip=clip_skip)
    ids = CaptionTokenizer(tokenizer, 24, chunks)(CAPTIONS[2 * chunks - 2 : 2 * chunks])
    context, pooled = encode_captions(pipe.networks, params, ids, config)
    prompts = pipe.encode_prompts(CAPTIONS[2 * chunks - 2 : 2 * chunks], clip_skip=clip_skip or None)
    assert context.shape[1] == 24 * chunks
    np.testing.assert_allclose(context, prompts.context, atol=1e-5)
    if pooled is not None:
        np.testing.assert_allclose(pooled, prompts.pooled, atol=1e-5)
    if clip_skip:
        own = pipe.encode_tokens(ids[:, :24]).context
        assert np.abs(np.asarray(own) - np.asarray(context)[:, :24]).max() > 1e-3


def test_methods_without_captions_have_no_empty_prompt():
    assert make_empty(None, Networks.of(tiny_xl.BASE), {}, training_defaults("autoencoder")) is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("diffusion.text_chunks", 0, "config.diffusion.text_chunks=0"),
        ("diffusion.clip_skip", -1, "config.diffusion.clip_skip=-1"),
        ("diffusion.clip_skip", 3, r"config.diffusion.clip_skip=3: give 1 \(the last layer\) to 2, or 0"),
        ("diffusion.caption_dropout", 1.5, "config.diffusion.caption_dropout=1.5"),
        ("data.cache_captions", 0, "config.data.cache_captions=0"),
        ("data.keep_tags", -1, "config.data.keep_tags=-1"),
        (
            "data.cache_text",
            True,
            "config.data.cache_text .* config.diffusion.train_text_encoder .* one of them",
        ),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(key, value, message):
    config = training_defaults("full")
    check(config, tiny_xl.BASE)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        check(config, tiny_xl.BASE)
