import collections
import re

import numpy as np
import pytest

from sd_jax import config as configs
from sd_jax.data import DataError
from sd_jax.data.captions import CAPTION_KEYS, check, choose, choose_key, choose_keys, texts_of

DRAWS = 4000


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (None, ()),
        ("", ()),
        (" \n ", ()),
        (" a  cat\n on a mat\n", ("a cat on a mat",)),
        (b"\xef\xbb\xbfcaf\xc3\xa9", ("café",)),
        (b"broken \xff byte", ("broken \ufffd byte",)),
        (["a", "", None, ["b"]], ("a", "b")),
        (7, ("7",)),
    ],
)
def test_texts_of_anything(value, texts):
    assert texts_of(value) == texts


# -- Columns ---------------------------------------------------------------------------------------------------------


def test_a_key_that_is_there_is_taken():
    assert choose_key("label", ["text", "label"], CAPTION_KEYS, "data.caption_key", "x") == "label"


def test_usual_names_stand_for_each_other():
    assert choose_key("text", ["jpg", "txt"], CAPTION_KEYS, "data.caption_key", "x") == "txt"
    assert choose_key("text", ["jpg", "json.caption"], CAPTION_KEYS, "data.caption_key", "x") == "json.caption"


@pytest.mark.parametrize("wanted", ["text", "titel"])
def test_a_missing_key_is_an_error_that_lists_the_columns(wanted):
    with pytest.raises(DataError, match=rf"data.caption_key='{wanted}': my.csv has no such column; it has a, b"):
        choose_key(wanted, ["a", "b"], CAPTION_KEYS, "data.caption_key", "my.csv")


def test_several_keys_are_several_columns():
    columns = iter(["text", "jpg", "blip", "json.long"])
    keys = lambda wanted, columns: choose_keys(wanted, columns, CAPTION_KEYS, "data.caption_key", "x")  # noqa: E731
    assert keys(" blip, text,json.long ", columns) == ("blip", "text", "json.long")
    assert keys("text", ["txt"]) == ("txt",) and keys("", ["txt"]) == ()
    with pytest.raises(DataError, match="data.caption_key='text': x has no such column; it has txt, blip"):
        keys("text,blip", ["txt", "blip"])  # among several, a name means itself


# -- The caption of an example ---------------------------------------------------------------------------------------


def data_of(**keys):
    data = configs.training_defaults("full").data
    data.update(keys)
    return data


def test_nothing_random_gives_the_first_caption_as_it_is():
    data = data_of(caption_key="a,b,c", tag_separator=",", shuffle_tags=True, tag_dropout=0.5)
    assert choose(((), ("x,  y , z", "other"), ("third",)), data) == "x,  y , z"
    assert choose(((), (), ()), data) == choose((), data) == ""
    assert choose((("first",), ("second",), ()), data_of(caption_key="a,b,c", caption_weights=(0, 1, 1))) == "second"


def test_a_caption_that_is_alone_takes_no_draw():
    """So that reading one column costs no randomness: crops and flips stay where they were."""
    rng = np.random.default_rng(0)
    assert choose((("a cat",), ()), data_of(caption_key="a,b"), rng) == "a cat"
    assert rng.random() == np.random.default_rng(0).random()


def drawn(fields, data):
    rng = np.random.default_rng(7)
    return collections.Counter(choose(fields, data, rng) for _ in range(DRAWS))


def assert_shares(counts, shares):
    """Pearson's chi-square below its 99.9% quantile for up to 5 degrees of freedom (20.5)."""
    assert set(counts) == set(shares)
    expected = {text: DRAWS * share / sum(shares.values()) for text, share in shares.items()}
    assert sum((counts[text] - n) ** 2 / n for text, n in expected.items()) < 20.5


