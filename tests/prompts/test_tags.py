import pytest

from sd_jax.prompts.tags import Tag, extract

ROWS = [
    # prompt, what is left of it, (kind, name, text encoder, U-Net)
    ("a cat", "a cat", []),
    ("a cat <lora:pixel>", "a cat ", [("lora", "pixel", 1, 1)]),
    ("a<lora:pixel:0.8>b", "ab", [("lora", "pixel", 0.8, 0.8)]),
    ("<lora:pixel:0.8:0.5>", "", [("lora", "pixel", 0.8, 0.5)]),
    ("<lora:pixel:-1>", "", [("lora", "pixel", -1, -1)]),
    ("<lora:pixel:te=0.3:unet=0.6>", "", [("lora", "pixel", 0.3, 0.6)]),
    ("<lora:pixel:0.7:unet=0.2>", "", [("lora", "pixel", 0.7, 0.2)]),
    ("<lora:pixel:te=0.4>", "", [("lora", "pixel", 0.4, 0.4)]),
    ("<lyco:pixel:0.5>", "", [("lora", "pixel", 0.5, 0.5)]),
    ("<hypernet:anime:0.4>", "", [("hypernet", "anime", 0.4, 0.4)]),
    ("<lora:one:1><lora:two:2> a", " a", [("lora", "one", 1, 1), ("lora", "two", 2, 2)]),
    ("<lora:my file v1.2 (new):1>", "", [("lora", "my file v1.2 (new)", 1, 1)]),
    ("<net:arg:x:y>", "", [("net", "arg", 1, 1)]),
    # not tags
    ("a < b and c > d", "a < b and c > d", []),
    ("<lora>", "<lora>", []),
    ("<lora:>", "<lora:>", []),
    ("<lora:open", "<lora:open", []),
    ("< lora:x:1>", "< lora:x:1>", []),
    ("3 <4:5", "3 <4:5", []),
    ("<>", "<>", []),
]


@pytest.mark.parametrize(("prompt", "left", "found"), ROWS, ids=[row[0] for row in ROWS])
def test_tags_are_taken_out(prompt, left, found):
    text, tags = extract(prompt)
    assert text == left
    assert [(tag.kind, tag.name, tag.text_weight, tag.unet_weight) for tag in tags] == found


def test_tags_keep_what_was_typed():
    assert extract("<net:arg:x:k=1>")[1] == [Tag("net", "arg", 1.0, 1.0, ("x", "k=1"), "<net:arg:x:k=1>")]
    assert extract("<lyco:a:1:2:16>")[1][0].arguments == ("1", "2", "16")


@pytest.mark.parametrize("tag", ["<lora:a:b>", "<lora:a:>", "<lora:a:1:b>", "<lora:a:inf>", "<hypernet:a:1,5>"])
def test_weights_that_are_no_numbers_leave_the_tag_in_the_text(tag):
    with pytest.warns(UserWarning, match=f"{tag} stays in the prompt"):
        text, tags = extract(f"x {tag} <lora:b:1>")
    assert text == f"x {tag} " and [t.name for t in tags] == ["b"]
