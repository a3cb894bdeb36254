import numpy as np
import pytest

from sd_jax.prompts.chunks import CaptionTokenizer, to_chunks
from sd_jax.prompts.weights import SYNTAXES, Piece, parse
from tests.prompts.prompt_table import ROWS, B


def ids_of(words, text):
    """Word by word, each of which is one token."""
    vocabulary = words._hf.get_vocab()
    return [vocabulary[word + "</w>"] for word in text.split()]


def chunked(words, text, positions=77, syntax="a1111"):
    """Lengths of the chunks without frame and padding, after checks of both; ids and weights."""
    ids, weights = to_chunks(parse(text, syntax), words, positions, SYNTAXES[syntax].chunking)
    assert ids.shape == weights.shape == (len(ids), positions)
    lengths = []
    for row, weight in zip(ids, weights, strict=True):
        end = list(row).index(words.eos_token_id)
        assert row[0] == words.bos_token_id and (row[end:] == words.pad_token_id).all()
        assert weight[0] == 1 and (weight[end:] == 1).all()
        lengths.append(end - 1)
    return lengths, ids, weights


@pytest.mark.filterwarnings("ignore:prompt used as it is typed")
@pytest.mark.parametrize(
    ("syntax", "text", "pieces"), [row[:3] for row in ROWS], ids=[f"{r[0]}-{r[1][:40]}" for r in ROWS]
)
def test_tokens_have_the_weights_of_the_table(words, syntax, text, pieces):
    ids, weights = to_chunks(parse(text, syntax), words, 1000, SYNTAXES[syntax].chunking)
    groups = [[]]
    for words_of_piece, weight in pieces:
        if (words_of_piece, weight) == B:
            groups.append([])
        else:
            groups[-1] += [(token, weight) for token in words.token_ids(words_of_piece)]
    if len(groups) > 1 and not groups[-1]:
        groups.pop()  # nothing after the last BREAK
    assert len(ids) == len(groups)
    for row, weight, group in zip(ids, weights, groups, strict=True):
        assert row[1 : len(group) + 1].tolist() == [token for token, _ in group]
        assert weight[1 : len(group) + 1].tolist() == pytest.approx([w for _, w in group], rel=1e-6)


def test_tokens_are_those_of_the_whole_text(words):
    ids, weights = to_chunks([Piece("a Red circle, a cat", 1.0)], words, 77)
    np.testing.assert_array_equal(ids, words(["a red circle, a cat"]))
    assert (weights == 1).all()
    assert ids[0, 1:7].tolist() == ids_of(words, "a red circle , a cat")


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_empty_prompts_are_one_chunk(words, syntax):
    lengths, ids, _ = chunked(words, "", syntax=syntax)
    assert lengths == [0]
    np.testing.assert_array_equal(ids, words([""]))


@pytest.mark.parametrize("positions", [77, 24, 9])
def test_chunks_hold_two_tokens_less_than_the_encoder_has_positions(words, positions):
    room = positions - 2
    assert chunked(words, "cat " * room, positions)[0] == [room]
    assert chunked(words, "cat " * (room + 1), positions)[0] == [room, 1]
    assert chunked(words, "cat " * 3 * room, positions)[0] == [room] * 3


# -- BREAK -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("cat BREAK cat cat", [1, 2]),
        ("cat BREAK", [1]),
        ("BREAK cat", [0, 1]),
        ("BREAK", [0]),
        ("BREAK BREAK cat", [0, 0, 1]),
        ("cat BREAK BREAK cat", [1, 0, 1]),
        ("cat " * 75 + "BREAK cat", [75, 1]),
        ("cat " * 76 + "BREAK cat", [75, 1, 1]),
    ],
)
def test_break_ends_a_chunk(words, text, lengths):
    assert chunked(words, text)[0] == lengths


def test_break_is_a_word_in_a_group_and_in_other_syntaxes(words):
    lengths, _, weights = chunked(words, "(cat BREAK cat:1.3)")
    assert len(lengths) == 1 and (weights < 0).sum() == len(words.token_ids("break"))
    assert len(chunked(words, "cat BREAK cat", syntax="comfy")[0]) == 1
    assert len(chunked(words, "(BREAK:-1) cat", syntax="comfy")[0]) == 1
    assert len(chunked(words, "cat BREAK cat", syntax="plain")[0]) == 1


