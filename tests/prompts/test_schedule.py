import pytest

from sd_jax.prompts.schedule import index_of_calls, schedule, split_and


def turns(*texts, calls=10):
    return [(n + 1, texts[n % len(texts)]) for n in range(calls)]


# prompt, its (end, text) over 10 calls
OVER_10 = [
    ("", [(10, "")]),
    ("test", [(10, "test")]),
    # from:to:when
    ("a [b:c:3] d", [(3, "a b d"), (10, "a c d")]),
    ("a [b:3]", [(3, "a "), (10, "a b")]),
    ("a [:b:3]", [(3, "a "), (10, "a b")]),
    ("a [b::3]", [(3, "a b"), (10, "a ")]),
    ("a [b: 3 ]", [(3, "a "), (10, "a b")]),
    ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
    ("[:3]", [(3, ""), (10, "")]),
    ("[a:3:4]", [(4, "a"), (10, "3")]),
    # a point makes a fraction, whatever its size; without one it counts calls
    ("[a:b:0.5]", [(5, "a"), (10, "b")]),
    ("[a:b:.5]", [(5, "a"), (10, "b")]),
    ("[a:b:.5e0]", [(5, "a"), (10, "b")]),
    ("[a:b:1.0]", [(10, "a")]),
    ("[a:b:3.]", [(10, "a")]),
    ("[a:b:1e1]", [(10, "a")]),
    ("[a:b:5e-1]", [(10, "b")]),
    ("[a:b:0.29]", [(2, "a"), (10, "b")]),  # rounded down
    ("[a:b:0.04]", [(10, "b")]),
    ("[a:b:0]", [(10, "b")]),
    ("[a:b:-1]", [(10, "b")]),
    ("[a:b:-.5]", [(10, "b")]),
    ("[a:b:+3]", [(3, "a"), (10, "b")]),
    ("[a:b:30]", [(10, "a")]),
    ("[a:b:1e999]", [(10, "a")]),
    ("[a:b:-1e999]", [(10, "b")]),
    # nesting; weights stay
    ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
    ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
    ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
    ("(a [b:c:3]:1.2)", [(3, "(a b:1.2)"), (10, "(a c:1.2)")]),
    ("[a:b:3] [c:d:6]", [(3, "a c"), (6, "b c"), (10, "b d")]),
    # taking turns
    ("[a|b] c", turns("a c", "b c")),
    ("[a|(b:1.1)]", turns("a", "(b:1.1)")),
    ("[fe|]male", turns("female", "male")),
    ("[fe|||]male", turns("female", "male", "male", "male")),
    ("[|a]", turns("", "a")),
    ("[|]", turns("", "")),
    ("[[a|b]:3]", [(1, ""), (2, ""), (3, ""), *turns("a", "b")[3:]]),
    ("[[a:b:3]|c]", [(1, "a"), (2, "c"), (3, "a"), (4, "c"), *turns("b", "c")[4:]]),
    # escapes
    (r"\[a:b:3]", [(10, r"\[a:b:3]")]),
    (r"[a\:b:c:3]", [(3, r"a\:b"), (10, "c")]),
    (r"[a\|b|c]", turns(r"a\|b", "c")),
    (r"[a:b:\3]", [(10, r"[a:b:\3]")]),
    # not a schedule
    ("[a]", [(10, "[a]")]),
    ("(a)", [(10, "(a)")]),
    ("(a:1.3)", [(10, "(a:1.3)")]),
    ("[a:b:x]", [(10, "[a:b:x]")]),
    ("[a:]", [(10, "[a:]")]),
    ("[a:b:c:3]", [(10, "[a:b:c:3]")]),
    ("(a:b:3)", [(10, "(a:b:3)")]),
    ("a:b:3", [(10, "a:b:3")]),
    ("[(a:b:3]", [(10, "[(a:b:3]")]),
    ("[a (b:c:3) d:4]", [(10, "[a (b:c:3) d:4]")]),
    ("a [unbalanced", [(10, "a [unbalanced")]),
    ("[a:b:3", [(10, "[a:b:3")]),
    ("a | b", [(10, "a | b")]),
    ("a\\", [(10, "a\\")]),
    # brackets that close nothing leave the others alone
    ("[a [b:c:3]", [(3, "[a b"), (10, "[a c")]),
    ("(a [b:c:3]", [(3, "(a b"), (10, "(a c")]),
    ("[b:c:3])", [(3, "b)"), (10, "c)")]),
    ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
]

REFUSED = ["a | b [c:3]", "[(a|b):3]", "[a|b:3] [c:d:4]", "[x|y] [a:b|c:3]", "[a:b:3] \\", "[a:b:3] \\\nc"]


