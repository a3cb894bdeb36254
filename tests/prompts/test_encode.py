import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.prompts.encode import TABLE_ROWS, EncodedPrompt, encode_prompts, encode_texts, match_tokens
from sd_jax.types import Conditioning

LONG = "cat " * 80
LONGER = "cat " * 160


@pytest.fixture
def texts(words, encode):
    """`texts(*texts, syntax=)` -> context, pooled, as NumPy."""

    def run(*texts, syntax="a1111", encode=encode, positions=77):
        conditioning = encode_texts(texts, words, encode, positions, syntax)
        return np.asarray(conditioning.context), np.asarray(conditioning.pooled)

    return run


@pytest.fixture
def prompts(words, encode):
    def run(*prompts, **options):
        return encode_prompts(prompts, words, encode, 77, **options)

    return run


def at(encoded, call):
    """What call number `call` of the denoiser reads: Conditioning [batch * parts, ...]."""
    rows = jnp.asarray(encoded.index)[:, :, call].reshape(-1)
    return Conditioning(*(None if x is None else jnp.asarray(x)[rows] for x in (encoded.contexts, encoded.pooled)))


def chunk(words, text, positions=77):
    """ids [1, positions] of one chunk that has no weights, written out."""
    ids = words.token_ids(text)
    padding = [words.pad_token_id] * (positions - 2 - len(ids))
    return np.asarray([[words.bos_token_id, *ids, words.eos_token_id, *padding]], np.int32)


def states(words, encode, text, positions=77):
    return np.asarray(encode(chunk(words, text, positions)).context)[0]


def along(weights, positions=77):
    """A column of weights: `weights` from the first word on, 1 elsewhere."""
    column = np.ones((positions, 1), np.float32)
    column[1 : len(weights) + 1, 0] = weights
    return column


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


# -- A plain restatement of the rules --------------------------------------------------------------------------------


def a1111(z, w):
    weighted = z * w
    return weighted * (z.mean() / weighted.mean())


def comfy(z, w, empty):
    return empty + (z - empty) * w


def test_without_weights_it_is_the_encoder(words, encode, texts):
    want = states(words, encode, "a red circle")
    for syntax in ("a1111", "comfy", "plain"):
        context, pooled = texts("a red circle", syntax=syntax)
        np.testing.assert_array_equal(context[0], want)
        np.testing.assert_array_equal(pooled, encode(chunk(words, "a red circle")).pooled)


@pytest.mark.parametrize(
    ("prompt", "words_", "weights"),
    [
        ("a (red:1.3) circle", "a red circle", [1, 1.3, 1]),
        ("a ((red) circle), [blue]", "a red circle, blue", [1, 1.21, 1.1, 1, 1 / 1.1]),
        ("(a red circle:0.5)", "a red circle", [0.5, 0.5, 0.5]),
        ("(a:0) (cat:-1.5)", "a cat", [0, -1.5]),
    ],
)
def test_a1111_weighs_and_restores_the_mean(words, encode, texts, prompt, words_, weights):
    z = states(words, encode, words_)
    assert abs(z.mean()) > 0.01
    close(texts(prompt)[0][0], a1111(z, along(weights)))


@pytest.mark.parametrize(
    ("prompt", "words_", "weights"),
    [
        ("a (red:1.3) circle", "a red circle", [1, 1.3, 1]),
        ("(a (red) circle:0.5)", "a red circle", [0.5, 0.55, 0.5]),
        ("(a (red:1.2) circle:0.5)", "a red circle", [0.5, 1.2, 0.5]),
        ("(a:0) (cat:-1.5)", "a cat", [0, -1.5]),
    ],
)
def test_comfy_leads_away_from_the_empty_prompt(words, encode, texts, prompt, words_, weights):
    z, empty = states(words, encode, words_), states(words, encode, "")
    close(texts(prompt, syntax="comfy")[0][0], comfy(z, along(weights), empty))


def test_chunks_are_weighted_one_by_one(words, encode, texts):
    prompt = "(cat:1.4) " + "cat " * 74 + "(red:0.6) circle"
    first, second = states(words, encode, "cat " * 75), states(words, encode, "red circle")
    context, pooled = texts(prompt)
    close(context[0], np.concatenate([a1111(first, along([1.4])), a1111(second, along([0.6]))]))
    np.testing.assert_array_equal(pooled, encode(chunk(words, "cat " * 75)).pooled)  # of the first chunk
    prompt = "(cat:1.4) " + "cat " * 76 + "(red:0.6) circle"
    first, second = states(words, encode, "cat " * 75), states(words, encode, "cat cat red circle")
    empty = states(words, encode, "")
    want = np.concatenate([comfy(first, along([1.4]), empty), comfy(second, along([1, 1, 0.6]), empty)])
    close(texts(prompt, syntax="comfy")[0][0], want)


