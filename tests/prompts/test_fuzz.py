"""Whatever is typed is read: nothing raises, and no text is lost without a warning."""

import random
import re
import time
import warnings
from collections import Counter

from sd_jax.prompts import schedule, tags
from sd_jax.prompts.weights import BREAK, SYNTAXES, parse

TOKENS = [*"()[]:|\\<>", *"()[]:|", *"abcXYZ 猫,.", *"0123456789", "-", "+", "e", "\n", "\0"]
TOKENS += [
    " AND ",
    " BREAK ",
    "AND",
    "BREAK",
    ":1.2)",
    ":3]",
    ":0.5]",
    "[a|b]",
    "[c:d:3]",
    "<lora:n:1>",
    "<lora:",
    "1e9",
]


def prompts(number, seed=0):
    rng = random.Random(seed)
    for _ in range(number):
        yield "".join(rng.choices(TOKENS, k=rng.choice((3, 6, 12, 24))))


def words(text):
    """What must not be lost: all but syntax, the numbers that it holds, and the space around BREAK and AND."""
    return re.sub(r"[()\[\]:|\\+\-.0-9e\s]|AND|BREAK", "", text)


def is_within(text, whole):
    characters = iter(whole)
    return all(character in characters for character in text)


def typed(nodes):
    """A parsed schedule as it was typed."""
    texts = []
    for node in nodes:
        if isinstance(node, schedule._Turns):
            texts.append("[" + "|".join(map(typed, node.options)) + "]")
        elif isinstance(node, schedule._Change):
            texts.append(f"[{typed(node.before)}:{typed(node.after)}:{node.when}]")
        else:
            texts.append(node)
    return "".join(texts)


def without_empty_changes(text):
    return re.sub(r"[\s:]", "", text)  # `[b:3]` and `[:b:3]` are one, and `when` has no spaces


def test_ten_thousand_random_prompts():
    begun, told = time.process_time(), Counter()
    for prompt in prompts(10_000):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for syntax in SYNTAXES:
                pieces = parse(prompt, syntax)
                text = "".join(piece.text for piece in pieces if piece != BREAK)
                assert pieces and words(text) == words(prompt), (syntax, prompt)
            text, found = tags.extract(prompt)
            assert len(text) + sum(len(tag.source) for tag in found) == len(prompt)
            parts = schedule.split_and(text)
            assert "".join(words(part) for part, _ in parts) == words(text)
            for part, _ in parts:
                nodes, parsed = schedule._parse(part)
                assert without_empty_changes(typed(nodes)) == without_empty_changes(part), part
                entries = schedule.schedule(part, 7)
                assert entries[-1][0] == 7 and all(is_within(read, part) for _, read in entries), part
                if not parsed:
                    assert entries == [(7, part)]
        for warning in caught:
            assert warning.category is UserWarning
            told[str(warning.message)[:20]] += 1
    assert len(told) >= 3  # as typed, without schedule, weighs all: the fuzz reaches them
    assert time.process_time() - begun < 10  # seconds; about 2 without the strict modes of the tests