@pytest.mark.parametrize(("prompt", "entries"), OVER_10, ids=[row[0] for row in OVER_10])
def test_schedules_over_ten_calls(prompt, entries):
    assert schedule(prompt, 10) == entries


@pytest.mark.parametrize("prompt", [p for p in REFUSED if p != "[(a|b):3]"])
def test_a_stray_bar_or_backslash_undoes_the_schedule(prompt):
    with pytest.warns(UserWarning, match="without its schedule"):
        assert schedule(prompt, 10) == [(10, prompt)]


def test_text_without_a_schedule_needs_no_warning():
    assert schedule("[(a|b):3]", 10) == [(10, "[(a|b):3]")]


# prompt, its (end, text) in the second pass of 10 calls behind a first one of 20
SECOND_PASS = [
    ("a [b:c:0.5] d", [(10, "a c d")]),
    ("a [b:c:1.5] d", [(5, "a b d"), (10, "a c d")]),
    ("a [b:c:1.0] d", [(10, "a c d")]),
    ("a [b:c:2.0] d", [(10, "a b d")]),
    ("a [b:c:3] d", [(10, "a c d")]),
    ("a [b:c:20] d", [(10, "a c d")]),
    ("a [b:c:23] d", [(3, "a b d"), (10, "a c d")]),
    ("a [b:c:30] d", [(10, "a b d")]),
    ("[a|b]", turns("a", "b")),
]


@pytest.mark.parametrize(("prompt", "entries"), SECOND_PASS, ids=[row[0] for row in SECOND_PASS])
def test_the_second_pass_of_hires_fix_counts_on(prompt, entries):
    assert schedule(prompt, 10, base_calls=20) == entries


def reads(prompt, calls):
    entries = schedule(prompt, calls)
    return [entries[i][1] for i in index_of_calls([end for end, _ in entries], calls)]


def test_calls_count_from_nought_and_ends_are_inclusive():
    assert reads("[b:c:3]", 6) == ["b"] * 4 + ["c"] * 2
    assert reads("[a|b]", 6) == ["a", "a", "b", "a", "b", "a"]
    assert reads("[a:b:0]", 3) == ["b"] * 3
    assert reads("[a:b:5]", 6) == ["a"] * 6  # to be read it would take a seventh call
    assert reads("x", 1) == ["x"]


def test_less_than_one_call_is_an_error():
    with pytest.raises(ValueError, match="at least 1 call of the denoiser, not 0"):
        schedule("a", 0)


def test_schedules_nest_deeper_than_the_interpreter_recurses():
    assert schedule("[" * 2000 + "x" + ":3]" * 2000, 10) == [(3, ""), (10, "x")]
    assert schedule("(" * 2000 + "[a:b:3]", 10)[0] == (3, "(" * 2000 + "a")


# -- AND -------------------------------------------------------------------------------------------------------------

PARTS = [
    ("", [("", 1)]),
    ("a cat", [("a cat", 1)]),
    ("a AND b", [("a", 1), (" b", 1)]),
    ("a AND b:1.2", [("a", 1), (" b", 1.2)]),
    ("a :2 AND b: -0.5 ", [("a", 2), (" b", -0.5)]),
    ("a AND b:.5 AND c:3.", [("a", 1), (" b", 0.5), (" c", 3)]),
    ("a AND", [("a", 1), ("", 1)]),
    ("AND", [("", 1), ("", 1)]),
    ("a:1:2 AND b", [("a:1", 2), (" b", 1)]),
    ("a:1e1 AND b", [("a:1e1", 1), (" b", 1)]),
    ("a: AND b", [("a:", 1), (" b", 1)]),
    ("(a AND b:1.2) c", [("(a", 1), (" b:1.2) c", 1)]),
    ("sAND and ANDy", [("sAND and ANDy", 1)]),
    ("a\nAND\nb", [("a", 1), ("\nb", 1)]),
    ("(a:1.2)", [("(a:1.2)", 1)]),
    ("a:1", [("a", 1)]),
    ("a:" + "9" * 400 + " AND b", [("a:" + "9" * 400, 1), (" b", 1)]),
]


@pytest.mark.parametrize(("prompt", "parts"), PARTS, ids=[row[0][:30] for row in PARTS])
def test_and_splits(prompt, parts):
    assert split_and(prompt) == parts


def test_a_number_at_the_end_of_a_whole_prompt_is_told_of():
    with pytest.warns(UserWarning, match="weighs all of it by 9, as in A1111"):
        assert split_and("a television, 16:9") == [("a television, 16", 9)]