# -- Long prompts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "lengths"),
    [
        # words before a comma, words after it -> lengths of the chunks
        (60, 20, [61, 20]),  # what follows the comma moves on
        (54, 30, [75, 10]),  # the comma is 21 tokens back, too far
        (55, 30, [56, 30]),  # 20 back, the furthest that counts
        (74, 5, [75, 5]),  # the comma is the last token of the chunk
        (75, 5, [75, 6]),  # the comma itself overflows: the chunk is full without it
        (60, 14, [75]),  # nothing overflows
        (60, 90, [61, 75, 15]),
    ],
)
def test_chunks_end_at_a_comma_near(words, before, after, lengths):
    text = "cat " * before + ", " + "red " * after
    got, ids, _ = chunked(words, text)
    assert got == lengths
    kept = [token for row, length in zip(ids, got, strict=True) for token in row[1 : length + 1]]
    assert kept == words.token_ids(text)


def test_a_comma_that_overflowed_does_not_count_in_its_new_chunk(words):
    assert chunked(words, "cat " * 75 + ", " + "red " * 80)[0] == [75, 75, 6]


def test_only_the_last_comma_counts(words):
    assert chunked(words, "cat , " * 37 + "red " * 3)[0] == [74, 3]


def test_weights_move_with_their_tokens(words):
    _, ids, weights = chunked(words, "cat " * 70 + ", (red:1.5) circle " + "[blue] " * 9)
    assert ids[1, 1:4].tolist() == ids_of(words, "red circle blue")
    assert weights[1, :5] == pytest.approx([1, 1.5, 1, 1 / 1.1, 1 / 1.1])
    assert (weights[0] == 1).all()


@pytest.mark.parametrize(
    ("text", "positions", "lengths"),
    [
        ("cat " * 80, 77, [75, 5]),  # a long segment is cut
        ("cat " * 70 + "(red blue green:1.2)" + " cat" * 9, 77, [75, 7]),
        ("cat " * 73 + "(red blue green:1.2)", 77, [73, 3]),  # a short one moves on whole
        ("cat " * 73 + "(red " + "blue " * 7 + ":1.2)", 77, [75, 6]),  # of 8 tokens it is long
        ("cat " * 60 + ", " + "cat " * 20, 77, [75, 6]),  # commas do not count
        ("(cat cat cat cat cat cat:1.2)", 6, [4, 2]),  # short, but longer than a chunk
    ],
)
def test_comfy_keeps_short_segments_whole(words, text, positions, lengths):
    assert chunked(words, text, positions, "comfy")[0] == lengths


def test_plain_prompts_are_chunked_as_a1111s(words):
    text = "cat " * 60 + ", " + "red " * 20
    np.testing.assert_array_equal(chunked(words, text, syntax="plain")[1], chunked(words, text)[1])


def test_other_padding_follows_the_end(words):
    from transformers import CLIPTokenizer

    from sd_jax.prompts.tokenize import Tokenizer

    theirs = CLIPTokenizer.from_pretrained(words.source, pad_token="!")  # as OpenCLIP's of SD 2 does
    ids, _ = to_chunks([Piece("a cat", 1.0)], Tokenizer(theirs, "other"), 8)
    a, cat = ids_of(words, "a cat")
    assert ids.tolist() == [[words.bos_token_id, a, cat, words.eos_token_id, 0, 0, 0, 0]]
    start, end = words.bos_token_id, words.eos_token_id
    ids = CaptionTokenizer(Tokenizer(theirs, "other"), 4, 2)(["cat"]).reshape(2, 4)
    assert ids.tolist() == [[start, cat, end, 0], [start, end, 0, 0]]


def test_an_encoder_must_have_room_for_a_word(words):
    with pytest.raises(ValueError, match="2 positions reads no words"):
        to_chunks([Piece("a", 1.0)], words, 2)


# -- Captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "cat " * 75,
        "cat " * 76,
        "cat " * 60 + ", " + "red " * 20,  # ends at the comma
        "cat " * 225,
        "cat " * 60 + ", " + "red " * 90 + "blue",
    ],
)
def test_captions_have_the_chunks_of_a_prompt(words, text):
    """And empty prompts behind them, as sampling puts behind the shorter of two texts."""
    prompt, _ = to_chunks(parse(text), words, 77)
    empty, _ = to_chunks([], words, 77)
    for chunks in range(len(prompt), 4):
        ids = CaptionTokenizer(words, 77, chunks)([text])
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids[0], np.concatenate([*prompt, *[empty[0]] * (chunks - len(prompt))]))


