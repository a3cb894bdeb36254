import contextlib

import pytest

from sd_jax.prompts.weights import BREAK, SYNTAXES, Piece, parse
from tests.prompts.prompt_table import ROWS, B


@pytest.mark.parametrize(("syntax", "text", "pieces", "verbatim"), ROWS, ids=[f"{r[0]}-{r[1][:40]}" for r in ROWS])
def test_prompts_mean_what_the_table_says(syntax, text, pieces, verbatim):
    with pytest.warns(UserWarning, match="used as it is typed") if verbatim else contextlib.nullcontext():
        got = parse(text, syntax)
    assert [piece.text for piece in got] == [words for words, _ in pieces]
    assert [piece.weight for piece in got] == pytest.approx([weight for _, weight in pieces], rel=1e-12)
    assert [piece == BREAK for piece in got] == [piece == B for piece in pieces]


def test_the_table_is_large():
    assert len(ROWS) >= 60 and {row[0] for row in ROWS} == set(SYNTAXES)


def test_a1111_is_the_default():
    assert parse("[x]") == parse("[x]", "a1111") != parse("[x]", "comfy")


def test_unknown_syntaxes_name_the_nearest():
    with pytest.raises(ValueError, match="prompt_syntax='comfyui' is unknown: did you mean comfy"):
        parse("x", "comfyui")
    with pytest.raises(ValueError, match="use one of a1111, comfy, plain"):
        parse("x", "zzz")


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("bracket", ["(", "[", ")", "]"])
def test_brackets_nest_deeper_than_the_interpreter_recurses(syntax, bracket):
    assert parse(bracket * 2000 + "x", syntax)[-1].text.endswith("x")


def test_groups_nest_deeper_than_the_interpreter_recurses():
    assert parse("(" * 1500 + "x:2" + ")" * 1500, "comfy") == [Piece("x", 2.0)]
    assert parse("(" * 1500 + "x" + ":1)" * 1500) == [Piece("x", 1.0)]
