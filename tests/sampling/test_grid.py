import dataclasses

import numpy as np
import pytest

from sd_jax.sampling import grid
from sd_jax.sampling.grid import Axis
from sd_jax.types import Recipe

# -- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("steps=10,20", [Axis("steps", (10, 20))]),
        (" sampler = euler , heun ; steps=4", [Axis("sampler", ("euler", "heun")), Axis("steps", (4,))]),
        ("seed=1;steps=2;eta=0.5;", [Axis("seed", (1,)), Axis("steps", (2,)), Axis("eta", (0.5,))]),
        ("eta=none,1", [Axis("eta", (None, 1.0))]),
        ("only_masked=true,False", [Axis("only_masked", (True, False))]),
        ('extend="8,0,0,0","0,0,8,0",none', [Axis("extend", ((8, 0, 0, 0), (0, 0, 8, 0), None))]),
        ('prompt="a; b=c, d",e', [Axis("prompt", ("a; b=c, d", "e"))]),
        ('prompt="say ""hi""",x', [Axis("prompt", ('say "hi"', "x"))]),
        ("negative_prompt=,blurry", [Axis("negative_prompt", ("", "blurry"))]),
        (
            "prompt_sr=cat,dog;prompt_sr=red,blue",
            [Axis("prompt_sr", ("cat", "dog")), Axis("prompt_sr", ("red", "blue"))],
        ),
        # Ranges
        ("steps=1-5", [Axis("steps", (1, 2, 3, 4, 5))]),
        ("steps=1-5 (+2)", [Axis("steps", (1, 3, 5))]),
        ("steps=1-6 (2)", [Axis("steps", (1, 3, 5))]),
        ("steps=10-1 (-3),30", [Axis("steps", (10, 7, 4, 1, 30))]),
        ("steps=3 - 1", [Axis("steps", (3, 2, 1))]),
        ("steps=1-10 [5]", [Axis("steps", (1, 3, 5, 7, 10))]),
        ("seed=-1-1", [Axis("seed", (-1, 0, 1))]),
        ("guidance_scale=1-2 (+0.25)", [Axis("guidance_scale", (1.0, 1.25, 1.5, 1.75, 2.0))]),
        ("strength=0.1-0.7 (+0.2)", [Axis("strength", (0.1, 0.3, 0.5, 0.7))]),
        ("strength=0-1 [3]", [Axis("strength", (0.0, 0.5, 1.0))]),
        ("eta=1e-1", [Axis("eta", (0.1,))]),
        ("prompt=1-5", [Axis("prompt", ("1-5",))]),
    ],
)
def test_axes(text, axes):
    assert grid.parse(text) == axes
    assert grid.from_json(grid.to_json(axes)) == axes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "0 axes"),
        ("seed=1;steps=2;eta=1;width=8", "4 axes: give 1 to 3"),
        ("samplr=euler", "'samplr' is no field of a recipe: did you mean sampler"),
        ("prompts_sr=a,b", "did you mean prompt_sr"),
        ("steps", "steps has no values"),
        ("steps=", "steps has no values"),
        ("steps=many", "grid: steps='many': a whole number is needed"),
        ("steps=1.5-3", "whole numbers are needed"),
        ("eta=x", "a number or none is needed"),
        ("only_masked=maybe", "true or false is needed"),
        ("extend=1,2,3,4", "left,top,right,bottom or none is needed"),
        ("width=none,", "width='': a whole number or none"),
        ("steps=1-5 (-1)", "holds no value"),
        ("steps=1-5 (0)", "holds no value"),
        ("steps=1-5 [0]", "holds no value"),
        ("steps=1;steps=2", "steps is there twice"),
        ("batch_size=1,2", "batch_size is no axis"),
        ("prompt_sr=,x", "nothing to look for"),
    ],
)
def test_mistakes_are_named(text, words):
    with pytest.raises(ValueError, match=r"^grid: ") as caught:
        grid.parse(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# -- The pictures ----------------------------------------------------------------------------------------------------


def test_cells_are_numbered_along_x_first():
    axes = grid.parse("seed=1,2;guidance_scale=3,4,5;eta=0.1,0.2")
    numbered = dict(grid.cells(Recipe("x"), axes))
    assert sorted(numbered) == list(range(12))
    for z, eta in enumerate((0.1, 0.2)):
        for y, scale in enumerate((3.0, 4.0, 5.0)):
            for x, seed in enumerate((1, 2)):
                expected = Recipe("x", seed=seed, guidance_scale=scale, eta=eta)
                assert numbered[x + 2 * y + 6 * z] == expected


@pytest.mark.parametrize("text", ["steps=1,2;seed=1-3;sampler=euler,heun", "seed=1-3;sampler=euler,heun;steps=1,2"])
def test_what_compiles_anew_comes_together(text):
    order = [(cell.steps, cell.sampler) for _, cell in grid.cells(Recipe("x"), grid.parse(text))]
    changes = sum(a != b for a, b in zip(order[1:], order, strict=False))
    assert len(order) == 12 and changes == 3


def test_no_guidance_compiles_anew_but_scales_do_not():
    axes = grid.parse("guidance_scale=1,2,3;seed=1,2")
    assert [number for number, _ in grid.cells(Recipe("x"), axes)] == [0, 3, 1, 2, 4, 5]


def test_search_and_replace():
    recipe = Recipe("a cat, a red cat", negative_prompt="no cat")
    cells = grid.cells(recipe, grid.parse('prompt_sr=cat,dog,"dog, asleep";prompt_sr=red,blue'))
    prompts = [cell.prompt for _, cell in cells]
    assert prompts[:3] == ["a cat, a red cat", "a dog, a red dog", "a dog, asleep, a red dog, asleep"]
    assert prompts[4] == "a dog, a blue dog" and cells[1][1].negative_prompt == "no dog"
    with pytest.raises(ValueError, match="looks for 'bird', which is in neither"):
        grid.cells(recipe, grid.parse("prompt_sr=bird,dog"))


def test_prompts_of_another_axis_are_searched():
    axes = grid.parse("prompt_sr=red,blue;prompt=a red cat,the red sea")
    assert [cell.prompt for _, cell in grid.cells(Recipe("x"), axes)] == [
        "a red cat",
        "a blue cat",
        "the red sea",
        "the blue sea",
    ]


def test_one_picture_a_cell():
    with pytest.raises(ValueError, match="batch_size=2: a cell of a grid is one picture"):
        grid.cells(Recipe("x", batch_size=2), grid.parse("steps=1,2"))


def test_labels():
    assert Axis("sampler", ("euler", "heun")).labels() == ["euler", "heun"]
    assert Axis("eta", (None, 0.1 + 0.2)).labels() == ["eta: none", "eta: 0.3"]
    assert Axis("extend", ((8, 0, 0, 0),)).labels() == ["extend: 8,0,0,0"]
    assert Axis("negative_prompt", ("", "blurry")).labels() == ["negative_prompt: none", "blurry"]
    assert Axis("prompt_sr", ("cat", "dog")).labels() == ["cat", "dog"]


def test_the_table_holds_every_picture_in_its_place():
    axes = grid.parse("seed=1,2,3;steps=4,5;eta=0,1")
    colours = np.array([(10 * i, 0, 255) for i in range(12)], np.uint8)  # none of a label's
    pixels = [np.broadcast_to(colour, (128, 128 if i else 64, 3)) for i, colour in enumerate(colours)]
    table = grid.picture(axes, pixels)
    places = [np.argwhere((table == colour).all(-1)) for colour in colours]
    assert [len(place) for place in places] == [128 * 64] + 11 * [128 * 128]
    tops, lefts = (np.array([place.min(0)[side] for place in places]).reshape(2, 2, 3) for side in (0, 1))
    assert (tops == tops[:, :, :1]).all() and (np.diff(tops, axis=1) == 134).all()  # rows
    assert (lefts == lefts[:, :1]).all() and (np.diff(lefts, axis=2) == 134).all()  # columns
    apart = np.abs(tops[1] - tops[0]) + np.abs(lefts[1] - lefts[0])
    assert (apart > 2 * 134).all() and (apart == apart[0, 0]).all()  # blocks
    assert (table[: tops.min()] < 100).any() and (table[:, : lefts.min()] < 100).any()  # labels


def test_only_names_of_fields_in_the_tables():
    names = {field.name for field in dataclasses.fields(Recipe)}
    assert {*grid._COMPILED, *grid._OPTIONS} <= names
