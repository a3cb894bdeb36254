"""What prompts mean, stated by hand: (syntax, prompt, its pieces). A BREAK that ends the chunk is the piece B.

Rows marked VERBATIM do not parse: one piece of weight 1, with a warning.
"""

UP, DOWN = 1.1, 1 / 1.1
B = ("BREAK", -1.0)
VERBATIM = "verbatim"

A1111 = [
    # plain text
    ("", [("", 1)]),
    ("a red circle", [("a red circle", 1)]),
    ("a, b; c! 100% <d> {e} #f 'g'", [("a, b; c! 100% <d> {e} #f 'g'", 1)]),
    ("two\nlines", [("two\nlines", 1)]),
    # one pair
    ("(x)", [("x", UP)]),
    ("[x]", [("x", DOWN)]),
    ("(x:1.5)", [("x", 1.5)]),
    ("a (red) circle", [("a ", 1), ("red", UP), (" circle", 1)]),
    ("a star (five points)", [("a star ", 1), ("five points", UP)]),
    ("(x:0)", [("x", 0)]),
    ("(x:-1.5)", [("x", -1.5)]),
    ("(x:+.5)", [("x", 0.5)]),
    ("(x:2.)", [("x", 2)]),
    ("(x: 1.3 )", [("x", 1.3)]),
    ("(x :1.3)", [("x ", 1.3)]),
    ("()", [("", 1)]),
    ("[]", [("", 1)]),
    # nesting multiplies; a number replaces the 1.1 of its own pair
    ("((x))", [("x", UP * UP)]),
    ("[[x]]", [("x", DOWN * DOWN)]),
    ("([x])", [("x", 1)]),
    ("(a (b:1.2) c:1.5)", [("a ", 1.5), ("b", 1.8), (" c", 1.5)]),
    ("((x:1.2):1.5)", [("x", 1.8)]),
    ("((x:1.2))", [("x", 1.2 * UP)]),
    ("[(x:1.2)]", [("x", 1.2 * DOWN)]),
    ("(a[b]c)", [("a", UP), ("b", 1), ("c", UP)]),
    ("(a)(b)", [("ab", UP)]),
    ("(a:1.2)(b:1.3)", [("a", 1.2), ("b", 1.3)]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [
            ("a ", 1),
            ("house", 1.3 * UP * UP),
            (" ", UP),
            ("on", UP * DOWN),
            (" a ", UP),
            ("hill", 0.5 * UP),
            (", sun, ", UP),
            ("sky", UP**4),
            (".", UP),
        ],
    ),
    # a number weighs behind the last colon of round brackets, nowhere else
    ("x:1.2", [("x:1.2", 1)]),
    ("[x:1.2]", [("x:1.2", DOWN)]),
    ("(x:y:1.2)", [("x:y", 1.2)]),
    ("(x:1.2:1.3)", [("x:1.2", 1.3)]),
    ("(x:y)", [("x:y", UP)]),
    ("(x:1.2 y)", [("x:1.2 y", UP)]),
    ("(x:1e1)", [("x:1e1", UP)]),
    ("(x::1.3)", [("x:", 1.3)]),
    ("(:1.3)", [("", 1)]),
    ("x:1.2) y", [("x:1.2) y", 1)]),
    # escapes
    (r"\(x\)", [("(x)", 1)]),
    (r"\[x\]", [("[x]", 1)]),
    (r"a\\b", [(r"a\b", 1)]),
    (r"\\(x)", [("\\", 1), ("x", UP)]),
    (r"(x\))", [("x)", UP)]),
    (r"(a \(b\):1.3)", [("a (b)", 1.3)]),
    (r"a\b", [("ab", 1)]),
    ("a\\", [("a", 1)]),
    (r"\\\(x", [(r"\(x", 1)]),
    # not balanced
    ("(x", [("x", UP)]),
    ("(unbalanced and more", [("unbalanced and more", UP)]),
    ("a ((b", [("a ", 1), ("b", UP * UP)]),
    ("[x", [("x", DOWN)]),
    ("x)", [("x)", 1)]),
    ("x]", [("x]", 1)]),
    (")x(", [(")x", 1)]),
    ("(a]", [("a]", UP)]),
    ("[a)", [("a)", DOWN)]),
    ("(a [b) c]", [("a ", UP), ("b", UP * DOWN), (" c", DOWN)]),
    ("a (b:1.2) c)", [("a ", 1), ("b", 1.2), (" c)", 1)]),
    ("(x:1.2", [("x:1.2", UP)]),
    # BREAK
    ("a BREAK b", [("a", 1), B, ("b", 1)]),
    ("a\nBREAK\n b", [("a", 1), B, ("b", 1)]),
    ("BREAK", [("", 1), B, ("", 1)]),
    ("BREAK BREAK", [("", 1), B, ("", 1), B, ("", 1)]),
    ("(a) BREAK (b)", [("a", UP), ("", 1), B, ("", 1), ("b", UP)]),
    ("aBREAK break Break BREAKb", [("aBREAK break Break BREAKb", 1)]),
    ("(a BREAK b:1.3)", [("a", 1.3), ("BREAK", -1.3), ("b", 1.3)]),
    ("[BREAK]", [("", DOWN), ("BREAK", -DOWN), ("", DOWN)]),
    ("(a BREAK b:1)", [("a", 1), B, ("b", 1)]),
    ("a AND b", [("a AND b", 1)]),
    # not numbers
    ("(x:1.2.3)", VERBATIM),
    ("a (x:.) (b)", VERBATIM),
    ("(x:" + "9" * 400 + ")", VERBATIM),
]