def test_captions_of_one_chunk_are_as_clip_was_trained(words):
    """Cut where the chunk is full, comma or not: what would move on has nowhere to go."""
    texts = ["a cat", "", "cat " * 60 + ", " + "red " * 20, "cat " * 75]
    with pytest.warns(UserWarning, match="dropped: 'red red red red red red'"):
        np.testing.assert_array_equal(CaptionTokenizer(words, 77)(texts), words(texts))


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_the_last_chunk_is_full_of_a_caption_that_is_cut(words, chunks):
    text = "cat cat cat cat , " * 9
    rows = CaptionTokenizer(words, 9, chunks)([text]).reshape(chunks, 9)
    lengths = [list(row).index(words.eos_token_id) - 1 for row in rows]
    assert lengths == [5] * (chunks - 1) + [7]  # the others end at the comma
    kept = [token for row, length in zip(rows, lengths, strict=True) for token in row[1 : length + 1]]
    assert kept == words.token_ids(text)[: len(kept)]


def test_long_captions_are_counted_and_a_few_shown(words, caplog):
    tokenize = CaptionTokenizer(words, 10, 2)
    texts = ["red " * 16 + f"square squarely{i}" for i in range(20)]
    assert tokenize(texts).shape == (20, 20) and tokenize.num_long == 20
    assert tokenize(["red " * 16]).shape == (1, 20) and tokenize.num_long == 20
    assert len(caplog.records) == 5 and "dropped 'square squarely0' of 'red red" in caplog.text
    assert "squarely4" in caplog.text and "without being shown" in caplog.text


# -- Words of several tokens -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_zorp(words):
    """Knows a word of 5 tokens."""
    return words.with_tokens({"zorp": 5})


@pytest.mark.parametrize(
    ("text", "syntax", "lengths"),
    [
        ("cat " * 70 + "zorp", "a1111", [75]),
        ("cat " * 71 + "zorp", "a1111", [71, 5]),
        ("cat " * 74 + "zorp cat", "a1111", [74, 6]),
        ("cat " * 60 + ", " + "cat " * 12 + "zorp", "a1111", [73, 5]),  # it alone moves on, not what follows the comma
        ("cat " * 72 + "zorp " * 16, "a1111", [72, 75, 5]),
        ("cat " * 72 + "zorp " + "cat " * 71, "a1111", [72, 75, 1]),
        ("cat " * 71 + "zorp", "comfy", [71, 5]),
        ("cat " * 72 + "(red zorp blue:1.2) " + "cat " * 9, "comfy", [73, 15]),
    ],
)
def test_a_word_of_several_tokens_is_not_cut_in_two(with_zorp, text, syntax, lengths):
    got, ids, _ = chunked(with_zorp, text, syntax=syntax)
    assert got == lengths
    kept = [token for row, length in zip(ids, got, strict=True) for token in row[1 : length + 1]]
    assert kept == [token for piece in parse(text, syntax) for token in with_zorp.token_ids(piece.text)]


@pytest.mark.parametrize("syntax", ["a1111", "comfy"])
def test_a_word_longer_than_a_chunk_is_cut(words, syntax):
    knows = words.with_tokens({"zorp": 12})
    assert sum(chunked(knows, "cat zorp", 9, syntax)[0]) == 13
    assert chunked(knows, "zorp", 9, syntax)[0] == [7, 5]


def test_captions_end_before_a_word_that_would_be_cut(with_zorp):
    texts = ["cat " * 4 + "zorp", "cat " * 2 + "zorp", "zorp cat cat zorp"]
    ids = CaptionTokenizer(with_zorp, 9)(texts)
    cat, zorp = with_zorp.token_ids("cat"), with_zorp.token_ids("zorp")
    rows = [cat * 4, cat * 2 + zorp, zorp + cat * 2]
    for row, kept in zip(ids, rows, strict=True):
        assert row[1 : len(kept) + 2].tolist() == [*kept, with_zorp.eos_token_id]
    two = CaptionTokenizer(with_zorp, 9, 2)(texts[:1]).reshape(2, 9)
    assert two[1, 1:7].tolist() == [*zorp, with_zorp.eos_token_id]