def test_each_of_joined_encoders_has_means_of_its_own(words, encode):
    """As A1111 has it for SDXL: whose encoders differ in scale."""

    def both(ids):
        out = encode(ids)
        return Conditioning(jnp.concatenate([out.context, 5 - 2 * out.context], axis=-1), out.pooled)

    z = states(words, encode, "a red cat")
    first, second = (a1111(part, along([1, 4, 1])) for part in (z, 5 - 2 * z))
    got = encode_texts(["a (red:4) cat"], words, both, 77, widths=(32, 32)).context[0]
    close(got, np.concatenate([first, second], axis=-1))
    np.testing.assert_array_equal(encode_prompts(["a (red:4) cat"], words, both, 77, widths=(32, 32)).contexts[0], got)
    assert np.abs(encode_texts(["a (red:4) cat"], words, both, 77).context[0] - got).max() > 1e-3


def test_break_starts_a_chunk(words, encode, texts):
    context, _ = texts("a red circle BREAK a (blue:1.2) square")
    want = [states(words, encode, "a red circle"), a1111(states(words, encode, "a blue square"), along([1, 1.2]))]
    close(context[0], np.concatenate(want))


def test_encoders_of_fewer_positions_have_shorter_chunks(words, make_encoder, texts):
    encode = make_encoder(24)
    context, _ = texts("cat " * 22 + "(red:1.3)", encode=encode, positions=24)
    want = [states(words, encode, "cat " * 22, 24), a1111(states(words, encode, "red", 24), along([1.3], 24))]
    close(context[0], np.concatenate(want))


def test_a_mean_of_nothing_is_not_restored(words, texts):
    """Of states with mean 0 by a layer norm, the ratio of the means is rounding noise."""

    def encode(ids):
        z = np.random.default_rng(int(ids.sum())).normal(size=(1, 77, 32)).astype(np.float32)
        return Conditioning(jnp.asarray(z - z.mean(-1, keepdims=True)), jnp.zeros((1, 32)))

    z = np.asarray(encode(chunk(words, "a red circle")).context)[0]
    np.testing.assert_array_equal(texts("a (red:1.5) circle", encode=encode)[0][0], z * along([1, 1.5]))


def test_half_precision_stays_half_precision(words, encode):
    def half(ids):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), encode(ids))

    for syntax in ("a1111", "comfy"):
        got = encode_texts(["a (red:1.3) cat", LONG], words, half, 77, syntax).context
        want = encode_texts(["a (red:1.3) cat", LONG], words, encode, 77, syntax).context
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=0.05, atol=0.05)


def test_encoders_without_pooled_states(words, encode):
    bare = lambda ids: Conditioning(encode(ids).context)  # noqa: E731
    assert encode_texts(["a"], words, bare, 77).pooled is None
    encoded = encode_prompts(["a [b|c]"], words, bare, 77, calls=3)
    assert encoded.pooled is None and at(encoded, 0).pooled is None


# -- Unequal lengths -------------------------------------------------------------------------------------------------


def test_shorter_texts_are_followed_by_empty_prompts(words, encode, texts):
    context, _ = texts("a cat", LONGER, "a cat")
    empty = states(words, encode, "")
    assert context.shape == (3, 231, 32)
    np.testing.assert_array_equal(context[0], np.concatenate([states(words, encode, "a cat"), empty, empty]))
    np.testing.assert_array_equal(context[1], texts(LONGER)[0][0])


def test_comfys_shorter_texts_are_repeated(texts):
    context, _ = texts("a cat", LONG, syntax="comfy")
    assert context.shape == (2, 154, 32)
    np.testing.assert_array_equal(context[0], np.tile(texts("a cat")[0][0], (2, 1)))


def test_prompts_of_a_batch_are_repeated(prompts, texts):
    contexts = np.asarray(at(prompts("a cat", LONG, LONGER), 0).context)
    assert contexts.shape == (3, 6 * 77, 32)
    for got, prompt, times in zip(contexts, ("a cat", LONG, LONGER), (6, 3, 2), strict=True):
        np.testing.assert_array_equal(got, np.tile(texts(prompt)[0][0], (times, 1)))


