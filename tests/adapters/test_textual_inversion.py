"""Words with vectors of their own, in a model's tables and in its prompts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.adapters.textual_inversion import Embedding, init, rows_of, with_embeddings
from sd_jax.models.clip_text import CLIPText
from sd_jax.models.networks import Networks
from sd_jax.models.presets import TINY
from sd_jax.prompts.encode import encode_texts
from sd_jax.prompts.tokenize import train_tokenizer

CAPTIONS = ["a photo of a red circle, a blue square, and a small green star on the left of a cat"] * 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(CAPTIONS, tmp_path_factory.mktemp("words") / "tokenizer", 700)


def a_model(tokenizer, rows=0, second=False, dtype="float32"):
    """(spec, params) of a tiny model's text encoders, with `rows` more in their tables than the tokenizer has words."""
    text = dataclasses.replace(
        TINY.text_encoder, vocab_size=tokenizer.vocab_size + rows, eos_token_id=tokenizer.eos_token_id
    )
    other = dataclasses.replace(text, hidden_size=48, projection_dim=16) if second else None
    spec = dataclasses.replace(TINY, text_encoder=text, text_encoder_2=other)
    rng, params = np.random.default_rng(0), {"unet": {"untouched": jnp.ones(3)}}
    for part, config in spec.text_encoders.items():
        network = CLIPText(config)
        found = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
        params[part] = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.1, 0.3, leaf.shape), dtype), found)
    return spec, params


def table(params, part="text_encoder"):
    return params[part]["text_model"]["embeddings"]["token_embedding"]["embedding"]