COMFY = [
    ("", [("", 1)]),
    ("a red circle", [("a red circle", 1)]),
    ("(x)", [("x", UP)]),
    ("((x))", [("x", UP * UP)]),
    ("(x:1.5)", [("x", 1.5)]),
    ("a (red:1.3) circle", [("a ", 1), ("red", 1.3), (" circle", 1)]),
    # an inner number replaces what surrounds it; brackets without one multiply it
    ("(a (b:1.2) c:1.5)", [("a ", 1.5), ("b", 1.2), (" c", 1.5)]),
    ("(a (b) c:1.5)", [("a ", 1.5), ("b", 1.5 * UP), (" c", 1.5)]),
    ("((x:1.2))", [("x", 1.2)]),
    ("((x):1.1)", [("x", 1.1 * UP)]),
    ("(a)(b)", [("a", UP), ("b", UP)]),
    # square brackets, BREAK, AND and schedules are text
    ("[x]", [("[x]", 1)]),
    ("a BREAK b AND [c:d:3]", [("a BREAK b AND [c:d:3]", 1)]),
    # what float() reads is a number
    ("(x:0)", [("x", 0)]),
    ("(x:-1)", [("x", -1)]),
    ("(x:1e1)", [("x", 10)]),
    ("(x: 1.3 )", [("x", 1.3)]),
    ("(x:y:1.2)", [("x:y", 1.2)]),
    ("(x:y)", [("x:y", UP)]),
    ("(x:)", [("x:", UP)]),
    ("(x:1.2.3)", [("x:1.2.3", UP)]),
    ("(:1.3)", [(":1.3", UP)]),
    ("x:1.2", [("x:1.2", 1)]),
    ("()", [("", 1)]),
    # escapes
    (r"\(x\)", [("(x)", 1)]),
    (r"(a \(b\):1.3)", [("a (b)", 1.3)]),
    (r"\[x\] \\ y", [(r"\[x\] \\ y", 1)]),
    (r"\\(x)", [(r"\(x)", 1)]),
    # not balanced
    ("(x", [("(x", 1)]),
    ("x)", [("x)", 1)]),
    ("a (b (c:1.2) d", [("a ", 1), ("(b (c:1.2) d", 1)]),
    ("(a (b)", [("a ", UP), ("(b", UP)]),
    ("a) (b:1.2)", [("a) (b:1.2)", 1)]),
    ("(a)) b", [("a", UP), (") b", 1)]),
    # not finite
    ("(x:inf)", VERBATIM),
    ("(x:nan)", VERBATIM),
]

PLAIN = [
    ("", [("", 1)]),
    (r"a (b:1.2) [c] \( BREAK AND <lora:d:1>", [(r"a (b:1.2) [c] \( BREAK AND <lora:d:1>", 1)]),
]

ROWS = [
    (syntax, text, [(text, 1)] if pieces is VERBATIM else pieces, pieces is VERBATIM)
    for syntax, rows in (("a1111", A1111), ("comfy", COMFY), ("plain", PLAIN))
    for text, pieces in rows
]