def test_prompts_that_would_be_repeated_too_often_are_lengthened(prompts, texts):
    contexts = np.asarray(at(prompts("cat " * 75 * 7, "red " * 75 * 8), 0).context)
    assert contexts.shape == (2, 8 * 77, 32)
    own = texts("cat " * 75 * 7)[0][0]
    np.testing.assert_array_equal(contexts[0], np.concatenate([own, np.repeat(own[-1:], 77, axis=0)]))


def test_prompt_and_negative_prompt_are_matched(prompts):
    positive, negative = prompts(LONG), prompts("a cat", negative=True)
    matched, other = match_tokens(positive, negative)
    np.testing.assert_array_equal(matched.contexts, positive.contexts)
    np.testing.assert_array_equal(other.contexts, np.tile(negative.contexts, (1, 2, 1)))
    np.testing.assert_array_equal(other.index, negative.index)


def test_a_repeated_context_guides_as_the_context(prompts):
    from sd_jax.models.attention import attention

    once, twice = (at(each, 0).context[:, :, None] for each in (prompts("a cat"), prompts("a cat", LONG)))
    q = jax.random.normal(jax.random.key(0), (1, 5, 1, 32))
    np.testing.assert_allclose(attention(q, once, once), attention(q, twice[:1], twice[:1]), atol=1e-5)


# -- Prompts that change, prompts of parts ---------------------------------------------------------------------------


def test_simple_prompts_are_one_text_for_all_calls(prompts, texts):
    encoded = prompts("a cat", calls=4)
    assert encoded.contexts.shape == (TABLE_ROWS, 77, 32) and encoded.pooled.shape == (TABLE_ROWS, 32)
    assert encoded.index.shape == (1, 1, 4) and encoded.weights.tolist() == [[1]] and encoded.is_single
    for call in range(4):
        got = at(encoded, call)
        np.testing.assert_array_equal(got.context, texts("a cat")[0])
        np.testing.assert_array_equal(got.pooled, texts("a cat")[1])


@pytest.mark.parametrize(
    ("prompt", "reads"),
    [
        ("a [red:blue:3] cat", ["a red cat"] * 4 + ["a blue cat"] * 2),
        ("a [red|blue] cat", ["a red cat"] * 2 + ["a blue cat", "a red cat"] * 2),
        ("a [(red:1.3)::0.5] cat", ["a (red:1.3) cat"] * 4 + ["a  cat"] * 2),
        ("a [red] cat", ["a [red] cat"] * 6),
    ],
)
def test_each_call_reads_its_text(prompts, texts, prompt, reads):
    encoded = prompts(prompt, calls=6)
    for call, text in enumerate(reads):
        np.testing.assert_array_equal(at(encoded, call).context, texts(text)[0])


def test_texts_of_one_schedule_are_followed_by_empty_prompts(prompts, texts):
    encoded = prompts(f"[a cat:{LONG}:2]", calls=5)
    want, _ = texts("a cat", LONG)
    np.testing.assert_array_equal(at(encoded, 0).context[0], want[0])
    np.testing.assert_array_equal(at(encoded, 4).context[0], want[1])


def test_second_passes_count_on(prompts, texts):
    encoded = prompts("a [red:blue:1.5] cat", calls=4, base_calls=10)
    reads = ["a red cat"] * 3 + ["a blue cat"]
    for call, text in enumerate(reads):
        np.testing.assert_array_equal(at(encoded, call).context, texts(text)[0])


def test_parts_and_their_weights(prompts, texts):
    encoded = prompts("a red cat AND a [blue|green] cat :-0.5 AND a square:2", "a cat", calls=3)
    assert encoded.parts == 3 and not encoded.is_single
    np.testing.assert_array_equal(encoded.weights, np.float32([[1, -0.5, 2], [1, 0, 0]]))
    context = np.asarray(at(encoded, 2).context)
    for row, text in enumerate(["a red cat", "a green cat", "a square", "a cat", "a cat", "a cat"]):
        np.testing.assert_array_equal(context[row], texts(text)[0][0])


def test_parts_of_unequal_length_repeat_the_last_state(prompts, texts):
    context = np.asarray(at(prompts(f"a cat AND {LONG}"), 0).context)
    own = texts("a cat")[0][0]
    np.testing.assert_array_equal(context[0], np.concatenate([own, np.repeat(own[-1:], 77, axis=0)]))
    np.testing.assert_array_equal(context[1], texts(LONG)[0][0])


def test_one_weighed_part_is_not_single(prompts):
    with pytest.warns(UserWarning, match="weighs all of it"):
        encoded = prompts("a cat:0.5")
    assert encoded.weights.tolist() == [[0.5]] and not encoded.is_single