def of_width(token, count, width=32, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return Embedding(token, {"text_encoder": rows})


def test_vectors_become_the_rows_of_the_words_ids(tokenizer):
    spec, params = a_model(tokenizer)
    sks, other = of_width("<sks>", 3), of_width("fancy", 1, seed=1)
    before = np.asarray(table(params)).copy()
    new_spec, new_params, new_tokenizer = with_embeddings(spec, params, tokenizer, [sks, other])
    assert new_spec.text_encoder.vocab_size == spec.text_encoder.vocab_size + 4 == len(table(new_params))
    new_tokenizer.check(new_spec.text_encoder)
    np.testing.assert_array_equal(table(new_params)[:-4], before)
    for embedding in (sks, other):
        ids = np.asarray(new_tokenizer.token_ids(embedding.token))
        np.testing.assert_array_equal(table(new_params)[ids], embedding.vectors["text_encoder"])
        found = rows_of(new_spec, new_params, new_tokenizer, embedding.token)
        np.testing.assert_array_equal(found["text_encoder"], embedding.vectors["text_encoder"])
    # What was given is as it was, and what does not change is shared
    np.testing.assert_array_equal(table(params), before)
    assert new_params["unet"] is params["unet"] and tokenizer.vocab_size == spec.text_encoder.vocab_size
    old, new = (tree["text_encoder"]["text_model"] for tree in (params, new_params))
    assert new["encoder"] is old["encoder"]
    assert new["embeddings"]["position_embedding"] is old["embeddings"]["position_embedding"]


def test_rows_that_no_word_had_are_taken_first(tokenizer):
    spec, params = a_model(tokenizer, rows=2)
    new_spec, new_params, new_tokenizer = with_embeddings(spec, params, tokenizer, [of_width("<one>", 1)])
    assert new_spec == spec and new_tokenizer.token_ids("<one>") == [tokenizer.vocab_size]
    np.testing.assert_array_equal(table(new_params)[-1], table(params)[-1])
    new_spec, new_params, _ = with_embeddings(spec, params, tokenizer, [of_width("<three>", 3)])
    assert new_spec.text_encoder.vocab_size == spec.text_encoder.vocab_size + 1 == len(table(new_params))


def encoded(model, texts, syntax="a1111"):
    spec, params, tokenizer = model
    networks, widths = Networks.of(spec), [config.hidden_size for config in spec.text_encoders.values()]
    encode = functools.partial(jax.jit(networks.encode_text), params)
    return encode_texts(texts, tokenizer, encode, 77, syntax, widths)


@pytest.mark.parametrize("second", [False, True])
def test_a_word_of_others_vectors_means_what_they_mean(tokenizer, second):
    """In brackets with weights, in several chunks, in every syntax, and in both encoders of SDXL."""
    spec, params = a_model(tokenizer, second=second)
    copied = Embedding("<sks>", rows_of(spec, params, tokenizer, "red circle"))
    model = with_embeddings(spec, params, tokenizer, [copied])
    pairs = [
        ("a <sks>, a cat", "a red circle, a cat"),
        ("a (<SKS>:1.3), [a cat]", "a (red circle:1.3), [a cat]"),
        ("a photo, " * 40 + "<sks> on the left", "a photo, " * 40 + "red circle on the left"),
    ]
    for syntax in ("a1111", "comfy"):
        got, want = encoded(model, [p for p, _ in pairs], syntax), encoded(model, [p for _, p in pairs], syntax)
        np.testing.assert_array_equal(got.context, want.context)
        np.testing.assert_array_equal(got.pooled, want.pooled)
    # Without it a prompt is what it was
    plain = encoded((spec, params, tokenizer), ["a red circle"]), encoded(model, ["a red circle"])
    np.testing.assert_array_equal(plain[0].context, plain[1].context)
    np.testing.assert_array_equal(plain[0].pooled, plain[1].pooled)


def test_a_new_one_begins_as_words(tokenizer):
    spec, params = a_model(tokenizer, second=True, dtype="bfloat16")
    words = rows_of(spec, params, tokenizer, "red circle star")
    for count, chosen in ((1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (7, [0, 0, 0, 1, 1, 2, 2])):
        made = init(spec, params, tokenizer, "<sks>", count, "red circle star")
        assert made.count == count and made.token == "<sks>"
        for part, rows in made.vectors.items():
            assert rows.dtype == jnp.float32
            np.testing.assert_array_equal(rows, words[part].astype(jnp.float32)[np.asarray(chosen)])
    for count, text in ((0, "red"), (2, " ")):
        with pytest.raises(ValueError, match="give at least one of each"):
            init(spec, params, tokenizer, "<sks>", count, text)


def test_rows_take_the_tables_type(tokenizer):
    spec, params = a_model(tokenizer, dtype="bfloat16")
    _, changed, _ = with_embeddings(spec, params, tokenizer, [of_width("<sks>", 2)])
    assert table(changed).dtype == jnp.bfloat16


def widths(**named):
    text = {part: dataclasses.replace(TINY.text_encoder, hidden_size=width) for part, width in named.items()}
    return dataclasses.replace(TINY, **{"text_encoder": None, **text})


SD1, SD2, SDXL, REFINER = (
    widths(text_encoder=768),
    widths(text_encoder=1024),
    widths(text_encoder=768, text_encoder_2=1280),
    widths(text_encoder_2=1280),
)


def zeros(**named):
    return Embedding("<sks>", {part: np.zeros((2, width), np.float32) for part, width in named.items()})


@pytest.mark.parametrize(
    ("spec", "embedding", "said"),
    [
        (SD1, zeros(text_encoder=1024), r"'<sks>' is for SD 2 \(text_encoder 1024 wide\), but this model is SD 1"),
        (SD2, zeros(text_encoder=768), "is for SD 1 .* but this model is SD 2"),
        (SDXL, zeros(text_encoder=768), "is for SD 1 .* but this model is SDXL .*: take one that was made for it"),
        (SD1, zeros(text_encoder=768, text_encoder_2=1280), "is for SDXL .* but this model is SD 1"),
        (REFINER, zeros(text_encoder=768), "but this model is SDXL's refiner"),
        (TINY, zeros(text_encoder=768), r"but this model is of another kind \(text_encoder 32 wide\)"),
        (
            SDXL,
            Embedding("<sks>", {"text_encoder": np.zeros((2, 768)), "text_encoder_2": np.zeros((3, 1280))}),
            "as many are needed for each",
        ),
    ],
)
def test_embeddings_of_another_family(tokenizer, spec, embedding, said):
    with pytest.raises(ValueError, match=said):
        with_embeddings(spec, {}, tokenizer, [embedding])


def test_sdxls_refiner_takes_sdxls(tokenizer):
    spec, params = a_model(tokenizer, second=True)
    spec = dataclasses.replace(spec, text_encoder=None)
    both = Embedding("<sks>", {"text_encoder": np.ones((1, 32)), "text_encoder_2": np.ones((1, 48), np.float32)})
    _, changed, _ = with_embeddings(spec, params, tokenizer, [both])
    assert changed["text_encoder"] is params["text_encoder"]
    np.testing.assert_array_equal(table(changed, "text_encoder_2")[-1], 1.0)


def test_words_that_are_taken(tokenizer):
    spec, params = a_model(tokenizer)
    with pytest.raises(ValueError, match="'circle' is a token"):
        with_embeddings(spec, params, tokenizer, [of_width("circle", 1)])
    with pytest.raises(ValueError, match="two embeddings are called '<sks>'"):
        with_embeddings(spec, params, tokenizer, [of_width("<sks>", 1), of_width("<sks>", 2)])
    with pytest.raises(ValueError, match="'<SKS>' is a token"):
        with_embeddings(spec, params, tokenizer, [of_width("<sks>", 1), of_width("<SKS>", 2)])