def test_columns_are_drawn_by_their_weights_and_captions_evenly():
    data = data_of(caption_key="a,b,c,d", caption_weights=(1, 3, 4, 0))
    full = (("a",), ("b",), ("c1", "c2"), ("d",))
    assert_shares(drawn(full, data), {"a": 1, "b": 3, "c1": 2, "c2": 2})
    assert_shares(drawn((full[0], (), *full[2:]), data), {"a": 1, "c1": 2, "c2": 2})  # an empty one is passed over
    assert drawn(((), (), (), ("d",)), data) == {"": DRAWS}  # nothing reads it
    assert_shares(drawn(full, data_of(caption_key="a,b,c,d")), {"a": 2, "b": 2, "c1": 1, "c2": 1, "d": 2})


def test_a_source_with_fewer_columns_reads_those():
    data = data_of(caption_key="a,b", caption_weights=(1, 9))
    assert drawn((("a",),), data) == {"a": DRAWS}


# -- Tags ------------------------------------------------------------------------------------------------------------


def test_kept_tags_stay_and_the_others_are_shuffled():
    data = data_of(tag_separator=",", keep_tags=2, shuffle_tags=True)
    counts = drawn((("1girl, solo, hat, red dress, , smile",),), data)
    orders = ["hat, red dress, smile", "hat, smile, red dress", "red dress, hat, smile"]
    orders += ["red dress, smile, hat", "smile, hat, red dress", "smile, red dress, hat"]
    assert_shares(counts, {f"1girl, solo, {order}": 1 for order in orders})


def test_tags_are_left_out_one_by_one_and_keep_their_order():
    data = data_of(tag_separator=",", keep_tags=1, tag_dropout=0.25)
    counts = drawn((("a, b, c",),), data)
    assert_shares(counts, {"a, b, c": 9, "a, b": 3, "a, c": 3, "a": 1})
    assert drawn((("b",),), data_of(tag_separator=",", tag_dropout=0.25))[""] == pytest.approx(DRAWS / 4, rel=0.1)


@pytest.mark.parametrize(
    ("separator", "text", "reversed_text"),
    [(",", "a,b", "b,a"), (",", "a, b", "b, a"), ("|", "a |b", "b |a"), (".", "a. b.", "b. a"), (",", "a b", "a b")],
)
def test_tags_are_parted_as_they_were(separator, text, reversed_text):
    counts = drawn(((text,),), data_of(tag_separator=separator, shuffle_tags=True))
    assert reversed_text in counts and len(counts) <= 2


# -- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"caption_weights": (1, 2)}, "config.data.caption_weights=(1, 2) are 2 for the 1 columns"),
        ({"caption_key": "a,b", "caption_weights": (1,)}, "config.data.caption_key='a,b': give one for each, or none"),
        ({"caption_key": "a,b", "caption_weights": (1, -1)}, "config.data.caption_weights=(1, -1): give numbers"),
        ({"caption_key": "a,b", "caption_weights": (0, 0)}, "not all of them 0"),
        ({"caption_weights": (float("nan"),)}, "config.data.caption_weights="),
        ({"keep_tags": -1}, "config.data.keep_tags=-1"),
        ({"tag_dropout": 1.0}, "config.data.tag_dropout=1.0: give a share from 0 on and below 1"),
        ({"tag_dropout": -0.1}, "config.data.tag_dropout=-0.1"),
        ({"tag_dropout": 0.1}, "config.data.tag_dropout=0.1 needs config.data.tag_separator"),
        ({"shuffle_tags": True}, "config.data.shuffle_tags=True needs config.data.tag_separator"),
        ({"keep_tags": 1}, "config.data.keep_tags=1 needs config.data.tag_separator"),
    ],
)
def test_what_cannot_be_chosen_is_refused_by_name(keys, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(data_of(**keys))


def test_what_can_be_chosen_passes():
    check(data_of())
    check(data_of(caption_key="a,b", caption_weights=(0, 2.5), tag_separator=",", keep_tags=1, tag_dropout=0.5))
    check(data_of(caption_key="", shuffle_tags=True, tag_separator=","))