def test_negative_prompts_are_scheduled_but_not_split(prompts, texts):
    encoded = prompts("red AND [blue:green:1] <lora:a:1>", calls=3, negative=True)
    assert encoded.parts == 1 and encoded.is_single
    np.testing.assert_array_equal(at(encoded, 0).context, texts("red AND blue <lora:a:1>")[0])
    np.testing.assert_array_equal(at(encoded, 2).context, texts("red AND green <lora:a:1>")[0])


def test_tags_that_nobody_took_are_left_out_and_told_of(prompts, texts):
    with pytest.warns(UserWarning, match="nothing applied it: <lora:a:1> <net:b>"):
        encoded = prompts("red <lora:a:1>cat<net:b>")
    np.testing.assert_array_equal(at(encoded, 0).context, texts("red cat")[0])


@pytest.mark.parametrize("syntax", ["comfy", "plain"])
def test_other_syntaxes_have_no_edits(prompts, texts, syntax):
    prompt = "[red:blue:3] AND [a|b] <lora:a:1> cat :2"
    encoded = prompts(prompt, calls=5, syntax=syntax)
    assert encoded.is_single and len(np.unique(encoded.index)) == 1
    np.testing.assert_array_equal(at(encoded, 0).context, texts(prompt, syntax=syntax)[0])


def test_zeros_are_as_long_as_the_prompt(prompts):
    for positive in (prompts("a cat AND [a|b] dog", LONG, calls=3), prompts("a cat", calls=3).replace(pooled=None)):
        zeros = positive.zeros()
        matched, same = match_tokens(positive, zeros)
        assert zeros.is_single and same.contexts.shape[1] == positive.contexts.shape[1] == matched.contexts.shape[1]
        told = at(zeros, 2)
        assert told.context.shape == (1, *positive.contexts.shape[1:]) and not told.context.any()
        assert (told.pooled is None) == (positive.pooled is None) and (told.pooled is None or not told.pooled.any())


def test_batches_repeat_pictures(prompts):
    encoded = prompts("a cat", "a red cat AND a blue cat").repeat(2)
    assert encoded.index.shape == (4, 2, 1) and encoded.weights.tolist() == [[1, 0], [1, 0], [1, 1], [1, 1]]
    assert at(encoded, 0).context.shape == (8, 77, 32)


def test_no_prompts_are_an_error(prompts):
    with pytest.raises(ValueError, match="no prompts to encode"):
        prompts()


# -- In the loop -----------------------------------------------------------------------------------------------------


def test_the_loop_picks_by_call_and_compiles_once(prompts, texts):
    compiled = []

    @jax.jit
    def loop(encoded: EncodedPrompt):
        compiled.append(encoded)

        def step(carry, call):
            return carry, at(encoded, call).context[0, 2]  # the state of the second word

        return jax.lax.scan(step, 0, jnp.arange(5, dtype=jnp.int32))[1]

    for prompt, reads in (
        ("a cat", ["a cat"] * 5),
        ("(a:1.2) cat", ["(a:1.2) cat"] * 5),
        ("a [cat:square:2]", ["a cat"] * 3 + ["a square"] * 2),
        ("a [red|blue|green|cat]", ["a red", "a red", "a blue", "a green", "a cat"]),
    ):
        want = [texts(text)[0][0, 2] for text in reads]
        np.testing.assert_allclose(loop(prompts(prompt, calls=5)), want, atol=1e-6)
    assert len(compiled) == 1


def test_guidance_by_parts_is_the_weighted_sum(prompts):
    """Eq. 3 as the loop computes it, against a loop over parts."""
    encoded = prompts("a red cat AND a blue square:0.5", "a cat")
    denoise = lambda context: context.mean(axis=1)  # noqa: E731  stands for the denoiser
    cond = denoise(at(encoded, 0).context).reshape(2, encoded.parts, -1)
    uncond, scale = jnp.full((2, 32), 0.1), 7.5
    got = uncond + scale * (jnp.asarray(encoded.weights)[:, :, None] * (cond - uncond[:, None])).sum(axis=1)
    for i, prompt in enumerate((["a red cat", "a blue square"], ["a cat"])):
        want = uncond[i]
        for weight, text in zip((1.0, 0.5), prompt, strict=False):
            want = want + weight * scale * (denoise(at(prompts(text), 0).context)[0] - uncond[i])
        np.testing.assert_allclose(got[i], want, atol=1e-5)


def test_the_table_grows_by_doubling(prompts):
    many = prompts("[" + "|".join("abcdefghij") + "]", calls=20)
    assert many.contexts.shape[0] == 16 and len(np.unique(many.index)) == 10
