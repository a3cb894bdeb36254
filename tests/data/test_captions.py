import pytest

from sd_jax.data import DataError
from sd_jax.data.captions import CAPTION_KEYS, choose_key, texts_of


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


def test_a_key_that_is_there_is_taken():
    assert choose_key("label", ["text", "label"], CAPTION_KEYS, "data.caption_key", "x") == "label"


def test_usual_names_stand_for_each_other():
    assert choose_key("text", ["jpg", "txt"], CAPTION_KEYS, "data.caption_key", "x") == "txt"
    assert choose_key("text", ["jpg", "json.caption"], CAPTION_KEYS, "data.caption_key", "x") == "json.caption"


@pytest.mark.parametrize("wanted", ["text", "titel"])
def test_a_missing_key_is_an_error_that_lists_the_columns(wanted):
    with pytest.raises(DataError, match=rf"data.caption_key='{wanted}': my.csv has no such column; it has a, b"):
        choose_key(wanted, ["a", "b"], CAPTION_KEYS, "data.caption_key", "my.csv")
